"""The process that reads MATLAB files: scipy crashes on some damaged ones, and a small one can unpack to any size.

It runs as a file, not as a module of the package, so that starting it costs no more than importing scipy. Requests are lines of JSON on
stdin: [path, variable, field], or [path, SEGMENTS, what] for a file of ImageNet-Segmentation. An answer is the length of a JSON text in 8
digits, that text, [reason, shapes], and the bytes of the matrices.
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
SEGMENTS = '<segments>'  # in place of a variable
MOST_PICTURES, LONGEST = 1 << 17, 256  # pictures of a file; letters of a name


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
        return '', segments(path, field or '') if variable == SEGMENTS else label_matrices(path, variable, field)
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
    opened, size = regular(path)
    with open(opened, 'rb') as file:
        if size > LARGEST:
            refuse(f'file of {size} bytes exceeds {LARGEST}')
        return file.read(LARGEST)


def regular(path: str) -> tuple[int, int]:
    """Open a regular file: its descriptor, and its size in bytes."""
    import os
    import stat

    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # so that opening a pipe does not block
    status = os.fstat(opened)
    if not stat.S_ISREG(status.st_mode):
        os.close(opened)
        refuse('not a regular file')
    return opened, status.st_size


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


def segments(path: str, what: str) -> list[Array]:
    """Of a MATLAB file of version 7.3 (HDF5) with a structure `value` of four cell arrays, one cell a picture.

    what: 'names', then the letters of `id` and `target`, (N, L) each, 0 behind the end; 'picture K', the red, green and blue of `img`,
    (H, W) each; 'mask K', the first matrix of `gt`, (H, W). The file can refer to no other.
    """
    import os

    os.environ['HDF5_PLUGIN_PRELOAD'] = '::'  # no filters but those of the library
    try:
        import h5py
    except ImportError:
        refuse("reading it needs h5py: pip install 'padseg[hdf5]'")
    os.close(regular(path)[0])
    with h5py.File(path, 'r') as file:
        if what == 'names':
            return [letters(file, name) for name in ('id', 'target')]
        kind, number = what.split()
        cell = referred(file, cells(file, {'picture': 'img', 'mask': 'gt'}[kind])[int(number)])
        if kind == 'picture':
            pixels = cell[()]
            if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype.kind != 'u' or pixels.dtype.itemsize != 1:
                refuse(f'a picture must be a matrix of bytes in three channels, not {pixels.dtype} of shape {pixels.shape}')
            return [label_matrix(channel.T) for channel in pixels]
        return [label_matrix(referred(file, cell[()].ravel()[0])[()].T)]


def cells(file: Any, name: str) -> Any:
    """References to the cells of a field of `value`, (N,)."""
    import h5py

    for place, own in ((file, 'value'), (file.get('value'), name)):
        if not isinstance(place, h5py.Group) or not isinstance(place.get(own, getlink=True), h5py.HardLink):
            refuse(f'holds no structure `value` with the field {name}')
    field = file['value'][name]
    if (
        not isinstance(field, h5py.Dataset)
        or h5py.check_ref_dtype(field.dtype) is not h5py.Reference
        or not 0 < field.size <= MOST_PICTURES
    ):
        refuse(f'{name} is not a cell array of at most {MOST_PICTURES} pictures')
    return own_data(field)[()].ravel()


def referred(file: Any, reference: Any) -> Any:
    """What a cell holds."""
    import h5py

    found = file[reference] if isinstance(reference, h5py.Reference) and reference else None
    if not isinstance(found, h5py.Dataset):
        refuse('a cell holds no matrix')
    return own_data(found)


def own_data(found: Any) -> Any:
    """A matrix whose numbers are in the file itself, and not too many. Refused otherwise."""
    if found.is_virtual or found.external:
        refuse('takes numbers from another file')
    if not 0 < found.nbytes <= LARGEST:
        refuse(f'a matrix of {found.nbytes} bytes, of at most {LARGEST}')
    return found


def letters(file: Any, name: str) -> Array:
    """The texts in the cells of a field, as numbers of letters: (N, L)."""
    import numpy as np

    texts = []
    for reference in cells(file, name):
        cell = referred(file, reference)
        if cell.dtype.kind != 'u' or cell.size > LONGEST:
            refuse(f'{name} is not a cell array of short texts')
        texts.append(cell[()].ravel())
    found = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for row, text in zip(found, texts, strict=True):
        row[: len(text)] = text
    return label_matrix(found)


def refuse(reason: str) -> NoReturn:
    raise Refused(reason)


if __name__ == '__main__':
    sys.path[:] = sys.argv[2:]  # find scipy where the parent process does
    serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]))
