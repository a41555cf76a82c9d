"""Files to pictures: finding them in a folder, and decoding them to upright RGB or saying why not."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple
from typing import NoReturn

import numpy as np
import PIL.Image
import PIL.ImageOps

from padseg.errors import NoImages
from padseg.errors import PadsegError
from padseg.types import Image

Readable = Image | str | Path  # a picture, or where its file is

# The decoders that are let near a stranger's file; Pillow knows many more.
DECODERS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM')
SUFFIXES = frozenset('.jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm'.split())
MAX_PIXELS = 178_000_000  # just below where Pillow itself refuses
TIFF_BITS_PER_SAMPLE = 258
# What Pillow's decoders raise on damaged files: OSError for most, the rest from parsing headers.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, struct.error, zlib.error)


class ImageError(PadsegError):
    """A file that is no picture padseg can use; the message is the reason."""

    exit_code = 3


class Found(NamedTuple):
    """A picture's file. name: its POSIX path relative to the folder that was searched."""

    path: Path
    name: str


def find(source: Path, skip: Path | None = None) -> list[Found]:
    """The picture files in a folder and below, sorted by name; or the one file that `source` is. NoImages if there is no `source`.

    Hidden files, special files, linked folders and the folder `skip` are left out.
    """
    if source.is_file():
        return [Found(source, source.name)]
    if not source.is_dir():
        raise NoImages(f'there is no folder or picture {source}')
    hidden = skip.resolve() if skip else None
    found = []
    for folder, folders, files in os.walk(source, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != '.' and Path(folder, name).resolve() != hidden]
        paths = [Path(folder, name) for name in files if name[0] != '.' and Path(name).suffix.lower() in SUFFIXES]
        # A dangling link stays in, so that it is reported and not lost.
        found += [Found(path, path.relative_to(source).as_posix()) for path in paths if path.is_file() or not path.exists()]
    return sorted(found, key=lambda picture: picture.name)


def refuse(error: OSError) -> NoReturn:
    raise NoImages(f'cannot list {error.filename}: {error.strerror}') from error


def as_image(image: Readable) -> Image:
    """The picture itself, or the one that a path leads to. ValueError for an array that is no (H, W, 3) uint8 picture."""
    if isinstance(image, (str, Path)):
        return read(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f'expected a picture (H, W, 3) uint8; got shape {image.shape}, {image.dtype}')
    return image


def read(path: str | Path) -> Image:
    """The picture in a file, (H, W, 3) uint8 RGB, upright. Raises ImageError with the reason, OSError if the file cannot be read."""
    return decode(Path(path).read_bytes())


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image:
    """The picture in a file's bytes, its first frame, (H, W, 3) uint8 RGB, upright. Raises ImageError with the reason.

    max_pixels: larger pictures are refused before they are decoded.
    """
    if not data:
        raise ImageError('empty file')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # oddities that do not stop Pillow, and its own size warning: MAX_PIXELS decides
        try:
            picture = PIL.Image.open(io.BytesIO(data), formats=DECODERS)
        except PIL.UnidentifiedImageError as error:
            raise ImageError(f'not a picture that padseg reads ({", ".join(DECODERS)})') from error
        except PIL.Image.DecompressionBombError as error:
            raise ImageError(f'size exceeds {MAX_PIXELS} pixels') from error
        except DAMAGE as error:
            raise ImageError(f'truncated or damaged: {error}') from error
        if picture.width * picture.height > max_pixels:
            raise ImageError(f'size {picture.width}x{picture.height} exceeds {max_pixels} pixels')
        try:
            picture.load()
            return np.array(to_rgb(picture))  # (H, W, 3)
        except DAMAGE as error:
            raise ImageError(f'truncated or damaged: {error}') from error


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Upright RGB of a loaded picture of any mode: deep greys scaled to 8 bits, transparency laid on white."""
    highest = 2 ** depth(picture) - 1
    picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode.startswith('I'):
        grey = np.asarray(picture).astype(np.uint32)
        return PIL.Image.fromarray(((grey * 255 + highest // 2) // highest).astype(np.uint8)).convert('RGB')
    if picture.has_transparency_data:
        picture = picture.convert('RGBA')
        picture = PIL.Image.alpha_composite(PIL.Image.new('RGBA', picture.size, 'white'), picture)
    return picture.convert('RGB')


def depth(picture: PIL.Image.Image) -> int:
    """Bits of a sample. Raises ImageError for samples without a known range: floats and 32-bit integers."""
    if picture.mode == 'F' or (picture.mode == 'I' and picture.format == 'TIFF'):
        raise ImageError('float or 32-bit samples, whose range is not known')
    if not picture.mode.startswith('I'):
        return 8
    bits: tuple[int, ...] = getattr(picture, 'tag_v2', {}).get(TIFF_BITS_PER_SAMPLE, (16,))
    return bits[0]
