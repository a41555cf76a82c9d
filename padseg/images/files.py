"""Open a picture's file without blocking, and read it within its size limit."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from padseg.images.decode import ImageError, Reading


@contextlib.contextmanager
def opened(path: Path, reading: Reading) -> Iterator[BinaryIO]:
    """Open a file for reading. Raises OSError, and ImageError before anything is read if it is too large or not a regular file."""
    refuse_special(path.stat())
    # another program may have replaced it by a pipe; opened with O_NONBLOCK, even that does not block
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), 'rb') as file:
        status = os.fstat(file.fileno())
        refuse_special(status)
        if status.st_size > reading.max_bytes:
            raise ImageError(f'file of {status.st_size} bytes exceeds {reading.max_bytes}')
        yield file


def refuse_special(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError('not a regular file')


def contents(path: Path, reading: Reading = Reading()) -> bytes:
    """Read the bytes of a file. Raises the same errors as `opened`, and ImageError if it grows meanwhile."""
    with opened(path, reading) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1)
    if len(data) > size:
        raise ImageError('the file grew while it was read')
    return data
