"""Proposals -> label map: enlarge bilinearly to the picture's size and take the argmax, holding only a few maps in memory at a time."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from skimage.measure import label as connected_components

from padseg.errors import UsageError
from padseg.methods.stages.guided_filter import guide_of, guided
from padseg.methods.stages.join import graph_of, joined as joined_superpixels
from padseg.methods.stages.runs import Runs, mean_inside, painted, runs_of
from padseg.types import Array, Image, LabelMap, Proposals


def label_map(
    proposals: Proposals,
    superpixels: Array | None = None,
    components: bool = False,
    min_area: float = 0.0,
    image: Image | None = None,
    refine: str = 'none',
    join: float = 0.0,
) -> LabelMap:
    """Assign each pixel to its strongest proposal: regions 1..K in order of first appearance; 0 where the model did not look.

    superpixels: (H, W) int, average values inside each before the argmax, or None. components: split regions into connected components
    (4-neighbours). min_area: regions below this share of the picture, in 0..1, go to the neighbour with the longest common border. image:
    the picture (H, W, 3), needed by refine and join. refine: 'guided' enlarges maps along the picture's edges. join: if above 0, join
    superpixels closer than this distance (see `stages/join.py`) instead of taking the argmax.
    """
    top, left, height, width = proposals.frame.box
    box = np.s_[top : top + height, left : left + width]
    if refine == 'guided':
        enlarge = partial(guided, guide=guide_of(pictured(image)[box], proposals.maps.shape[1:]))
    else:
        enlarge = partial(upsample, size=(height, width))
    strongest = np.arange(len(proposals.maps))  # proposal for each number in `winner`
    if superpixels is None:
        winner = argmax(proposals, enlarge)
    elif join:
        winner, strongest = joined_regions(proposals, superpixels[box], enlarge, pictured(image)[box], join)
    else:
        winner = argmax_inside(proposals, superpixels[box], enlarge)
    labels = np.zeros(proposals.frame.size, np.promote_types(winner.dtype, np.min_scalar_type(len(strongest))))
    np.add(winner, 1, out=labels[box], dtype=labels.dtype)
    regions = runs_of(connected_components(labels, background=0, connectivity=1) if components else labels)
    proposal = strongest[labels.ravel()[regions.places].astype(int) - 1]  # (K,)
    order, numbered = relabel(regions, absorb(regions, min_area * labels.size))
    return LabelMap(numbered, tuple(proposals.members[proposal[region]] for region in order))


def pictured(image: Image | None) -> Image:
    if image is None:
        raise UsageError('this refinement needs the picture')
    return image


def argmax(proposals: Proposals, enlarge: Callable[[Array], Array]) -> Array:
    """Number of the strongest proposal at each pixel, the first if equal: (M, h, w) -> (H, W), in the smallest type that holds M.

    enlarge: (h, w) -> (H, W).
    """
    first, *rest = scaled_proposals(proposals)
    best = enlarge(first)  # (H, W)
    winner = np.zeros(best.shape, np.min_scalar_type(len(proposals.maps)))
    stronger = np.empty(best.shape, bool)
    for number, small in enumerate(rest, start=1):
        values = enlarge(small)
        np.greater(values, best, out=stronger)
        np.copyto(best, values, where=stronger)
        np.copyto(winner, number, where=stronger)
    return winner


def argmax_inside(proposals: Proposals, superpixels: Array, enlarge: Callable[[Array], Array]) -> Array:
    """As `argmax`, with every proposal averaged inside each superpixel: (M, h, w), (H, W) -> (H, W)."""
    runs = runs_of(superpixels)
    means = [mean_inside(runs, enlarge(values)) for values in scaled_proposals(proposals)]  # M times (K,)
    return painted(runs, np.argmax(means, 0).astype(np.min_scalar_type(len(means))))


def joined_regions(
    proposals: Proposals, superpixels: Array, enlarge: Callable[[Array], Array], image: Image, threshold: float
) -> tuple[Array, Array]:
    """Join superpixels where proposals and picture agree: region 0..R-1 of each pixel (H, W), strongest proposal of each region (R,)."""
    runs = runs_of(superpixels)
    means = np.stack([mean_inside(runs, enlarge(values)) for values in scaled_proposals(proposals)], 1)  # (K, M)
    owner = joined_superpixels(graph_of(painted(runs, np.arange(len(runs.names))), means, image), threshold)  # (K,)
    _, regions = np.unique(owner, return_inverse=True)  # (K,)
    totals = np.zeros((regions.max() + 1, means.shape[1]))
    np.add.at(totals, regions, means * runs.areas[:, None])
    return painted(runs, regions), totals.argmax(1)


def scaled_proposals(proposals: Proposals) -> Array:
    """Scale maps to a maximum of 1, (M, h, w) float32; float32 would lose the small differences left by a softmax over 4096 positions."""
    maps = proposals.maps.cpu().numpy()
    offset = maps.min()
    return ((maps - offset) / max(maps.max() - offset, 1e-300)).astype(np.float32)


def upsample(values: Array, size: tuple[int, ...]) -> Array:
    """Bilinear with half-pixel centres, (h, w) -> (H, W); the same as torch's interpolate with align_corners=False."""
    return cv2.resize(values, size[::-1], interpolation=cv2.INTER_LINEAR)


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
    index = painted(regions, np.arange(count, dtype=np.int32))  # (H, W)
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
    return LabelMap(numbered, tuple(labels.tokens[name - 1] for name in regions.names[order].tolist()))
