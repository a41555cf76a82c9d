"""Regions -> groups: one number for regions that do not touch but are alike, such as the sky on both sides of a mast.

How much each feature counts was learned from pictures with ground truth, by bin/fit-joining.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from padseg.methods.stages.join import LEAST_AREA, MEANS, Graph
from padseg.types import Array

MOST = 1000  # regions that are compared, the largest; others stay as they are
NEVER = np.finfo(np.float64).max


class ApartWeights(NamedTuple):
    """How much features of two regions that do not touch count in the logarithm of the odds that they are different things.

    The features are those of the same names in `join.Weights`.
    """

    proposals: float
    doubt: float
    colours: float
    area: float
    bias: float


APART = ApartWeights(proposals=3.703, doubt=4.564, colours=-0.683, area=0.148, bias=-3.002)


def regrouped(graph: Graph, regions: Array, count: int, threshold: float, weights: ApartWeights = APART) -> Array:
    """Group regions that do not touch while the odds that they are different things are below the threshold.

    graph: of K superpixels; regions: (K,), region 0..count-1 of each. Returns for each region the largest one of its group, (count,). Of
    two groups the highest odds of a pair decide (complete linkage), so regions that touch are never in one group, and no group is a chain.
    """
    pooled = of_regions(graph, regions, count)
    largest = np.argsort(-pooled.areas, kind='stable')[:MOST]
    largest = largest[pooled.areas[largest] > 0]
    group = np.arange(count)
    if len(largest) > 1:
        pairs = squareform(odds_apart(pooled, largest, weights), checks=False)
        found = fcluster(linkage(pairs, 'complete'), np.nextafter(threshold, 0), 'distance')  # (N,)
        _, first, place = np.unique(found, return_index=True, return_inverse=True)
        group[largest] = largest[first[place]]
    return group


def of_regions(graph: Graph, regions: Array, count: int) -> Graph:
    """The graph of regions from that of their superpixels; histograms and the like are means by area. regions: (K,), 0..count-1."""
    areas = np.bincount(regions, graph.areas, count)
    share = graph.areas / np.maximum(areas[regions], 1e-300)  # (K,), of a superpixel in its region

    def mean(values: Array) -> Array:
        sums = np.zeros((count, values.shape[1]))
        np.add.at(sums, regions, values * share[:, None])
        return sums

    borders: list[dict[int, tuple[float, float]]] = [{} for _ in range(count)]
    for own, around in zip(regions.tolist(), graph.borders, strict=True):
        for neighbour, (total, length) in around.items():
            if (other := int(regions[neighbour])) != own:
                known = borders[own].get(other, (0.0, 0.0))
                borders[own][other] = known[0] + total, known[1] + length
    means = {name: mean(getattr(graph, name)) for name in MEANS}
    return graph._replace(areas=areas, borders=borders, **means)


def odds_apart(graph: Graph, regions: Array, weights: ApartWeights) -> Array:
    """The odds that two regions are different things, (N, N), of some regions (N,); NEVER where they touch, 0 on the diagonal."""
    odds = np.exp(features_apart(graph, regions) @ np.array(weights[:-1]) + weights.bias)
    for place, region in enumerate(regions.tolist()):
        odds[place, np.isin(regions, list(graph.borders[region]))] = NEVER
    np.fill_diagonal(odds, 0)
    return np.minimum(odds, NEVER)


def features_apart(graph: Graph, regions: Array) -> Array:
    """Features of all pairs of some regions (N,): (N, N, F), in the order of `ApartWeights`."""
    shares, histograms, areas = graph.shares[regions], graph.histograms[regions], graph.areas[regions]
    root = np.sqrt(shares)
    doubt = np.sqrt(np.maximum(1 - shares @ shares.T, 0))
    colours = np.zeros_like(doubt)
    for column in histograms.T:  # a bin at a time: (N, N), not (N, N, bins)
        one, other = column[:, None], column[None]
        colours += (one - other) ** 2 / np.maximum(one + other, 1e-9)
    area = np.log(areas[:, None] * areas[None] / (areas[:, None] + areas[None]) + LEAST_AREA)
    return np.stack([1 - root @ root.T, doubt, colours / 2, area], 2)
