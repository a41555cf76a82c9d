"""A label map as one indexed PNG: VOC palette up to 255 regions, 16-bit grey above; and the encoding of other pictures."""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import PIL.Image
from PIL.PngImagePlugin import PngImageFile

from padseg.errors import UnreadableLabels
from padseg.exports.colours import voc_colours
from padseg.exports.enlarged import enlarged_rows, png, sources
from padseg.images import DAMAGE, ImageError, contents
from padseg.system.files import atomic

if TYPE_CHECKING:
    from padseg.types import Array, Image, LabelMap

SUFFIX = '.png'
INDEXED = ('P', 'L', '1', 'I;16', 'I')
STRETCHED = {'L;2': 85, 'L;4': 17}  # Pillow scales 2-bit and 4-bit greys by these factors to fill a byte


class TooManyRegions(ImageError, ValueError):
    """A label map that no PNG holds."""


def write(image: Image | None, labels: LabelMap, path: Path) -> None:
    """`write_label_map` with an exporter's signature; the picture is not needed."""
    write_label_map(labels, path)


def write_label_map(labels: LabelMap, path: Path, size: tuple[int, int] | None = None) -> None:
    """Write labels (H, W) as palette PNG, or as 16-bit grey if there are more than 255 regions. TooManyRegions if more than 65535.

    size: (H, W) of the file's label map, if larger.
    """
    highest = int(labels.labels.max())
    if highest > np.iinfo(np.uint16).max:
        raise TooManyRegions(f'a PNG holds at most 65535 regions; got {highest}')
    if size and size != labels.labels.shape:
        rows = enlarged_rows(
            labels.labels.astype('>u2' if highest > np.iinfo(np.uint8).max else np.uint8), sources(labels.labels.shape, size)
        )
        with atomic(path) as temporary:
            temporary.write_bytes(png(rows, size, 16) if highest > np.iinfo(np.uint8).max else png(rows, size, 8, voc_colours().tobytes()))
        return
    if highest > np.iinfo(np.uint8).max:
        picture = PIL.Image.fromarray(labels.labels.astype(np.uint16))
    else:
        picture = PIL.Image.fromarray(labels.labels.astype(np.uint8))
        picture.putpalette(voc_colours().tobytes())
    with atomic(path) as temporary:
        picture.save(temporary, 'PNG', compress_type=zlib.Z_RLE)  # five times as fast for a fifth more bytes


def encoded(suffix: str, pixels: Array, options: Sequence[int] = ()) -> bytes:
    """A picture in OpenCV's order of colours as a file of this suffix. ImageError if OpenCV cannot, as with sides of a million pixels."""
    try:
        done, data = cv2.imencode(suffix, pixels, options)
    except cv2.error as error:
        raise ImageError(f'cannot be written as {suffix}: {error.err}') from error
    if not done:
        raise ImageError(f'{pixels.shape[1]}x{pixels.shape[0]} pixels are too long or too wide for a {suffix} file')
    return data.tobytes()


def read_label_map(path: Path, size: tuple[int, int] | None = None) -> Array:
    """Labels (H, W), uint8, uint16 or int32: indices of a palette PNG or greys of a grey one. UnreadableLabels if it holds none.

    size: (H, W) that it has to have, which is found out before it is decoded; without it, Pillow's limit of pixels holds.
    """
    labels, rawmode = png_pixels(path, INDEXED, 'a label map has one channel, grey or with a palette', size)
    if labels.dtype == bool:
        return labels.astype(np.uint8)
    return labels // STRETCHED[rawmode] if rawmode in STRETCHED else labels


def png_pixels(path: Path, modes: tuple[str, ...], wanted: str, size: tuple[int, int] | None = None) -> tuple[Array, str]:
    """The pixels of a PNG in one of Pillow's modes, and how they are packed in the file. Raises UnreadableLabels."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Pillow warns about large pictures, but label maps may be large
        try:
            file = io.BytesIO(contents(path))
            with PngImageFile(file) if size else PIL.Image.open(file, formats=('PNG',)) as picture:
                if picture.mode not in modes:
                    raise UnreadableLabels(path, f'{wanted}; this is {picture.mode}')
                if size and picture.size != size[::-1]:
                    raise UnreadableLabels(path, 'differs in size from its picture')
                rawmode = str(picture.tile[0][3]) if picture.tile else ''
                return np.asarray(picture), rawmode
        except PIL.UnidentifiedImageError as error:
            raise UnreadableLabels(path, 'not a PNG') from error
        except ImageError as error:
            raise UnreadableLabels(path, str(error)) from error
        except MemoryError as error:
            raise UnreadableLabels(path, 'not enough memory to decode it') from error
        except (*DAMAGE, PIL.Image.DecompressionBombError) as error:
            raise UnreadableLabels(path, f'truncated or damaged: {error}') from error
