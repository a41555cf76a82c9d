"""Ground truth of one split of a data set: its pictures, reading their labels, and turning these into classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from padseg.datasets.base import Sample
from padseg.datasets.readers import READERS
from padseg.datasets.tables import LISTED, UNDECLARED, Table, declared, histogram, histogram_text, look_up
from padseg.errors import UsageError

if TYPE_CHECKING:
    from padseg.types import Array


class Dataset(NamedTuple):
    """A split found on disk. classes: names of the scored classes, none for regions without classes; background: which of them it is.

    layout: the one that was found, in words. table: the class of each raw value. reader: key of READERS; annotations: the JSON file
    that it needs. pictures: how many are published; missing: how many were left out for want of a file. Nothing large is in it, so
    it can go to worker processes.
    """

    name: str
    classes: tuple[str, ...]
    background: int | None
    split: str
    layout: str
    root: Path
    samples: tuple[Sample, ...]
    table: Table | None
    reader: str = 'png'
    annotations: Path | None = None
    pictures: int | None = None
    missing: int = 0

    def read(self, sample: Sample) -> tuple[Array, ...]:
        """Raw values of every annotator, (H, W) integers >= 0. Raises UnreadableLabels with the file and the reason."""
        return READERS[self.reader](sample, self.annotations or self.root)

    def to_classes(self, raw: Array) -> Array:
        """Raw values (H, W) as classes 0..n-1 and VOID, int32; regions without classes stay as they are.

        Raises UsageError with the histogram if a value is none that the data set declares.
        """
        if self.table is None:
            return raw
        classes = look_up(raw, self.table)
        if classes is None:
            counts = histogram(raw)
            strange = [value for value in counts if value not in range(len(self.table)) or self.table[value] == UNDECLARED]
            raise UsageError(
                f'labels {", ".join(map(str, strange[:LISTED]))} are none of {self.name} ({len(self.classes)} classes; declared are '
                f'{declared(self.table)}); values and their pixels: {histogram_text(counts)}'
            )
        return classes
