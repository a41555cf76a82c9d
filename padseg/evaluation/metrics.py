"""Measures of agreement between two label maps, all based on their contingency table."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from padseg.errors import PadsegError

if TYPE_CHECKING:
    from padseg.types import Array


DENSE = 1 << 16  # ids below which a table of all ids is quicker than filling run by run
COUNTED = 1 << 20  # fields of a table that are counted one by one; of a larger one only those that have pixels
LARGEST = 1 << 24  # fields of a table of classes and regions, which matching takes whole; overlaps of two partitions
BLOCK = 1 << 16  # pixels counted at once: what is in between stays in the cache and asks for no fresh memory


class TooMany(PadsegError):
    """More classes, regions or boundary pixels than can be matched in bounded time and memory."""

    exit_code = 3


class ClassCounts(NamedTuple):
    """Pixels of each class after matching, (num_classes,) int64 each; total: valid pixels. Counts of several pictures can be added.

    spilled: false positives of classes matched with a region in which they have no pixel; which class that is depends on how regions are
    numbered.
    """

    true_positive: Array
    false_positive: Array
    false_negative: Array
    spilled: Array
    total: int

    @classmethod
    def none(cls, num_classes: int) -> ClassCounts:
        zero = np.zeros(num_classes, np.int64)
        return cls(zero, zero, zero, zero, 0)

    def first(self, classes: int) -> ClassCounts:
        """Those of the first classes alone."""
        positive, wrong, missed, spilled = (part[:classes] for part in self[:4])
        return ClassCounts(positive, wrong, missed, spilled, self.total)

    def plus(self, other: ClassCounts) -> ClassCounts:
        return ClassCounts(
            self.true_positive + other.true_positive,
            self.false_positive + other.false_positive,
            self.false_negative + other.false_negative,
            self.spilled + other.spilled,
            self.total + other.total,
        )


class ClassScores(NamedTuple):
    """Shares in 0..1. iou, class_accuracy: one per class, nan for classes that do not count.

    miou_order_free leaves out false positives of regions matched with a class that they do not touch, so that it does not depend on how
    regions are numbered (except for equal overlaps).
    """

    accuracy: float
    mean_accuracy: float
    miou: float
    miou_order_free: float
    iou: tuple[float, ...]
    class_accuracy: tuple[float, ...]


class RegionScores(NamedTuple):
    """Agreement of two partitions: covering and probabilistic Rand index in 0..1, variation of information in bits, predicted regions."""

    covering: float
    pri: float
    vi: float
    regions: float


class Overlaps(NamedTuple):
    """The fields of a contingency table that have pixels, (N,) int64 each, row by row."""

    row: Array
    column: Array
    pixels: Array


def contingency(a: Array, b: Array) -> Array:
    """Pixels that have the i-th id of `a` and the j-th id of `b`, ids in order of first appearance: (ids of a, ids of b) int64."""
    row, column, pixels = overlaps(a, b)
    table = np.zeros((row.max() + 1, column.max() + 1), np.int64)
    table[row, column] = pixels
    return table


def overlaps(a: Array, b: Array) -> Overlaps:
    """The same without the fields that are 0, of which two label maps of many ids have more than fit into memory."""
    require_same_shape(a, b)
    a, b = numbered(a), numbered(b)
    height, width = int(a.max()) + 1, int(b.max()) + 1
    if height * width <= COUNTED:
        table = tally(a, b, height, width)
        row, column = np.nonzero(table)
        return Overlaps(row, column, table[row, column])
    field = a.ravel().astype(np.int64)
    field *= width
    field += b.ravel()
    field.sort()
    if 1 + np.count_nonzero(field[1:] != field[:-1]) > LARGEST:
        raise TooMany(f'{height} and {width} regions overlap in more than {LARGEST} ways')
    starts = run_starts(field)
    row, column = np.divmod(field[starts], width)
    return Overlaps(row, column, np.diff(np.append(starts, field.size)))


def class_table(truth: Array, pred: Array, num_classes: int, compacted: bool = True) -> Array:
    """Count the pixels of each class in each region: (num_classes, regions) int64. Pixels with truth outside 0..num_classes-1 are ignored.

    Columns are regions in order of first appearance, or, not compacted, the ids 0..max themselves. Raises ValueError for label maps
    that are of different sizes, no integers, or predictions below 0, TooMany for more classes and regions than can be matched.
    """
    require_same_shape(pred, truth)
    if pred.min() < 0:
        raise ValueError(f'regions are numbers >= 0; got {pred.min()}')
    if truth.min() < -1 or truth.max() >= num_classes:
        truth = np.where((truth >= 0) & (truth < num_classes), truth.astype(np.int64), -1)
    regions = numbered(pred) if compacted else pred
    low, width = min(int(truth.min()), 0), int(regions.max()) + 1
    if num_classes * max(num_classes, width) > LARGEST:
        raise TooMany(f'{num_classes} classes and region numbers up to {width - 1} make a table of more than {LARGEST} fields')
    return tally(truth, regions, num_classes, width, low)[-low:]


def tally(rows: Array, columns: Array, height: int, width: int, low: int = 0) -> Array:
    """Count each pair of numbers: integers low..height-1 and 0..width-1 of the same shape -> (height - low, width) int64."""
    counts = np.zeros((height - low) * width, np.int64)
    rows, columns = rows.ravel(), columns.ravel()
    for start in range(0, rows.size, BLOCK):
        index = rows[start : start + BLOCK].astype(np.int64)
        index -= low
        index *= width
        index += columns[start : start + BLOCK]
        counts += np.bincount(index, minlength=len(counts))
    return counts.reshape(height - low, width)


def run_starts(flat: Array) -> Array:
    """Start of each run of equal ids, the only places where an id can first appear: (N,) -> (R,)."""
    return np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)


def count_ids(labels: Array) -> int:
    """Number of distinct ids."""
    flat = labels.ravel()
    return len(np.unique(flat[run_starts(flat)]))


def compact(labels: Array) -> Array:
    """Renumber ids 0..K-1 in order of first appearance, row by row, int64; the shape stays."""
    return numbered(labels).astype(np.int64)


def numbered(labels: Array) -> Array:
    """As `compact`, in the smallest type that holds the numbers."""
    flat = labels.ravel()
    if flat.min() < 0 or flat.max() >= DENSE:
        starts = run_starts(flat)
        ids, first, of_run = np.unique(flat[starts], return_index=True, return_inverse=True)
        number = first.argsort().argsort().astype(np.min_scalar_type(len(ids)))  # of each id, ascending
        return np.repeat(number[of_run], np.diff(np.append(starts, flat.size))).reshape(labels.shape)
    number, known = np.full(int(flat.max()) + 1, -1), 0
    for start in range(0, flat.size, BLOCK):
        part = flat[start : start + BLOCK]
        ids, first = np.unique(part[run_starts(part)], return_index=True)
        fresh = number[ids] < 0
        number[ids[fresh][first[fresh].argsort()]] = np.arange(known, known + np.count_nonzero(fresh))
        known += int(np.count_nonzero(fresh))
    number = number.astype(np.min_scalar_type(known))
    found = np.empty(flat.size, number.dtype)
    for start in range(0, flat.size, BLOCK):
        found[start : start + BLOCK] = number[flat[start : start + BLOCK]]
    return found.reshape(labels.shape)


def match_regions(table: Array) -> Array:
    """Column for each row in the one-to-one matching with the most pixels: (rows, columns >= rows) -> (rows,) (SciPy)."""
    return np.asarray(linear_sum_assignment(table, maximize=True)[1])


def widened(table: Array) -> Array:
    """Add empty columns until there are as many as rows, so that every class gets one."""
    return np.pad(table, ((0, 0), (0, max(0, table.shape[0] - table.shape[1]))))


def counts_of(table: Array, column: Array) -> ClassCounts:
    """Counts when class g is assigned the region column[g]: (classes, regions) and (classes,)."""
    hit = table[np.arange(len(table)), column]
    wrong = table.sum(0)[column] - hit
    return ClassCounts(hit, wrong, table.sum(1) - hit, np.where(hit > 0, 0, wrong), int(table.sum()))


def hungarian_counts(pred: Array, truth: Array, num_classes: int, compacted: bool = True) -> ClassCounts:
    """Match regions to classes one to one to maximise agreeing pixels, for one picture (DiffSeg, Sec. 4.1).

    Pixels whose truth is outside 0..num_classes-1 do not count. Absent classes take part in the matching, so surplus regions may be charged
    to them; which one is a tie that depends on numbering, so regions are compacted first unless told otherwise.
    """
    table = widened(class_table(truth, pred, num_classes, compacted))
    return counts_of(table, match_regions(table))


def merge_background(table: Array, background: int) -> Array:
    """DiffCut's many-to-one rule: (classes, regions) -> (classes, regions + 1), with everything merged into background in the last column.

    The other classes are matched first, without the background's pixels. A class is kept if any matched region has a pixel of it; regions
    of kept classes stay, all others are merged. This uses the ground truth, so it is an oracle.
    """
    objects = widened(np.delete(table, background, 0))
    column = match_regions(objects)
    kept = column[objects[:, column].any(1)]
    rest = np.setdiff1d(np.arange(table.shape[1]), kept)
    merged = np.hstack([table, table[:, rest].sum(1, keepdims=True)])
    merged[:, rest] = 0
    return merged


def class_scores(counts: ClassCounts, absent: str = 'unless-predicted') -> ClassScores:
    """Compute scores from counts summed over a data set.

    absent: which classes without true pixels enter the means: `unless-predicted`, only those with false positives (DiffSeg); `left-out`,
    none (detectron2); `zero`, all, as 0 (GoCA, whose denominators also carry 1e-8).
    """
    present = counts.true_positive + counts.false_negative
    union = present + counts.false_positive
    if absent == 'zero':
        iou = counts.true_positive / (union + 1e-8)
        recall = counts.true_positive / (present + 1e-8)
        free = iou
    else:
        iou, recall = ratio(counts.true_positive, union), ratio(counts.true_positive, present)
        free = ratio(counts.true_positive, union - counts.spilled)
        if absent == 'left-out':
            iou = np.where(present > 0, iou, np.nan)
    accuracy = counts.true_positive.sum() / counts.total if counts.total else float('nan')
    return ClassScores(float(accuracy), mean(recall), mean(iou), mean(free), tuple(iou.tolist()), tuple(recall.tolist()))


def ratio(part: Array, whole: Array) -> Array:
    """part / whole, nan where both are 0."""
    with np.errstate(invalid='ignore'):
        return np.true_divide(part, whole)


def mean(values: Array) -> float:
    """Mean of the values that are not nan; nan if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float('nan')


def region_scores(truth: Array, pred: Array) -> RegionScores:
    """Compare two partitions (H, W). Only `covering` depends on which one is the truth: its regions are the ones covered.

    TooMany for more than LARGEST overlaps of a true with a predicted region.
    """
    row, column, table = overlaps(truth, pred)
    table = table.astype(np.float64)
    rows, columns = np.bincount(row, table), np.bincount(column, table)  # pixels of each region
    pixels = table.sum()
    iou = table / (rows[row] + columns[column] - table)
    best = np.maximum.reduceat(iou, run_starts(row))  # of each true region
    pairs = two_of(pixels)
    # The partitions disagree on pairs that are together in exactly one of them.
    apart = two_of(rows).sum() + two_of(columns).sum() - 2 * two_of(table).sum()
    return RegionScores(
        covering=float((best * rows).sum() / pixels),
        pri=float(1 - apart / pairs) if pairs else 1.0,
        vi=2 * entropy(table / pixels) - entropy(rows / pixels) - entropy(columns / pixels),
        regions=float(len(columns)),
    )


def two_of(count: Array) -> Array:
    """Number of pairs among `count` items."""
    return count * (count - 1) / 2


def entropy(share: Array) -> float:
    """Entropy in bits of a distribution of any shape."""
    # scikit-image's variation_of_information takes 8 times as long given a 10 x 14 table, and 30 times given a 300 x 1743 one
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def require_same_shape(a: Array, b: Array) -> None:
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise ValueError(f'expected two label maps (H, W) of the same size; got shapes {a.shape} and {b.shape}')
    if a.dtype.kind not in 'iu' or b.dtype.kind not in 'iu':
        raise ValueError(f'labels are integers; got {a.dtype} and {b.dtype}')
