"""Edge-aware enlargement: token maps have one value for 16 x 16 pixels, the picture says where in between an edge runs."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from padseg.types import Array
from padseg.types import Image

AREA = 1_000_000  # pixels; on larger pictures the linear models are found on a reduced copy (He and Sun, Fast Guided Filter, 2015)
EPSILON = 1e-3  # variance of a guide in 0..1 below which a window counts as flat


class Guide(NamedTuple):
    """A picture as guide. image: (H, W, 3) uint8; small: (h, w, 3) float32 in 0..1, itself or reduced; mean: of its windows, (h, w, 3);
    inverse: of their covariance plus EPSILON, (h, w, 3, 3); radius: of the windows, in pixels of `small`."""

    image: Image
    small: Array
    mean: Array
    inverse: Array
    radius: int


def guide_of(image: Image, cells: tuple[int, ...]) -> Guide:
    """The guide for a map of `cells` (h, w) over this picture: its windows reach one cell in every direction."""
    height, width = image.shape[:2]
    reduce = min(1.0, (AREA / (height * width)) ** 0.5)
    size = max(1, round(width * reduce)), max(1, round(height * reduce))
    small = (cv2.resize(image, size, interpolation=cv2.INTER_AREA) if reduce < 1 else image).astype(np.float32) / 255
    radius = max(1, round(max(size[1] / cells[0], size[0] / cells[1])))
    mean = window_mean(small, radius)
    products = (small[..., :, None] * small[..., None, :]).reshape(*small.shape[:2], 9)
    covariance = window_mean(products, radius).reshape(*small.shape, 3) - mean[..., :, None] * mean[..., None, :]
    inverse = np.linalg.inv(covariance.astype(np.float64) + EPSILON * np.eye(3)).astype(np.float32)
    return Guide(image, small, mean, inverse, radius)


def guided(values: Array, guide: Guide) -> Array:
    """A map enlarged to the picture's size so that it follows its edges, (h, w) -> (H, W) float32.

    In every window the result is a linear function of the picture's colours (He et al., Guided Image Filtering, 2013, Eqs. 14-16).
    """
    mean, radius = guide.mean, guide.radius
    enlarged = cv2.resize(values.astype(np.float32), guide.small.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    level = window_mean(enlarged, radius)
    covariance = window_mean(guide.small * enlarged[..., None], radius) - mean * level[..., None]
    slope = np.einsum('hwij,hwj->hwi', guide.inverse, covariance)  # a, (h, w, 3)
    offset = level - (slope * mean).sum(2)  # b, (h, w)
    models = window_mean(np.dstack([slope, offset]), radius)  # (h, w, 4)
    size = guide.image.shape[1::-1]
    models = models if models.shape[1::-1] == size else cv2.resize(models, size, interpolation=cv2.INTER_LINEAR)
    return (models[..., :3] * guide.image).sum(2) / 255 + models[..., 3]


def window_mean(values: Array, radius: int) -> Array:
    """Mean over the square of `radius` around each pixel, as far as it lies in the picture: (h, w, …) float32, the same shape."""
    side = (2 * radius + 1, 2 * radius + 1)
    total = boxed(values, side)
    count = boxed(np.ones(values.shape[:2], np.float32), side)
    return total / (count if values.ndim == 2 else count[..., None])


def boxed(values: Array, side: tuple[int, int]) -> Array:
    """Sums over windows, one channel at a time."""
    if values.ndim == 2:
        return cv2.boxFilter(values, -1, side, normalize=False, borderType=cv2.BORDER_CONSTANT)
    return np.dstack([boxed(values[..., channel], side) for channel in range(values.shape[2])])
