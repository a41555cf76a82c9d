"""Windows over a large picture: where they lie, how their tokens are brought into agreement, and how they are blended."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import padseg
from padseg.errors import UsageError
from padseg.methods.seg4diff import Options, prepare
from padseg.methods.stages.tiles import (
    agreeing,
    enlarged,
    grid_of,
    level_maps,
    ramp,
    scales,
    shares,
    starts,
    tiled_label_map,
    window_maps,
    windows,
)
from padseg.types import Frame, LabelMap, Proposals


def noise_picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(st.integers(1, 300), st.integers(2, 40), st.integers(1, 39))
def test_windows_cover_everything_and_overlap(length, side, shared):
    shared = min(shared, side - 1)
    begins = starts(length, side, shared)
    assert begins[0] == 0 and begins[-1] + side >= length
    assert all(0 < after - before <= side - shared for before, after in itertools.pairwise(begins))
    assert len(begins) == 1 or begins[-1] + side == length


def test_scales_go_from_just_above_the_whole_picture_to_that_of_the_windows():
    assert scales(1.0) == [] and scales(0.3) == []
    assert scales(1.9) == [1.0]
    assert scales(9.0) == [1 / 8, 1 / 4, 1 / 2, 1]


@given(st.integers(0, 1000))
def test_tokens_are_renamed_as_they_were(seed):
    rng = np.random.default_rng(seed)
    known = np.zeros((7, 5, 6), np.float32)
    known[rng.integers(0, 7, 30), np.arange(30) // 6, np.arange(30) % 6] = 1  # each pixel belongs to one token
    order = rng.permutation(7)
    np.testing.assert_array_equal(agreeing(known[order], known), known)


def test_maps_of_windows_are_blended_by_their_weights(backbone):
    options = prepare(backbone, Options(tiles=64, overlap=24, side=64)).options
    image, grid = noise_picture(100, 150), grid_of((100, 150), 1.0, backbone.multiple)
    side, shared = 64 // backbone.multiple, 24 // backbone.multiple
    known = np.random.default_rng(1).random((77, 3, 4), np.float32)
    places = windows(grid, side, shared)
    assert len(places) == 8
    total, weights = np.zeros((77, *grid)), np.zeros(grid)
    for window, maps in window_maps(image, grid, places, backbone, options):
        here = enlarged(known, grid)[:, window.top :, window.left :][:, : window.rows, : window.columns].copy()
        for row in range(window.rows):
            for column in range(window.columns):
                at = window.top + row, window.left + column
                if weights[at]:
                    here[:, row, column] += total[:, at[0], at[1]] / weights[at]
        ordered = agreeing(maps, here)
        np.testing.assert_array_equal(np.sort(ordered, 0), np.sort(maps, 0))  # in another order, and nothing else
        weight = ramp(window, grid, shared)
        for row in range(window.rows):
            for column in range(window.columns):
                at = window.top + row, window.left + column
                total[:, at[0], at[1]] += weight[row, column] * ordered[:, row, column]
                weights[at] += weight[row, column]
    np.testing.assert_allclose(level_maps(image, grid, side, shared, backbone, options, known), total / weights, rtol=1e-4, atol=1e-7)


def test_a_picture_that_fits_in_a_window_is_segmented_as_ever(backbone):
    image = noise_picture(60, 50)
    plain, tiled = (padseg.segment(image, backbone, Options(side=32, tiles=tiles, overlap=16, threshold=0.01)) for tiles in (0, 64))
    assert isinstance(plain, LabelMap)
    np.testing.assert_array_equal(plain.labels, tiled.labels)
    assert plain.tokens == tiled.tokens


def test_maps_of_a_large_picture_have_the_cells_of_its_windows(backbone):
    options = Options(side=32, tiles=64, overlap=16)
    maps = padseg.token_maps(noise_picture(200, 130), backbone, options)
    assert maps.maps.shape == (77, *grid_of((200, 130), 0.5, backbone.multiple)) and maps.frame.size == (200, 130)
    sums = shares(maps.maps.numpy()).sum(0)
    np.testing.assert_allclose(sums, 1, rtol=1e-5)
    assert padseg.segment(noise_picture(200, 130), backbone, options).labels.shape == (200, 130)


def test_regions_may_be_as_small_as_in_one_window(backbone):
    options = Options(side=32, tiles=64, overlap=16, threshold=0.0, min_area=0.05)
    labels = padseg.segment(noise_picture(256, 256), backbone, dataclasses.replace(options, components=True)).labels
    areas = np.bincount(labels.ravel())[1:]
    assert areas.min() >= 0.05 * 64**2 and areas.min() < 0.05 * 256**2
    assert math.isclose(areas.sum(), 256**2)


def proposals_of(quadrants: list[list[int]], side: int) -> Proposals:
    """Two proposals, each 1 in the quadrants of its number and 0 elsewhere."""
    numbers = np.array(quadrants).repeat(side // 2, 0).repeat(side // 2, 1)
    maps = torch.from_numpy(np.stack([numbers == 0, numbers == 1]).astype(np.float64))
    return Proposals(maps, ((0,), (1,)), Frame((side, side), (0, 0, side, side)))


@pytest.mark.parametrize(('tiles', 'expected'), [(64, [[1, 2], [3, 2]]), (126, [[1, 2], [1, 2]])])
def test_regions_of_the_whole_view_are_divided_the_less_the_smaller_the_picture(tiles, expected):
    """Windows see that the lower left differs; that they do not tell left from right is of no account."""
    image = np.array([[20, 100], [180, 250]], np.uint8).repeat(64, 0).repeat(64, 1)[..., None].repeat(3, 2)
    options = Options(tiles=tiles, overlap=16, refine='none', superpixels=100.0, join=1.0, components=False, min_area=0.0)
    found = tiled_label_map(image, proposals_of([[0, 0], [1, 0]], 128), options, proposals_of([[0, 1], [0, 1]], 128))
    assert found.labels[32::64, 32::64].tolist() == expected and found.labels.max() == max(map(max, expected))


@pytest.mark.parametrize('wrong', [{'tiles': 20}, {'tiles': 128, 'overlap': 65}, {'tiles': 128, 'geometry': 'diffseg'}])
def test_tiles_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match='tiles|overlap'):
        Options(**wrong)
