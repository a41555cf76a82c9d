"""Writing so that a result exists completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

from padseg.errors import OutputConflict, ResourceExhausted

PREFIX = '.padseg-'  # of temporary names; hidden, and short so that long names stay possible
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MARK = 12  # hexadecimal digits
# A picture's own fault when its results cannot be written; any other error of the file system concerns the whole run.
NAME_FAULTS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


def inside(folder: Path, name: str, linked: bool = False) -> Path:
    """The path below a folder that a recorded name, a POSIX path relative to it, stands for. Whether there is a file is not asked.

    Raises OutputConflict for a name that could lead elsewhere: one that `is_plain` refuses, or on whose way below the folder there is a
    symbolic link; `linked`: its last part may be one, as pictures may. The folder itself may be a link: it was named by the user.
    """
    if not is_plain(name):
        raise OutputConflict(f'{ascii(name)} is no name of a file in {folder}')
    path = folder
    *folders, last = name.split('/')
    for part in (*folders, *([] if linked else [last])):
        path = path / part
        if os.path.islink(path):
            raise OutputConflict(f'{path} is a link, which is not followed in a folder of results: put what it points to in its place')
    return folder / name


def is_plain(name: str) -> bool:
    """Whether a recorded name is a relative path, written in one way: no root or drive, no `.` or `..`, no empty part, no NUL.

    What separates folders on another system only, such as a backslash, is a letter like others. So are lone surrogates, by which
    Python stands for bytes that are no UTF-8; not those that no file system would have given.
    """
    parts = name.split('/')
    try:
        same = os.fsdecode(os.fsencode(name)) == name  # surrogates can spell a letter, and the name of another file with it
    except UnicodeEncodeError:
        return False
    return same and '..' not in parts and '\0' not in name and Path(name).parts == tuple(parts)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` for the block to make a file or a folder of files at; it then takes the place of `path` at once.

    If the block raises, nothing is left of it and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        for file in sorted(temporary.iterdir()) if temporary.is_dir() else [temporary]:
            flush(file)  # all of a folder after all are written: one commit of the file system's journal serves them all
        if temporary.is_dir() and path.is_dir():
            remove(path)  # a rename replaces a file, but no folder that holds something
        os.replace(temporary, path)
    finally:
        remove(temporary)


@contextlib.contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """A full disk or quota, at whichever write, as ResourceExhausted."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ResourceExhausted(f'{out}: {error.strerror}; what is finished stays, and the same command continues') from error


def temporary_beside(path: Path) -> Path:
    """A new name in the folder of `path`."""
    return path.parent / f'{temporary_prefix(path.name)}-{uuid.uuid4().hex[:MARK]}'


def flush(path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one; a folder leaves its place before its files go."""
    if path.is_dir():
        doomed = path if path.name.startswith(PREFIX) else temporary_beside(path)
        if doomed != path:
            path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove what a killed run left half written in a folder; only what was to get one of these names, if any are given."""
    wanted = None if names is None else {temporary_prefix(name) for name in names}
    for path in folder.glob(f'{PREFIX}*'):
        if wanted is None or path.name[: len(PREFIX) + MARK] in wanted:
            remove(path)


def temporary_prefix(name: str) -> str:
    """How temporary names for a file or folder of this name begin: runs that share a folder know theirs by it."""
    return PREFIX + hashlib.sha256(os.fsencode(name)).hexdigest()[:MARK]
