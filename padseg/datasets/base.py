"""What a data set consists of: its row, its possible layouts on disk, a picture with its labels, and the errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from padseg.errors import NoImages
from padseg.system.text import printable

VOID = -1  # pixels that belong to no class and do not count
SHOWN = 5  # names listed in a message


class LayoutError(NoImages):
    """The files of a data set are not laid out as expected, or some are missing."""


class LayoutShown(LayoutError):
    """One whose message shows on lines of its own what is expected."""

    several_lines = True


class Sample(NamedTuple):
    """One picture. name: its POSIX path below the folder of pictures, without suffix; image: None in a folder that holds only labels.

    truths: its label files, one per annotator unless a single file holds the labels of all annotators.
    """

    name: str
    image: Path | None
    truths: tuple[Path, ...]


class Split(NamedTuple):
    """folder: the split's name on disk; ids: list in this package that names its pictures; pictures: the published number.

    exact: without a list, any number of pictures other than the published one is an error.
    """

    folder: str
    ids: str = ''
    pictures: int | None = None
    exact: bool = False


class Layout(NamedTuple):
    """One way to lay out the files. Paths are below a home; {split} is the split's folder; of several paths the first that exists is used.

    homes: the folders that usually hold the files. With 'a/b' the root may be b, hold b, or hold a/b. images, labels: folders of files
    <name><end>, with image_end '' for any picture format; label files whose names end in one of `beside` are something else. values: which
    of the row's tables the numbers in the files use. listing: a text file with one name per line; annotations: a JSON file that holds or
    explains the labels; annotators: x_0.png, x_1.png … are labels of the same picture x; splits: the ones with this layout, all if empty.
    """

    name: str
    homes: tuple[str, ...]
    images: tuple[str, ...]
    labels: tuple[str, ...]
    values: str = 'index'
    reader: str = 'png'
    image_end: str = ''
    label_end: str = '.png'
    beside: tuple[str, ...] = ()
    listing: str = ''
    annotations: tuple[str, ...] = ()
    annotators: bool = False
    splits: tuple[str, ...] = ()


class DatasetRow(NamedTuple):
    """A data set. title: a short description; facts: JSON file in this package with its names and tables, '' for regions without classes.

    background: scored as the 'first' or 'last' class, or None if it is not scored.
    """

    title: str
    facts: str
    splits: Mapping[str, Split]
    layouts: tuple[Layout, ...]
    background: str | None = None


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = [printable(name) for name in names]
    more = f' and {len(listed) - SHOWN} more' if len(listed) > SHOWN else ''
    return ', '.join(listed[:SHOWN]) + more
