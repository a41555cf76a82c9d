"""Scores of one map of an object in each picture, as on ImageNet-Segmentation (Chefer et al. 2021; ConceptAttention, App.)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from padseg.types import Array

SIDE = 224  # pixels that are compared along a side


class BinaryCounts(NamedTuple):
    """Pixels of object and background that were found, missed, and taken for the object wrongly. Counts of pictures can be added."""

    true_positive: int
    true_negative: int
    false_positive: int
    false_negative: int

    def plus(self, other: BinaryCounts) -> BinaryCounts:
        return BinaryCounts(*(one + more for one, more in zip(self, other, strict=True)))


class BinaryScores(NamedTuple):
    """Shares in 0..1. miou: the mean of the IoU of object and background; acc_by_2_minus_acc: accuracy / (2 - accuracy).

    The latter is what ConceptAttention's released script prints as mean IoU: it counts object and background, of every picture one above
    the other, as if both were one mask.
    """

    accuracy: float
    iou: tuple[float, float]
    miou: float
    acc_by_2_minus_acc: float


def above_mean(values: Array) -> Array:
    """The mask of the object: where a map is above its own mean, (..., h, w) bool."""
    return np.asarray(values > values.mean((-2, -1), keepdims=True))


def nearest(values: Array, size: tuple[int, int]) -> Array:
    """The value at the upper left corner of every pixel, as torch's `nearest` resizes: (..., h, w) -> (..., H, W)."""
    rows, columns = (np.arange(wanted) * length // wanted for wanted, length in zip(size, values.shape[-2:], strict=True))
    return np.asarray(values[..., rows[:, None], columns])


def binary_counts(predicted: Array, truth: Array) -> BinaryCounts:
    """Counts of a mask and the true one, (H, W) bool each."""
    require_pair(predicted, truth)
    found, missed = predicted & truth, truth & ~predicted
    wrong = predicted & ~truth
    counts = [int(np.count_nonzero(part)) for part in (found, wrong, missed)]
    return BinaryCounts(counts[0], truth.size - sum(counts), counts[1], counts[2])


def binary_scores(counts: BinaryCounts) -> BinaryScores:
    """Scores of the counts of all pictures; those of a class without pixels are nan."""
    found, empty, wrong, missed = counts
    accuracy = (found + empty) / max(1, sum(counts))
    iou = tuple(right / (right + wrong + missed) if right + wrong + missed else float('nan') for right in (empty, found))
    return BinaryScores(accuracy, (iou[0], iou[1]), float(np.mean(iou)), accuracy / (2 - accuracy))


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
