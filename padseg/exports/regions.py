"""What all converters of a run share: a picture with its label map, the location of its files, and its regions one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from padseg.images import Reading

if TYPE_CHECKING:
    from padseg.types import Array


REGION = 'region'  # name of regions without a class


class LabelledPicture(NamedTuple):
    """A finished picture. number: its position in name order, from 1; name: POSIX path below the pictures; labels: (H, W), 0 for none."""

    number: int
    name: str
    sha256: str | None
    labels: Array


class Place(NamedTuple):
    """Where and what to export. folder: for the output; own: whether it is inside the run's; images: folder of the pictures.

    reading: how the run read the pictures; names: of all finished pictures; classes: class names by region number from 1, empty if regions
    have no classes.
    """

    folder: Path
    own: bool
    images: Path
    reading: Reading
    names: tuple[str, ...]
    made_by: dict[str, str | None]
    classes: tuple[str, ...] = ()

    @property
    def categories(self) -> tuple[str, ...]:
        """Category names of regions; a single one if there are no classes."""
        return self.classes or (REGION,)

    def category(self, region: Region) -> int:
        """Number of a region's category, from 1."""
        return region.number if self.classes else 1

    def name(self, region: Region) -> str:
        return self.categories[self.category(region) - 1]


Add = Callable[[LabelledPicture], None]


class Region(NamedTuple):
    """number: in the label map; box: left, top, width, height in pixels; mask: (H, W) bool over the whole picture."""

    number: int
    box: tuple[int, int, int, int]
    area: int
    mask: Array

    @property
    def patch(self) -> Array:
        """The mask cropped to the box, (height, width) bool."""
        left, top, width, height = self.box
        return self.mask[top : top + height, left : left + width]


def each_region(labels: Array) -> Iterator[Region]:
    """Yield the regions of a label map (H, W) by number, with one mask in memory at a time; 0, unassigned, is not a region."""
    for number in np.unique(labels[labels > 0]).tolist():
        mask = labels == number  # (H, W)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top = int(columns[0]), int(rows[0])
        box = (left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)
        yield Region(number, box, int(np.count_nonzero(mask)), mask)
