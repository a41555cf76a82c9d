"""Refine masks along the edges of a picture by pixel-adaptive mask refinement (Araslanov and Roth, 2020), as DiffCut does."""

from __future__ import annotations

import cv2
import numpy as np

from padseg.types import Array

DILATIONS = (1, 2, 4, 8)  # distances of the neighbours in pixels
SHARPNESS, ADDED = 0.1, 1e-8  # by the released code: differences of colours count in so many local standard deviations
OFFSETS = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))


def refined_masks(masks: Array, image: Array, times: int) -> Array:
    """Each pixel becomes the mean of its neighbours that their likeness in colour weighs, so many times: (K, h, w), (h, w, 3) in 0..1.

    Neighbours are the 8 around a pixel at each of DILATIONS, not the pixel itself; beyond the border lie its pixels again.
    """
    shares = neighbour_shares(image)
    masks = np.asarray(masks, np.float32)
    for _ in range(times):
        masks = np.stack([mixed(mask, shares) for mask in masks])
    return masks


def mixed(mask: Array, shares: Array) -> Array:
    result = np.zeros_like(mask)
    for share, values in zip(shares, neighbours(mask), strict=True):
        result += share * values
    return result


def neighbours(values: Array, centre: bool = False) -> list[Array]:
    """Views of the pixels that lie around each one, (h, w, ...) each, with `centre` also itself, once at each distance."""
    reach, (height, width) = DILATIONS[-1], values.shape[:2]
    wide = np.pad(values, ((reach, reach), (reach, reach), *((0, 0),) * (values.ndim - 2)), mode='edge')
    return [
        wide[top : top + height, left : left + width]
        for distance in DILATIONS
        for top, left in ((reach + row * distance, reach + column * distance) for row, column in OFFSETS if centre or row or column)
    ]


def neighbour_shares(image: Array) -> Array:
    """The weight of each neighbour of each pixel, summing to 1: (h, w, 3) in 0..1 -> (8 * distances, h, w) float32."""
    image = np.asarray(image, np.float32)
    around = neighbours(image, centre=True)
    mean = sum(around) / np.float32(len(around))
    spread = np.sqrt(sum((values - mean) ** 2 for values in around) / (len(around) - 1))  # of each channel, unbiased
    scores = np.stack([-(np.abs(values - image) / (ADDED + SHARPNESS * spread)).mean(2) for values in neighbours(image)])
    np.exp(scores - scores.max(0), out=scores)
    scores /= scores.sum(0)
    return scores


def smoothed_labels(labels: Array) -> Array:
    """The median of 3 x 3 pixels, as the released code ends with; the labels must be numbered as there: (h, w) uint8 or uint16."""
    return cv2.medianBlur(labels, 3)
