"""Check what a data set on disk holds, without a model: sizes, label values and their classes, and every faulty file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from padseg import images
from padseg.datasets.base import VOID, Sample
from padseg.datasets.dataset import Dataset
from padseg.datasets.tables import UNDECLARED, histogram
from padseg.errors import UnreadableLabels

IGNORED = 'ignored'
OUT_OF_RANGE = 'out of range'
REGION = 'region'

Size = tuple[int, int]  # height, width in pixels


class ValueCount(NamedTuple):
    """A raw label value. pixels, files: how many have it; number, name: the class it maps to, number None for no class.

    name is 'ignored', 'out of range' or 'region' for values without a class.
    """

    value: int
    pixels: int
    files: int
    number: int | None
    name: str


class Problem(NamedTuple):
    """An unusable file, and the reason."""

    sample: str
    path: Path
    reason: str


class Check(NamedTuple):
    """The result of a check. pictures: in the split; published: the official number, if known; labels: number of label maps read.

    smallest, largest: picture sizes by area; sizes: number of different sizes; values: histogram over the data set, of region numbers if
    there are no classes; empty: pictures in which no pixel counts; unreadable, different: files that cannot be read, and labels that differ
    in size from their picture.
    """

    name: str
    split: str
    layout: str
    root: Path
    classes: int
    pictures: int
    published: int | None
    labels: int
    smallest: Size | None
    largest: Size | None
    sizes: int
    values: tuple[ValueCount, ...]
    empty: tuple[str, ...]
    unreadable: tuple[Problem, ...]
    different: tuple[Problem, ...]

    @property
    def out_of_range(self) -> tuple[ValueCount, ...]:
        """The values that the data set does not declare."""
        return tuple(value for value in self.values if value.name == OUT_OF_RANGE)

    @property
    def good(self) -> bool:
        """Whether the data set can be evaluated as it is."""
        return not (self.out_of_range or self.unreadable or self.different)

    def as_dict(self) -> dict[str, Any]:
        """Return the check as JSON-serialisable values."""
        plain = {**self._asdict(), 'root': str(self.root), 'out_of_range': self.out_of_range, 'good': self.good}
        for field in ('values', 'out_of_range'):
            plain[field] = [value._asdict() for value in plain[field]]
        for field in ('unreadable', 'different'):
            plain[field] = [{**problem._asdict(), 'path': str(problem.path)} for problem in plain[field]]
        return plain


class Look(NamedTuple):
    """Findings for one picture. size: of the picture, or of its labels if there is no picture; counts: one histogram per annotator."""

    name: str
    size: Size | None
    counts: tuple[dict[int, int], ...]
    unreadable: tuple[Problem, ...]
    different: tuple[Problem, ...]


def check_dataset(dataset: Dataset, samples: Iterable[Sample] | None = None) -> Check:
    """Read all pictures and labels once. samples: the data set's samples, possibly wrapped to report progress."""
    looks = [look(dataset, sample) for sample in (dataset.samples if samples is None else samples)]
    sizes = sorted({look.size for look in looks if look.size}, key=lambda size: (size[0] * size[1], size))
    pixels: Counter[int] = Counter()
    in_files: Counter[int] = Counter()
    for counts in (counts for look in looks for counts in look.counts):
        pixels.update(counts)
        in_files.update(counts.keys())
    return Check(
        name=dataset.name,
        split=dataset.split,
        layout=dataset.layout,
        root=dataset.root,
        classes=len(dataset.classes),
        pictures=len(looks),
        published=dataset.pictures,
        labels=sum(len(look.counts) for look in looks),
        smallest=sizes[0] if sizes else None,
        largest=sizes[-1] if sizes else None,
        sizes=len(sizes),
        values=tuple(ValueCount(value, pixels[value], in_files[value], *class_of(dataset, value)) for value in sorted(pixels)),
        empty=tuple(look.name for look in looks if is_empty(dataset, look)),
        unreadable=tuple(problem for look in looks for problem in look.unreadable),
        different=tuple(problem for look in looks for problem in look.different),
    )


def look(dataset: Dataset, sample: Sample) -> Look:
    """Read one picture and its labels."""
    size, unreadable = None, []
    if sample.image is not None:
        try:
            height, width, _ = dataset.picture(sample).shape
            size = height, width
        except (images.ImageError, UnreadableLabels, OSError) as error:
            unreadable.append(Problem(sample.name, sample.image, str(error)))
    try:
        truths = dataset.read(sample)
    except UnreadableLabels as error:
        return Look(sample.name, size, (), (*unreadable, Problem(sample.name, error.path, error.reason)), ())
    height, width = size or truths[0].shape
    paths = sample.truths if len(sample.truths) == len(truths) else sample.truths * len(truths)  # one file may hold all annotators
    different = [
        Problem(sample.name, path, f'{truth.shape} (height, width); the picture has {(height, width)}')
        for path, truth in zip(paths, truths, strict=True)
        if truth.shape != (height, width)
    ]
    return Look(sample.name, (height, width), tuple(map(histogram, truths)), tuple(unreadable), tuple(different))


def class_of(dataset: Dataset, value: int) -> tuple[int | None, str]:
    """Number and name of the class that a raw value maps to; without a class, None and the reason."""
    if dataset.table is None:
        return None, REGION
    number = dataset.table[value] if value < len(dataset.table) else UNDECLARED
    if number in (VOID, UNDECLARED):
        return None, IGNORED if number == VOID else OUT_OF_RANGE
    return number, dataset.classes[number]


def is_empty(dataset: Dataset, look: Look) -> bool:
    """Return whether none of a picture's pixels counts."""
    return bool(look.counts) and all(class_of(dataset, value)[1] == IGNORED for counts in look.counts for value in counts)
