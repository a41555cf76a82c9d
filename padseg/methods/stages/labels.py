"""Proposals -> label map: enlarge bilinearly to the picture's size and take the argmax, holding only a few maps in memory at a time.

A label map takes 4 bytes a pixel and the picture 3; what is in between takes few more, or is worked on in parts.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components as groups_of
from skimage.measure import label as connected_components

from padseg.errors import UsageError
from padseg.methods.stages.enlarging import Enlarge, upsampled, whole
from padseg.methods.stages.guided_filter import guide_of, guided
from padseg.methods.stages.join import GRAPH_AREA, Graph, Join, graph_of, joins, owners, within
from padseg.methods.stages.regroup import regrouped
from padseg.methods.stages.runs import PART, Runs, as_runs, mean_inside, numbers_to, painted, parts, runs_of
from padseg.types import Array, Frame, Image, LabelMap, Proposals


def label_map(
    proposals: Proposals,
    superpixels: Array | None = None,
    components: bool = False,
    min_area: float = 0.0,
    image: Image | None = None,
    refine: str = 'none',
    join: float = 0.0,
    known: JoinOrder | None = None,
    unit: float = 1.0,
    graph_area: int = GRAPH_AREA,
    regroup: float = 0.0,
) -> LabelMap:
    """Assign each pixel to its strongest proposal: regions 1..K in order of first appearance; 0 where the model did not look.

    superpixels: (H, W) int, average values inside each before the argmax, or None. components: split regions into connected components
    (4-neighbours). min_area: regions below this share of the picture, in 0..1, go to the neighbour with the longest common border. image:
    the picture (H, W, 3), needed by refine and join. refine: 'guided' enlarges maps along the picture's edges. join: if above 0, join
    superpixels closer than this distance (see `stages/join.py`) instead of taking the argmax. known: the `join_order` of the same
    proposals, superpixels, picture and refine, if it has been made already. unit: the share of the picture that counts as a whole picture
    for join; graph_area: pixels above which join compares colours on a reduced copy. regroup: if above 0, joined regions that do
    not touch get one number where the odds that they are different things are below this (see `stages/regroup.py`).
    """
    top, left, height, width = proposals.frame.box
    box = np.s_[top : top + height, left : left + width]
    strongest = np.arange(len(proposals.maps))  # proposal for each number in `winner`
    steps = None
    if superpixels is None:
        winner = argmax(proposals, enlarging(proposals, image, refine))
    elif join:
        steps = known or join_order(proposals, superpixels, pictured(image), refine, join, unit, graph_area)
        winner, strongest = joined_regions(steps, join)
    else:
        winner = argmax_inside(proposals, superpixels[box], enlarging(proposals, image, refine))
    labels = np.zeros(proposals.frame.size, np.promote_types(winner.dtype, np.min_scalar_type(len(strongest))))
    np.add(winner, 1, out=labels[box], dtype=labels.dtype)
    del winner
    regions = component_runs(labels) if components else runs_of(labels)
    proposal = strongest[labels.ravel()[regions.places].astype(int) - 1]  # (K,)
    del labels
    owner = absorb(regions, min_area * np.prod(regions.shape))
    order, numbered = relabel(regions, owner)
    if steps and regroup:
        inside = numbered[box].ravel()[steps.superpixels.places] - 1  # (K,), the region of each superpixel
        group = regrouped(steps.graph, inside, len(order), regroup)
        owner[order] = np.array(order)[group]
        order, numbered = relabel(regions, owner[owner])
    return LabelMap(numbered, tuple(proposals.members[proposal[region]] for region in order))


def enlarging(proposals: Proposals, image: Image | None, refine: str) -> Enlarge:
    """How maps become as large as the part of the picture that the model saw."""
    top, left, height, width = proposals.frame.box
    if refine == 'guided':
        seen = pictured(image)[top : top + height, left : left + width]
        return partial(guided, guide=guide_of(seen, proposals.maps.shape[1:]))
    return partial(upsampled, size=(height, width))


def pictured(image: Image | None) -> Image:
    if image is None:
        raise UsageError('this refinement needs the picture')
    return image


def argmax(proposals: Proposals, enlarge: Enlarge) -> Array:
    """Number of the strongest proposal at each pixel, the first if equal: (M, h, w) -> (H, W), in the smallest type that holds M."""
    first, *rest = scaled_proposals(proposals)
    strips = [
        (best, np.zeros(best.shape, np.min_scalar_type(len(proposals.maps))), np.empty(best.shape, bool)) for _, best in enlarge(first)
    ]
    for number, small in enumerate(rest, start=1):
        for (_, values), (best, winner, stronger) in zip(enlarge(small), strips, strict=True):
            np.greater(values, best, out=stronger)
            np.copyto(best, values, where=stronger)
            np.copyto(winner, number, where=stronger)
    winners = [winner for _, winner, _ in strips]
    return winners[0] if len(winners) == 1 else np.concatenate(winners, 1)


def argmax_inside(proposals: Proposals, superpixels: Array, enlarge: Enlarge) -> Array:
    """As `argmax`, with every proposal averaged inside each superpixel: (M, h, w), (H, W) -> (H, W)."""
    runs = runs_of(superpixels)
    means = [mean_inside(runs, whole(enlarge(values), runs.shape)) for values in scaled_proposals(proposals)]  # M times (K,)
    return painted(runs, np.argmax(means, 0).astype(np.min_scalar_type(len(means))))


class JoinOrder(NamedTuple):
    """Superpixels, and the order in which they join. means: (K, M), of every proposal inside each; steps: as of `joins`."""

    superpixels: Runs
    means: Array
    graph: Graph
    steps: list[Join]


def join_order(
    proposals: Proposals,
    superpixels: Array,
    image: Image,
    refine: str = 'none',
    join: float = math.inf,
    unit: float = 1.0,
    graph_area: int = GRAPH_AREA,
    regions: Array | None = None,
) -> JoinOrder:
    """Join superpixels (H, W) where proposals and picture (H, W, 3) agree, up to a distance; what holds for it holds for lower ones too.

    unit, graph_area: as of `label_map`. regions: (K,), of each superpixel in ascending order, if only those of the same one may join.
    """
    runs, means, graph = superpixel_graph(proposals, superpixels, image, refine, unit, graph_area)
    return JoinOrder(runs, means, graph, joins(graph if regions is None else within(graph, regions), join))


def superpixel_graph(
    proposals: Proposals, superpixels: Array, image: Image, refine: str, unit: float = 1.0, graph_area: int = GRAPH_AREA
) -> tuple[Runs, Array, Graph]:
    """Superpixels (H, W), the mean of every proposal inside each (K, M), and their graph."""
    top, left, height, width = proposals.frame.box
    box = np.s_[top : top + height, left : left + width]
    enlarge = enlarging(proposals, image, refine)
    runs = runs_of(superpixels[box])
    means = np.stack([mean_inside(runs, whole(enlarge(values), runs.shape)) for values in scaled_proposals(proposals)], 1)  # (K, M)
    return runs, means, graph_of(painted(runs, numbers_to(len(runs.names))), means, image[box], unit, graph_area)


def joined_regions(order: JoinOrder, threshold: float) -> tuple[Array, Array]:
    """Join superpixels closer than a threshold: region 0..R-1 of each pixel (H, W), strongest proposal of each region (R,)."""
    runs, means, _, steps = order
    _, regions = np.unique(owners(steps, len(means), threshold), return_inverse=True)  # (K,)
    totals = np.zeros((regions.max() + 1, means.shape[1]))
    np.add.at(totals, regions, means * runs.areas[:, None])
    return painted(runs, numbers_to(len(totals))[regions]), totals.argmax(1)


def coarsened(labels: Array, order: JoinOrder, frame: Frame, thresholds: Sequence[float], components: bool) -> list[Array]:
    """Join the regions of a label map (H, W) as their superpixels join, up to each threshold in ascending order.

    Each result joins whole regions of the one before it: a region goes where most of its pixels do. order: up to the highest threshold;
    components: split regions into connected components (4-neighbours).
    """
    top, left, height, width = frame.box
    superpixels = painted(order.superpixels, numbers_to(len(order.means)))  # (H', W'), the part that the model saw
    levels = []
    for threshold in thresholds:
        inside = labels[top : top + height, left : left + width]
        joined = owners(order.steps, len(order.means), threshold)[superpixels]
        pairs, pixels = np.unique(inside.astype(np.int64) * len(order.means) + joined, return_counts=True)
        most = np.lexsort((-pixels, pairs // len(order.means)))  # the largest part of each region first
        regions, first = np.unique(pairs[most] // len(order.means), return_index=True)
        numbers = np.zeros(int(labels.max()) + 1, np.int32)
        numbers[regions] = pairs[most][first] % len(order.means) + 1
        numbers[0] = 0
        labels = numbers[labels]
        found = component_runs(labels) if components else runs_of(labels)
        labels = relabel(found, np.arange(len(found.names)))[1]
        levels.append(labels)
    return levels


def component_runs(labels: Array, most: int = PART) -> Runs:
    """The connected components (4-neighbours) of a label map (H, W), numbered by first appearance in reading order; 0 stays.

    They are looked for in parts of the rows, of about `most` pixels.
    """
    starts, lengths, numbers, joints = [], [], [], []
    count, above = 0, labels[:0]
    for rows in parts(len(labels), labels.shape[1], most):
        found = connected_components(labels[rows], background=0, connectivity=1)
        np.add(found, count, out=found, where=found > 0)
        if rows.start:
            touching = (labels[rows.start - 1] == labels[rows.start]) & (found[0] > 0)
            joints.append(np.stack([above[touching], found[0, touching]]))
        count, above = max(count, int(found.max())), found[-1].copy()
        runs = runs_of(found)
        starts.append(runs.starts + rows.start * labels.shape[1])
        lengths.append(runs.lengths)
        numbers.append(runs.names[runs.regions])
    if not joints:
        return runs
    pairs = np.concatenate(joints, 1)
    _, group = groups_of(coo_matrix((np.ones(pairs.shape[1], bool), pairs), (count + 1, count + 1)), directed=False)  # (count + 1,)
    _, first = np.unique(group, return_index=True)
    return as_runs(np.concatenate(starts), np.concatenate(lengths), first[group[np.concatenate(numbers)]], labels.shape)


def scaled_proposals(proposals: Proposals) -> Array:
    """Scale maps to a maximum of 1, (M, h, w) float32; float32 would lose the small differences left by a softmax over 4096 positions."""
    maps = proposals.maps.cpu().numpy()
    offset = maps.min()
    return ((maps - offset) / max(maps.max() - offset, 1e-300)).astype(np.float32)


def absorb(regions: Runs, smallest: float) -> Array:
    """Merge each region of less than `smallest` pixels into the neighbour with the longest common border, smallest first; 0 stays.

    Returns the region that each one ends in, (K,), its own number if it stays.
    """
    size, fixed = regions.areas.tolist(), (regions.names == 0).tolist()
    owner = list(range(len(size)))
    queue = [(pixels, region) for region, pixels in enumerate(size) if pixels < smallest and not fixed[region]]
    heapq.heapify(queue)
    borders = common_borders(regions) if queue else []
    while queue:
        pixels, region = heapq.heappop(queue)
        around = {other: length for other, length in borders[region].items() if not fixed[other]}
        if pixels != size[region] or owner[region] != region or not around:
            continue  # it has grown since, is gone, or has no neighbour to join
        target = max(around, key=lambda other: (around[other], size[other], -other))
        owner[region] = target
        size[target] += pixels
        for other, length in borders[region].items():
            del borders[other][region]
            if other != target:
                borders[other][target] += length
                borders[target][other] += length
        if size[target] < smallest:
            heapq.heappush(queue, (size[target], target))
    for region in range(len(owner)):
        while owner[region] != owner[owner[region]]:
            owner[region] = owner[owner[region]]
    return np.array(owner)


def common_borders(regions: Runs) -> list[Counter[int]]:
    """For each of the K regions, the length of the border with each neighbour, in pixel edges."""
    count = len(regions.names)
    index = painted(regions, numbers_to(count))  # (H, W)
    borders: list[Counter[int]] = [Counter() for _ in range(count)]
    for first, second in ((index[:, :-1], index[:, 1:]), (index[:-1], index[1:])):
        apart = first != second
        pairs, lengths = np.unique(first[apart].astype(np.int64) * count + second[apart], return_counts=True)
        for pair, length in zip(pairs.tolist(), lengths.tolist(), strict=True):
            one, other = divmod(pair, count)
            borders[one][other] += length
            borders[other][one] += length
    return borders


def relabel(regions: Runs, owner: Array) -> tuple[list[int], Array]:
    """Renumber the remaining regions 1..K by first appearance in reading order, 0 stays: their former indices, and labels (H, W) int32.

    owner: the region that each one ends in.
    """
    places = np.full(len(owner), regions.places.max())
    np.minimum.at(places, owner, regions.places)
    left = np.unique(owner[regions.names > 0])
    order = left[np.argsort(places[left])]
    new = np.zeros(len(owner), np.int32)
    new[order] = np.arange(1, len(order) + 1)
    return order.tolist(), painted(regions, new[owner])


def as_regions(numbers: Array) -> LabelMap:
    """Turn any integer map (H, W) into a label map without tokens, with regions numbered by first appearance."""
    regions = runs_of(numbers - numbers.min() + 1)
    order, numbered = relabel(regions, np.arange(len(regions.names)))
    return LabelMap(numbered, ((),) * len(order))


def unassign(labels: LabelMap, void: Array) -> LabelMap:
    """Set the label map to 0 where `void` (H, W) holds; the remaining regions are renumbered, classes are not."""
    if labels.names:
        return labels._replace(labels=np.where(void, 0, labels.labels))
    regions = runs_of(np.where(void, 0, labels.labels))
    order, numbered = relabel(regions, np.arange(len(regions.names)))
    levels = tuple(np.where(void, 0, level) for level in labels.levels)
    return LabelMap(numbered, tuple(labels.tokens[name - 1] for name in regions.names[order].tolist()), levels=levels)
