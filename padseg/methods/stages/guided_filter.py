"""Edge-aware enlargement: token maps have one value per 16 x 16 pixels, and the picture shows where in between an edge runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from padseg.methods.stages.enlarging import strips, upsample
from padseg.types import Array, Image

AREA = 1_000_000  # pixels; larger pictures are reduced to fit the linear models (He and Sun, Fast Guided Filter, 2015)
EPSILON = 1e-3  # variance, for a guide in 0..1, below which a window counts as flat


class Guide(NamedTuple):
    """A guide picture. image: (H, W, 3) uint8; small: (3, h, w) float32 in 0..1, the picture itself or reduced.

    mean: of each window, (3, h, w); inverse: of each window's covariance plus EPSILON, (3, 3, h, w); radius: of the windows, in pixels of
    `small`.
    """

    image: Image
    small: Array
    mean: Array
    inverse: Array
    radius: int


def at_most(image: Image, area: int) -> Array:
    """Return the picture (H, W, 3), reduced to about `area` pixels if it has more."""
    reduce = (area / (image.shape[0] * image.shape[1])) ** 0.5
    size = max(1, round(image.shape[1] * reduce)), max(1, round(image.shape[0] * reduce))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA) if reduce < 1 else image


def guide_of(image: Image, cells: tuple[int, ...]) -> Guide:
    """Prepare a picture as guide for a map of `cells` (h, w); its windows reach one cell in every direction."""
    height, width = image.shape[:2]
    reduced = at_most(image, AREA)
    size = reduced.shape[1::-1]
    small = np.ascontiguousarray(reduced.transpose(2, 0, 1), np.float32) / 255  # (3, h, w)
    radius = max(1, round(max(size[1] / cells[0], size[0] / cells[1])))
    mean = window_mean(small, radius)
    covariance = window_mean(small[:, None] * small[None], radius) - mean[:, None] * mean[None]  # (3, 3, h, w)
    matrices = covariance.transpose(2, 3, 0, 1).astype(np.float64) + EPSILON * np.eye(3)  # (h, w, 3, 3)
    inverse = np.ascontiguousarray(np.linalg.inv(matrices).transpose(2, 3, 0, 1), np.float32)
    return Guide(image, small, mean, inverse, radius)


def guided(values: Array, guide: Guide) -> Iterator[tuple[slice, Array]]:
    """Enlarge a map to the picture's size so that it follows the picture's edges, (h, w) -> (H, W) float32, in strips of columns.

    In every window the result is a linear function of the picture's colours (He et al., Guided Image Filtering, 2013, Eqs. 14-16).
    """
    small, mean, radius = guide.small, guide.mean, guide.radius
    enlarged = cv2.resize(values.astype(np.float32), small.shape[:0:-1], interpolation=cv2.INTER_LINEAR)
    level, *products = window_mean(np.stack([enlarged, *(small * enlarged)]), radius)
    slope = (guide.inverse * (products - mean * level)).sum(1)  # a, (3, h, w)
    offset = level - (slope * mean).sum(0)  # b, (h, w)
    models = window_mean(np.stack([*slope, offset]), radius)  # (4, h, w)
    size = guide.image.shape[:2]
    for columns in strips(size):
        result = np.zeros(guide.image[:, columns].shape[:2], np.float32)
        for channel, model in enumerate(models[:3]):
            part = upsample(model, size, columns)
            part *= guide.image[:, columns, channel]
            result += part
        result /= 255
        result += upsample(models[3], size, columns)
        yield columns, result


def window_mean(values: Array, radius: int) -> Array:
    """Mean over the square of `radius` around each pixel, clipped at the border: (…, h, w) float32, same shape."""
    side = tuple(2 * min(radius, length - 1) + 1 for length in values.shape[:-3:-1])  # farther out, OpenCV would add zeros one by one
    count = boxed(np.ones(values.shape[-2:], np.float32), side)
    planes = values.reshape(-1, *count.shape)
    return np.stack([boxed(plane, side) / count for plane in planes]).reshape(values.shape)


def boxed(values: Array, side: tuple[int, ...]) -> Array:
    """Window sums, (h, w). side: width and height of the window."""
    return cv2.boxFilter(values, -1, side, normalize=False, borderType=cv2.BORDER_CONSTANT)
