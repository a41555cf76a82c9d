"""Decode a file's bytes to an upright 8-bit RGB picture within limits, with notes on conversions, or give the reason why that fails."""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageChops
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from padseg.errors import PadsegError
from padseg.images.complete import (
    SHORT,
    gif_frames,
    is_short_jpeg,
    is_short_png,
    is_short_tiff,
    jpeg_fault,
    lacks_scans,
    lean_png,
    with_key_colour,
)
from padseg.images.finding import AVIF, HEIC, SUFFIXES
from padseg.images.parts import Pieces, is_plain_png, png_like, png_of_one_row, png_pieces, png_size, rows_of_part, tiff_pieces
from padseg.images.pixels import (
    CONVENTIONS,
    TURNS,
    Colours,
    Profile,
    factor,
    fits_range,
    is_clear,
    is_deep,
    own_bounds,
    profile_of,
    to_rgb,
    to_void,
)
from padseg.images.tiff import Tiff, UnknownRange, Unsupported
from padseg.types import Array, Image

Opened = ImageFile | Tiff  # a file whose header has been read
UNKNOWN_RANGE = 'float or 32-bit samples, whose range is not known: set it with --value-range'


class Decoder(NamedTuple):
    """A file format: a pattern for its first bytes, and the class that decodes it."""

    start: re.Pattern[bytes]
    open: Callable[[IO[bytes]], Opened]


def heic(file: IO[bytes]) -> ImageFile:
    """Open a HEIC file with pillow-heif, an optional library."""
    from pillow_heif import HeifImageFile

    picture: ImageFile = HeifImageFile(file)
    return picture


# The decoders trusted with unknown files; Pillow has many more. Their classes are used directly because PIL.Image.open
# limits picture size with a process-wide setting, while each run has its own limit.
DECODERS = {
    'JPEG': Decoder(re.compile(rb'\xff\xd8\xff'), JpegImageFile),
    'PNG': Decoder(re.compile(rb'\x89PNG\r\n\x1a\n'), PngImageFile),
    'WEBP': Decoder(re.compile(rb'RIFF....WEBPVP8', re.DOTALL), WebPImageFile),
    'BMP': Decoder(re.compile(rb'BM'), BmpImageFile),
    'TIFF': Decoder(re.compile(rb'(?:II|MM)(?:[*+]\0|\0[*+])'), Tiff),
    'GIF': Decoder(re.compile(rb'GIF8[79]a'), GifImageFile),
    'PPM': Decoder(re.compile(rb'P[1-6f]\s'), PpmImageFile),
    **({'AVIF': Decoder(re.compile(rb'....ftypavi[fs]', re.DOTALL), AvifImageFile)} if AVIF in SUFFIXES else {}),
    **({'HEIC': Decoder(re.compile(rb'....ftyp(?:hei[cfmsx]|mif1)', re.DOTALL), heic)} if HEIC in SUFFIXES else {}),
}
MAX_PIXELS = 89_000_000
MAX_TILED_PIXELS = 400_000_000  # where a picture is seen through windows
REDUCED = 4_000_000  # pixels that `reduce` leaves at least
MAX_BYTES = 1_000_000_000
MAX_FRAMES = 1000  # of one file; more suggests an attack or a film
ALL_FRAMES = 100  # all frames of an animation together may have this many times the pixels allowed for one picture
MAX_SECONDS = 30.0  # of processor time for one picture; the largest allowed picture takes a tenth of it
MAX_MEMORY = 2_000_000_000
EXIF = ('apply', 'ignore')
FRAMES = ('first', 'all')
UNREADABLE_EXIF = ('EXIF data not readable',)
DRAFTS = (8, 4, 2)  # the factors by which a JPEG can be reduced during decoding
# Raised by Pillow's decoders for damaged files: OSError for most, the rest while parsing headers.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, struct.error, zlib.error)


class ImageError(PadsegError):
    """A file that padseg cannot use as a picture; the message gives the reason."""

    exit_code = 3


class Reading(NamedTuple):
    """How files are read. max_pixels, max_bytes: limits; larger pictures and files are rejected before decoding or reading.

    exif: whether to turn a picture upright by its EXIF data, one of EXIF; frames: which frames or pages of a file to use, one of FRAMES;
    value_range: the sample values of black and white, without which pictures with float or 32-bit samples are refused; background: RGB
    behind transparent parts; void: report which pixels are fully transparent; shrink: reduce pictures of more pixels than this;
    reduce: reduce large pictures by up to this factor along each side, as far as REDUCED pixels are left.
    max_seconds, max_memory: limits of decoding, in seconds of processor time and in bytes beyond the file's own; they hold only where
    pictures are decoded in a separate process.
    """

    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES
    exif: str = 'apply'
    frames: str = 'first'
    value_range: tuple[float, float] | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    void: bool = False
    shrink: int | None = None
    reduce: int = 1
    max_seconds: float = MAX_SECONDS
    max_memory: int = MAX_MEMORY


class Decoded(NamedTuple):
    """A picture (H, W, 3). notes: conversions beyond plain decoding, in words.

    void: (H, W) bool, where it is fully transparent; None if nowhere or not requested. size: (H, W) of the file's upright picture before
    reduction.
    """

    image: Image
    void: Array | None
    size: tuple[int, int]
    notes: tuple[str, ...]


def decode(data: bytes, reading: Reading = Reading(), frame: int = 0) -> Image:
    """Decode a picture to (H, W, 3) uint8 RGB, upright. Raises ImageError with the reason."""
    return decode_with_notes(data, reading, frame).image


def decode_pillow(picture: PIL.Image.Image) -> Image:
    """Convert a Pillow image to (H, W, 3) uint8 RGB by the rules for files: upright, on white where transparent. Raises ImageError."""
    with reasons():
        check_size(picture, Reading())
        return unpack(picture, Reading(), ()).image


def decode_with_notes(data: bytes, reading: Reading = Reading(), frame: int = 0) -> Decoded:
    """Decode a picture, with notes on conversions. Raises ImageError with the reason.

    JPEGs are reduced during decoding, most PNGs and TIFFs in parts of rows. Others take up to 4 bytes per pixel of the original picture
    plus the reduced one in memory.
    """
    if not data:
        raise ImageError('empty file')
    with reasons():
        return decode_frame(opened_bytes(data, reading), data, reading, frame)


def decode_frame(picture: Opened, data: bytes, reading: Reading, frame: int, step: Callable[[], None] = lambda: None) -> Decoded:
    """Decode a frame of an open file, which stands at an earlier frame or the first. step: called after each frame in between.

    Raises ImageError, and what Pillow raises for damaged files.
    """
    if frame == 0:
        return unpack(picture, reading, frame_notes(data, picture, reading), data)
    go_to(picture, frame, step)
    check_size(picture, reading)
    return unpack(picture, reading, ())


def go_to(picture: Opened, frame: int, step: Callable[[], None]) -> None:
    """Move an open file to a later frame. The frames of an animation build on earlier ones, so these are decoded too."""
    if not isinstance(picture, Tiff):
        for number in range(picture.tell() + 1, frame):
            picture.seek(number)
            picture.load()
            step()
    picture.seek(frame)


@contextlib.contextmanager
def reasons() -> Iterator[None]:
    """Turn exceptions from decoding into ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # oddities that Pillow can handle
            yield
    except PIL.Image.DecompressionBombError as error:
        raise ImageError('more pixels than Pillow reads from this kind of file') from error
    except MemoryError as error:
        raise ImageError('not enough memory to decode it: try --shrink, or fewer --workers') from error
    except DAMAGE as error:
        raise ImageError(f'truncated or damaged: {error}') from error


def opened_bytes(data: bytes, reading: Reading) -> Opened:
    """Open a file's bytes as `opened_file` does. Raises ImageError also for faults of a JPEG as a whole."""
    if is_kind(data, 'JPEG') and (fault := jpeg_fault(data)):
        raise ImageError(fault)
    if is_kind(data, 'PNG'):
        data, too_large = lean_png(png_like(data, png_size(data)[1], b'') if in_parts(data, reading) else data)
        picture = opened_file(io.BytesIO(data), reading)
        if too_large and isinstance(picture, PngImageFile):
            picture.info['icc_profile'] = too_large
        return picture
    if is_kind(data, 'GIF') and reading.frames == 'first' and (end := gif_frames(data, 1)[1]):
        data = data[:end] + b';'  # or Pillow would fill a truncated first frame from the frames after it
    return opened_file(io.BytesIO(data), reading)


def in_parts(data: bytes, reading: Reading) -> bool:
    """Whether this is a PNG that is reduced in parts."""
    return is_plain_png(data) and reduction(png_size(data), reading) > 1


def is_kind(data: bytes, kind: str) -> bool:
    return DECODERS[kind].start.match(data) is not None


def opened_file(file: IO[bytes], reading: Reading) -> Opened:
    """Read a file's header and check it against the limits. The first frame is not decoded yet."""
    start = file.read(16)
    file.seek(0)
    decoder = next((decoder for decoder in DECODERS.values() if decoder.start.match(start)), None)
    if decoder is None:
        raise ImageError(f'not a picture that padseg reads ({", ".join(DECODERS)})')
    picture = decoder.open(file)
    check_size(picture, reading)
    return picture


def check_size(picture: PIL.Image.Image | Tiff, reading: Reading) -> None:
    width, height = picture.size
    if width * height > reading.max_pixels:
        raise ImageError(f'size {width}x{height} exceeds {reading.max_pixels} pixels')


def count_frames(file: IO[bytes], reading: Reading) -> int:
    """Count the frames of an animation or pages of a TIFF, up to MAX_FRAMES + 1; counting ends with the first damaged one."""
    picture = opened_file(file, reading)
    if isinstance(picture, Tiff):
        return count_pages(picture)
    if isinstance(picture, GifImageFile):
        file.seek(0)
        return gif_frames(file.read(), MAX_FRAMES + 1)[0]
    try:
        return min(getattr(picture, 'n_frames', 1), MAX_FRAMES + 1)
    except DAMAGE:
        return picture.tell() + 2


def frames_to_read(file: IO[bytes], reading: Reading) -> int:
    """Count frames as `count_frames` does, but return MAX_FRAMES + 1 also if the frames have too many pixels together."""
    number = count_frames(file, reading)
    file.seek(0)
    return MAX_FRAMES + 1 if are_too_large(opened_file(file, reading), number, reading) else number


def count_pages(picture: Tiff) -> int:
    """Count the pages of a TIFF, up to MAX_FRAMES + 1."""
    for page in range(1, MAX_FRAMES + 1):
        try:
            picture.seek(page)
        except EOFError:
            return page
        except DAMAGE:
            return page + 1
    return MAX_FRAMES + 1


def are_too_large(picture: Opened, frames: int, reading: Reading) -> bool:
    """Whether the frames of an animation have too many pixels together, which a small file can hold. Pages of a TIFF differ in size."""
    width, height = picture.size
    return not isinstance(picture, Tiff) and frames * width * height > ALL_FRAMES * reading.max_pixels


def frame_notes(data: bytes, picture: Opened, reading: Reading) -> tuple[str, ...]:
    """A note if only the first of several frames is used. Raises ImageError if all are wanted and there are too many."""
    if not isinstance(picture, (GifImageFile, Tiff)) and getattr(picture, 'n_frames', 1) == 1:
        return ()
    number = count_frames(io.BytesIO(data), reading)
    many = f'more than {MAX_FRAMES}' if number > MAX_FRAMES else str(number)
    if reading.frames == 'all' and number > MAX_FRAMES:
        raise ImageError(f'{many} frames')
    if reading.frames == 'all' and are_too_large(picture, number, reading):
        width, height = picture.size
        raise ImageError(f'{many} frames of {width}x{height} have more than {ALL_FRAMES * reading.max_pixels} pixels together')
    return (f'first of {many} frames',) if reading.frames == 'first' and number > 1 else ()


def is_short(picture: PIL.Image.Image, data: bytes) -> bool:
    """Whether a loaded picture lacks rows at its end without Pillow having said so."""
    if not data:  # a picture that the caller opened
        return False
    if isinstance(picture, JpegImageFile):
        return is_short_jpeg(data, picture)
    if isinstance(picture, TiffImageFile):
        return is_short_tiff(data, picture)
    return isinstance(picture, PngImageFile) and not getattr(picture, 'is_animated', False) and is_short_png(data, picture)


def unpack(picture: PIL.Image.Image | Tiff, reading: Reading, notes: tuple[str, ...], data: bytes = b'') -> Decoded:
    """Decode a frame whose size has been checked. Raises ImageError for samples of unknown range, and Pillow's errors for damaged files."""
    pieces: Pieces | None = None
    size, by = picture.size, reduction(picture.size, reading)
    if isinstance(picture, Tiff):
        pieces = tiff_pieces(picture, by) if by > 1 else None
        picture = page_of(picture, reading)
    elif in_parts(data, reading):
        pieces = png_pieces(data, rows_of_part(size[0], by))
    seen = (
        PngImageFile(io.BytesIO(png_of_one_row(data))) if pieces and isinstance(picture, PngImageFile) else picture
    )  # others load to tell
    bounds = None
    if is_deep(picture):
        bounds = own_bounds(picture) or reading.value_range
        if bounds is None:
            raise ImageError(UNKNOWN_RANGE)
    turn, turn_notes = turning(seen, reading, pieces is None)
    profile, profile_notes = profile_for(picture)
    if pieces is None:
        if by > 1 and isinstance(picture, JpegImageFile):
            draft(picture, by, reading.shrink is None)
        picture.load()
        if is_short(picture, data):
            raise ImageError(SHORT)
        if isinstance(picture, TiffImageFile):
            size = picture.size  # Pillow has turned it
        if reading.shrink:
            by = factor(picture.size, reading.shrink)
        elif isinstance(picture, JpegImageFile):
            by = max(1, round(by * picture.width / size[0]))  # what is left after the draft
        pieces = iter([as_meant(picture, data)])
    image, void, clear = reduced_rows(pieces, Colours(bounds, profile, reading.background), by, reading.void)
    image = TURNS[turn](image)
    notes += ('wholly transparent',) if clear else ()
    notes += ('progressive, without its last scans',) if isinstance(picture, JpegImageFile) and lacks_scans(data) else ()
    width, height = size[::-1] if turn >= 5 else size
    if image.shape[:2] != (height, width):
        notes = (*notes, f'reduced from {width}x{height}')
    void = None if void is None else np.ascontiguousarray(TURNS[turn](void))
    return Decoded(np.ascontiguousarray(image), void, (height, width), notes + turn_notes + profile_notes)


def reduced_rows(pieces: Pieces, colours: Colours, by: int, void: bool) -> tuple[Image, Array | None, bool]:
    """What `to_rgb`, `to_void` (if `void`) and `is_clear` say of a picture in parts of rows."""
    found = [(to_rgb(piece, colours, by), to_void(piece, by) if void else None, is_clear(piece)) for piece in pieces]
    images, voids, clear = zip(*found, strict=True)
    if len(found) == 1:
        return found[0]
    clears = [np.zeros(image.shape[:2], bool) if own is None else own for image, own in zip(images, voids, strict=True)]
    return np.concatenate(images), np.concatenate(clears) if any(own is not None for own in voids) else None, all(clear)


def as_meant(picture: PIL.Image.Image, data: bytes) -> PIL.Image.Image:
    """Correct a loaded picture where Pillow misreads its format."""
    if isinstance(picture, JpegImageFile) and picture.mode == 'CMYK' and 'adobe' not in picture.info:
        return PIL.ImageChops.invert(picture)  # Pillow takes all CMYK for Adobe's, in which 0 is full ink
    if isinstance(picture, BmpImageFile) and picture.mode == 'RGBA' and picture.getchannel('A').getextrema() == (0, 0):
        return picture.convert('RGB')  # many programs leave the fourth byte of a pixel empty
    if isinstance(picture, PngImageFile) and data and isinstance(picture.info.get('transparency'), (int, tuple)):
        return with_key_colour(picture, data)
    return picture


def page_of(picture: Tiff, reading: Reading) -> PIL.Image.Image:
    """The page of a TIFF as a picture, not necessarily loaded yet. Raises ImageError for a layout that padseg does not read."""
    try:
        return picture.picture(reading.value_range)
    except UnknownRange as error:
        raise ImageError(UNKNOWN_RANGE) from error
    except Unsupported as error:
        raise ImageError(str(error)) from error


def turning(picture: PIL.Image.Image, reading: Reading, whole: bool) -> tuple[int, tuple[str, ...]]:
    """Key in TURNS for turning a picture upright that is loaded `whole` or in parts, and a note if the orientation cannot be read."""
    try:
        exif = picture.getexif()
    except DAMAGE:
        return 1, UNREADABLE_EXIF
    if not exif and picture.info.get('exif'):  # the JPEG decoder hides a failed parse
        return 1, UNREADABLE_EXIF
    orientation = exif.get(Base.Orientation, 1)
    if not isinstance(orientation, int) or orientation not in TURNS:
        return 1, ()
    by_xmp = orientation != 1 and not names_orientation(picture)
    notes = ('turned as its XMP data say',) if by_xmp and reading.exif == 'apply' else ()
    if whole and isinstance(picture, TiffImageFile):  # Pillow turns these while loading
        return 1 if reading.exif == 'apply' else {6: 8, 8: 6}.get(orientation, orientation), notes
    return orientation if reading.exif == 'apply' else 1, notes


def names_orientation(picture: PIL.Image.Image) -> bool:
    """Whether the EXIF data hold an orientation. If not, Pillow uses the XMP data."""
    if isinstance(picture, TiffImageFile):
        return Base.Orientation in picture.tag_v2
    if 'exif' not in picture.info:
        return 'xmp' not in picture.info and 'XML:com.adobe.xmp' not in picture.info
    exif = PIL.Image.Exif()
    exif.load(picture.info['exif'])
    return Base.Orientation in exif


def profile_for(picture: PIL.Image.Image) -> tuple[Profile, tuple[str, ...]]:
    """Return a picture's embedded colour profile, if usable, and notes on how colours are converted."""
    plainly = (f'converted from {picture.mode}',) if picture.mode in CONVENTIONS else ()
    data = picture.info.get('icc_profile')
    if not data:
        return Profile(), plainly
    profile = profile_of(data)
    if not fits_range(profile, picture):
        return Profile(), (*plainly, 'colour profile not used')
    return profile, ('converted by its colour profile',) if profile.transform else ()


def reduction(size: tuple[int, int], reading: Reading) -> int:
    """By how much a picture (width, height) is reduced along each side."""
    if reading.shrink:
        return factor(size, reading.shrink)
    return max(1, min(reading.reduce, math.isqrt(size[0] * size[1] // REDUCED)))


def draft(picture: JpegImageFile, by: int, exactly: bool) -> None:
    """Have a JPEG reduced during decoding as far as possible, but at most by a factor of `by`, or exactly: by one that divides it."""
    scale = next((scale for scale in DRAFTS if scale <= by and not (exactly and by % scale)), 1)
    if scale > 1:
        picture.draft(None, (max(1, picture.width // scale), max(1, picture.height // scale)))
