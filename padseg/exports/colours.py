"""The PASCAL VOC colour map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from padseg.types import Array


def voc_colours(count: int = 256) -> Array:
    """Colours of ids 0..count-1, (count, 3) uint8 RGB: an id's bits 0, 1, 2, then 3, 4, 5, … fill R, G, B from the highest bit down."""
    ids = np.arange(count)
    colours = np.zeros((count, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> (3 * place + channel) & 1) << (7 - place)).astype(np.uint8)
    return colours
