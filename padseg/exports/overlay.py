"""Draw regions in colour and their boundaries in white over the picture, as JPEG, with a legend of class names if there are any."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

from padseg.errors import UsageError
from padseg.exports.colours import voc_colours
from padseg.images import ImageError
from padseg.system.files import atomic

if TYPE_CHECKING:
    from padseg.types import Array, Image, LabelMap

SUFFIX = '.jpg'
QUALITY = 90
LONGEST = 65500  # longest side in pixels that JPEG encoders accept
LETTERS, LINES, GAP = 10, 28, 3  # of the legend: minimum letter height, lines per picture height, gap in pixels
SIDE_PER_LINE = 800  # picture pixels per pixel of boundary width, so that boundaries stay visible in large pictures


def write(image: Image | None, labels: LabelMap, path: Path) -> None:
    """Write `overlay(image, labels)` as JPEG. Raises UsageError without an image, ImageError for one too large for JPEG."""
    if image is None:
        raise UsageError('an overlay needs the picture: export(labels, path, image)')
    if max(image.shape) > LONGEST:
        raise ImageError(f'an overlay is at most {LONGEST} pixels long; got {image.shape[1]}x{image.shape[0]}')
    drawn = overlay(image, labels.labels)
    if labels.names:
        drawn = with_legend(drawn, labels)
    drawn = cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)
    data = cv2.imencode('.jpg', drawn, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def overlay(image: Image, labels: Array) -> Array:
    """Blend picture and region colours half and half, (H, W, 3) uint8; pixels with label 0 stay unchanged."""
    if image.shape[:2] != labels.shape:
        raise ValueError(f'picture and labels differ in size: {image.shape[:2]} and {labels.shape}')
    colours = voc_colours()[np.where(labels > 0, (labels - 1) % 255 + 1, 0)]  # (H, W, 3)
    drawn = cv2.addWeighted(image, 0.5, colours, 0.5, 0)
    drawn[labels == 0] = image[labels == 0]
    drawn[inner_boundaries(labels)] = 255
    return drawn


def with_legend(drawn: Array, labels: LabelMap) -> Array:
    """Add a legend in a corner of the overlay with colours and names of the classes shown, as many as fit."""
    size = max(LETTERS, min(drawn.shape[:2]) // LINES)
    shown = [int(number) for number in np.unique(labels.labels) if number][: drawn.shape[0] // (size + GAP)]
    if not shown:
        return drawn
    picture = PIL.Image.fromarray(drawn)
    pen, font, colours = ImageDraw.Draw(picture), ImageFont.load_default(size), voc_colours()
    width = max(font.getlength(labels.names[number - 1]) for number in shown)
    pen.rectangle((0, 0, size + 3 * GAP + width, len(shown) * (size + GAP) + GAP), 'white')
    for place, number in enumerate(shown):
        top = GAP + place * (size + GAP)
        pen.rectangle((GAP, top, GAP + size, top + size), tuple(colours[(number - 1) % 255 + 1].tolist()))
        pen.text((2 * GAP + size, top), labels.names[number - 1], 'black', font)
    return np.asarray(picture)


def inner_boundaries(labels: Array) -> Array:
    """Boundary mask, (H, W) bool: true within about a line width of where the label changes to the right or below."""
    edges = np.zeros(labels.shape, np.uint8)
    edges[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edges[:-1] |= labels[:-1] != labels[1:]
    width = max(1, max(labels.shape) // SIDE_PER_LINE)
    return cv2.dilate(edges, np.ones((width, width), np.uint8)) > 0
