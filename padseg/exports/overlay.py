"""The picture with its regions in colour and their boundaries in white, as JPEG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from padseg.errors import UsageError
from padseg.exports.colours import voc_colours
from padseg.exports.files import atomic
from padseg.images import ImageError

if TYPE_CHECKING:
    from padseg.types import Array
    from padseg.types import Image
    from padseg.types import LabelMap

SUFFIX = '.jpg'
QUALITY = 90
LONGEST = 65500  # pixels of a side that JPEG encoders take
SIDE_PER_LINE = 800  # pixels of picture for each pixel of boundary width, so that it is seen in large pictures too


def write(image: Image | None, labels: LabelMap, path: Path) -> None:
    """Write `overlay(image, labels)` as JPEG. Raises UsageError without an image, ImageError for one longer than JPEG allows."""
    if image is None:
        raise UsageError('an overlay needs the picture: export(labels, path, image)')
    if max(image.shape) > LONGEST:
        raise ImageError(f'an overlay is at most {LONGEST} pixels long; got {image.shape[1]}x{image.shape[0]}')
    drawn = cv2.cvtColor(overlay(image, labels.labels), cv2.COLOR_RGB2BGR)
    data = cv2.imencode('.jpg', drawn, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def overlay(image: Image, labels: Array) -> Array:
    """(H, W, 3) uint8: half picture, half the region's colour; pixels of label 0 stay as they are."""
    if image.shape[:2] != labels.shape:
        raise ValueError(f'picture and labels differ in size: {image.shape[:2]} and {labels.shape}')
    colours = voc_colours()[np.where(labels > 0, (labels - 1) % 255 + 1, 0)]  # (H, W, 3)
    drawn = cv2.addWeighted(image, 0.5, colours, 0.5, 0)
    drawn[labels == 0] = image[labels == 0]
    drawn[boundaries(labels)] = 255
    return drawn


def boundaries(labels: Array) -> Array:
    """(H, W) bool, true within about a line's width of where the label changes to the right or below."""
    edges = np.zeros(labels.shape, np.uint8)
    edges[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edges[:-1] |= labels[:-1] != labels[1:]
    width = max(1, max(labels.shape) // SIDE_PER_LINE)
    return cv2.dilate(edges, np.ones((width, width), np.uint8)) > 0
