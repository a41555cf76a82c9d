"""Superpixels -> regions: join neighbours that proposals, colours and the border between them do not separate, most similar first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from padseg.methods.stages.guided_filter import at_most
from padseg.methods.stages.runs import parts
from padseg.types import Array, Image

COLOUR = 0.25  # weight of the difference between two regions' mean colours
BORDER = 1.1  # weight of the contrast along their common border
AREA = 0.18  # exponent of the area; makes small regions join sooner
UNIT = 150.0  # summed CIE Lab difference that counts as 1, about black against white with some colour
BLUR = 1.0  # pixels
GRAPH_AREA = 1_000_000  # pixels; for larger pictures, colour and contrast come from a reduced copy


class Graph(NamedTuple):
    """Adjacency graph of regions. shares: (K, M), how much each region belongs to each proposal; rows sum to 1.

    colours: (K, 3) mean CIE Lab; areas: (K,) shares of the picture, or of a window; borders: for each region,
    {neighbour: (summed contrast along the border, border length)}.
    """

    shares: Array
    colours: Array
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
    pixels = np.maximum(np.bincount(index.ravel(), minlength=count), 1)
    colours = np.stack([np.bincount(index.ravel(), channel.ravel(), count) for channel in cv2.split(lab)], 1) / pixels[:, None]
    values = np.maximum(values, 0)  # a guided filter goes below 0 beside edges, and a share has a root
    shares = values / np.maximum(values.sum(1, keepdims=True), 1e-300)
    return Graph(shares, colours, areas, contrasts(index, lab, count))


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


def joins(graph: Graph, threshold: float) -> list[Join]:
    """Join the two most similar neighbours until no distance is below the threshold; returns the steps in order."""
    shares, colours, areas = graph.shares.copy(), graph.colours.copy(), graph.areas.copy()
    borders = [dict(each) for each in graph.borders]
    steps: list[Join] = []
    age = [0] * len(areas)  # how often a region has grown; -1 once it has been joined to another
    queue: list[tuple[float, int, int, int, int]] = []

    def push(region: int, others: list[int]) -> None:
        far = distances(region, others, shares, colours, areas, borders[region])
        for other, distance in zip(others, far.tolist(), strict=True):
            if distance < threshold:
                heapq.heappush(queue, (distance, region, other, age[region], age[other]))

    for region in range(len(areas)):
        push(region, [other for other in borders[region] if other > region])
    while queue:
        distance, region, other, *ages = heapq.heappop(queue)
        if [age[region], age[other]] != ages:
            continue  # outdated: one of them has changed since
        weights = areas[[region, other]] / (areas[region] + areas[other])
        shares[region] = weights @ shares[[region, other]]
        colours[region] = weights @ colours[[region, other]]
        areas[region] += areas[other]
        steps.append(Join(distance, region, other))
        age[region], age[other] = age[region] + 1, -1
        for third, (total, length) in borders[other].items():
            del borders[third][other]
            if third != region:
                known = borders[region].get(third, (0.0, 0.0))
                borders[region][third] = borders[third][region] = known[0] + total, known[1] + length
        push(region, list(borders[region]))
    return steps


def distances(
    region: int, others: list[int], shares: Array, colours: Array, areas: Array, borders: dict[int, tuple[float, float]]
) -> Array:
    """Distances between a region and its neighbours, (N,), from proposals, colours and borders, scaled down for small regions.

    Where proposals are sure that two regions are one, colours and borders are ignored: a checked cloth has borders, a striped one two
    colours.
    """
    both = shares[region] * shares[others]  # (N, M)
    overlap = np.sqrt(both).sum(1)  # Bhattacharyya coefficient, in 0..1
    doubt = np.sqrt(np.maximum(1 - both.sum(1), 0))  # from the chance that a pixel of each has the same proposal
    colour = np.abs(colours[region] - colours[others]).sum(1) / UNIT
    border = np.array([total / length for total, length in (borders[other] for other in others)])
    area = areas[region] * areas[others] / (areas[region] + areas[others])
    return (1 - overlap + doubt * (COLOUR * colour + BORDER * border)) * area**AREA
