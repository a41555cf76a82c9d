"""Names from records as paths, and writing so that a result exists completely or not at all."""

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
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}  # a place that cannot be written to
MARK = 12  # hexadecimal digits
LONGEST = 8192  # bytes of a recorded name: twice as many as systems open
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
        stored = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    # surrogates can spell a letter, and the name of another file with it
    written_once = os.fsdecode(stored) == name and Path(name).parts == tuple(parts)
    return written_once and '..' not in parts and '\0' not in name and len(stored) <= LONGEST


def opened(path: Path) -> BinaryIO:
    """A file of a folder of results, open for reading. OSError also for a link, and for a pipe or a device, which could be waited for."""
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

    If the block raises, nothing is left of it and `path` is as it was. A link at `path` is replaced, not followed. OSError for a file
    where a folder is, and the other way round.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        for file in sorted(temporary.iterdir()) if temporary.is_dir() else [temporary]:
            flush(file)  # all of a folder after all are written: one commit of the file system's journal serves them all
        if temporary.is_dir() and (path.is_dir() or os.path.islink(path)):
            remove(path)  # a rename replaces a file, but no folder that holds something
        os.replace(temporary, path)
    finally:
        remove(temporary)


@contextlib.contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """A full disk or quota, at whichever write, as ResourceExhausted; a place that cannot be written to as OutputConflict."""
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename
        if error.errno in REFUSED and isinstance(place, (str, Path)):
            raise OutputConflict(f'cannot write to {place}: {error.strerror}') from error
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
    """Remove a file, a link or a folder, if there is one; a folder leaves its place before its files go."""
    if path.is_dir() and not os.path.islink(path):
        doomed = path if path.name.startswith(PREFIX) else temporary_beside(path)
        if doomed != path:
            path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove what a killed run left half written in a folder; only what was to get one of these names, if any are given.

    What cannot be removed stays: nothing takes it for a result.
    """
    wanted = None if names is None else {temporary_prefix(name) for name in names}
    for path in folder.glob(f'{PREFIX}*'):
        if wanted is None or path.name[: len(PREFIX) + MARK] in wanted:
            with contextlib.suppress(OSError):
                remove(path)


@contextlib.contextmanager
def together(folder: Path, clean: Callable[[], None]) -> Iterator[None]:
    """Be one of those that write to a folder, which is made if need be; `clean` is called first, unless others are at work there.

    Nothing is left in the folder for that. Where the file system knows no such locks, `clean` is not called.
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
            fcntl.flock(number, fcntl.LOCK_SH)  # waits for another one's cleaning at most
        yield
    finally:
        os.close(number)


def temporary_prefix(name: str) -> str:
    """Prefix of temporary names for a file or folder of this name, so that runs sharing a folder recognise their own."""
    return PREFIX + hashlib.sha256(os.fsencode(name)).hexdigest()[:MARK]
