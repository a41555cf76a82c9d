"""Write results atomically: each exists completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

from padseg.errors import ResourceExhausted

PREFIX = '.padseg-'  # prefix of temporary names; hidden, and short so that long names remain possible
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MARK = 12  # hexadecimal digits
# Write errors caused by a picture's own name; any other file system error affects the whole run.
NAME_FAULTS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` at which the block creates a file or a folder of files; it then replaces `path` in one step.

    If the block raises, the temporary path is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        for file in sorted(temporary.iterdir()) if temporary.is_dir() else [temporary]:
            flush(file)  # after all files of a folder are written, so that one journal commit covers them
        if temporary.is_dir() and path.is_dir():
            remove(path)  # a rename replaces a file, but not a folder with content
        os.replace(temporary, path)
    finally:
        remove(temporary)


@contextlib.contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """Turn a full disk or quota, at any write, into ResourceExhausted."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ResourceExhausted(f'{out}: {error.strerror}; finished results are kept, and the same command continues') from error


def temporary_beside(path: Path) -> Path:
    """Return a new temporary path in the same folder as `path`."""
    return path.parent / f'{temporary_prefix(path.name)}-{uuid.uuid4().hex[:MARK]}'


def flush(path: Path) -> None:
    """Wait until the file's bytes are on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove(path: Path) -> None:
    """Remove a file or folder, if it exists; a folder is renamed before its files are deleted."""
    if path.is_dir():
        doomed = path if path.name.startswith(PREFIX) else temporary_beside(path)
        if doomed != path:
            path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove half-written files that a killed run left in a folder; with `names`, only those meant to get one of these names."""
    wanted = None if names is None else {temporary_prefix(name) for name in names}
    for path in folder.glob(f'{PREFIX}*'):
        if wanted is None or path.name[: len(PREFIX) + MARK] in wanted:
            remove(path)


def temporary_prefix(name: str) -> str:
    """Prefix of temporary names for a file or folder of this name, so that runs sharing a folder recognise their own."""
    return PREFIX + hashlib.sha256(os.fsencode(name)).hexdigest()[:MARK]
