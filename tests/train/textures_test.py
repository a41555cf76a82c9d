"""Textures: fields between 0 and 1 of every size, which vary where they should; palettes keep their bounds."""

from __future__ import annotations

import numpy as np
import pytest

from padseg.train.textures import TEXTURES, Style, choose_style, paint


@pytest.mark.parametrize('name', TEXTURES)
def test_textures_stay_between_0_and_1(name):
    for seed, (height, width) in enumerate([(1, 1), (3, 50), (50, 3), (64, 48)] * 5):
        field = TEXTURES[name](np.random.default_rng(seed), height, width)
        assert field.shape == (height, width)
        assert field.dtype == np.float32
        assert 0 <= field.min() <= field.max() <= 1


@pytest.mark.parametrize('name', sorted(set(TEXTURES) - {'plain'}))
def test_textures_vary(name):
    assert np.mean([TEXTURES[name](np.random.default_rng(seed), 64, 64).std() for seed in range(10)]) > 0.1


@pytest.mark.parametrize('near', [None, np.array([200.0, 40, 40])])
def test_palettes_are_colours(near):
    for seed in range(50):
        palette = choose_style(np.random.default_rng(seed), 0.3, near).palette
        assert palette.ndim == 2 and palette.shape[1] == 3 and len(palette) >= 2
        assert 0 <= palette.min() <= palette.max() <= 255


def test_plainness_decides_whether_a_style_is_plain():
    def calm(plainness: float) -> list[bool]:
        return [choose_style(np.random.default_rng(seed), plainness).texture in ('plain', 'gradient') for seed in range(30)]

    assert not any(calm(0.0))
    assert all(calm(1.0))


def test_paint_goes_from_the_first_colour_of_the_palette_to_the_last():
    colours = paint(np.random.default_rng(0), Style('checker', np.array([[10.0, 20, 30], [200, 150, 100]])), 40, 60)
    assert colours.shape == (40, 60, 3)
    assert colours.dtype == np.float32
    assert np.unique(colours.reshape(-1, 3), axis=0).tolist() == [[10, 20, 30], [200, 150, 100]]
