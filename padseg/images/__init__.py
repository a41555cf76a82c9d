"""Find picture files in a folder and read them."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image

from padseg.errors import UsageError
from padseg.images.apart import count_apart, decode_apart, size_apart, start_decoding
from padseg.images.complete import png_chunk
from padseg.images.decode import (
    DAMAGE,
    DECODERS,
    EXIF,
    FRAMES,
    MAX_BYTES,
    MAX_FRAMES,
    MAX_MEMORY,
    MAX_PIXELS,
    MAX_SECONDS,
    MAX_TILED_PIXELS,
    Decoded,
    ImageError,
    Reading,
    decode,
    decode_pillow,
    decode_with_notes,
)
from padseg.images.files import contents
from padseg.images.finding import HEIC, LINKED, SUFFIXES, Found, Listing, find, in_words, listing, refuse
from padseg.types import Array, Image

# The rest of the package imports everything about pictures from here.
__all__ = [
    'DAMAGE',
    'DECODERS',
    'EXIF',
    'FRAMES',
    'HEIC',
    'LINKED',
    'MAX_BYTES',
    'MAX_FRAMES',
    'MAX_MEMORY',
    'MAX_PIXELS',
    'MAX_SECONDS',
    'MAX_TILED_PIXELS',
    'SUFFIXES',
    'Decoded',
    'Found',
    'ImageError',
    'Listing',
    'Readable',
    'Reading',
    'WrongPicture',
    'as_image',
    'as_images',
    'collisions',
    'contents',
    'count_apart',
    'decode',
    'decode_apart',
    'decode_with_notes',
    'file_and_frame',
    'find',
    'frames_of',
    'ignores_case',
    'in_words',
    'listing',
    'png_chunk',
    'read',
    'refuse',
    'size_apart',
    'start_decoding',
]

Readable = Image | PIL.Image.Image | str | Path | IO[bytes]  # a picture, or its file
KINDS = 'a picture is a path, a file opened in binary mode, a PIL image, or a uint8 array (H, W), (H, W, 3) RGB or (H, W, 4) RGBA'
FRAME = re.compile(r'(.+)\.f(\d{4})', re.DOTALL)


class WrongPicture(UsageError, ValueError):
    """An argument that is not a picture; the message lists what is accepted."""


def frames_of(picture: Found, reading: Reading) -> list[Found]:
    """Return a file's frames as pictures `a.gif.f0000`, `a.gif.f0001`, … if all are wanted and there are several, else the file itself.

    A file that cannot be read or has more than MAX_FRAMES frames also stays one picture; decoding it reports the error.
    """
    if reading.frames == 'first':
        return [picture]
    try:
        number = count_apart(picture.path, reading)
    except (ImageError, OSError):
        return [picture]
    if not 1 < number <= MAX_FRAMES:
        return [picture]
    return [Found(picture.path, f'{picture.name}.f{frame:04d}', frame) for frame in range(number)]


def file_and_frame(name: str) -> tuple[str, int]:
    """Split a picture's name into file name and frame number: `a.gif.f0003` is frame 3 of `a.gif`."""
    match = FRAME.fullmatch(name)  # no picture file has such a suffix
    return (match[1], int(match[2])) if match else (name, 0)


def collisions(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that are equal if case and accent encoding are ignored: the first in order, and each other one."""
    first: dict[str, str] = {}
    pairs = []
    for name in sorted(set(names)):
        plain = unicodedata.normalize('NFC', unicodedata.normalize('NFD', name).casefold())
        if first.setdefault(plain, name) != name:
            pairs.append((first[plain], name))
    return pairs


def ignores_case(folder: Path) -> bool:
    """Test with a temporary file whether a folder treats `a` and `A` as the same name. OSError if the folder is not writable."""
    with tempfile.NamedTemporaryFile(prefix='.case-', dir=folder) as file:
        path = Path(file.name)
        return path.with_name(path.name.swapcase()).exists()


def as_images(image: Any) -> list[Image]:
    """Convert a picture, or a list or tuple of them, to a list of images."""
    return [as_image(picture) for picture in image] if isinstance(image, (list, tuple)) else [as_image(image)]


def as_image(image: Readable) -> Image:
    """Convert a picture in any accepted form to (H, W, 3) uint8 RGB.

    Paths, open files and PIL images are read as by `read`: upright, transparent parts on white. Arrays are (H, W) grey, (H, W, 3) RGB or
    (H, W, 4) RGBA uint8. Raises WrongPicture for anything else, ImageError for a file that is not a picture, and OSError.
    """
    if isinstance(image, (str, Path)):
        return read(image)
    if isinstance(image, PIL.Image.Image):
        return decode_pillow(image)
    if isinstance(image, np.ndarray):
        return from_array(image)
    if hasattr(image, 'read'):
        return from_file(image)
    raise WrongPicture(f'{KINDS}; got {type(image).__name__}')


def from_array(array: Array) -> Image:
    """Convert an array of samples to a picture."""
    form = f'{array.dtype} of shape {array.shape}'
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise WrongPicture(f'{KINDS}; got an array of {form}')
    if array.ndim == 3 and array.shape[2] == 3:
        return np.ascontiguousarray(array)
    return decode_pillow(PIL.Image.fromarray(np.ascontiguousarray(array)))


def from_file(file: Any) -> Image:
    """Read a picture from a file opened in binary mode, from its current position."""
    data = file.read(MAX_BYTES + 1)
    if not isinstance(data, bytes):
        raise WrongPicture(f'{KINDS}; got a file opened as text: open it with "rb"')
    if len(data) > MAX_BYTES:
        raise ImageError(f'file exceeds {MAX_BYTES} bytes')
    return decode(data, Reading())


def read(path: str | Path, reading: Reading = Reading()) -> Image:
    """Read a picture file as (H, W, 3) uint8 RGB, upright. Raises ImageError with the reason, OSError if the file cannot be read."""
    return decode(contents(Path(path), reading), reading)
