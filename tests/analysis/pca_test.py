"""Principal components and what explains them, on planted features and against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from padseg import Options
from padseg.analysis import pca
from padseg.analysis.pca import colours, explained, places, principal, regions_of
from padseg.analysis.recording import Pictures, Subject
from padseg.system.progress import Silent
from padseg.types import Frame

GRID = (12, 16)
REGIONS = np.zeros(GRID, int)
REGIONS[3:9, 4:11], REGIONS[9:, :5], REGIONS[2:5, 12:14] = 1, 2, 3


def planted(*parts: tuple[float, np.ndarray], width: int = 40) -> torch.Tensor:
    """Features (N, width) that hold signals (N, k) of these strengths in directions of their own, with a little noise."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(width, width)))[0]
    features, used = 1e-3 * rng.normal(size=(GRID[0] * GRID[1], width)), 0
    for strength, signal in parts:
        features += strength * signal @ directions[used : used + signal.shape[1]]
        used += signal.shape[1]
    return torch.from_numpy(features + 7).float()  # the mean does not count


def one_hots() -> np.ndarray:
    return (REGIONS.ravel()[:, None] == np.arange(4)).astype(float)


@pytest.mark.parametrize('count', [20, 300])  # fewer and more tokens than channels
def test_components_are_those_of_a_singular_value_decomposition(count):
    tokens = torch.randn(count, 50, generator=torch.Generator().manual_seed(1)) * torch.linspace(1, 3, 50)
    scores, share = principal(tokens)
    centred = tokens.double().numpy() - tokens.double().numpy().mean(0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    assert np.abs(scores.numpy()) == pytest.approx(np.abs(u[:, :3] * s[:3]), abs=1e-6)
    assert share == pytest.approx((s[:3] ** 2).sum() / (s**2).sum())
    largest = np.abs(vt[:3]).argmax(1)
    loadings = np.linalg.lstsq(scores.numpy(), centred, rcond=None)[0]  # (3, C)
    assert all(loadings[k, largest[k]] > 0 for k in range(3))


def test_planted_places_are_explained_by_places():
    waves = places(GRID)
    scores, share = principal(planted((5, waves[:, [1, 9, 3]])))
    by_place, adjusted = explained(scores.numpy(), waves)
    by_region, _ = explained(scores.numpy(), one_hots())
    assert share > 0.99 and by_place > 0.999 and adjusted > 0.999 and by_region < 0.5


def test_planted_regions_are_explained_by_regions():
    scores, share = principal(planted((5, one_hots())))
    by_region, adjusted = explained(scores.numpy(), one_hots())
    by_place, _ = explained(scores.numpy(), places(GRID))
    assert share > 0.99 and by_region > 0.999 and adjusted > 0.999 and by_place < 0.9


def test_noise_is_explained_by_nothing_once_adjusted():
    scores = np.random.default_rng(5).normal(size=(192, 3))
    plain, adjusted = explained(scores, places(GRID))
    assert 0.02 < plain < 0.2 and abs(adjusted) < 0.06


def test_what_is_explained_is_a_share_of_squares():
    scores = np.array([[0.0], [2.0], [10.0], [12.0]])
    halves = np.array([[1.0], [1], [0], [0]])
    assert explained(scores, halves) == pytest.approx((1 - 4 / 104, 1 - 4 / 104 * 3 / 2))
    assert explained(scores, np.hstack((halves, 1 - halves))) == pytest.approx((1 - 4 / 104, 1 - 4 / 104 * 3 / 2))  # one feature too many
    assert np.isnan(explained(np.ones((4, 1)), halves)).all()
    exact, adjusted = explained(scores, np.eye(4))
    assert exact == pytest.approx(1) and np.isnan(adjusted)


def test_regions_of_tokens():
    truth = np.zeros((8, 12), np.uint8)
    truth[:, 8:], truth[:4, :4] = 7, 255
    valid, regions = regions_of(truth, Frame((8, 12), (0, 0, 8, 12)), (2, 3))
    assert valid.tolist() == [False, True, True, True, True, True] and regions.argmax(1).tolist() == [0, 1, 0, 0, 1]
    valid, regions = regions_of(truth, Frame((8, 12), (4, 4, 4, 8)), (1, 2))  # only a part is seen
    assert valid.all() and regions.tolist() == [[1, 0], [0, 1]]
    assert colours(np.array([[1.0, 5.0], [3.0, 5.0]])).tolist() == [[0, 0, 0], [1, 0, 0]]


def test_components_of_a_model(backbone, picture):
    truth = np.zeros(picture.shape[:2], np.uint8)
    truth[:, 40:] = 1
    subjects = [Subject('a.png', picture, 'cat', truth), Subject('b.png', picture[::-1].copy(), '')]
    found = pca.measure(Pictures(subjects, backbone, Options(side=32).resolve(backbone.spec), (1, 4), Silent()))
    assert found.mean.shape == (2, 3, 4, 5) and found.maps.shape[:2] == (3, 4) and found.maps.shape[4] == 3
    assert found.maps.min() == 0 and found.maps.max() == 1 and found.name == 'a.png' and np.array_equal(found.image, picture)
    assert not np.isnan(found.mean).any()  # regions are those of the picture that has some
    rows = pca.rows(found)
    assert len(rows) == 2 * 4 * 3 and all(0 < row['explained'] <= 1 and row['region'] <= 1 for row in rows)
    unlabelled = pca.measure(Pictures(subjects[1:], backbone, Options(side=32).resolve(backbone.spec), (1,), Silent()))
    assert pca.rows(unlabelled)[0]['region'] is None and pca.rows(unlabelled)[0]['position'] is not None
