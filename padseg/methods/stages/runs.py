"""A picture of numbers as runs of equal ones: areas, means and repainting without a pass over pixels for each number."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from padseg.types import Array


class Runs(NamedTuple):
    """A picture of numbers as runs of equal ones in reading order. names: (K,) the numbers, ascending; places: (K,) the first pixel of
    each; areas: (K,) its pixels; starts, lengths, regions: (R,) a run's first pixel, its pixels, and which of the names it has."""

    names: Array
    places: Array
    areas: Array
    starts: Array
    lengths: Array
    regions: Array
    shape: tuple[int, ...]


def runs_of(numbers: Array) -> Runs:
    """The runs of a picture of whole numbers, (H, W): far fewer than its pixels, so sorting them takes little."""
    flat = numbers.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    lengths = np.diff(starts, append=len(flat))
    names, first, regions = np.unique(flat[starts], return_index=True, return_inverse=True)
    areas = np.bincount(regions, lengths).astype(int)
    return Runs(names, starts[first], areas, starts, lengths, regions, numbers.shape)


def painted(runs: Runs, values: Array) -> Array:
    """The picture with a value for each name: (K,) -> (H, W)."""
    return np.repeat(values[runs.regions], runs.lengths).reshape(runs.shape)


def mean_inside(runs: Runs, values: Array) -> Array:
    """Mean of the values (H, W) over each name's pixels: (K,)."""
    totals = np.add.reduceat(values.ravel(), runs.starts, dtype=np.float64)  # (R,)
    return np.bincount(runs.regions, totals) / runs.areas
