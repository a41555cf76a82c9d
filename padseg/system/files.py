"""Turn names from records into safe paths, and write results so that they exist completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from padseg.errors import OutputConflict, ResourceExhausted

PREFIX = '.padseg-'  # prefix of temporary names; hidden, and short so that long names remain possible
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Errors of a place that cannot be written to.
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
CONTINUES, BEGINS_ANEW = 'finished results are kept, and the same command continues', 'make room, and run the command again'
MARK = 12  # hexadecimal digits
NO_NAMES = frozenset({'', '.', '..'})  # of files
TRIAL = 1 << 16  # bytes
LONGEST = 8192  # bytes of a recorded name; systems open at most half as many
# A picture's own fault when its results cannot be written; any other error of the file system concerns the whole run.
NAME_FAULTS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


def inside(folder: Path, name: str, linked: bool = False) -> Path:
    """The path of a recorded name, a POSIX path relative to a folder. The file need not exist.

    Raises OutputConflict for a name that could lead elsewhere: one that `is_plain` refuses, or that passes through a link below the folder.
    linked: whether the last part may be a link, as for pictures. The folder itself may be a link, because the user named it.
    """
    if not is_plain(name):
        raise OutputConflict(f'{ascii(name)} is not the name of a file in {folder}')
    path = folder
    *folders, last = name.split('/')
    for part in (*folders, *([] if linked else [last])):
        path = path / part
        if os.path.islink(path):
            raise OutputConflict(f'{path} is a link, which is not followed in a folder of results: replace it with what it points to')
    return folder / name


def is_plain(name: str) -> bool:
    """Whether a recorded name is a relative path in its simplest form: no root, no `.` or `..`, no empty part, no NUL.

    A backslash, which separates folders only on other systems, is an ordinary character. So are the lone surrogates in which Python encodes
    bytes that are not UTF-8; others, which no file system yields, are refused.
    """
    if name.isascii():
        stored = name.encode()
    else:
        try:
            stored = os.fsencode(name)
        except UnicodeEncodeError:
            return False
        if os.fsdecode(stored) != name:  # surrogates that spell a valid character would name another file
            return False
    return '\0' not in name and len(stored) <= LONGEST and NO_NAMES.isdisjoint(name.split('/'))


def is_path(text: str) -> bool:
    """Whether a recorded path, perhaps from another machine, can be passed to this system's calls."""
    try:
        os.lstat(text)
    except ValueError:
        return False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def opened(path: Path) -> BinaryIO:
    """Open a file in a folder of results for reading. Raises OSError also for links, pipes and devices, which could block."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, 'a link, which is not followed', str(path)) from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, 'not a regular file', str(path))
        return os.fdopen(number, 'rb')
    except BaseException:
        os.close(number)
        raise


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` at which the block creates a file or a folder of files; it then replaces `path` in one step.

    If the block raises, nothing of it is left and `path` is as it was. A link at `path` is replaced, not followed. Raises OSError if a file
    would replace a folder, or a folder a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        for file in sorted(temporary.iterdir()) if temporary.is_dir() else [temporary]:
            flush(file)  # after all files are written, so that one commit of the file system's journal serves all
        if temporary.is_dir() and (path.is_dir() or os.path.islink(path)):
            remove(path)  # a rename cannot replace a folder that is not empty
        os.replace(temporary, path)
    finally:
        remove(temporary)


@contextlib.contextmanager
def full_disk(out: Path, then: str = CONTINUES) -> Iterator[None]:
    """Inside the block, turn errors of a full disk or quota into ResourceExhausted, and of an unwritable place into OutputConflict.

    then: what the message says of the work so far.
    """
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename
        if error.errno in REFUSED and isinstance(place, (str, Path)):
            raise OutputConflict(f'cannot write to {place}: {error.strerror}') from error
        if error.errno not in FULL:
            raise
        raise ResourceExhausted(f'{out}: {error.strerror}; {then}') from error


def try_to_write(folder: Path) -> None:
    """Write a small file to a folder and remove it. Raises OSError, which names the folder, if that fails."""
    path = temporary_beside(folder / 'trial')
    try:
        path.write_bytes(bytes(TRIAL))
        flush(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        with contextlib.suppress(OSError):
            remove(path)


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
    """Remove a file, a link or a folder, if it exists. A folder is renamed before its files are deleted."""
    if path.is_dir() and not os.path.islink(path):
        doomed = path if path.name.startswith(PREFIX) else temporary_beside(path)
        if doomed != path:
            path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove what a killed run left half written in a folder; if names are given, only what was to get one of them.

    What cannot be removed stays, since nothing takes it for a result.
    """
    wanted = None if names is None else {temporary_prefix(name) for name in names}
    for path in folder.glob(f'{PREFIX}*'):
        if wanted is None or path.name[: len(PREFIX) + MARK] in wanted:
            with contextlib.suppress(OSError):
                remove(path)


@contextlib.contextmanager
def together(folder: Path, clean: Callable[[], None]) -> Iterator[None]:
    """Share a folder with other writers inside the block. Creates the folder if needed; calls `clean` first if nobody else writes there.

    Leaves no lock file in the folder. `clean` is not called on file systems without such locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        else:
            clean()
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_SH)  # waits at most while another process cleans
        yield
    finally:
        os.close(number)


def temporary_prefix(name: str) -> str:
    """Prefix of temporary names for a file or folder of this name, so that runs sharing a folder recognise their own."""
    return PREFIX + hashlib.sha256(os.fsencode(name)).hexdigest()[:MARK]
