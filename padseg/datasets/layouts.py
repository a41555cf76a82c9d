"""Find the files of a data set: which layout a folder has, and which label files belong to which picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from padseg import images
from padseg.datasets.base import Layout, LayoutError, LayoutShown, Sample, Split, some
from padseg.datasets.readers import detail_paintings
from padseg.datasets.tables import listed_names
from padseg.system.text import printable

ENTRIES = 12  # of a folder, listed in a message
ALLOW = '--allow-missing uses what is there'


class Part(NamedTuple):
    """A part of a layout. wanted: its possible locations; path: where it is, or None."""

    wanted: tuple[str, ...]
    path: Path | None


class FoundLayout(NamedTuple):
    """A layout found on disk. labels, listing, annotations: None if the layout has none."""

    layout: Layout
    images: Path
    labels: Path | None
    listing: Path | None
    annotations: Path | None


def find_place(root: Path, layouts: Iterable[Layout], title: str, split: str, folder: str) -> FoundLayout:
    """Find the first complete layout at or below `root`, for a split and its folder.

    Raises LayoutError with the known trees and the parts of them that exist.
    """
    if not root.is_dir():
        raise LayoutError(f'there is no folder {root}')
    trees = []
    for layout in layouts:
        if layout.splits and split not in layout.splits:
            continue
        tried = [parts(layout, root / home, folder) for home in homes(layout)]
        for pieces in tried:
            if all(part.path for part in pieces.values()):
                paths = {kind: part.path for kind, part in pieces.items()}
                return FoundLayout(layout, paths['images'] or root, paths.get('labels'), paths.get('listing'), paths.get('annotations'))
        trees.append(folder_tree(layout, max(tried, key=lambda pieces: sum(part.path is not None for part in pieces.values()))))
    known = '\n'.join(dict.fromkeys(trees))
    here = printable(content(root))
    raise LayoutShown(f'{printable(str(root))} holds no {title} in a layout that padseg knows; it holds {here}. Expected one of:\n{known}')


def homes(layout: Layout) -> list[str]:
    """Folders below a root that may hold the files, starting with the root itself: for a/b they are '', b, a/b."""
    chains = [home.split('/') for home in layout.homes]
    return list(dict.fromkeys(['', *('/'.join(chain[-length:]) for chain in chains for length in range(1, 1 + len(chain)))]))


def parts(layout: Layout, home: Path, folder: str) -> dict[str, Part]:
    """Look for the parts of a layout below a home, by kind: images, labels, listing, annotations."""

    def part(paths: Iterable[str], present: Callable[[Path], bool], files: str = '') -> Part:
        below = [in_split(path, folder) for path in paths]
        return Part(tuple(path + files for path in below), next((home / path for path in below if present(home / path)), None))

    pieces = {'images': part(layout.images, Path.is_dir, f'/*{layout.image_end or ".jpg"}')}
    if layout.labels:
        pieces['labels'] = part(layout.labels, lambda path: any(True for _ in label_files(path, layout)), f'/*{layout.label_end}')
    if layout.listing:
        pieces['listing'] = part([layout.listing], Path.is_file)
    if layout.annotations:
        pieces['annotations'] = part(layout.annotations, Path.is_file)
    return pieces


def in_split(path: str, folder: str) -> str:
    """Insert a split's folder into a layout's path."""
    return path.replace('{split}', folder).rstrip('/')


def folder_tree(layout: Layout, pieces: dict[str, Part]) -> str:
    """Show a layout as a tree, with each part marked as found or missing."""
    usual = ' or '.join(filter(None, layout.homes))
    lines = [f'  {layout.name}{f" (there or in {usual})" if usual else ""}:']
    width = max(len(path) for part in pieces.values() for path in part.wanted)
    for part in pieces.values():
        state = 'missing' if part.path is None else f'found: {part.path}'
        lines += [f'    {part.wanted[0]:{width}}  {state}', *(f'      or {path}' for path in part.wanted[1:])]
    return '\n'.join(lines)


def content(folder: Path) -> str:
    """List the entries of a folder, in words."""
    names = sorted(path.name + '/' * path.is_dir() for path in folder.iterdir())
    more = f' and {len(names) - ENTRIES} more' if len(names) > ENTRIES else ''
    return ', '.join(names[:ENTRIES]) + more or 'nothing'


def samples(place: FoundLayout, split: Split, allow_missing: bool) -> tuple[tuple[Sample, ...], int]:
    """Return the pictures of a split with their label files, sorted by name, and the number missing, which needs `allow_missing`.

    Raises LayoutError with the names of pictures that lack a file.
    """
    pictures = unique(files_below(place.images, (place.layout.image_end,) if place.layout.image_end else images.SUFFIXES))
    truths = labels_by_picture(place, pictures)
    names = listed_files(place, split)
    wanted = sorted(pictures.keys() | truths.keys() if names is None else set(names))
    complete = [name for name in wanted if name in pictures and name in truths]
    if not wanted:
        raise LayoutError(f'{place.listing or place.annotations or place.images} names no picture of the split')
    if not complete or not allow_missing:
        require_all(wanted, pictures, 'picture', place.images)
        require_all(wanted, truths, 'labels', place.labels or place.annotations or place.images)
    expected = split.pictures if split.exact and split.pictures else len(wanted)
    if len(complete) != expected and not allow_missing:
        raise LayoutError(f'the split has {expected} pictures; {place.images} has {len(complete)} ({ALLOW})')
    members = [
        Sample(pictures[name].relative_to(place.images).with_suffix('').as_posix(), pictures[name], truths[name]) for name in complete
    ]
    return tuple(sorted(members)), max(0, expected - len(complete))


def listed_files(place: FoundLayout, split: Split) -> Collection[str] | None:
    """Names in the layout's own list or in this package's; None if the folders themselves define the split."""
    if place.listing:
        try:
            lines = images.contents(place.listing).decode('utf-8-sig', 'surrogateescape').splitlines()
        except (images.ImageError, OSError) as error:
            raise LayoutError(f'{place.listing} cannot be read: {error}') from error
        names = [line.split()[0] for line in lines if line.strip()]
        outside = [name for name in names if name.startswith('/') or '..' in name.split('/')]
        if outside:
            raise LayoutError(f'{place.listing} names {some(outside)}: it may only name files below {place.images}')
        return names
    if place.labels is None and place.annotations:
        return [name for name, painting in detail_paintings(place.annotations).items() if painting.phase == split.folder]
    return listed_names(split.ids) if split.ids else None


def labels_by_picture(place: FoundLayout, pictures: Container[str]) -> dict[str, tuple[Path, ...]]:
    """Label files by picture name."""
    if place.labels is None:
        return dict.fromkeys(detail_paintings(place.annotations), (place.annotations,)) if place.annotations else {}
    paths = unique(label_files(place.labels, place.layout))
    return by_annotator(paths, pictures) if place.layout.annotators else {name: (path,) for name, path in paths.items()}


def label_files(folder: Path, layout: Layout) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of a layout's label files in a folder and below; nothing if there is no folder."""
    if not folder.is_dir():
        return iter(())
    return ((name, path) for name, path in files_below(folder, (layout.label_end,)) if not path.name.endswith(layout.beside))


def files_below(folder: Path, ends: Collection[str]) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of the files <name><end> in a folder and below, except hidden ones. Names are POSIX paths; ends match in any case.

    Anything with such a name is yielded, so that it is reported if it cannot be read; a folder only if no such file is in it.
    """
    for parent, folders, entries in os.walk(folder, onerror=images.refuse):
        folders[:] = sorted(name for name in folders if name[0] != '.')
        below = Path(parent).relative_to(folder).as_posix()
        for entry in sorted([*entries, *folders]):
            end = next((end for end in ends if entry.lower().endswith(end.lower())), None)
            if end is None or entry[0] == '.' or len(entry) == len(end):
                continue
            path = Path(parent, entry)
            if entry in folders and not path.is_symlink() and any(True for _ in files_below(path, ends)):
                continue
            name = entry[: len(entry) - len(end)]
            yield (name if below == '.' else f'{below}/{name}'), path


def unique(files: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Return paths by name. LayoutError if two have the same name."""
    paths: dict[str, Path] = {}
    for name, path in files:
        if name in paths:
            raise LayoutError(f'two files for {name}: {paths[name]} and {path}')
        paths[name] = path
    return paths


def by_annotator(paths: dict[str, Path], pictures: Container[str]) -> dict[str, tuple[Path, ...]]:
    """Group label files by picture: x_0, x_1, … belong to x, in numerical order, unless there is a picture with the full name."""
    groups: dict[str, list[tuple[int, Path]]] = {}
    for name, path in paths.items():
        stem, _, number = name.rpartition('_')
        if stem and number.isascii() and number.isdigit() and name not in pictures:
            groups.setdefault(stem, []).append((int(number), path))
        else:
            groups.setdefault(name, []).append((-1, path))
    return {name: tuple(path for _, path in sorted(group)) for name, group in groups.items()}


def require_all(names: Iterable[str], known: Container[str], words: str, folder: Path) -> None:
    missing = [name for name in names if name not in known]
    if missing:
        raise LayoutError(f'no {words} in {folder} for {len(missing)} of the split: {some(missing)} ({ALLOW})')


def picture_name(path: PurePosixPath | Path) -> str:
    """Return the name without `.png` and then without a picture suffix, if there is one: a/b.jpg.png is a/b."""
    path = path.with_suffix('')
    return (path.with_suffix('') if path.suffix.lower() in images.SUFFIXES else path).as_posix()
