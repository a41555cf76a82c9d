"""A label map as one indexed PNG: VOC palette up to 255 regions, 16-bit grey above."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from padseg.errors import UsageError
from padseg.exports.colours import voc_colours
from padseg.exports.files import atomic

if TYPE_CHECKING:
    from padseg.types import Array
    from padseg.types import Image
    from padseg.types import LabelMap

SUFFIX = '.png'


def write(image: Image | None, labels: LabelMap, path: Path) -> None:
    """The exporter's form of `write_label_map`; the picture is not needed."""
    write_label_map(labels, path)


def write_label_map(labels: LabelMap, path: Path) -> None:
    """Write labels (H, W), 0..65535, as palette PNG, or as 16-bit grey if there are more than 255 regions."""
    highest = int(labels.labels.max())
    if highest > np.iinfo(np.uint16).max:
        raise ValueError(f'a PNG holds at most 65535 regions; got {highest}')
    if highest > np.iinfo(np.uint8).max:
        picture = PIL.Image.fromarray(labels.labels.astype(np.uint16))
    else:
        picture = PIL.Image.fromarray(labels.labels.astype(np.uint8))
        picture.putpalette(voc_colours().tobytes())
    with atomic(path) as temporary:
        picture.save(temporary, 'PNG')


def read_label_map(path: Path) -> Array:
    """Labels (H, W) int32 of an indexed or grey PNG. Raises UsageError for a file that holds no label map."""
    try:
        with PIL.Image.open(path, formats=('PNG',)) as picture:
            labels = np.asarray(picture)
    except PIL.UnidentifiedImageError as error:
        raise UsageError(f'{path} is no PNG') from error
    if labels.ndim != 2:
        raise UsageError(f'{path} is no label map: expected one channel, got shape {labels.shape}')
    return labels.astype(np.int32)
