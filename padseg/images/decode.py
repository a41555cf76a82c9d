"""Decode a file's bytes to an upright 8-bit RGB picture, within limits, with notes on conversions, or with the reason why it cannot be."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageChops
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
from padseg.images.pixels import CONVENTIONS, TURNS, Colours, Profile, factor, fits_range, is_deep, own_bounds, profile_of, to_rgb, to_void
from padseg.types import Array, Image


class Decoder(NamedTuple):
    """A file format: a pattern for its first bytes, and the class that decodes it."""

    start: re.Pattern[bytes]
    open: type[ImageFile]


# The decoders trusted with unknown files; Pillow has many more. Their classes are used directly because PIL.Image.open
# limits picture size with a process-wide setting, while each run has its own limit.
DECODERS = {
    'JPEG': Decoder(re.compile(rb'\xff\xd8\xff'), JpegImageFile),
    'PNG': Decoder(re.compile(rb'\x89PNG\r\n\x1a\n'), PngImageFile),
    'WEBP': Decoder(re.compile(rb'RIFF....WEBPVP8', re.DOTALL), WebPImageFile),
    'BMP': Decoder(re.compile(rb'BM'), BmpImageFile),
    'TIFF': Decoder(re.compile(rb'(?:II|MM)(?:[*+]\0|\0[*+])'), TiffImageFile),
    'GIF': Decoder(re.compile(rb'GIF8[79]a'), GifImageFile),
    'PPM': Decoder(re.compile(rb'P[1-6f]\s'), PpmImageFile),
}
MAX_PIXELS = 89_000_000
MAX_BYTES = 1_000_000_000
MAX_FRAMES = 1000  # per file; more means an attack or a film
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

    exif: whether to turn a picture upright as its EXIF data say, one of EXIF; frames: of an animation or multi-page file, one of FRAMES;
    value_range: sample values that become black and white, for pictures with float or 32-bit samples, which are rejected without it;
    background: RGB behind transparent parts; void: whether to report fully transparent pixels; shrink: reduce pictures with more pixels.
    """

    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES
    exif: str = 'apply'
    frames: str = 'first'
    value_range: tuple[float, float] | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    void: bool = False
    shrink: int | None = None


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

    JPEGs are reduced during decoding. Other formats take up to 4 bytes per pixel of the original picture plus the reduced one in memory.
    """
    if not data:
        raise ImageError('empty file')
    with reasons():
        picture = opened_file(io.BytesIO(data), reading)
        if frame == 0:
            return unpack(picture, reading, frame_notes(data, picture, reading))
        picture.seek(frame)
        check_size(picture, reading)
        return unpack(picture, reading, ())


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


def opened_file(file: IO[bytes], reading: Reading) -> ImageFile:
    """Open a picture file and check its header against the limits; the first frame is not decoded yet."""
    start = file.read(16)
    file.seek(0)
    decoder = next((decoder for decoder in DECODERS.values() if decoder.start.match(start)), None)
    if decoder is None:
        raise ImageError(f'not a picture that padseg reads ({", ".join(DECODERS)})')
    picture = decoder.open(file)
    check_size(picture, reading)
    return picture


def check_size(picture: PIL.Image.Image, reading: Reading) -> None:
    if picture.width * picture.height > reading.max_pixels:
        raise ImageError(f'size {picture.width}x{picture.height} exceeds {reading.max_pixels} pixels')


def count_frames(file: IO[bytes], reading: Reading) -> int:
    """Count the frames of an animation or pages of a TIFF, up to MAX_FRAMES + 1; counting ends with the first damaged one."""
    picture = opened_file(file, reading)
    if isinstance(picture, TiffImageFile):
        return count_pages(picture)
    try:
        return min(getattr(picture, 'n_frames', 1), MAX_FRAMES + 1)
    except DAMAGE:
        return picture.tell() + 2


def count_pages(picture: TiffImageFile) -> int:
    """As count_frames, for a TIFF. Pillow's own count takes minutes for very many pages."""
    for page in range(1, MAX_FRAMES + 1):
        try:
            picture.seek(page)
        except EOFError:
            return page
        except DAMAGE:
            return page + 1
    return MAX_FRAMES + 1


def frame_notes(data: bytes, picture: ImageFile, reading: Reading) -> tuple[str, ...]:
    """Note that there are more frames than the first. Raises ImageError if all are wanted and there are too many."""
    if not isinstance(picture, (GifImageFile, TiffImageFile)) and getattr(picture, 'n_frames', 1) == 1:
        return ()
    number = count_frames(io.BytesIO(data), reading)
    many = f'more than {MAX_FRAMES}' if number > MAX_FRAMES else str(number)
    if reading.frames == 'all' and number > MAX_FRAMES:
        raise ImageError(f'{many} frames')
    return (f'first of {many} frames',) if reading.frames == 'first' and number > 1 else ()


def unpack(picture: PIL.Image.Image, reading: Reading, notes: tuple[str, ...]) -> Decoded:
    """Decode a frame whose size was checked. Raises ImageError for samples of unknown range, and whatever Pillow raises for damage."""
    bounds = None
    if is_deep(picture):
        bounds = own_bounds(picture) or reading.value_range
        if bounds is None:
            raise ImageError('float or 32-bit samples of unknown range: give it with --value-range')
    turn, turn_notes = turning(picture, reading)
    profile, profile_notes = profile_for(picture)
    size = picture.size
    if reading.shrink and isinstance(picture, JpegImageFile):
        draft(picture, factor(size, reading.shrink))
    picture.load()
    loaded: PIL.Image.Image = picture
    if isinstance(picture, TiffImageFile):
        size = picture.size  # Pillow has turned it
    elif isinstance(picture, JpegImageFile) and picture.mode == 'CMYK' and 'adobe' not in picture.info:
        loaded = PIL.ImageChops.invert(picture)  # Pillow treats all CMYK as Adobe's, where 0 is full ink
    by = factor(picture.size, reading.shrink) if reading.shrink else 1
    image = TURNS[turn](to_rgb(loaded, Colours(bounds, profile, reading.background), by))
    void = to_void(loaded, by) if reading.void else None
    width, height = size[::-1] if turn >= 5 else size
    if image.shape[:2] != (height, width):
        notes = (*notes, f'reduced from {width}x{height}')
    void = None if void is None else np.ascontiguousarray(TURNS[turn](void))
    return Decoded(np.ascontiguousarray(image), void, (height, width), notes + turn_notes + profile_notes)


def turning(picture: PIL.Image.Image, reading: Reading) -> tuple[int, tuple[str, ...]]:
    """Key in TURNS for turning a loaded picture upright, and a note if the orientation cannot be read."""
    try:
        exif = picture.getexif()
    except DAMAGE:
        return 1, UNREADABLE_EXIF
    if not exif and picture.info.get('exif'):  # the JPEG decoder hides that parsing failed
        return 1, UNREADABLE_EXIF
    orientation = exif.get(Base.Orientation, 1)
    if not isinstance(orientation, int) or orientation not in TURNS:
        return 1, ()
    if isinstance(picture, TiffImageFile):  # Pillow turns these while loading
        return 1 if reading.exif == 'apply' else {6: 8, 8: 6}.get(orientation, orientation), ()
    return orientation if reading.exif == 'apply' else 1, ()


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


def draft(picture: JpegImageFile, by: int) -> None:
    """Have a JPEG reduced during decoding as far as possible, but at most by a factor of `by`."""
    scale = next((scale for scale in DRAFTS if scale <= by), 1)
    if scale > 1:
        picture.draft(None, (max(1, picture.width // scale), max(1, picture.height // scale)))
