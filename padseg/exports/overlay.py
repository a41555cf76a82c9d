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
from padseg.exports.png import encoded
from padseg.images import ImageError
from padseg.system.files import atomic
from padseg.system.text import printable

if TYPE_CHECKING:
    from padseg.types import Array, Image, LabelMap

SUFFIX = '.jpg'
QUALITY = 90
PART = 4_000_000  # pixels that are drawn at once
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
    cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR, dst=drawn)
    data = encoded('.jpg', drawn, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def overlay(image: Image, labels: Array) -> Array:
    """Blend picture and region colours half and half, (H, W, 3) uint8; pixels with label 0 stay unchanged."""
    if image.shape[:2] != labels.shape:
        raise ValueError(f'picture and labels differ in size: {image.shape[:2]} and {labels.shape}')
    drawn = np.empty_like(image)
    rows, width = max(1, PART // image.shape[1]), line_width(labels)
    for top in range(0, len(image), rows):
        some, before = np.s_[top : top + rows], min(top, width)
        colours = voc_colours()[np.where(labels[some] > 0, (labels[some] - 1) % 255 + 1, 0)]  # (rows, W, 3)
        drawn[some] = cv2.addWeighted(image[some], 0.5, colours, 0.5, 0)
        drawn[some][labels[some] == 0] = image[some][labels[some] == 0]
        lines = inner_boundaries(labels[top - before : top + rows + width + 1], width)
        drawn[some][lines[before : before + rows]] = 255
    return drawn


def with_legend(drawn: Array, labels: LabelMap) -> Array:
    """Add a legend in a corner of the overlay with colours and names of the classes shown, as many as fit."""
    size = max(LETTERS, min(drawn.shape[:2]) // LINES)
    shown = [int(number) for number in np.unique(labels.labels) if number][: drawn.shape[0] // (size + GAP)]
    if not shown:
        return drawn
    picture = PIL.Image.fromarray(drawn)
    pen, font, colours = ImageDraw.Draw(picture), ImageFont.load_default(size), voc_colours()
    names = {number: printable(labels.names[number - 1]) for number in shown}
    width = max(map(font.getlength, names.values()))
    pen.rectangle((0, 0, size + 3 * GAP + width, len(shown) * (size + GAP) + GAP), 'white')
    for place, number in enumerate(shown):
        top = GAP + place * (size + GAP)
        pen.rectangle((GAP, top, GAP + size, top + size), tuple(colours[(number - 1) % 255 + 1].tolist()))
        pen.text((2 * GAP + size, top), names[number], 'black', font)
    return np.array(picture)


def line_width(labels: Array) -> int:
    return max(1, max(labels.shape) // SIDE_PER_LINE)


def inner_boundaries(labels: Array, width: int | None = None) -> Array:
    """Boundary mask, (H, W) bool: true within about a line width of where the label changes to the right or below."""
    edges = np.zeros(labels.shape, np.uint8)
    edges[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edges[:-1] |= labels[:-1] != labels[1:]
    width = width or line_width(labels)
    return cv2.dilate(edges, np.ones((width, width), np.uint8)).view(bool)
