"""The boundary benchmark of BSDS500: how many of the annotated boundaries a partition finds, and how many of its own were annotated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import KDTree
from skimage.morphology import thin

from padseg.evaluation.metrics import TooMany, require_same_shape
from padseg.types import Array

NEAR = 2_000_000  # pairs of pixels that are near enough to be matched: a minute or two of a processor, and 300 MB
THINNED = 500_000_000  # pixels that thinning may look at, all of them for each layer that it takes off: up to a minute
TOLERANCE = 0.0075  # of the picture's diagonal: what BSDS500 allows, 4.3 pixels of its 481 x 321


class BoundaryCounts(NamedTuple):
    """Boundary pixels of a picture; counts of several pictures can be added.

    truth: over all annotators; matched_truth: those with a match, so that the two give recall. pred: predicted; matched_pred: those with a
    match in at least one annotator.
    """

    matched_truth: int
    truth: int
    matched_pred: int
    pred: int


class PrecisionRecall(NamedTuple):
    """All in 0..1; f: harmonic mean of precision and recall."""

    precision: float
    recall: float
    f: float


class BoundarySweep(NamedTuple):
    """best: index of the ODS threshold; ods: all pictures at that threshold; ois: each picture at its own best threshold."""

    best: int
    ods: PrecisionRecall
    ois: PrecisionRecall


class ScoreSweep(NamedTuple):
    """best: index of the ODS threshold; ods: mean over pictures at that threshold; ois: mean of each picture's best score."""

    best: int
    ods: float
    ois: float


def region_boundaries(labels: Array) -> Array:
    """Boundary pixels, (H, W) bool: the 2 x 2 block to the lower right has several labels; last row and column are repeated (seg2bdry)."""
    require_same_shape(labels, labels)
    block = np.pad(labels, ((0, 1), (0, 1)), 'edge')  # (H + 1, W + 1)
    several: Array = (block[:-1, 1:] != labels) | (block[1:, :-1] != labels) | (block[1:, 1:] != labels)
    return several


def thin_boundaries(labels: Array) -> Array:
    """The boundaries reduced to lines one pixel wide, (H, W) bool, as Martin et al. (2004) compare them on both sides.

    TooMany for large areas of single pixels.
    """
    # Drawn boundaries left as they are would keep a fifth to a third of their pixels without a partner: on the validation
    # pictures annotators then reach F 0.68 against each other, and 0.79 with both thinned. Published for the test set: 0.80.
    boundaries = region_boundaries(labels)
    layers = (min(labels.shape) + 1) // 2  # at most
    if boundaries.size * layers > THINNED:  # regions of single pixels side by side are boundaries as thick as they extend
        layers = int(cv2.distanceTransform(boundaries.view(np.uint8), cv2.DIST_C, 3).clip(max=layers).max())
    if boundaries.size * layers > THINNED:
        raise TooMany(f'boundaries are {2 * layers} pixels thick: too many regions of single pixels to find their lines')
    return thin(boundaries)


def boundary_counts(pred: Array, truths: Sequence[Array], tolerance: float = TOLERANCE) -> BoundaryCounts:
    """Count the boundary pixels that a label map (H, W) shares with those of each annotator (Arbelaez et al. 2011).

    tolerance: maximum distance of matching pixels, as a share of the diagonal. ValueError for different sizes or no annotator.
    """
    for truth in truths:
        require_same_shape(truth, pred)
    return count_matches(thin_boundaries(pred), [thin_boundaries(truth) for truth in truths], tolerance)


def count_matches(pred: Array, truths: Sequence[Array], tolerance: float = TOLERANCE) -> BoundaryCounts:
    """As `boundary_counts`, for thinned boundaries (H, W) bool, so that many predictions can be compared with the same truths."""
    if not truths or tolerance < 0:
        raise ValueError(f'expected at least one annotator and a tolerance >= 0; got {len(truths)} and {tolerance}')
    radius = tolerance * float(np.hypot(*pred.shape))
    pixels = np.argwhere(pred)
    has_partner = np.zeros(len(pixels), bool)
    matched = drawn = 0
    for truth in truths:
        partners, _ = match_boundaries(pixels, np.argwhere(truth), radius)
        has_partner[partners] = True
        matched += len(partners)
        drawn += int(np.count_nonzero(truth))
    return BoundaryCounts(matched, drawn, int(np.count_nonzero(has_partner)), len(pixels))


def match_boundaries(a: Array, b: Array, radius: float) -> tuple[Array, Array]:
    """Match points (A, 2) and (B, 2) at most `radius` apart one to one: the most pairs possible, then the smallest total distance.

    Returns the pairs' numbers in `a` and in `b`. BSDS's own matcher approximates this: it minimises distance with a cost of 100
    times the radius for each point left out, over a graph that it thins by chance. Which of equally good pairings comes out is left open.
    TooMany for more than NEAR pairs of points so near.
    """
    ours, theirs = KDTree(a), KDTree(b)
    if len(a) * len(b) > NEAR and theirs.count_neighbors(ours, radius) > NEAR:
        raise TooMany(f'more than {NEAR} pairs of boundary pixels are near enough to be matched')
    near = theirs.sparse_distance_matrix(ours, radius, output_type='ndarray')
    rows, row = np.unique(near['i'], return_inverse=True)
    columns, column = np.unique(near['j'], return_inverse=True)
    if not len(rows):
        return columns, rows
    # Each row may stay unmatched through an extra column of its own, which costs more than any rerouting that would match it.
    # 1 is added to all costs because the solver treats zero as no edge.
    alone = np.arange(len(rows))
    cost = np.append(near['v'] + 1, np.full(len(rows), max(radius, 1) * (len(rows) + 1) + 1))
    places = np.append(row, alone), np.append(column, len(columns) + alone)
    chosen, partner = min_weight_full_bipartite_matching(csr_array((cost, places)))
    paired = partner < len(columns)
    return columns[partner[paired]], rows[chosen[paired]]


def precision_recall_f(counts: BoundaryCounts) -> PrecisionRecall:
    """Precision, recall and F of counts. As in BSDS, 0 / 0 is 0: if nothing is predicted or annotated, and for F if both are 0."""
    precision = counts.matched_pred / max(counts.pred, 1)
    recall = counts.matched_truth / max(counts.truth, 1)
    both = precision + recall
    return PrecisionRecall(precision, recall, 2 * precision * recall / both if both else 0.0)


def total_counts(counts: Sequence[BoundaryCounts]) -> BoundaryCounts:
    """Add the counts of several pictures."""
    return BoundaryCounts(*(sum(column) for column in zip(*counts, strict=True)))


def boundary_sweep(counts: Sequence[Sequence[BoundaryCounts]]) -> BoundarySweep:
    """ODS and OIS of counts[picture][threshold], with ties going to the first threshold; F is not interpolated between thresholds.

    ValueError unless all pictures have the same number of thresholds, at least one. OIS may be below ODS, because counts are summed.
    """
    lengths = sorted({len(picture) for picture in counts})
    if len(lengths) != 1 or not lengths[0]:
        raise ValueError(f'expected pictures with the same number of thresholds, at least one; got numbers {lengths}')
    table = np.array([[precision_recall_f(one).f for one in picture] for picture in counts])  # (pictures, thresholds)
    scores = [precision_recall_f(total_counts(column)) for column in zip(*counts, strict=True)]
    best = int(np.argmax([score.f for score in scores]))
    own = total_counts([picture[place] for picture, place in zip(counts, table.argmax(1).tolist(), strict=True)])
    return BoundarySweep(best, scores[best], precision_recall_f(own))


def score_sweep(scores: Array) -> ScoreSweep:
    """ODS and OIS of a score (pictures, thresholds) for which higher is better, such as covering; ties go to the first threshold."""
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f'expected scores of (pictures, thresholds), at least one of each; got shape {scores.shape}')
    means = scores.mean(0)
    return ScoreSweep(int(means.argmax()), float(means.max()), float(scores.max(1).mean()))
