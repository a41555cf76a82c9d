"""The guided filter against windows solved one by one, and what it is for: regions that end where the picture's do."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
import torch

from padseg.methods.stages.enlarging import whole
from padseg.methods.stages.guided_filter import AREA, EPSILON, guide_of, guided, window_mean
from padseg.methods.stages.labels import label_map
from padseg.types import Frame, Proposals


def enlarged(values, guide):
    return whole(guided(values, guide), guide.image.shape[:2])


def slowly(values, image, radius):
    """A least-squares fit in every window, and at every pixel the mean of the fits of all windows that hold it."""
    height, width = image.shape[:2]
    enlarged = cv2.resize(values.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float64)
    colours = image / 255
    fits = np.zeros((height, width, 4))
    for y in range(height):
        for x in range(width):
            window = np.s_[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
            inputs, targets = colours[window].reshape(-1, 3), enlarged[window].ravel()
            mean = inputs.mean(0)
            slope = np.linalg.solve(np.cov(inputs.T, bias=True) + EPSILON * np.eye(3), ((inputs - mean) * targets[:, None]).mean(0))
            fits[y, x] = [*slope, targets.mean() - slope @ mean]
    result = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            window = np.s_[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
            fit = fits[window].reshape(-1, 4).mean(0)
            result[y, x] = fit[:3] @ colours[y, x] + fit[3]
    return result


@pytest.mark.parametrize(
    ('size', 'cells', 'radius'), [((20, 30), (5, 6), 5), ((17, 9), (4, 3), 4), ((3, 40), (1, 10), 4), ((1, 1), (1, 1), 1)]
)
def test_against_windows_one_by_one(size, cells, radius):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    values = rng.random(cells).astype(np.float32)
    guide = guide_of(image, cells)
    assert guide.radius == radius
    assert enlarged(values, guide) == pytest.approx(slowly(values, image, radius), abs=1e-5)


def test_constant_maps_and_flat_pictures():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)
    assert enlarged(np.full((5, 6), 0.3, np.float32), guide_of(image, (5, 6))) == pytest.approx(0.3, abs=1e-5)
    flat = np.full((40, 60, 3), 77, np.uint8)
    values = rng.random((5, 6)).astype(np.float32)
    smooth = cv2.resize(values, (60, 40), interpolation=cv2.INTER_LINEAR)
    guide = guide_of(flat, (5, 6))
    expected = window_mean(window_mean(smooth, guide.radius), guide.radius)
    assert enlarged(values, guide) == pytest.approx(expected, abs=1e-4)  # nothing to go by: smoothed twice


def disc(radius=43):
    """A dark disc on light ground with slight noise, (160, 192, 3), and where it is."""
    rows, columns = np.mgrid[:160, :192]
    inside = (rows - 77) ** 2 + (columns - 101) ** 2 < radius**2
    noise = np.random.default_rng(0).integers(-9, 10, (160, 192, 3))
    return (np.where(inside[..., None], (70, 60, 90), (180, 190, 170)) + noise).astype(np.uint8), inside


def test_regions_follow_the_edges_of_the_picture():
    image, inside = disc()
    share = cv2.resize(inside.astype(np.float32), (12, 10), interpolation=cv2.INTER_AREA)  # cells of 16 pixels
    proposals = Proposals(
        torch.tensor(np.stack([share, 1 - share]), dtype=torch.float64), ((0,), (1,)), Frame((160, 192), (0, 0, 160, 192))
    )
    plain, along = (label_map(proposals, image=image, refine=refine).labels for refine in ('none', 'guided'))
    wrong = [np.count_nonzero((labels != labels[0, 0]) != inside) for labels in (plain, along)]
    assert wrong[1] * 5 < wrong[0], wrong


def test_a_frame_inside_the_picture():
    image, inside = disc()
    share = cv2.resize(inside[20:148, 32:160].astype(np.float32), (8, 8), interpolation=cv2.INTER_AREA)
    proposals = Proposals(torch.tensor(np.stack([share, 1 - share])), ((0,), (1,)), Frame((160, 192), (20, 32, 128, 128)))
    found = label_map(proposals, image=image, refine='guided').labels
    whole = Proposals(proposals.maps, proposals.members, Frame((128, 128), (0, 0, 128, 128)))
    expected = label_map(whole, image=np.ascontiguousarray(image[20:148, 32:160]), refine='guided').labels
    assert np.array_equal(found[20:148, 32:160], expected)
    assert not found[:20].any() and not found[:, 160:].any()


def test_large_pictures_by_a_reduced_copy():
    """The linear models come from fewer pixels, but the edges are those of the whole picture."""
    image, inside = disc()
    large, truth = image.repeat(10, 0).repeat(10, 1), inside.repeat(10, 0).repeat(10, 1)
    assert large.shape[0] * large.shape[1] > 2 * AREA
    share = cv2.resize(inside.astype(np.float32), (12, 10), interpolation=cv2.INTER_AREA)
    guide = guide_of(large, (10, 12))
    assert guide.small.shape[0] * guide.small.shape[1] <= 1.01 * AREA
    assert np.mean((enlarged(share, guide) > 0.5) != truth) < 0.01


@pytest.mark.parametrize(('size', 'radius'), [((7, 9), 20), ((1, 12), 3), ((12, 1), 30), ((5, 40), 6), ((1, 1), 2)])
def test_windows_larger_than_the_picture(size, radius):
    values = np.random.default_rng(0).random((2, *size)).astype(np.float32)
    mean = window_mean(values, radius)
    for row, column in np.ndindex(size):
        window = values[:, max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1]
        assert mean[:, row, column] == pytest.approx(window.mean((1, 2)), abs=1e-6)


def test_a_long_and_narrow_picture_takes_about_as_long_as_a_square_one():
    """Of as many pixels; once, windows were searched for rows far beyond its border."""
    times = []
    for size in ((400, 400), (10, 16000)):
        values = np.random.default_rng(0).random((1, *size)).astype(np.float32)
        began = time.process_time()
        window_mean(values, max(size) // 24)
        times.append(time.process_time() - began)
    assert times[1] < 10 * times[0]
