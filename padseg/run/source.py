"""The source of a run: which folder of pictures its results belong to, and which pictures are unchanged."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from padseg.errors import OutputConflict, UsageError
from padseg.exports import CONVERTERS
from padseg.images import SUFFIXES as PICTURES, Found, ImageError, Reading, contents, file_and_frame
from padseg.run.records import SUFFIXES, Entry, Recorded, Run, entry_of
from padseg.system.ledger import REMEDY

log = logging.getLogger(__name__)
PLACES = (*SUFFIXES, 'shards', *{converter.FOLDER for converter in CONVERTERS.values()})  # folders in the output folder that results go to


def folder_of(source: Path) -> Path:
    """The folder that names of pictures are relative to: the source itself, or the parent of a single picture, even if it is gone."""
    alone = os.path.isfile(source) or (source.suffix.lower() in PICTURES and not os.path.exists(source))
    return source.parent if alone else source


def recorded_source(source: Path) -> str:
    """The source as an absolute path for the record, so that a later run can start from any folder."""
    return str(source.parent.resolve() / source.name if os.path.isfile(source) else source.resolve())


def refuse_results(source: Path, out: Path) -> None:
    """Raise UsageError if the source is the output folder, or lies in a part of it that results go to, under whatever path."""
    if os.path.isdir(source) and identity(source) == identity(out):
        raise UsageError(f'the output folder cannot be the folder of pictures: {out}')
    taken = {identity(out / place): place for place in PLACES} if os.path.isdir(out) else {}
    for folder in (source.resolve(), *source.resolve().parents):
        if (place := taken.get(identity(folder))) is not None:
            raise UsageError(f'{source} lies where results go, in {out / place}, and would be overwritten: choose another --out')


def identity(path: Path) -> tuple[int, int] | Path:
    """Device and inode of a file or folder, the same for every path to it; the path itself if nothing is there."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return path
    return status.st_dev, status.st_ino


def refuse_other_source(source: Path, out: Path, earlier: Run, records: Mapping[str, Recorded], frames: Iterable[Found]) -> None:
    """Raise OutputConflict if the results in `out` belong to the pictures of another folder.

    A folder may have been moved, copied or mounted elsewhere, and a few pictures may have changed. It counts as the same if more than half
    of the pictures that are done are in it, unchanged. frames: all pictures in `source`.
    """
    if same_folder(Path(earlier.source), source):
        return
    present = {picture.name: picture for picture in frames}
    done = [name for name, record in records.items() if record.status == 'done']
    same = sum(name in present and unchanged(present[name], entry_of(records[name])) for name in done)
    if 2 * same <= len(done):
        raise OutputConflict(
            f'{out} holds results of the pictures in {earlier.source}; {source} has {same} of these {len(done)} unchanged: {REMEDY}'
        )


def same_folder(one: Path, other: Path) -> bool:
    first, second = folder_of(one), folder_of(other)
    return identity(first) == identity(second) or first.resolve() == second.resolve()


def unchanged(picture: Found, entry: Entry, checksum: bool = False) -> bool:
    """Whether a picture's file is still the one in the entry, by size and modification time, or else by content."""
    try:
        status = picture.path.stat()
        if not checksum and (status.st_size, status.st_mtime_ns) == (entry.bytes, entry.modified):
            return True
        if entry.sha256 is None or status.st_size != entry.bytes:
            return False
        return hashlib.sha256(contents(picture.path, Reading(max_bytes=status.st_size))).hexdigest() == entry.sha256
    except (ImageError, OSError):
        return False  # reading it again reports what is wrong


def refuse_unlike(one: Run, other: Run, folder: Path, records: Iterable[Recorded]) -> None:
    """Raise OutputConflict if the results in `folder`, from the run `other`, do not belong to the pictures of the run `one`.

    If the pictures of `one` are not on this machine, that cannot be checked, and a warning says so.
    """
    place = folder_of(Path(one.source))
    if not os.path.isdir(place):
        log.warning('cannot check that %s and %s hold the same pictures: joining %s all the same', one.source, other.source, folder)
        return
    entries = [entry_of(record) for record in records if record.status == 'done']
    files = [place / file_and_frame(entry.input)[0] for entry in entries]
    same = sum(unchanged(Found(path, entry.input), entry) for path, entry in zip(files, entries, strict=True))
    if entries and 2 * same <= len(entries):
        raise OutputConflict(
            f'{folder} holds results of the pictures in {other.source}; {one.source} has {same} of these {len(entries)} unchanged'
        )
