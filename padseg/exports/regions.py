"""What the converters of a whole run share: a picture with its label map, where its files are, and its regions one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from padseg.images import Reading

if TYPE_CHECKING:
    from padseg.types import Array


REGION = 'region'  # the name of all that have none


class LabelledPicture(NamedTuple):
    """A done picture. number: its place in name order, from 1; name: its POSIX path below the pictures; labels: (H, W), 0 = unassigned;
    pixels: of the picture in its file, of which more than that were never decoded."""

    number: int
    name: str
    sha256: str | None
    labels: Array
    pixels: int


class Place(NamedTuple):
    """folder: where the files go; own: it lies inside the run's; images: folder of the pictures, reading: how the run read them;
    names: of all done ones. classes: names of the regions' classes, by their number from 1; none if regions have no names."""

    folder: Path
    own: bool
    images: Path
    reading: Reading
    names: tuple[str, ...]
    made_by: dict[str, str | None]
    classes: tuple[str, ...] = ()

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories of regions; without classes there is only one."""
        return self.classes or (REGION,)

    def category(self, region: Region) -> int:
        """The number of a region's category, from 1."""
        return region.number if self.classes else 1

    def name(self, region: Region) -> str:
        return self.categories[self.category(region) - 1]


Add = Callable[[LabelledPicture], None]


class Region(NamedTuple):
    """number: in the label map; box: left, top, width, height in pixels; mask: (H, W) bool of the whole picture."""

    number: int
    box: tuple[int, int, int, int]
    area: int
    mask: Array

    @property
    def patch(self) -> Array:
        """The part of the mask that the box holds, (height, width) bool."""
        left, top, width, height = self.box
        return self.mask[top : top + height, left : left + width]


def each_region(labels: Array) -> Iterator[Region]:
    """The regions of a label map (H, W) by number, one mask in memory at a time; unassigned pixels, 0, are no region."""
    for number in np.unique(labels[labels > 0]).tolist():
        mask = labels == number  # (H, W)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top = int(columns[0]), int(rows[0])
        box = (left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)
        yield Region(number, box, int(np.count_nonzero(mask)), mask)
