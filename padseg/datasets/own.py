"""The user's own pictures and labels: a folder described by a padseg.toml in it, or a folder of label maps alone."""

from __future__ import annotations

import sys
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from padseg.datasets.base import VOID, Layout, LayoutError, LayoutShown, Sample, Split
from padseg.datasets.dataset import Dataset
from padseg.datasets.layouts import by_annotator, files_below, find_place, in_split, picture_name, samples, unique
from padseg.datasets.rows import DATASETS, FOLDER
from padseg.datasets.tables import DENSE, UNDECLARED, Table
from padseg.errors import UsageError
from padseg.images import ImageError, contents
from padseg.system.text import printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = 'padseg.toml'
EXAMPLE = "num_classes = 3\nignore_index = 255\nimages = 'images'\nlabels = 'labels'"
DEFAULT_SPLIT = 'val'

Value = Annotated[int, Field(ge=0, lt=DENSE)]


class Suffixes(BaseModel):
    """Endings of picture and label file names; the rest of the name must match. images: '' for any picture format."""

    model_config = ConfigDict(extra='forbid', strict=True)

    images: str = ''
    labels: Annotated[str, Field(pattern=r'\.png$')] = '.png'


class FolderSettings(BaseModel):
    """padseg.toml. Without num_classes and classes, labels are regions without classes, and x_0.png, x_1.png are labels of the same picture
    x.

    classes: class names; ignore_index: file value that does not count; background: name or number of a class; reduce_zero_label: 0 does not
    count and 1 is class 0; images, labels: folders, whose paths contain {split} or which hold one folder per split.
    """

    model_config = ConfigDict(extra='forbid', strict=True, frozen=True)

    num_classes: Annotated[int, Field(ge=1, le=DENSE)] | None = None
    classes: Annotated[list[str], Field(min_length=1)] | None = None
    ignore_index: Value | None = 255
    background: int | str | None = None
    reduce_zero_label: bool = False
    images: str | None = None
    labels: str | None = None
    suffixes: Suffixes = Suffixes()


def open_folder(root: Path, split: str | None, settings: FolderSettings, allow_missing: bool = False) -> Dataset:
    """Open pictures and labels below `root`, in the subfolders named by `split`; by default in those named val if there are any, else in
    all.

    Raises UsageError for contradictory settings, LayoutError for missing files.
    """
    names, background = folder_class_names(settings)
    layouts = tuple(with_folders(layout, settings) for layout in DATASETS[FOLDER].layouts)
    if split is None:
        holds = any((root / in_split(path, DEFAULT_SPLIT)).is_dir() for layout in layouts for path in layout.images)
        split = DEFAULT_SPLIT if holds else ''
    place = find_place(root, layouts, f'pictures with labels{f" ({split})" if split else ""}', split, split)
    pictures, missing = samples(place, Split(split), allow_missing)
    return Dataset(
        name=FOLDER,
        classes=names,
        background=background,
        split=split or 'all',
        layout=place.layout.name,
        root=root,
        samples=pictures,
        missing=missing,
        table=folder_class_table(settings, len(names)),
    )


def with_folders(layout: Layout, settings: FolderSettings) -> Layout:
    """Return the layout with the folders and suffixes from the settings."""
    return layout._replace(
        images=layout.images if settings.images is None else (with_split(settings.images),),
        labels=layout.labels if settings.labels is None else (with_split(settings.labels),),
        image_end=settings.suffixes.images,
        label_end=settings.suffixes.labels,
        annotators=settings.num_classes is None and settings.classes is None,
    )


def with_split(path: str) -> str:
    return path if '{split}' in path else f'{path}/{{split}}'


def read_settings(root: Path) -> FolderSettings:
    """Read padseg.toml. Raises LayoutError if there is none, UsageError for invalid content."""
    path = root / FILE
    try:
        return FolderSettings.model_validate(tomllib.loads(contents(path).decode('utf-8-sig')))
    except FileNotFoundError as error:
        raise LayoutShown(f'there is no {printable(str(path))}, which says what the labels mean; for example:\n{EXAMPLE}') from error
    except (ImageError, OSError) as error:
        raise UsageError(f'{path} cannot be read: {error}') from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f'{path} is not valid TOML: {error}') from error
    except ValidationError as error:
        raise UsageError(f'{path}: {"; ".join(map(complaint, error.errors()))}') from error


def complaint(error: Any) -> str:
    """Describe one invalid setting in words."""
    if error['type'] == 'extra_forbidden':
        known = (FolderSettings if len(error['loc']) == 1 else Suffixes).model_fields
        return f'{error["loc"][-1]} is not a setting; the settings are {", ".join(known)}'
    return f'{".".join(map(str, error["loc"]))}: {error["msg"][0].lower()}{error["msg"][1:]}; got {error["input"]!r}'


def folder_class_names(settings: FolderSettings) -> tuple[tuple[str, ...], int | None]:
    """Class names, or numbers if they have no names, and the background's number. UsageError for contradictory settings."""
    names = tuple(name.strip() for name in settings.classes or map(str, range(settings.num_classes or 0)))
    if settings.num_classes not in (None, len(names)):
        raise UsageError(f'num_classes is {settings.num_classes}, but classes names {len(names)}')
    if len(set(names)) < len(names):
        raise UsageError(f'classes names one class twice: {", ".join(names)}')
    background = settings.background
    if background is None:
        return names, None
    if background in names:
        return names, names.index(str(background))
    if isinstance(background, int) and 0 <= background < len(names):
        return names, background
    raise UsageError(f'background is one of the {len(names)} classes, by name or number from 0; got {background!r}')


def folder_class_table(settings: FolderSettings, num_classes: int) -> Table | None:
    """The class of each file value; None for regions without classes."""
    if not num_classes:
        return None
    table = [VOID] * settings.reduce_zero_label + list(range(num_classes))
    if settings.ignore_index is not None:
        table += [UNDECLARED] * (settings.ignore_index + 1 - len(table))
        table[settings.ignore_index] = VOID
    return tuple(table)


def label_folder(
    labels: Path, num_classes: int | None, ignore: int | None = 255, background: int | None = None, pictures: Container[str] = ()
) -> Dataset:
    """Open the PNG files in a folder and below as ground truth; `num_classes` None means regions without classes.

    For those, x_0.png, x_1.png … are labels of the same picture x, unless `pictures` contains the name x_0 itself. Raises LayoutError if
    there is no PNG, UsageError for a number out of range.
    """
    try:
        settings = FolderSettings(num_classes=num_classes, ignore_index=ignore, background=background)
    except ValidationError as error:
        raise UsageError('; '.join(map(complaint, error.errors()))) from error
    names, background = folder_class_names(settings)
    if not labels.is_dir():
        raise LayoutError(f'there is no folder {labels}')
    paths = unique((picture_name(path.relative_to(labels)), path) for _, path in files_below(labels, ('.png',)))
    if not paths:
        raise LayoutError(f'there are no PNG files in {labels}')
    truths = {name: (path,) for name, path in paths.items()} if names else by_annotator(paths, pictures)
    return Dataset(
        name=FOLDER,
        classes=names,
        background=background,
        split='all',
        layout='labels',
        root=labels,
        samples=tuple(Sample(name, None, truths[name]) for name in sorted(truths)),
        table=folder_class_table(settings, len(names)),
    )
