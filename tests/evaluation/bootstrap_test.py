"""Bootstrap intervals that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from padseg.evaluation.bootstrap import Bootstrap, mean_interval


def at(confidence, **options):
    return Bootstrap(resamples=4000, confidence=confidence, **options)


def test_two_groups():
    # of two draws both are 0 in a quarter of cases, and both are 1 in another
    assert mean_interval([0, 1], ['a', 'b'], at(0.95)) == (0, 1)
    assert mean_interval([0, 1], ['a', 'b'], at(0.4)) == (0.5, 0.5)


def test_three_groups():
    # of the 27 draws one has the mean 0, three 1, three 2, ... and one 9: 5 % and 95 % are 1 and 7
    assert mean_interval([0, 3, 9], 'abc', at(0.9)) == (1, 7)
    assert mean_interval([0, 3, 9], 'abc', at(0.98)) == (0, 9)


def test_groups_are_drawn_whole_and_count_by_their_size():
    # means 0, 10, or of both groups 30 / 4
    assert mean_interval([0, 10, 10, 10], 'abbb', at(0.95)) == (0, 10)
    assert mean_interval([0, 10, 10, 10], 'abbb', at(0.4)) == (7.5, 7.5)
    # differences inside a group do not widen the interval
    assert mean_interval([-5, 5, 5, -5], 'aabb') == (0, 0)


def test_equal_values_have_no_width_and_one_group_no_interval():
    assert mean_interval([2, 2, 2], [1, 2, 3]) == (2, 2)
    assert mean_interval([1, 2, 3], [7, 7, 7]) is None


def test_the_same_seed_gives_the_same_interval_in_any_order():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(1, 1, 200).tolist(), [f'prompt {number % 50}' for number in range(200)]
    order = rng.permutation(200)
    low, high = mean_interval(values, groups)
    assert mean_interval([values[place] for place in order], [groups[place] for place in order]) == (low, high)
    assert mean_interval(values, groups, Bootstrap(seed=1)) != (low, high)
    spread = np.std([np.mean(values[place::50]) for place in range(50)]) / 50**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.1)


def test_the_interval_does_not_depend_on_what_fits_in_memory(monkeypatch):
    from padseg.evaluation import bootstrap

    whole = mean_interval([0, 3, 9, 4], 'abcd', Bootstrap(500))
    monkeypatch.setattr(bootstrap, 'MOST_CELLS', 8)
    assert mean_interval([0, 3, 9, 4], 'abcd', Bootstrap(500)) == whole
