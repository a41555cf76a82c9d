"""Pixel-adaptive mask refinement, against a loop over pixels."""

from __future__ import annotations

import numpy as np

from padseg.methods.stages.pamr import DILATIONS, refined_masks, smoothed_labels


def obvious(mask, image):
    height, width = mask.shape
    result = np.zeros_like(mask)
    for row in range(height):
        for column in range(width):
            places = [
                (min(max(row + down * far, 0), height - 1), min(max(column + across * far, 0), width - 1))
                for far in DILATIONS
                for down in (-1, 0, 1)
                for across in (-1, 0, 1)
            ]
            spread = np.std([image[place] for place in places], axis=0, ddof=1)
            around = [place for number, place in enumerate(places) if number % 9 != 4]
            scores = np.array([-(np.abs(image[place] - image[row, column]) / (1e-8 + 0.1 * spread)).mean() for place in around])
            shares = np.exp(scores - scores.max())
            result[row, column] = shares @ [mask[place] for place in around] / shares.sum()
    return result


def test_it_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    image, masks = rng.random((6, 9, 3)), rng.random((2, 6, 9))
    expected = np.stack([obvious(obvious(mask, image), image) for mask in masks])
    assert np.abs(refined_masks(masks, image, 2) - expected).max() < 1e-5


def test_a_mask_moves_to_the_edge_of_the_picture():
    image = np.zeros((32, 32, 3))
    image[:, 16:] = 1
    mask = np.zeros((1, 32, 32))
    mask[:, :, 13:] = 1  # three pixels beside the edge
    found = refined_masks(np.concatenate([mask, 1 - mask]), image, 10).argmax(0)
    assert (found == (np.arange(32) < 16)).all()


def test_flat_pictures_and_lone_labels():
    masks = refined_masks(np.ones((1, 5, 5)), np.full((5, 5, 3), 0.5), 3)
    assert np.allclose(masks, 1)
    labels = np.zeros((5, 5), np.uint8)
    labels[2, 2] = 3
    assert not smoothed_labels(labels).any()
