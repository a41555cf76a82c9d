"""Check that files hold all the data their headers promise, where decoders silently fill in what is missing."""

from __future__ import annotations

import io
import itertools
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import PIL.Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from padseg.images.pixels import to_bytes

SHORT = 'truncated or damaged: the data end before the last row'
RESTARTS = range(0xD0, 0xD8)
AMONG_CODES = frozenset((0, 0xFF, *RESTARTS))  # may follow 0xff within the entropy-coded data of a JPEG scan
PROGRESSIVE = 0xC2
HUFFMAN = (0xC0, 0xC1, PROGRESSIVE)  # frame markers of the kinds of JPEG whose missing data decode as zeros
FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
SCAN, END, INTERVAL = 0xDA, 0xD9, 0xDD
ALONE = {0x01, 0xD8, END}  # markers without data
MAX_SCANS = 500  # as TurboJPEG's own limit; encoders make a dozen
MAX_SEGMENTS = 20_000
FILLER = bytes(range(1, 251)) * 4  # entropy-coded data that do not decode as zeros
MIDDLE = (126, 129)  # samples that missing data decode to, allowing for the rounding of colour conversions
COMPRESSION, AS_JPEG, JPEG_TABLES = 259, 7, 347  # TIFF tags, and a value of the first
PLACES = ((273, 324), (279, 325))  # tags of where data begin and how long they are, of strips and of tiles
CHUNK = 2**20
TEXTS = (b'tEXt', b'zTXt', b'iTXt')
NEEDED = (b'XML:com.adobe.xmp\0', b'Raw profile type exif\0')  # texts that may hold the orientation
HEAD = 100  # bytes; longer than any keyword
MAX_TEXT = 2**20  # bytes: Pillow's limit for a text or a colour profile


class Segment(NamedTuple):
    """A segment of a JPEG. code: of its marker; start, data, end: where the marker begins, where its data begin, and where they end."""

    code: int
    start: int
    data: int
    end: int


class Frame(NamedTuple):
    """The frame header of a JPEG. sampling: factors of each component, horizontal and vertical."""

    width: int
    height: int
    sampling: dict[int, tuple[int, int]]


def segments(data: bytes) -> Iterator[Segment]:
    """Yield the segments of a JPEG up to its end. The entropy-coded data of a scan lie between its segment and the next."""
    place = 2
    while (start := next_marker(data, place)) is not None:
        code = data[start + 1]
        begin = start + 2
        place = begin + (0 if code in ALONE else int.from_bytes(data[begin : begin + 2], 'big'))
        yield Segment(code, start, begin, place)
        if code == END:
            return


def next_marker(data: bytes, place: int) -> int | None:
    """Where the next marker begins, apart from those that may occur within entropy-coded data."""
    while (place := data.find(b'\xff', place)) >= 0 and place + 1 < len(data):
        if data[place + 1] not in AMONG_CODES:
            return place
        place += 1 if data[place + 1] == 0xFF else 2
    return None


def jpeg_fault(data: bytes) -> str | None:
    """What is wrong with a JPEG as a whole, in words; None if nothing is."""
    frame: Frame | None = None
    begun: set[int] = set()
    scans = interval = 0
    parts = list(itertools.islice(segments(data), MAX_SEGMENTS))
    for segment, following in zip(parts, [*parts[1:], None], strict=False):
        body = data[segment.data + 2 : segment.end]
        if segment.code == INTERVAL and len(body) >= 2:
            interval = int.from_bytes(body[:2], 'big')
        elif segment.code in FRAMES and frame is None and len(body) >= 6:
            frame = frame_of(body)
        elif segment.code == SCAN and len(body) >= 4 and frame:
            scans += 1
            names = body[1 : 1 + 2 * body[0] : 2]
            begun |= set(names) if body[-3] == 0 else set()  # this scan has the first coefficient
            codes = data[segment.end : following.start if following else len(data)]
            if interval and restarts(codes) < (units(frame, names) - 1) // interval:
                return SHORT
            if scans > MAX_SCANS:
                return f'more than {MAX_SCANS} scans'
    return None if frame and frame.sampling.keys() <= begun else SHORT


def lacks_scans(data: bytes) -> bool:
    """Whether a progressive JPEG ends before the scans that would bring all its coefficients to full precision.

    Such a file is legal (ITU-T T.81, G.1.1.1), and decoders do not complain, but it shows less than a whole one would.
    """
    missing: set[tuple[int, int]] = set()  # component, and place of the coefficient in zigzag order
    for segment in itertools.islice(segments(data), MAX_SEGMENTS):
        body = data[segment.data + 2 : segment.end]
        if segment.code == PROGRESSIVE and len(body) >= 6:
            missing = {(name, place) for name in frame_of(body).sampling for place in range(64)}
        elif segment.code == SCAN and len(body) >= 4 and body[-1] & 15 == 0:  # with the last bit
            missing -= {(name, place) for name in body[1 : 1 + 2 * body[0] : 2] for place in range(body[-3], body[-2] + 1)}
    return bool(missing)


def frame_of(body: bytes) -> Frame:
    components = {body[place]: (max(1, body[place + 1] >> 4), max(1, body[place + 1] & 15)) for place in range(6, len(body) - 2, 3)}
    return Frame(int.from_bytes(body[3:5], 'big'), int.from_bytes(body[1:3], 'big'), components)


def restarts(codes: bytes) -> int:
    return sum(codes.count(bytes((0xFF, number))) for number in RESTARTS)


def units(frame: Frame, names: bytes) -> int:
    """Number of units (MCUs) in a scan of these components: blocks for a single component, otherwise groups of blocks."""
    across, down = (max(factors) for factors in zip(*frame.sampling.values(), strict=True))
    if len(names) > 1:
        return -(-frame.width // (8 * across)) * -(-frame.height // (8 * down))
    own = frame.sampling.get(names[0], (across, down)) if names else (across, down)
    return -(-frame.width * own[0] // (8 * across)) * -(-frame.height * own[1] // (8 * down))


def is_short_jpeg(data: bytes, picture: JpegImageFile) -> bool:
    """Whether a loaded JPEG ends before its last row, that is, whether it changes when other data are appended to its scans."""
    corner = picture.getpixel((picture.width - 1, picture.height - 1))
    values = corner if isinstance(corner, tuple) else (corner or 0,)
    if not all(MIDDLE[0] <= value <= MIDDLE[1] for value in values):
        return False
    parts = list(segments(data))
    if not any(segment.code in HUFFMAN for segment in parts):
        return False
    pieces = []
    for segment, following in zip(parts, parts[1:], strict=False):
        pieces.append(data[segment.start : following.start])
        if segment.code == SCAN:
            pieces.append(FILLER)
    filled = JpegImageFile(io.BytesIO(data[:2] + b''.join(pieces) + data[parts[-1].start :]))
    if filled.size != picture.size:
        filled.draft(None, picture.size)
    filled.load()
    return filled.size != picture.size or any(
        not np.array_equal(np.asarray(picture.crop(strip)), np.asarray(filled.crop(strip))) for strip in strips_of(picture)
    )


def is_short_tiff(data: bytes, picture: TiffImageFile) -> bool:
    """Whether a strip or tile of a loaded TIFF with JPEG compression ends before its last row."""
    tags = picture.tag_v2
    if tags.get(COMPRESSION) != AS_JPEG:
        return False
    starts, sizes = (as_tuple(tags.get(strip, tags.get(tile, ()))) for strip, tile in PLACES)
    tables = bytes(tags.get(JPEG_TABLES, b''))
    for start, size in zip(starts, sizes, strict=False):
        part = data[start : start + size]
        whole = tables[:-2] + part[2:] if tables else part
        jpeg = JpegImageFile(io.BytesIO(whole))
        jpeg.load()
        if jpeg_fault(whole) or is_short_jpeg(whole, jpeg):
            return True
    return False


def as_tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def strips_of(picture: PIL.Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, CHUNK // picture.width)
    for top in range(0, picture.height, rows):
        yield 0, top, picture.width, min(top + rows, picture.height)


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each chunk of a PNG."""
    place = 8
    while place + 12 <= len(data):
        name, end = data[place + 4 : place + 8], place + 12 + int.from_bytes(data[place : place + 4], 'big')
        yield name, place, min(end, len(data))
        if name == b'IEND':
            return
        place = end


def png_chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, 'big') + name + body + zlib.crc32(body, zlib.crc32(name)).to_bytes(4, 'big')


def is_short_png(data: bytes, picture: PIL.Image.Image) -> bool:
    """Whether the data of a loaded PNG end before its last row."""
    last = picture.crop((0, picture.height - 1, picture.width, picture.height))
    interlaced = data[28] == 1
    if not interlaced and last.getbbox(alpha_only=False):
        return False  # missing rows would be zeros
    needed = png_bytes(picture.width, picture.height, data[24], data[25], interlaced)
    for some in unpacked(data):
        needed -= len(some)
        if needed <= 0:
            return False
    return True


def unpacked(data: bytes) -> Iterator[bytes]:
    """The rows of a PNG as filters leave them, in pieces of at most CHUNK bytes."""
    unpacker = zlib.decompressobj()
    for name, start, end in chunks(data):
        for first in range(start + 8, end - 4, CHUNK) if name == b'IDAT' else ():
            part = data[first : min(first + CHUNK, end - 4)]
            while part and not unpacker.eof:
                yield unpacker.decompress(part, CHUNK)
                part = unpacker.unconsumed_tail
    yield unpacker.flush()


def png_bytes(width: int, height: int, depth: int, colours: int, interlaced: bool) -> int:
    """Size of a PNG's rows before compression, in bytes."""
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    total = 0
    for left, top, across, down in passes if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        total += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    return total


def lean_png(data: bytes) -> tuple[bytes, bytes]:
    """Drop what padseg does not need from a PNG: texts, some of which Pillow refuses, and a colour profile that is too large.

    Returns the PNG and the start of the dropped profile, empty if there was none.
    """
    parts, profile = [data[:8]], b''
    for name, start, end in chunks(data):
        body = data[start + 8 : start + 8 + HEAD] if name in TEXTS or name == b'iCCP' else b''
        if name == b'iCCP' and unpacks_to_more(data[start + 8 : end - 4].partition(b'\0')[2][1:], MAX_TEXT):
            profile = body
        elif name not in TEXTS or (body.startswith(NEEDED) and end - start < MAX_TEXT and not is_bomb(name, data[start + 8 : end - 4])):
            parts.append(data[start:end])
    return b''.join(parts), profile


def is_bomb(name: bytes, body: bytes) -> bool:
    """Whether a text decompresses to more than Pillow accepts."""
    keyword, _, rest = body.partition(b'\0')
    if name == b'zTXt':
        return unpacks_to_more(rest[1:], MAX_TEXT)
    return name == b'iTXt' and rest[:1] == b'\1' and unpacks_to_more(rest[2:].split(b'\0', 2)[-1], MAX_TEXT)


def unpacks_to_more(data: bytes, most: int) -> bool:
    try:
        return len(zlib.decompressobj().decompress(data, most + 1)) > most
    except zlib.error:
        return False


def with_key_colour(picture: PIL.Image.Image, data: bytes) -> PIL.Image.Image:
    """Correct the transparent colour of a loaded PNG, which Pillow gets wrong for depths other than 8 bits."""
    depth, key = data[24], picture.info['transparency']
    if depth == 8 or picture.mode == 'P':
        return picture
    if depth < 8:
        copy = picture.copy()
        copy.info['transparency'] = (key if picture.mode != '1' else key // 255) * 255 // (2**depth - 1)
        return copy
    import cv2  # imported late because it is slow to import; needed because Pillow keeps only 8 bits of a colour

    samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if samples is None:
        raise OSError('OpenCV cannot read it')
    stored = samples[..., None] if samples.ndim == 2 else samples[..., 2::-1]  # (H, W, bands), in the order of the file
    clear = (stored == np.array(key, np.uint16)).all(-1)
    bands = [PIL.Image.fromarray(to_bytes(stored[..., 0], (0, 65535)))] if isinstance(key, int) else list(picture.split())
    return PIL.Image.merge('LA' if len(bands) == 1 else 'RGBA', [*bands, PIL.Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))])


def gif_frames(data: bytes, most: int) -> tuple[int, int]:
    """Number of frames in a GIF, up to `most`, and where the first one ends. A truncated frame counts."""
    place = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 128 else 0)
    count = first = 0
    while place < len(data) and count < most:
        kind = data[place]
        if kind == 0x3B:
            break
        if kind == 0x21:  # an extension
            place = after_blocks(data, place + 2)
        elif kind == 0x2C:  # a picture
            flags = data[place + 9] if place + 9 < len(data) else 0
            place = after_blocks(data, place + 11 + (3 << (flags & 7) + 1 if flags & 128 else 0))
            count += 1
            first = first or place
        else:
            place += 1
    return count, first


def after_blocks(data: bytes, place: int) -> int:
    while place < len(data) and data[place]:
        place += data[place] + 1
    return place + 1
