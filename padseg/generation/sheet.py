"""Contact sheets: a row of pictures under each prompt; and the strip that shows how a picture came about."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

from padseg.evaluation.sheet import within
from padseg.images import ImageError, Reading, decode_apart
from padseg.system.files import atomic
from padseg.types import Image

ROWS, COLUMNS = 12, 8  # at most
SIDE = 192  # of a thumbnail at most, in pixels
GAP, LETTERS = 8, 13


class Row(NamedTuple):
    """A prompt with its pictures, at most COLUMNS: paths, None for one that is not there."""

    title: str
    pictures: Sequence[Path | None]


def write_sheet(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with the first ROWS rows. A picture that cannot be read leaves a grey square."""
    shown = [(row.title, [thumbnail(picture) for picture in row.pictures[:COLUMNS]]) for row in rows[:ROWS]]
    columns = max((len(cells) for _, cells in shown), default=0)
    side = max((length for _, cells in shown for cell in cells for length in cell.shape[:2]), default=SIDE)
    height, width = LETTERS + GAP + side + GAP, GAP + max(1, columns) * (side + GAP)
    drawn = PIL.Image.new('RGB', (width, GAP + len(shown) * height), 'white')
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(LETTERS)
    for number, (title, cells) in enumerate(shown):
        top = GAP + number * height
        pen.text((GAP, top), within(ascii(title)[1:-1], font, width - 2 * GAP), 'black', font)
        for column, cell in enumerate(cells):
            drawn.paste(PIL.Image.fromarray(cell), (GAP + column * (side + GAP), top + LETTERS + GAP))
    data = io.BytesIO()
    drawn.save(data, 'PNG')
    with atomic(path) as temporary:
        temporary.write_bytes(data.getvalue())


def thumbnail(path: Path | None) -> Image:
    """A picture reduced to SIDE pixels, if it is larger: (h, w, 3)."""
    read = None
    if path and not path.is_symlink():
        with contextlib.suppress(ImageError, OSError):
            read = decode_apart(path, Reading()).image
    if read is None:
        return np.full((SIDE, SIDE, 3), 224, np.uint8)
    scale = min(1.0, SIDE / max(read.shape[:2]))
    size = (max(1, round(read.shape[1] * scale)), max(1, round(read.shape[0] * scale)))
    return cv2.resize(read, size, interpolation=cv2.INTER_AREA).astype(np.uint8)


def strip(images: Sequence[Image]) -> Image:
    """Pictures of one size side by side."""
    return np.concatenate(images, axis=1)
