"""How well two label maps agree. Every measure starts from their contingency table."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

if TYPE_CHECKING:
    from padseg.types import Array


class ClassCounts(NamedTuple):
    """Pixels of each class after matching, (num_classes,) int64 each; total: the valid pixels. Counts of pictures add up."""

    true_positive: Array
    false_positive: Array
    false_negative: Array
    total: int


class RegionScores(NamedTuple):
    """Agreement of two partitions: covering and probabilistic Rand index in 0..1, variation of information in bits, regions predicted."""

    covering: float
    pri: float
    vi: float
    regions: float


def contingency(a: Array, b: Array) -> Array:
    """Pixels that have the i-th id of `a` and the j-th id of `b`, ids in ascending order: (ids of a, ids of b) int64."""
    check(a, b)
    a_ids, a = np.unique(a, return_inverse=True)
    b_ids, b = np.unique(b, return_inverse=True)
    counts = np.bincount(a.ravel() * len(b_ids) + b.ravel(), minlength=len(a_ids) * len(b_ids))
    return counts.reshape(len(a_ids), len(b_ids))


def compact(labels: Array) -> Array:
    """Ids renumbered 0..K-1 in order of first appearance, row by row; the shape stays."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order: Array = first.argsort().argsort()  # of each id, ascending
    return order[inverse].reshape(labels.shape)


def hungarian_counts(pred: Array, truth: Array, num_classes: int) -> ClassCounts:
    """Match regions to classes one to one so that the most pixels agree, for one picture (DiffSeg's protocol).

    Pixels whose truth is outside 0..num_classes-1 do not count. Absent classes take part in the matching, so surplus
    regions may be charged to them; which one is a tie that depends on numbering, hence regions are compacted first.
    """
    check(pred, truth)
    regions = compact(pred).ravel()
    classes = truth.astype(np.int64).ravel()
    columns = max(num_classes, int(regions.max()) + 1)
    valid = (classes >= 0) & (classes < num_classes)
    table = np.bincount(classes[valid] * columns + regions[valid], minlength=num_classes * columns)
    table = table.reshape(num_classes, columns)  # (classes, regions), never fewer columns than rows
    rows, matched = linear_sum_assignment(table, maximize=True)
    hit = table[rows, matched]
    return ClassCounts(hit, table.sum(0)[matched] - hit, table.sum(1) - hit, int(table.sum()))


def region_scores(truth: Array, pred: Array) -> RegionScores:
    """Compare two partitions (H, W). Only `covering` depends on which one is the truth: its regions are the ones covered."""
    table = contingency(truth, pred).astype(np.float64)  # (truth regions, predicted regions)
    pixels, rows, columns = table.sum(), table.sum(1), table.sum(0)
    iou = table / (rows[:, None] + columns[None, :] - table)
    pairs = two_of(pixels)
    # Pairs that are together in exactly one of the two partitions disagree.
    apart = two_of(rows).sum() + two_of(columns).sum() - 2 * two_of(table).sum()
    return RegionScores(
        covering=float((iou.max(1) * rows).sum() / pixels),
        pri=float(1 - apart / pairs) if pairs else 1.0,
        vi=2 * entropy(table / pixels) - entropy(rows / pixels) - entropy(columns / pixels),
        regions=float(len(columns)),
    )


def two_of(count: Array) -> Array:
    """Pairs that can be drawn from `count` things."""
    return count * (count - 1) / 2


def entropy(share: Array) -> float:
    """Entropy in bits of a distribution of any shape."""
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def check(a: Array, b: Array) -> None:
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise ValueError(f'expected two label maps (H, W) of the same size; got shapes {a.shape} and {b.shape}')
    if a.dtype.kind not in 'iu' or b.dtype.kind not in 'iu':
        raise ValueError(f'labels are integers; got {a.dtype} and {b.dtype}')
