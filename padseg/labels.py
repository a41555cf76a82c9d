"""Proposals -> label map: bilinear to the picture's size, argmax, with memory for a few maps whatever their number."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from skimage.measure import label as connected_components
from skimage.segmentation import felzenszwalb

from padseg.refine import guide_of
from padseg.refine import guided
from padseg.types import Array
from padseg.types import Image
from padseg.types import LabelMap
from padseg.types import Proposals

SUPERPIXEL_AREA = 1_000_000  # pixels; on larger pictures superpixels are found on a reduced copy


def label_map(
    proposals: Proposals,
    superpixels: Array | None = None,
    components: bool = False,
    min_area: float = 0.0,
    guide: Image | None = None,
) -> LabelMap:
    """Each pixel's strongest proposal, as regions 1..K in order of first appearance; 0 where the model did not look.

    superpixels: (H, W) int, values averaged inside each before the argmax, or None. components: connected components become regions
    (4-neighbours). min_area: smaller regions, as a share of the picture in 0..1, go to the neighbour with the longest common border.
    guide: the picture (H, W, 3), if the maps are to be enlarged along its edges.
    """
    top, left, height, width = proposals.frame.box
    box = np.s_[top : top + height, left : left + width]
    if guide is None:
        enlarge = partial(upsample, size=(height, width))
    else:
        enlarge = partial(guided, guide=guide_of(guide[box], proposals.maps.shape[1:]))
    winner = argmax(proposals, enlarge) if superpixels is None else argmax_inside(proposals, superpixels[box], enlarge)
    labels = np.zeros(proposals.frame.size, np.int32)
    labels[box] = winner + 1
    regions = connected_components(labels, background=0, connectivity=1) if components else labels
    names, places = np.unique(regions, return_index=True)
    proposal = dict(zip(names.tolist(), (labels.ravel()[places] - 1).tolist(), strict=True))
    order, numbered = relabel(absorb(regions, min_area * labels.size))
    return LabelMap(numbered, tuple(proposals.members[proposal[name]] for name in order))


def argmax(proposals: Proposals, enlarge: Callable[[Array], Array]) -> Array:
    """Number of the strongest proposal at each pixel, the first among equals: (M, h, w) -> (H, W) int32. enlarge: (h, w) -> (H, W)."""
    first, *rest = scaled(proposals)
    best = enlarge(first)  # (H, W)
    winner = np.zeros(best.shape, np.int32)
    for number, values in enumerate(rest, start=1):
        values = enlarge(values)
        stronger = values > best
        np.copyto(best, values, where=stronger)
        np.copyto(winner, number, where=stronger)
    return winner


def argmax_inside(proposals: Proposals, superpixels: Array, enlarge: Callable[[Array], Array]) -> Array:
    """As argmax, with every proposal averaged inside each superpixel: (M, h, w), (H, W) -> (H, W) int32."""
    index = np.unique(superpixels, return_inverse=True)[1].ravel()
    area = np.bincount(index)
    means = [np.bincount(index, enlarge(values).ravel()) / area for values in scaled(proposals)]
    return np.argmax(means, 0).astype(np.int32)[index].reshape(superpixels.shape)


def scaled(proposals: Proposals) -> Array:
    """The maps with the greatest value 1: a softmax over 4096 places leaves differences that float32 would lose. (M, h, w) float32."""
    maps = proposals.maps.cpu().numpy()
    offset = maps.min()
    return ((maps - offset) / max(maps.max() - offset, 1e-300)).astype(np.float32)


def upsample(values: Array, size: tuple[int, ...]) -> Array:
    """Bilinear, half-pixel centres, (h, w) -> (H, W); the same as torch's interpolate with align_corners=False."""
    return cv2.resize(values, size[::-1], interpolation=cv2.INTER_LINEAR)


def absorb(regions: Array, smallest: float) -> Array:
    """Join every region of less than `smallest` pixels to the neighbour with the longest common border, the least first; 0 stays."""
    names, index, area = np.unique(regions, return_inverse=True, return_counts=True)
    index = index.reshape(regions.shape)
    borders = common_borders(index)
    owner, size = list(range(len(names))), area.tolist()
    queue = [(pixels, region) for region, pixels in enumerate(size) if pixels < smallest and names[region] != 0]
    heapq.heapify(queue)
    while queue:
        pixels, region = heapq.heappop(queue)
        around = {other: length for other, length in borders[region].items() if names[other] != 0}
        if pixels != size[region] or owner[region] != region or not around:
            continue  # it has grown since, is gone, or has nobody to go to
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
    return names[np.array(owner)[index]]


def common_borders(index: Array) -> list[Counter[int]]:
    """For each region 0..R-1 the length of the border with each neighbour, in pixel edges: (H, W) -> R counters."""
    borders: list[Counter[int]] = [Counter() for _ in range(int(index.max()) + 1)]
    for first, second in ((index[:, :-1], index[:, 1:]), (index[:-1], index[1:])):
        apart = first != second
        pairs, lengths = np.unique(np.stack([first[apart], second[apart]]), axis=1, return_counts=True)
        for one, other, length in zip(*pairs.tolist(), lengths.tolist(), strict=True):
            borders[one][other] += length
            borders[other][one] += length
    return borders


def relabel(regions: Array) -> tuple[list[int], Array]:
    """Number the regions 1..K by first appearance in reading order, 0 kept: their old names in that order, and (H, W) int32."""
    names, places, index = np.unique(regions, return_index=True, return_inverse=True)
    real = np.flatnonzero(names > 0)
    order = real[np.argsort(places[real])]
    new = np.zeros(len(names), np.int32)
    new[order] = np.arange(1, len(order) + 1)
    return names[order].tolist(), new[index].reshape(regions.shape)


def unassign(labels: LabelMap, void: Array) -> LabelMap:
    """The label map with 0 where `void` (H, W) holds; regions that are left are numbered anew."""
    order, numbered = relabel(np.where(void, 0, labels.labels))
    return LabelMap(numbered, tuple(labels.tokens[name - 1] for name in order))


def superpixels(image: Image, scale: float) -> Array:
    """Felzenszwalb and Huttenlocher's graph-based superpixels: (H, W, 3) uint8 -> (H, W) int."""
    height, width = image.shape[:2]
    reduce = min(1.0, (SUPERPIXEL_AREA / (height * width)) ** 0.5)
    size = max(1, round(width * reduce)), max(1, round(height * reduce))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if reduce < 1 else image
    found = felzenszwalb(small, scale=scale, sigma=0.8, min_size=max(1, round(scale / 2)))
    return cv2.resize(found.astype(np.int32), (width, height), interpolation=cv2.INTER_NEAREST) if reduce < 1 else found
