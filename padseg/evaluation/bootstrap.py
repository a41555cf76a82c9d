"""How far a mean can be trusted: percentile intervals from groups of values drawn with replacement (Efron's bootstrap), by SciPy."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from padseg.types import Array

MOST_CELLS = 1 << 22  # drawn numbers held in memory at a time


class Bootstrap(NamedTuple):
    """How intervals are made: the number of resamples, the seed of the drawing, and the share of resampled means that lie inside."""

    resamples: int = 10_000
    seed: int = 0
    confidence: float = 0.95


def mean_interval(values: Sequence[float], groups: Sequence[Hashable], how: Bootstrap = Bootstrap()) -> tuple[float, float] | None:
    """(low, high) of the mean of values (N,), whose groups, such as prompts or seeds, are drawn whole; None for a single group.

    The order of the values does not matter. Values of paired differences give the interval of the difference.
    """
    from scipy import stats

    sums, sizes = totals(values, groups)
    if len(sums) < 2:
        return None
    result = stats.bootstrap(
        (sums, sizes),
        mean_of_totals,
        paired=True,
        vectorized=True,
        n_resamples=how.resamples,
        batch=max(1, MOST_CELLS // len(sums)),
        confidence_level=how.confidence,
        method='percentile',
        rng=np.random.default_rng(how.seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def totals(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[Array, Array]:
    """Sums and numbers of the values of each group, sorted by them: (G,) each."""
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    rows = sorted((math.fsum(own), len(own)) for own in members.values())
    return np.array([total for total, _ in rows]), np.array([float(size) for _, size in rows])


def mean_of_totals(sums: Array, sizes: Array, axis: int = -1) -> Array:
    return sums.sum(axis) / sizes.sum(axis)
