"""Ground truth of one split of a data set: find its pictures, read their labels, and map them to classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from padseg.datasets.base import Sample
from padseg.datasets.readers import READERS
from padseg.datasets.segments import segment_picture
from padseg.datasets.tables import LISTED, UNDECLARED, Table, declared, histogram, histogram_text, look_up
from padseg.errors import UsageError
from padseg.images import Reading, decode_apart

if TYPE_CHECKING:
    from padseg.types import Array, Image


class Dataset(NamedTuple):
    """A split found on disk. classes: names of the scored classes, empty for regions without classes; background: number of that class.

    layout: description of the layout found. table: the class of each raw value. reader: key of READERS; annotations: the JSON file that it
    needs. pictures: the published number; missing: how many were left out because a file is missing. A Dataset holds nothing large and can
    be sent to worker processes.
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
        """Read the raw labels of every annotator, (H, W) integers >= 0. Raises UnreadableLabels with the file and the reason."""
        return READERS[self.reader](sample, self.annotations or self.root)

    def picture(self, sample: Sample) -> Image:
        """Decode the sample's picture, (H, W, 3). Raises ImageError, OSError, or UnreadableLabels for one in a file of labels."""
        if self.reader == 'segments':
            return segment_picture(sample, self.annotations or self.root)
        assert sample.image is not None
        return decode_apart(sample.image, Reading()).image

    def to_classes(self, raw: Array) -> Array:
        """Map raw values (H, W) to classes 0..n-1 and VOID, int32; regions without classes stay unchanged.

        Raises UsageError, with the histogram, for a value that the data set does not declare.
        """
        if self.table is None:
            return raw
        classes = look_up(raw, self.table)
        if classes is None:
            counts = histogram(raw)
            strange = [value for value in counts if value not in range(len(self.table)) or self.table[value] == UNDECLARED]
            raise UsageError(
                f'labels {", ".join(map(str, strange[:LISTED]))} are not labels of {self.name} ({len(self.classes)} classes; '
                f'declared: {declared(self.table)}); pixels of each value: {histogram_text(counts)}'
            )
        return classes
