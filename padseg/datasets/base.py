"""What a data set is made of: its row, the ways its files lie on disk, one picture with its labels, and what can be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from padseg.errors import NoImages
from padseg.system.text import printable

VOID = -1  # a pixel that belongs to no class and does not count
SHOWN = 5  # names that a message lists


class LayoutError(NoImages):
    """The files of a data set do not lie as expected, or some are missing."""


class Sample(NamedTuple):
    """One picture. name: its POSIX path below the folder of pictures, without suffix; truths: files of its labels, one an annotator
    unless a file holds those of all; image: None in a folder of labels alone."""

    name: str
    image: Path | None
    truths: tuple[Path, ...]


class Split(NamedTuple):
    """folder: its name on disk; ids: the list in this package that names its pictures; pictures: how many are published.

    exact: without a list, another number of pictures than published is an error.
    """

    folder: str
    ids: str = ''
    pictures: int | None = None
    exact: bool = False


class Layout(NamedTuple):
    """One way the files lie. Paths are below a home, {split} is the split's folder; of several paths the first that exists is taken.

    homes: folders that the files are usually in. With 'a/b' the root may be b, hold b, or hold a/b. images, labels: folders of files
    <name><end>, image_end '' for any picture; a file of labels that ends in one of `beside` is something else. values: which of the
    row's tables the numbers in the files mean. listing: a text file with one name a line; annotations: a JSON file that holds or explains
    the labels; annotators: x_0.png, x_1.png … are the labels of one picture x; splits: those that have this layout, all if empty.
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
    """A data set. title: in words; facts: the JSON file of this package with its names and tables, '' = regions without classes.

    background: whether it is scored as the 'first' or the 'last' class, or not at all.
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
