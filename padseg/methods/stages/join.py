"""Superpixels -> regions: join neighbours that proposals, colours and the border between them do not separate, most similar first.

How much each of these counts was learned from pictures with ground truth, by bin/fit-joining.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from padseg.methods.stages.guided_filter import at_most
from padseg.methods.stages.runs import parts
from padseg.types import Array, Image

UNIT = 150.0  # summed CIE Lab difference that counts as 1, about black against white with some colour
SPREAD = 50.0  # CIE Lab
BINS = 8  # of each channel of CIE Lab
RANGES = ((0.0, 100.0), (-50.0, 50.0), (-50.0, 50.0))  # of the channels; what is beyond falls into the last bin
BLUR = 1.0  # pixels
GRAPH_AREA = 1_000_000  # pixels; for larger pictures, colour and contrast come from a reduced copy
LEAST_AREA = 1e-5  # share of the picture; keeps a logarithm finite
AT_ONCE = 4096  # pairs that are compared at once


class Weights(NamedTuple):
    """How much features of two neighbours count in the logarithm of the odds that they belong to different regions.

    proposals: 1 less the Bhattacharyya coefficient of their shares of the proposals; doubt: root of the chance that a pixel of each has
    another proposal; border: contrast along the common border, in UNIT; doubted: border times doubt, because where proposals are sure that
    both are one, a border is part of a pattern; colours: half the chi-squared distance of histograms of CIE Lab; spreads: difference of the
    colours' standard deviations, in SPREAD; touching: share of the shorter outline that is common border; area: logarithm of the harmonic
    sum of their areas, so that small regions join sooner.
    """

    proposals: float
    doubt: float
    border: float
    doubted: float
    colours: float
    spreads: float
    touching: float
    area: float
    bias: float


WEIGHTS = Weights(
    proposals=3.593, doubt=3.179, border=2.007, doubted=4.155, colours=1.438, spreads=1.109, touching=-0.790, area=0.220, bias=-3.146
)


class Graph(NamedTuple):
    """Adjacency graph of regions. shares: (K, M), how much each region belongs to each proposal; rows sum to 1.

    colours, squares: (K, 3), means of CIE Lab and of its squares; histograms: (K, 3 BINS), rows sum to 1; areas: (K,) shares of the
    picture, or of a window; borders: for each region, {neighbour: (summed contrast along the border, border length)}.
    """

    shares: Array
    colours: Array
    squares: Array
    histograms: Array
    areas: Array
    borders: list[dict[int, tuple[float, float]]]


def graph_of(index: Array, values: Array, image: Image, unit: float = 1.0, most: int = GRAPH_AREA) -> Graph:
    """Build the graph of a picture's superpixels.

    index: (H, W) uint8, uint16 or int32, number 0..K-1 of each pixel's superpixel; values: (K, M), mean of every proposal inside, below 0
    as 0; image: (H, W, 3) uint8 RGB. unit: the share of the picture that counts as 1 for areas; most: pixels above which
    colour and contrast come from a reduced copy.
    """
    count = len(values)
    areas = np.sum([np.bincount(index[rows].ravel(), minlength=count) for rows in parts(*index.shape)], 0) / (index.size * unit)
    small = at_most(image, most).astype(np.float32) / 255
    if small.shape != image.shape:
        index = cv2.resize(index, small.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    lab = cv2.GaussianBlur(cv2.cvtColor(small, cv2.COLOR_RGB2LAB), (0, 0), BLUR)  # (h, w, 3)
    flat = index.ravel()
    pixels = np.maximum(np.bincount(flat, minlength=count), 1)[:, None]
    channels = [channel.ravel() for channel in cv2.split(lab)]
    colours = np.stack([np.bincount(flat, channel, count) for channel in channels], 1) / pixels
    squares = np.stack([np.bincount(flat, channel * channel, count) for channel in channels], 1) / pixels
    histograms = np.concatenate([counts_of(flat, channel, *ends, count) for channel, ends in zip(channels, RANGES, strict=True)], 1)
    values = np.maximum(values, 0)  # a guided filter goes below 0 beside edges, and a share has a root
    shares = values / np.maximum(values.sum(1, keepdims=True), 1e-300)
    return Graph(shares, colours, squares, histograms / (len(RANGES) * pixels), areas, contrasts(index, lab, count))


def counts_of(flat: Array, channel: Array, low: float, high: float, count: int) -> Array:
    """How many pixels of each region fall into each bin of a channel: (N,), (N,) -> (count, BINS)."""
    bins = np.clip((channel - low) * (BINS / (high - low)), 0, BINS - 1).astype(np.int64)
    return np.bincount(flat.astype(np.int64) * BINS + bins, minlength=count * BINS).reshape(count, BINS)


def contrasts(index: Array, lab: Array, count: int) -> list[dict[int, tuple[float, float]]]:
    """For each region, {neighbour: (summed contrast, length)} of the common border, in pixel edges.

    The contrast at an edge is the colour difference, in UNIT, between the pixels just beyond the two that touch.
    """
    borders: list[dict[int, tuple[float, float]]] = [{} for _ in range(count)]
    for numbers, colours in ((index, lab), (index.T, lab.transpose(1, 0, 2))):
        left, right = np.nonzero(numbers[:, :-1] != numbers[:, 1:])
        before, after = numbers[left, right], numbers[left, right + 1]
        last = numbers.shape[1] - 1
        contrast = np.abs(colours[left, np.maximum(right - 1, 0)] - colours[left, np.minimum(right + 2, last)]).sum(1) / UNIT
        pairs = np.minimum(before, after).astype(np.int64) * count + np.maximum(before, after)
        names, places = np.unique(pairs, return_inverse=True)
        sums, lengths = np.bincount(places, contrast), np.bincount(places)
        for pair, total, length in zip(names.tolist(), sums.tolist(), lengths.tolist(), strict=True):
            one, other = divmod(pair, count)
            known = borders[one].get(other, (0.0, 0.0))
            borders[one][other] = borders[other][one] = known[0] + total, known[1] + length
    return borders


def within(graph: Graph, regions: Array) -> Graph:
    """The same without borders between regions (K,), so that only superpixels of the same one join."""
    borders = [
        {other: border for other, border in each.items() if regions[other] == own} for own, each in zip(regions, graph.borders, strict=True)
    ]
    return graph._replace(borders=borders)


class Join(NamedTuple):
    """Two regions that become one: `gone` is from then on a part of `kept`."""

    distance: float
    kept: int
    gone: int


Seen = Callable[[Array, Array, Array, Sequence[Join]], None]


def joined(graph: Graph, threshold: float) -> Array:
    """Join the two most similar neighbours until no distance is below the threshold; returns the region of each superpixel, (K,)."""
    return owners(joins(graph, threshold), len(graph.areas), threshold)


def owners(steps: Sequence[Join], count: int, threshold: float) -> Array:
    """The region of each superpixel, (K,), after the steps up to the first whose distance is not below the threshold.

    steps: by this threshold or a higher one, whose first steps are the same.
    """
    owner = np.arange(count)
    for distance, kept, gone in steps:
        if distance >= threshold:
            break
        owner[owner == gone] = kept
    return owner


def joins(graph: Graph, threshold: float, seen: Seen = lambda *_: None, weights: Weights = WEIGHTS) -> list[Join]:
    """Join the two most similar neighbours until no distance is below the threshold; returns the steps in order.

    seen: is given pairs of neighbours, (N,) and (N,), their features, (N, F), and the steps up to then, whenever features are computed.
    """
    areas, outlines = graph.areas.copy(), outlines_of(graph)
    means = np.concatenate([getattr(graph, name) for name in MEANS], 1)  # (K, ...)
    borders = [dict(each) for each in graph.borders]
    steps: list[Join] = []
    age = [0] * len(areas)  # how often a region has grown; -1 once it has been joined to another
    queue: list[tuple[float, int, int, int, int]] = []

    def compare(pairs: list[tuple[int, int]]) -> None:
        ones, others = np.array(pairs).T
        compared = features(ones, others, means, areas, outlines, np.array([borders[one][other] for one, other in pairs]))
        seen(ones, others, compared, steps)
        for (one, other), distance in zip(pairs, distances(compared, weights).tolist(), strict=True):
            if distance < threshold:
                heapq.heappush(queue, (distance, one, other, age[one], age[other]))

    neighbours = [(region, other) for region, around in enumerate(borders) for other in around if other > region]
    for start in range(0, len(neighbours), AT_ONCE):
        compare(neighbours[start : start + AT_ONCE])
    while queue:
        distance, region, other, *ages = heapq.heappop(queue)
        if [age[region], age[other]] != ages:
            continue  # outdated: one of them has changed since
        parts_of_both = areas[[region, other]] / (areas[region] + areas[other])
        means[region] = parts_of_both @ means[[region, other]]
        areas[region] += areas[other]
        outlines[region] += outlines[other] - 2 * borders[region][other][1]
        steps.append(Join(distance, region, other))
        age[region], age[other] = age[region] + 1, -1
        for third, (total, length) in borders[other].items():
            del borders[third][other]
            if third != region:
                known = borders[region].get(third, (0.0, 0.0))
                borders[region][third] = borders[third][region] = known[0] + total, known[1] + length
        if borders[region]:
            compare([(region, third) for third in borders[region]])
    return steps


MEANS = ('colours', 'squares', 'histograms', 'shares')  # of a graph, averaged when regions join
AT = np.cumsum([3, 3, 3 * BINS])  # where they begin, side by side


def outlines_of(graph: Graph) -> Array:
    """Lengths of the regions' borders with others, (K,)."""
    return np.array([sum(length for _, length in each.values()) for each in graph.borders], float)


def features(ones: Array, others: Array, means: Array, areas: Array, outlines: Array, borders: Array) -> Array:
    """Features of pairs of regions, (N, F), in the order of `Weights`.

    means: of MEANS, side by side; borders: (N, 2), summed contrast along the common border of each pair, and its length.
    """
    own, theirs = np.split(means[ones], AT, 1), np.split(means[others], AT, 1)
    both = own[3] * theirs[3]  # (N, M)
    overlap = np.sqrt(both).sum(1)  # Bhattacharyya coefficient, in 0..1
    doubt = np.sqrt(np.maximum(1 - both.sum(1), 0))
    totals, lengths = borders.T
    border = totals / lengths
    apart = (own[2] - theirs[2]) ** 2 / np.maximum(own[2] + theirs[2], 1e-9)
    spreads = np.abs(spread(own[0], own[1]) - spread(theirs[0], theirs[1])) / SPREAD
    touching = lengths / np.minimum(outlines[ones], outlines[others])
    area = np.log(areas[ones] * areas[others] / (areas[ones] + areas[others]) + LEAST_AREA)
    return np.stack([1 - overlap, doubt, border, doubt * border, apart.sum(1) / 2, spreads, touching, area], 1)


def spread(colours: Array, squares: Array) -> Array:
    """Standard deviations of colours from means and means of squares, (..., 3) -> (...)."""
    return np.sqrt(np.maximum(squares - colours**2, 0).sum(-1))


def distances(compared: Array, weights: Weights) -> Array:
    """The odds that two neighbours belong to different regions, from their features: (N, F) -> (N,)."""
    return np.exp(compared @ np.array(weights[:-1]) + weights.bias)
