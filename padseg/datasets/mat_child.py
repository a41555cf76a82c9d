"""The process that reads MATLAB files: scipy crashes on some damaged ones, and a small one can unpack to any size.

It runs as a file, not as a module of the package, so that starting it costs no more than importing scipy. Requests are lines of JSON on
stdin: [path, variable, field]. An answer is the length of a JSON text in 8 digits, that text, [reason, shapes], and the bytes of the
matrices.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    from padseg.types import Array

MEMORY = 1 << 30  # bytes of address space for reading a file
LARGEST = 1 << 28  # bytes of a file, both compressed and decompressed
HEADER, TAG, COMPRESSED = 128, 8, 15  # bytes, bytes, and the type of a compressed element
PIECE = 1 << 16
INT32 = 2**31 - 1


class Refused(Exception):
    """A file that holds no label maps; the message is the reason."""


def serve(requests: BinaryIO, answers: BinaryIO, seconds: int) -> None:
    """Answer requests until there are no more. SIGALRM ends the process if a file takes longer than `seconds`."""
    import signal

    import scipy.io  # noqa: F401  # before memory is limited, and not counted in the first file's time

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides when to stop
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever handler was inherited
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    bound_memory()
    for request in requests:
        signal.alarm(seconds)
        reason, matrices = answer(*json.loads(request))
        signal.alarm(0)
        text = json.dumps([reason, [matrix.shape for matrix in matrices]]).encode()
        answers.write(b'%08d' % len(text) + text)
        for matrix in matrices:
            answers.write(matrix.data)
        answers.flush()


def answer(path: str, variable: str, field: str | None) -> tuple[str, list[Array]]:
    """The matrices, or the reason why there are none."""
    try:
        return '', label_matrices(path, variable, field)
    except Refused as error:
        return str(error), []
    except MemoryError:
        return f'takes more than {MEMORY} bytes of memory to read', []
    except Exception as error:  # scipy raises all kinds of errors for damaged files
        return f'not a MATLAB file, or a damaged one: {error}', []


def bound_memory() -> None:
    """Limit this process to MEMORY bytes of address space more than now, where the system tells how much that is."""
    import resource

    try:
        with open('/proc/self/statm', encoding='ascii') as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    except (OSError, ValueError):  # on macOS; LARGEST still holds there
        pass


def label_matrices(path: str, variable: str, field: str | None) -> list[Array]:
    """The matrix in a variable, or with `field` one from each structure in a cell array: (H, W) int32 each."""
    value = read_variable(path, variable)
    if field is None:
        return [label_matrix(value)]
    try:
        matrices = [cell[field].item() for cell in value.ravel()]
    except (AttributeError, IndexError, TypeError, ValueError):
        refuse(f'{variable} is not a cell array of structures with the field {field}')
    if not matrices:
        refuse(f'{variable} is empty')
    return [label_matrix(matrix) for matrix in matrices]


def read_variable(path: str, name: str) -> Array:
    """One variable of a MATLAB file."""
    import warnings

    import numpy as np
    from scipy.io import loadmat

    check(contents(path))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # oddities that scipy reads all the same
        try:
            variables = loadmat(path, variable_names=[name])
        except NotImplementedError:
            refuse('a MATLAB file of version 7.3, which padseg does not read: save it as version 7 or older')
    if name not in variables:
        refuse(f'holds no variable {name}')
    return np.asarray(variables[name])


def contents(path: str) -> bytes:
    """Read the bytes of a regular file."""
    import os
    import stat

    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # so that opening a pipe does not block
    status = os.fstat(opened)
    if not stat.S_ISREG(status.st_mode):
        os.close(opened)
        refuse('not a regular file')
    with open(opened, 'rb') as file:
        if status.st_size > LARGEST:
            refuse(f'file of {status.st_size} bytes exceeds {LARGEST}')
        return file.read(LARGEST)


def check(data: bytes) -> None:
    """Decompress the compressed parts of a MATLAB file of version 5 to 7, to check their sizes and checksums.

    scipy uses data before it has checked the checksum.
    """
    import struct

    order = {b'IM': '<', b'MI': '>'}.get(data[HEADER - 2 : HEADER])
    place, room = HEADER, LARGEST
    while order and place < len(data):
        kind, size = struct.unpack_from(f'{order}II', data, place)
        place += TAG
        if kind == COMPRESSED:
            room -= unpacked(memoryview(data)[place : place + size], room)
        place += size


def unpacked(data: memoryview, room: int) -> int:
    """Number of bytes that a compressed part unpacks to. Raises Refused if it exceeds `room`, ValueError if the part is truncated."""
    import zlib

    unpacker, size = zlib.decompressobj(), 0
    for start in range(0, len(data), PIECE):
        rest: bytes | memoryview = data[start : start + PIECE]
        while rest:
            size += len(unpacker.decompress(rest, PIECE))
            rest = unpacker.unconsumed_tail
            if size > room:
                refuse(f'unpacks to more than {LARGEST} bytes')
        if unpacker.eof:
            break
    if not unpacker.eof:
        raise ValueError('incomplete or truncated stream')
    return size


def label_matrix(values: Any) -> Array:
    """Convert a matrix of whole numbers >= 0, stored as any type, to int32."""
    import numpy as np

    matrix = np.asarray(values)
    if matrix.ndim != 2 or not matrix.size or matrix.dtype.kind not in 'iufb':
        refuse(f'labels must be a matrix of numbers, not {matrix.dtype} of shape {matrix.shape}')
    if not ((matrix >= 0) & (matrix <= INT32) & (matrix == np.floor(matrix))).all():
        refuse('labels must be whole numbers, 0 or larger')
    return np.ascontiguousarray(matrix, np.int32)


def refuse(reason: str) -> NoReturn:
    raise Refused(reason)


if __name__ == '__main__':
    sys.path[:] = sys.argv[2:]  # find scipy where the parent process does
    serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]))
