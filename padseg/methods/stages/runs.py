"""A map of numbers as runs of equal values, so that areas, means and repainting need no pass over all pixels for each number."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from padseg.types import Array


class Runs(NamedTuple):
    """A map of numbers as runs of equal values in reading order.

    names: (K,) the distinct numbers, ascending; places: (K,) first pixel of each; areas: (K,) pixel count of each; starts, lengths,
    regions: (R,) first pixel, pixel count and index into names of each run.
    """

    names: Array
    places: Array
    areas: Array
    starts: Array
    lengths: Array
    regions: Array
    shape: tuple[int, ...]


def runs_of(numbers: Array) -> Runs:
    """Find the runs of an integer map (H, W); there are far fewer runs than pixels, so sorting them is cheap."""
    flat = numbers.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    lengths = np.diff(starts, append=len(flat))
    names, first, regions = np.unique(flat[starts], return_index=True, return_inverse=True)
    areas = np.bincount(regions, lengths).astype(int)
    return Runs(names, starts[first], areas, starts, lengths, regions, numbers.shape)


def painted(runs: Runs, values: Array) -> Array:
    """Paint a value for each name: (K,) -> (H, W)."""
    return np.repeat(values[runs.regions], runs.lengths).reshape(runs.shape)


def mean_inside(runs: Runs, values: Array) -> Array:
    """Mean of the values (H, W) over each name's pixels: (K,)."""
    totals = np.add.reduceat(values.ravel(), runs.starts, dtype=np.float64)  # (R,)
    return np.bincount(runs.regions, totals) / runs.areas
