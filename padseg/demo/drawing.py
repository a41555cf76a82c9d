"""Pictures and a legend for the page."""

from __future__ import annotations

import base64
import html
import math
import zlib

import cv2
import numpy as np

from padseg.exports.colours import voc_colours
from padseg.exports.overlay import inner_boundaries
from padseg.system.text import printable
from padseg.types import Array, Image, LabelMap

SIDE = 1024  # pixels of the longest side of a preview
DIMMED = 0.35  # brightness of what is not lit
COLUMNS = 11  # of the grid of maps: 77 are 7 rows
MOST_MAPS = 100
GAP, TOP = 4, 14  # pixels between maps, and above each one for its number
COARSE = 24  # smallest longer side of a map in the grid


def preview_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the preview of a picture (H, W, …), which is never larger than the picture."""
    scale = min(1.0, SIDE / max(shape[:2]))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def preview_labels(labels: Array) -> Array:
    """A label map (H, W) at the size of the preview, int32."""
    return cv2.resize(labels.astype(np.int32), preview_size(labels.shape)[::-1], interpolation=cv2.INTER_NEAREST)


def numbers_for_page(labels: Array) -> str:
    """The label map of the preview for hover.js: width, height, and rows of little-endian 32-bit numbers, in zlib and base64."""
    numbers = preview_labels(labels)
    packed = base64.b64encode(zlib.compress(numbers.astype('<u4').tobytes())).decode('ascii')
    return f'{numbers.shape[1]} {numbers.shape[0]} {packed}'


def preview(image: Image, labels: Array, opacity: float = 0.5, lit: int = 0) -> Array:
    """The picture (H, W, 3) with its regions (H, W) in colour, at most SIDE pixels long.

    opacity: of the colours, in 0..1, 0 leaves the boundaries alone; lit: a region that stays as it is while all else is dimmed, 0 for none.
    """
    size = preview_size(image.shape)
    small = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    numbers = preview_labels(labels)
    colours = voc_colours()[np.where(numbers > 0, (numbers - 1) % 255 + 1, 0)]  # (h, w, 3)
    drawn = cv2.addWeighted(small, 1 - opacity, colours, opacity, 0)
    drawn[numbers == 0] = small[numbers == 0]
    if lit:
        drawn = (drawn * DIMMED).astype(np.uint8)
        drawn[numbers == lit] = small[numbers == lit]
        outline = inner_boundaries((numbers == lit).astype(np.uint8), 3)
    else:
        outline = inner_boundaries(numbers)
    drawn[outline] = 255
    return drawn


def grid_of_maps(maps: Array) -> Array | None:
    """All maps (T, h, w) side by side, each from its lowest value, dark, to its highest, with its number; None for more than MOST_MAPS."""
    if len(maps) > MOST_MAPS:
        return None
    columns = min(COLUMNS, len(maps))
    side = (SIDE - GAP) // COLUMNS - GAP
    scale = side / max(maps.shape[1:])
    height, width = (max(1, round(length * scale)) for length in maps.shape[1:])
    rows = math.ceil(len(maps) / columns)
    drawn = np.full((GAP + rows * (TOP + height + GAP), GAP + columns * (width + GAP), 3), 255, np.uint8)
    for number, values in enumerate(maps):
        top, left = GAP + number // columns * (TOP + height + GAP), GAP + number % columns * (width + GAP)
        drawn[top + TOP : top + TOP + height, left : left + width] = heat(values, (height, width))
        cv2.putText(drawn, str(number), (left, top + TOP - 3), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (60, 60, 60), 1, cv2.LINE_AA)
    return drawn


def heat(values: Array, size: tuple[int, int]) -> Array:
    """A map (h, w) in Viridis' colours, of this size."""
    low, high = float(values.min()), float(values.max())
    scaled = ((values - low) / max(high - low, 1e-30) * 255).astype(np.uint8)
    enlarged = cv2.resize(scaled, size[::-1], interpolation=cv2.INTER_NEAREST)
    return cv2.cvtColor(cv2.applyColorMap(enlarged, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def legend(labels: LabelMap, shares: dict[int, float]) -> str:
    """HTML of the classes shown, with colour and share; names come from strangers."""
    colours = voc_colours()
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    rows = [
        f'<li style="display:flex;align-items:center;gap:.5em"><span style="width:1em;height:1em;flex:none;border:1px solid #777;'
        f'background:#{bytes(colours[(number - 1) % 255 + 1].tolist()).hex()}"></span>'
        f'{html.escape(printable(labels.names[number - 1]))} – {share:.1%}</li>'
        for number, share in ranked
    ]
    return f'<ul aria-label="Classes" style="list-style:none;padding:0;margin:0">{"".join(rows)}</ul>'
