"""PNGs of label maps and masks in a larger size than the label map at hand, made row by row: rows that repeat are packed only once.

A mask of 300 million pixels takes some milliseconds that way, and no array of its size is ever made.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from padseg.images import png_chunk
from padseg.types import Array

GREY, INDEXED = 0, 3  # colour types of PNG
AS_IT_IS, AS_ABOVE = b'\0', b'\2'  # filters of a PNG's row: none, and the difference from the row above
MANY = 64  # equal rows that are packed together at most
MODULUS = 65521  # of Adler-32
Rows = Iterable[tuple[Array, int]]  # the pixels of a row (W,), and how many rows one below the other have them
Box = tuple[int, ...]  # left, top, width, height in pixels


class Sources(NamedTuple):
    """Which row and which column of a label map (h, w) each row (H,) and column (W,) of the larger one is from."""

    rows: Array
    columns: Array


def sources(small: tuple[int, ...], size: tuple[int, ...]) -> Sources:
    """Those of OpenCV's nearest neighbours, for a label map of the size `small` (h, w) enlarged to `size` (H, W)."""
    each = (np.arange(length, dtype=np.int32)[:, None] for length in small)
    return Sources(*(cv2.resize(own, (1, large), interpolation=cv2.INTER_NEAREST)[:, 0] for own, large in zip(each, size, strict=True)))


def enlarged_rows(labels: Array, places: Sources) -> Iterator[tuple[Array, int]]:
    """The rows of a label map (h, w) in the larger size. Equal rows come together."""
    firsts = np.flatnonzero(np.append(True, (labels[1:] != labels[:-1]).any(1)))  # of rows that are equal
    numbers, times = np.unique(np.searchsorted(firsts, places.rows, 'right') - 1, return_counts=True)
    for first, count in zip(firsts[numbers].tolist(), times.tolist(), strict=True):
        yield labels[first][places.columns], count


def png(rows: Rows, size: tuple[int, int], depth: int = 8, palette: bytes = b'') -> bytes:
    """The PNG of a picture (H, W) from its rows: grey, in bytes or big-endian words, or with a palette of bytes RGB."""
    head = struct.pack('>IIBBBBB', size[1], size[0], depth, INDEXED if palette else GREY, 0, 0, 0)
    chunks = [(b'IHDR', head), *([(b'PLTE', palette)] if palette else []), (b'IDAT', b''.join(packed(rows))), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(png_chunk(*each) for each in chunks)


def packed(rows: Rows) -> Iterator[bytes]:
    """The rows as a stream of zlib. A row that is as the one above is a block of zeros, which needs no compression of its own."""
    yield b'\x78\x01'
    packer, check = packer_of_rows(), 1
    for row, times in rows:
        data = AS_IT_IS + row.tobytes()
        check = zlib.adler32(data, check)
        yield packer.compress(data)
        if times > 1:
            yield packer.flush(zlib.Z_FULL_FLUSH)  # what follows then refers to nothing before
        for first in range(1, times, MANY):
            count = min(MANY, times - first)
            zeros, own = packed_repeats(len(data) - 1, count)
            check = joined_checks(check, own, count * len(data))
            yield zeros
    yield packer.flush()
    yield check.to_bytes(4, 'big')


def packer_of_rows() -> zlib._Compress:
    return zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)


@lru_cache(2 * MANY)
def packed_repeats(width: int, count: int) -> tuple[bytes, int]:
    """A number of rows of this many bytes that are as the ones above, as blocks that refer to nothing before them; and their Adler-32."""
    data, packer = (AS_ABOVE + bytes(width)) * count, packer_of_rows()
    return packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH), zlib.adler32(data)


def joined_checks(first: int, second: int, length: int) -> int:
    """The Adler-32 of two texts one after the other, from their own (RFC 1950, section 8.2). length: of the second, in bytes."""
    (high, low), (more, last) = divmod(first, 1 << 16), divmod(second, 1 << 16)
    return (high + more + length * (low - 1)) % MODULUS << 16 | (low + last - 1) % MODULUS


def enlarged_mask(labels: Array, region: int, where: tuple[slice, ...], places: Sources) -> tuple[bytes, int, Box]:
    """The mask of a region in the larger size as a PNG, 0 or 255, with its area and box there. where: its rows and columns in `labels`."""
    height, width = (len(own) for own in places)
    inside = labels[where[0]] == region  # (h', w)
    area = int(np.bincount(places.rows)[where[0]] @ (inside @ np.bincount(places.columns)))
    (top, bottom), (left, right) = (np.searchsorted(own, (part.start, part.stop)).tolist() for own, part in zip(places, where, strict=True))
    shown = enlarged_rows(inside * np.uint8(255), Sources(places.rows[top:bottom] - where[0].start, places.columns))
    empty = np.zeros(width, np.uint8)
    rows = itertools.chain([(empty, top)] if top else [], shown, [(empty, height - bottom)] if bottom < height else [])
    return png(rows, (height, width)), area, (left, top, right - left, bottom - top)
