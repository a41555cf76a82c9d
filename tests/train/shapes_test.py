"""Shapes: outlines that fill a part of their square, and the masks that they are filled to."""

from __future__ import annotations

import numpy as np
import pytest

from padseg.train.shapes import SHAPES, UPRIGHT, fill, turned


@pytest.mark.parametrize('name', SHAPES)
def test_shapes_fill_a_part_of_their_square(name):
    for seed in range(20):
        contours = [contour * 40 + 64 for contour in SHAPES[name](np.random.default_rng(seed))]
        share = (fill(contours, 128, 128) > 127).mean() * (128 / 80) ** 2
        assert 0.02 < share < 1


def test_a_filled_box_covers_its_pixels():
    mask = fill([np.array([(2, 1), (5, 1), (5, 3), (2, 3)])], 6, 8)
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:6] = True
    assert np.array_equal(mask > 127, expected)


def test_a_ring_has_a_hole():
    contours = [contour * 30 + 32 for contour in SHAPES['ring'](np.random.default_rng(0))]
    mask = fill(contours, 64, 64)
    assert mask[32, 32] == 0
    assert mask[32, 4] == 255


def test_a_quarter_turn_goes_from_right_to_down():
    assert np.allclose(turned(np.array([(1.0, 0), (0, 2)]), np.pi / 2), [(0, 1), (-2, 0)])


def test_shapes_with_an_upright_are_shapes():
    assert UPRIGHT < set(SHAPES)
