"""Felzenszwalb and Huttenlocher's superpixels for pictures of any size."""

from __future__ import annotations

import cv2
from skimage.segmentation import felzenszwalb

from padseg.methods.stages.guided_filter import at_most
from padseg.methods.stages.runs import small_type
from padseg.types import Array, Image

SUPERPIXEL_AREA = 1_000_000  # pixels; superpixels of larger pictures are computed on a reduced copy


def superpixels_of(image: Image, scale: float, area: int = SUPERPIXEL_AREA) -> Array:
    """Felzenszwalb and Huttenlocher's graph-based superpixels: (H, W, 3) uint8 -> (H, W) int.

    area: pixels above which they are computed on a reduced copy.
    """
    small = at_most(image, area)
    found = felzenszwalb(small, scale=scale, sigma=0.8, min_size=max(1, round(scale / 2)))
    if small.shape == image.shape:
        return found
    return cv2.resize(found.astype(small_type(found.max())), image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
