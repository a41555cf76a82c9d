"""Proposals -> label map: bilinear to the picture's size, argmax, with memory for a few maps whatever their number."""

from __future__ import annotations

import cv2
import numpy as np
from skimage.measure import label as connected_components
from skimage.segmentation import felzenszwalb

from padseg.types import Array
from padseg.types import Image
from padseg.types import LabelMap
from padseg.types import Proposals

SUPERPIXEL_AREA = 1_000_000  # pixels; on larger pictures superpixels are found on a reduced copy


def label_map(proposals: Proposals, superpixels: Array | None = None, split: bool = False) -> LabelMap:
    """Each pixel's strongest proposal, as regions 1..K in order of first appearance; 0 where the model did not look.

    superpixels: (H, W) int, values averaged inside each before the argmax, or None. split: connected components become regions
    (4-neighbours).
    """
    top, left, height, width = proposals.frame.box
    box = np.s_[top : top + height, left : left + width]
    winner = argmax(proposals, (height, width)) if superpixels is None else argmax_inside(proposals, superpixels[box])
    labels = np.zeros(proposals.frame.size, np.int32)
    labels[box] = winner + 1
    first, labels = relabel(connected_components(labels, background=0, connectivity=1) if split else labels, labels)
    return LabelMap(labels, tuple(proposals.members[proposal - 1] for proposal in first))


def argmax(proposals: Proposals, size: tuple[int, int]) -> Array:
    """Number of the strongest proposal at each pixel, the first among equals: (M, h, w) -> (H, W) int32."""
    best, winner = np.full(size, -np.inf, np.float32), np.zeros(size, np.int32)
    for number, values in enumerate(scaled(proposals)):
        values = upsample(values, size)  # (H, W)
        stronger = values > best
        np.copyto(best, values, where=stronger)
        np.copyto(winner, number, where=stronger)
    return winner


def argmax_inside(proposals: Proposals, superpixels: Array) -> Array:
    """As argmax, with every proposal averaged inside each superpixel: (M, h, w), (H, W) -> (H, W) int32."""
    index = np.unique(superpixels, return_inverse=True)[1].ravel()
    area = np.bincount(index)
    means = [np.bincount(index, upsample(values, superpixels.shape).ravel()) / area for values in scaled(proposals)]
    return np.argmax(means, 0).astype(np.int32)[index].reshape(superpixels.shape)


def scaled(proposals: Proposals) -> Array:
    """The maps with the greatest value 1: a softmax over 4096 places leaves differences that float32 would lose. (M, h, w) float32."""
    maps = proposals.maps.cpu().numpy()
    offset = maps.min()
    return ((maps - offset) / max(maps.max() - offset, 1e-300)).astype(np.float32)


def upsample(values: Array, size: tuple[int, ...]) -> Array:
    """Bilinear, half-pixel centres, (h, w) -> (H, W); the same as torch's interpolate with align_corners=False."""
    return cv2.resize(values, size[::-1], interpolation=cv2.INTER_LINEAR)


def relabel(regions: Array, labels: Array) -> tuple[list[int], Array]:
    """Number the regions 1..K by first appearance in reading order, 0 kept; and the value of `labels` inside each region."""
    names, places, index = np.unique(regions, return_index=True, return_inverse=True)
    order = np.argsort(places[names > 0])
    new = np.zeros(len(names), np.int32)
    new[np.flatnonzero(names > 0)[order]] = np.arange(1, len(order) + 1)
    first = labels.ravel()[places[names > 0][order]].tolist()
    return first, new[index].reshape(regions.shape)


def superpixels(image: Image, scale: float) -> Array:
    """Felzenszwalb and Huttenlocher's graph-based superpixels: (H, W, 3) uint8 -> (H, W) int."""
    height, width = image.shape[:2]
    reduce = min(1.0, (SUPERPIXEL_AREA / (height * width)) ** 0.5)
    size = max(1, round(width * reduce)), max(1, round(height * reduce))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if reduce < 1 else image
    found = felzenszwalb(small, scale=scale, sigma=0.8, min_size=50)
    return cv2.resize(found.astype(np.int32), (width, height), interpolation=cv2.INTER_NEAREST) if reduce < 1 else found
