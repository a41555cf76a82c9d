"""A picture's file, opened without waiting, and read within its limit."""

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
    """A file, open for reading. Raises ImageError if it is too large or not a file, which is found out before it is read; and OSError."""
    refuse_special(path.stat())
    # another program may have put a pipe in its place by now: opened like this, nobody waits for one
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
    """The bytes of a file. Raises as `opened`."""
    with opened(path, reading) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1)
    if len(data) > size:
        raise ImageError('the file grew while it was read')
    return data
