"""A map of numbers as runs of equal values, so that areas, means and repainting need no pass over all pixels for each number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from padseg.types import Array

PART = 4_000_000  # pixels of a large picture that are worked on at once, where what is worked on takes many bytes a pixel


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
    changed = np.ones(len(flat), bool)
    np.not_equal(flat[1:], flat[:-1], out=changed[1:])
    starts = np.flatnonzero(changed)
    return as_runs(starts, np.diff(starts, append=len(flat)), flat[starts], numbers.shape)


def as_runs(starts: Array, lengths: Array, numbers: Array, shape: tuple[int, ...]) -> Runs:
    """The same from where runs start, how long they are, and the number of each, (R,) each. Neighbours may have the same number."""
    names, first, regions = np.unique(numbers, return_index=True, return_inverse=True)
    areas = np.bincount(regions, lengths).astype(int)
    return Runs(names, starts[first], areas, starts, lengths, regions, shape)


def numbers_to(count: int) -> Array:
    """0..count - 1 in a type of few bytes that OpenCV knows."""
    return np.arange(count, dtype=small_type(count - 1))


def small_type(highest: int) -> type:
    return np.uint8 if highest < 1 << 8 else np.uint16 if highest < 1 << 16 else np.int32


def painted(runs: Runs, values: Array) -> Array:
    """Paint a value for each name: (K,) -> (H, W)."""
    return np.repeat(values[runs.regions], runs.lengths).reshape(runs.shape)


def mean_inside(runs: Runs, values: Array) -> Array:
    """Mean of the values (H, W) over each name's pixels: (K,)."""
    return np.bincount(runs.regions, totals(values.ravel(), runs.starts)) / runs.areas


def totals(values: Array, starts: Array, most: int = PART) -> Array:
    """Sums of the values (N,) from each start to the next, (R,) float64, of which no more than `most` are converted at once.

    NumPy's reduceat would convert all of them; the sums are the same to the last bit.
    """
    if len(values) <= most:
        return np.add.reduceat(values, starts, dtype=np.float64)
    sums = np.empty(len(starts))
    first, ends = 0, np.append(starts[1:], len(values))
    while first < len(starts):
        start = starts[first]
        last = int(np.searchsorted(ends, start + most, 'right'))  # the runs that end by then
        if last > first:
            sums[first:last] = np.add.reduceat(values[start : ends[last - 1]], starts[first:last] - start, dtype=np.float64)
        else:
            last = first + 1
            sums[first] = np.float64(values[start]) + pairwise(values[start + 1 : ends[first]], most)
        first = last
    return sums


def pairwise(values: Array, most: int) -> np.float64:
    """The sum of float32 values as NumPy's pairwise summation of all of them in float64 has it."""
    if len(values) <= most:
        return np.add.reduce(values.astype(np.float64))
    half = len(values) // 2
    half -= half % 8
    return pairwise(values[:half], most) + pairwise(values[half:], most)


def parts(length: int, across: int, most: int = PART) -> Iterator[slice]:
    """The rows (or columns) of a picture in parts of about `most` pixels. across: pixels in one of them.

    None of them is alone, unless it is the only one: OpenCV enlarges those in another way.
    """
    step = max(2, most // across)
    starts = [start for start in range(0, length, step) if start == 0 or start < length - 1]
    yield from (slice(start, end) for start, end in zip(starts, [*starts[1:], length], strict=True))
