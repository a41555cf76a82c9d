"""Token maps -> the picture's size, in strips of columns, so that no map of a large picture need be in memory whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import cv2
import numpy as np

from padseg.methods.stages.runs import PART, parts, small_type
from padseg.types import Array, LabelMap

LARGE = 32_000_000  # pixels: pictures of most cameras have fewer, and are one strip, which is faster
Strips = Iterable[tuple[slice, Array]]  # columns, and a map's values there (H, columns)
Enlarge = Callable[[Array], Strips]  # of a map (h, w)


def upsample(values: Array, size: tuple[int, ...], columns: slice = slice(None)) -> Array:
    """Bilinear with half-pixel centres, (h, w) -> (H, W), or only these columns of it, of which there are at least two.

    The same as torch's interpolate with align_corners=False.
    """
    if values.shape[1] == 1 or columns in (slice(None), slice(0, size[1])):
        return cv2.resize(values, size[::-1], interpolation=cv2.INTER_LINEAR)[:, columns]
    rows = cv2.resize(values, (size[1], len(values)), interpolation=cv2.INTER_LINEAR)[:, columns]  # (h, columns)
    return cv2.resize(rows, (rows.shape[1], size[0]), interpolation=cv2.INTER_LINEAR)


def upsampled(values: Array, size: tuple[int, ...]) -> Iterator[tuple[slice, Array]]:
    """The same in strips."""
    for columns in strips(size):
        yield columns, upsample(values, size, columns)


def strips(size: tuple[int, ...]) -> Iterator[slice]:
    """The columns of a picture (H, W), of a large one in strips."""
    height, width = size
    return parts(width, height, PART if height * width > LARGE else LARGE)


def whole(strips: Strips, size: tuple[int, ...]) -> Array:
    """A map from its strips, (H, W) float32."""
    result = np.empty(size, np.float32)
    for columns, values in strips:
        if values.shape == size:
            return values
        result[:, columns] = values
    return result


def enlarged_labels(labels: LabelMap, size: tuple[int, ...]) -> LabelMap:
    """A label map in another size (H, W), in the smallest type that holds its numbers: int32 would take 4 bytes a pixel."""
    small: Array = labels.labels.astype(small_type(int(labels.labels.max())))
    return labels._replace(labels=cv2.resize(small, size[::-1], interpolation=cv2.INTER_NEAREST))
