"""Learning how superpixels are joined: what is said of pairs, by hand; planted weights are found; pairs follow the joining."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from padseg.methods.stages.join import BINS, WEIGHTS, Graph, Weights, joins
from padseg.methods.stages.regroup import ApartWeights, features_apart
from padseg.train.joining import START, UNKNOWN, Example, Pairs, apart, compared, compared_apart, confusion, fit, fitted


def stripes(count, rng):
    """Stripes side by side, each with its own share of two proposals."""
    shares = rng.dirichlet(np.ones(2), count)
    borders = [{other: (1.0, 10.0) for other in (number - 1, number + 1) if 0 <= other < count} for number in range(count)]
    colours = rng.uniform(0, 100, (count, 3))
    histograms = rng.dirichlet(np.ones(3 * BINS), count)
    return Graph(shares, colours, colours**2 + 1, histograms, np.full(count, 1 / count), borders)


def test_confusion_counts_pixels_without_void():
    index = np.array([[0, 0, 1], [0, 1, 1]])
    truth = np.array([[7, 9, 9], [-1, 7, 9]])
    assert confusion(index, truth, 3).tolist() == [[1, 1], [1, 2], [0, 0]]


def test_apart_compares_what_most_pixels_are():
    ones, others = np.array([[5, 2], [5, 2], [5, 2], [0, 0]]), np.array([[3, 1], [1, 3], [0, 0], [3, 1]])
    assert apart(ones, others).tolist() == [0, 1, UNKNOWN, UNKNOWN]


def test_pairs_are_those_that_the_joining_compares():
    """Three stripes, two annotators: at first all neighbours are compared, then the region that grew with what is left."""
    graph = stripes(3, np.random.default_rng(0))
    confusions = np.array([[9, 0], [0, 9], [0, 5]]), np.array([[9], [9], [9]])
    first = joins(graph, np.inf)[0]
    found = compared(Example(graph, confusions), WEIGHTS)
    assert found.features.shape == (3, len(Weights._fields) - 1)
    grown = confusions[0][first.kept] + confusions[0][first.gone]
    (left,) = {0, 1, 2} - {first.kept, first.gone}
    last = 0.5 * (grown.argmax() != confusions[0][left].argmax())
    assert found.apart.tolist() == [0.5, 0.0, last]
    assert confusions[0].tolist() == [[9, 0], [0, 9], [0, 5]]  # the example stays as it was


def test_regions_that_do_not_touch_are_compared_where_joining_ends():
    """Four stripes that nothing joins: the first with the third and fourth, the second with the fourth. Then all are one region."""
    graph = stripes(4, np.random.default_rng(0))
    confusions = np.array([[9, 0], [0, 9], [5, 4], [0, 0]]), np.array([[9], [9], [9], [9]])
    found = compared_apart(Example(graph, confusions), 0.0, WEIGHTS)
    features = features_apart(graph, np.arange(4))
    assert found.features.tolist() == [features[0, 2].tolist(), features[0, 3].tolist(), features[1, 3].tolist()]
    assert found.apart.tolist() == [0.0, UNKNOWN / 2, UNKNOWN / 2]
    none = compared_apart(Example(graph, confusions), np.inf, WEIGHTS)
    assert none.features.shape == (0, len(ApartWeights._fields) - 1) and none.apart.shape == (0,)


@pytest.mark.parametrize('planted', [Weights(3.0, 0.5, 1.0, 2.0, 1.5, 0.0, -1.0, 0.3, -1.0), ApartWeights(2.0, 0.5, 1.0, 0.3, -1.0)])
def test_planted_weights_are_found(planted):
    rng = np.random.default_rng(1)
    features = rng.uniform(0, 1, (20_000, len(planted) - 1))
    pairs = Pairs(features, expit(features @ np.array(planted[:-1]) + planted.bias))
    found = fit([pairs, pairs], type(planted))
    assert np.array(found) == pytest.approx(np.array(planted), abs=0.12)  # the penalty makes them smaller


def test_a_set_counts_as_often_as_it_is_said_to():
    rng = np.random.default_rng(3)
    sets = [Pairs(rng.uniform(0, 1, (500, len(WEIGHTS) - 1)), rng.integers(0, 2, 500).astype(float)) for _ in range(2)]
    assert np.array(fit(sets, Weights, (0, 5))) == pytest.approx(np.array(fit([sets[1]], Weights)), abs=0.02)  # but for the penalty's scale
    assert np.array(fit(sets, Weights, (2, 1))) == pytest.approx(np.array(fit([sets[0], *sets], Weights)), abs=0.02)
    assert fit(sets, Weights, (3, 3)) == fit(sets, Weights)


def test_rounds_follow_the_weights_before():
    rng = np.random.default_rng(2)
    sets = [[Example(stripes(12, rng), (np.eye(2, dtype=int)[rng.integers(0, 2, 12)],)) for _ in range(3)] for _ in range(2)]
    first, second = fitted(sets, 2)
    assert first == next(iter(fitted(sets, 1, START))) != START
    assert second == next(iter(fitted(sets, 1, first)))
