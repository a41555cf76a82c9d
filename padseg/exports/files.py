"""Writing so that a result exists completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock

from padseg.errors import OutputConflict
from padseg.errors import UsageError

PREFIX = '.padseg-'  # of temporary names; hidden, and short so that long names stay possible
# A picture's own fault when its results cannot be written; any other error of the file system concerns the whole run.
NAME_FAULTS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` for the block to make a file or a folder of files at; it then takes the place of `path` at once.

    If the block raises, nothing is left of it and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f'{PREFIX}{uuid.uuid4().hex}'
    try:
        yield temporary
        for file in sorted(temporary.iterdir()) if temporary.is_dir() else [temporary]:
            flush(file)
        if temporary.is_dir() and path.is_dir():
            remove(path)  # a rename replaces a file, but no folder that holds something
        os.replace(temporary, path)
    finally:
        remove(temporary)


def flush(path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    with path.open('rb+') as file:
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one; a folder leaves its place before its files go."""
    if path.is_dir():
        doomed = path.parent / f'{PREFIX}{uuid.uuid4().hex}'
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half written in a folder."""
    for path in folder.glob(f'{PREFIX}*'):
        remove(path)


@contextlib.contextmanager
def exclusive(out: Path, foreign: str) -> Iterator[None]:
    """Make the output folder and keep other runs out of it. OutputConflict if one is in it, or if the file `foreign` is there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f'cannot make the output folder {out}: {error.strerror}') from error
    if (out / foreign).exists():
        raise OutputConflict(f'{out} holds {foreign}, results of another command: choose another --out')
    try:
        with filelock.FileLock(out / '.lock', timeout=0):
            yield
    except filelock.Timeout as error:
        raise OutputConflict(f'another run is writing to {out}') from error
