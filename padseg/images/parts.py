"""PNG and TIFF files as pictures of some rows each, one below the other, so that one that is to be reduced need not be decoded whole."""

from __future__ import annotations

import io
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence

import PIL.Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from padseg.images.complete import PLACES, chunks, is_short_tiff, lean_png, png_bytes, png_chunk, unpacked
from padseg.images.tiff import OLD_JPEG, PLAIN, YCBCR, Tiff, ints, pillow_is_right

PART = 2**20  # pixels that are decoded at once; MOST: if strips or tiles are large
MOST = 2**26
HEIGHT, ROWS, TILE_WIDTH, TILE_HEIGHT = 257, 278, 322, 323  # TIFF tags
# tags of a TIFF that say how its samples are stored
NEEDED = (256, 258, 259, 262, 266, 277, 284, 292, 293, 317, 320, TILE_WIDTH, TILE_HEIGHT, 332, 338, 339, 347, 529, 530, 531, 532)
LONG = 4  # a type of TIFF values
HEADERS = {b'II': b'II*\0\x08\0\0\0', b'MM': b'MM\0*\0\0\0\x08'}  # of a TIFF whose tags come first
ENDS = 'the data end before the last row'
Pieces = Iterator[PIL.Image.Image]


def rows_of_part(width: int, step: int, pixels: int = PART) -> int:
    """How many rows of a picture are decoded at once: about so many pixels, and a multiple of `step`."""
    return max(1, pixels // (width * step)) * step


def is_plain_png(data: bytes) -> bool:
    """Whether this is the start of a PNG of 8 bits, not interlaced, with one frame."""
    names = [name for name, _, _ in itertools.takewhile(lambda each: each[0] != b'IDAT', chunks(data))]
    return data[:8] == b'\x89PNG\r\n\x1a\n' and data[24:29:4] == b'\x08\0' and names[:1] == [b'IHDR'] and b'acTL' not in names


def png_size(data: bytes) -> tuple[int, int]:
    """(width, height) by the header of a PNG."""
    return int.from_bytes(data[16:20], 'big'), int.from_bytes(data[20:24], 'big')


def png_like(data: bytes, height: int, rows: bytes) -> bytes:
    """A PNG that differs from another in its rows. rows: as filters leave them, not compressed."""
    parts, first = [data[:8]], True
    for name, start, end in chunks(data):
        if name == b'IHDR':
            parts.append(png_chunk(name, data[start + 8 : start + 12] + height.to_bytes(4, 'big') + data[start + 16 : end - 4]))
        elif name != b'IDAT':
            parts.append(data[start:end])
        elif first:
            parts.append(png_chunk(name, zlib.compress(rows, 0)))
            first = False
    return b''.join(parts)


def png_of_one_row(data: bytes) -> bytes:
    """A plain PNG with the header and the texts of another, and a single row."""
    return lean_png(png_like(data, 1, bytes(row_bytes(data))))[0]


def row_bytes(data: bytes) -> int:
    """Size of a row of a plain PNG with its filter, in bytes."""
    return png_bytes(png_size(data)[0], 1, data[24], data[25], False)


def png_pieces(data: bytes, rows: int) -> Pieces:
    """Yield a plain PNG in parts of this many rows, but for the last. Raises OSError if rows are missing.

    Filters refer to the row above, so a part begins with the last row of the one before, which is cut off afterwards.
    """
    (width, left), size = png_size(data), row_bytes(data)
    header = png_of_one_row(data)
    waiting, above = bytearray(), b''
    for some in unpacked(data):
        waiting += some
        while left and len(waiting) >= (count := min(left, rows)) * size:
            file = io.BytesIO(png_like(header, count + bool(above), above + waiting[: count * size]))
            del waiting[: count * size]
            piece: PIL.Image.Image = PngImageFile(file)
            piece.load()
            own = piece.crop((0, 1, width, count + 1)) if above else piece
            above = b'\0' + own.crop((0, count - 1, width, count)).tobytes()
            left -= count
            yield own
        if not left:
            return
    raise OSError(ENDS)


def tiff_pieces(page: Tiff, by: int, pixels: int = PART) -> Pieces | None:
    """A page of a TIFF in parts of about so many pixels, and of a multiple of `by` rows but for the last; not turned upright.

    None if its strips or tiles do not allow it.
    """
    layout, tags = page.layout, page.tags
    (width, height), kind = layout.size, int(PLACES[0][0] not in tags)  # 0: strips, 1: tiles
    starts, sizes = (ints(tags, pair[kind], ()) for pair in PLACES)
    if (
        not pillow_is_right(layout)
        or layout.planar
        or layout.compression == OLD_JPEG
        or (layout.compression, layout.photometric) == (PLAIN, YCBCR)
    ):
        return None
    if not 0 < layout.needed <= len(starts) == len(sizes) or not all(sizes):
        return None
    rows = min(height, ints(tags, TILE_HEIGHT if kind else ROWS, (height,))[0])
    if not kind and layout.compression == PLAIN and len(starts) == 1:  # every row may be a strip of its own
        rows, size = 1, -(-width * sum(layout.bits) // 8)
        starts, sizes = tuple(range(starts[0], starts[0] + height * size, size)), (size,) * height
    count = rows_of_part(width, math.lcm(rows, by), pixels)
    return None if count * width > MOST else tiff_parts(page, kind, starts, sizes, rows, count)


def tiff_parts(page: Tiff, kind: int, starts: Sequence[int], sizes: Sequence[int], rows: int, count: int) -> Pieces:
    """Yield `count` rows of a page at a time. Raises OSError if data are missing.

    kind: 0 for strips, 1 for tiles; starts, sizes: where they are in the file, in bytes; rows: of one of them.
    """
    width, height = page.size
    across = -(-width // ints(page.tags, TILE_WIDTH, (width,))[0]) if kind else 1
    for top in range(0, height, count):
        own = slice(top // rows * across, -(-min(top + count, height) // rows) * across)
        found = []
        for start, size in zip(starts[own], sizes[own], strict=True):
            page.file.seek(start)
            found.append(page.file.read(size))
            if len(found[-1]) < size:
                raise OSError(ENDS)
        data = tiff_like(page, kind, found, rows, min(count, height - top))
        piece = TiffImageFile(io.BytesIO(data))
        piece.load()
        if is_short_tiff(data, piece):
            raise OSError(ENDS)
        yield piece


def tiff_like(page: Tiff, kind: int, parts: Sequence[bytes], rows: int, height: int) -> bytes:
    """A TIFF whose samples are stored as those of a page, of these strips or tiles."""
    tags = ImageFileDirectory_v2(HEADERS[page.tags.prefix])
    for tag in NEEDED:
        if tag in page.tags:
            tags.tagtype[tag] = page.tags.tagtype[tag]
            tags[tag] = page.tags[tag]
    starts = tuple(itertools.accumulate(map(len, parts[:-1]), initial=0))
    places = {PLACES[0][kind]: starts, PLACES[1][kind]: tuple(map(len, parts)), HEIGHT: height, **({} if kind else {ROWS: rows})}
    for tag, value in places.items():
        tags.tagtype[tag] = LONG
        tags[tag] = value
    if kind:  # Pillow adds the size of the tags to where strips are, but not to where tiles are
        size = 8 + len(tags.tobytes(8))
        tags[PLACES[0][kind]] = tuple(size + start for start in starts)
    return HEADERS[page.tags.prefix] + tags.tobytes(8) + b''.join(parts)
