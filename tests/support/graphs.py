"""Graphs of superpixels, and a slow, obvious way of putting their numbers into groups."""

from __future__ import annotations

import numpy as np

from padseg.methods.stages.join import BINS, Graph


def random_graph(seed, count, maps=3):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(maps), count)
    borders = [{} for _ in range(count)]
    for one in range(count):
        for other in range(one + 1, count):
            if rng.random() < 0.4 or other == one + 1:
                borders[one][other] = borders[other][one] = (float(rng.uniform(0, 5)), float(rng.integers(1, 20)))
    colours = rng.uniform(0, 100, (count, 3))
    histograms = rng.dirichlet(np.ones(3 * BINS), count)
    return Graph(shares, colours, colours**2 + rng.uniform(0, 900, (count, 3)), histograms, rng.dirichlet(np.ones(count)), borders)


def grouped_slowly(count, distance, threshold):
    """Groups of numbers, the two nearest put together at every step; the distance of two groups anew from their members."""
    groups = [[number] for number in range(count)]
    while True:
        pairs = [(distance(a, b), i, j) for i, a in enumerate(groups) for j, b in enumerate(groups) if i < j]
        nearest, i, j = min(pairs, default=(np.inf, 0, 0))
        if not nearest < threshold:
            return {frozenset(group) for group in groups}
        groups[i] += groups.pop(j)
