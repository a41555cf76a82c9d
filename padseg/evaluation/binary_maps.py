"""Scores of one map of an object in each picture, as on ImageNet-Segmentation (Chefer et al. 2021; ConceptAttention, App.)."""

from __future__ import annotations

import numpy as np

from padseg.types import Array


def above_mean(values: Array) -> Array:
    """The mask of the object: where a map is above its own mean, (..., h, w) bool."""
    return np.asarray(values > values.mean((-2, -1), keepdims=True))


def nearest(values: Array, size: tuple[int, int]) -> Array:
    """The value at the upper left corner of every pixel, as torch's `nearest` resizes: (..., h, w) -> (..., H, W)."""
    rows, columns = (np.arange(wanted) * length // wanted for wanted, length in zip(size, values.shape[-2:], strict=True))
    return np.asarray(values[..., rows[:, None], columns])


def released_miou(accuracy: float) -> float:
    """What ConceptAttention's released script prints as mean IoU: accuracy / (2 - accuracy).

    It counts object and background, of every picture one above the other, as if both were one mask.
    """
    return accuracy / (2 - accuracy)


def picture_precision(values: Array, truth: Array) -> float:
    """Average precision of a map, (H, W), scaled to 0..1 and with what it leaves for the background, for both as if they were one."""
    require_pair(values, truth)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return average_precision(np.stack((1 - scaled, scaled)), np.stack((~truth, truth)))


def average_precision(scores: Array, truth: Array) -> float:
    """The sum over thresholds of precision times what recall gains, without interpolation; 0 if nothing is true.

    scores: of any shape; truth: bool, of the same shape. Equal scores are one threshold.
    """
    order = np.argsort(scores, axis=None, kind='stable')[::-1]
    ranked, hits = scores.ravel()[order], truth.ravel()[order].cumsum()
    ends = np.append(np.flatnonzero(np.diff(ranked)), ranked.size - 1)  # the last of equal scores
    if not hits[-1]:
        return 0.0
    return float(np.sum(np.diff(hits[ends], prepend=0) / hits[-1] * hits[ends] / (ends + 1)))


def require_pair(values: Array, truth: Array) -> None:
    if values.shape != truth.shape or truth.dtype != np.bool_ or not truth.size:
        raise ValueError(f'expected a map and a mask of the same size; got {values.shape} and {truth.dtype} {truth.shape}')
