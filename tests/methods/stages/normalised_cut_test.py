"""DiffCut's recursive cut: planted partitions, what changes nothing, and the obvious way."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from padseg.methods.stages import normalised_cut as cuts


def planted(counts, between=0.02, seed=0):
    """The affinity of groups of these sizes: near 1 inside, near `between` across."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(counts)), counts)
    weights = np.where(groups[:, None] == groups, 1.0, between) * rng.uniform(0.9, 1, (len(groups),) * 2)
    weights = np.minimum(weights, weights.T)
    np.fill_diagonal(weights, 1)
    return weights, groups


def features(count=100, channels=6, seed=1):
    return np.random.default_rng(seed).standard_normal((count, channels))


def regions(tokens, tau, alpha=10):
    return cuts.token_labels(cuts.cut_tree(cuts.affinity(cuts.unit(tokens), alpha), tau), tau)


def same(one, other):
    """Whether two label arrays are the same partition."""
    pairs = {*zip(one.tolist(), other.tolist(), strict=True)}
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


def obvious_cut(weights):
    """The best cut by a full decomposition and the Rayleigh quotient of each threshold."""
    degrees = np.diag(weights.sum(1))
    scale = np.diag(weights.sum(1) ** -0.5)
    vector = scale @ scipy.linalg.eigh(scale @ (degrees - weights) @ scale)[1][:, 1]
    vector *= np.sign(vector[np.abs(vector).argmax()])
    values, sides = [], []
    for threshold in np.linspace(0.99 * vector.min(), 0.99 * vector.max(), 100):
        side = vector > threshold
        share = degrees[side].sum() / degrees.sum()
        z = np.where(side, 2, -2 * share / (1 - share))
        values.append(z @ (degrees - weights) @ z / (z @ degrees @ z))
        sides.append(side)
    return vector, min(values), sides[int(np.argmin(values))]


@pytest.mark.parametrize('counts', [(30, 50), (40, 30, 45), (5, 7)])
def test_planted_groups_are_found_for_any_threshold_between_their_cuts(counts):
    weights, groups = planted(counts)
    tree = cuts.cut_tree(weights, 2)
    between = sorted(node.value for node in tree[:1] if node.value < 1)
    inside = min(node.value for node in tree if len(set(groups[node.graph])) == 1)
    assert between[-1] < 0.3 < 0.8 < inside
    for tau in (0.3, 0.8 * inside, 0.999 * inside):
        assert same(cuts.token_labels(tree, tau), groups)


def test_nothing_is_cut_at_0_and_everything_at_2():
    tokens = features(60)
    assert not regions(tokens, 0).any()
    assert sorted(regions(tokens, 2)) == list(range(60))


def test_regions_at_a_higher_threshold_divide_those_at_a_lower_one():
    tree = cuts.cut_tree(cuts.affinity(cuts.unit(features(150))), 2)
    levels = [cuts.token_labels(tree, tau) for tau in (0, 0.2, 0.5, 0.7, 0.9, 1.1, 2)]
    counts = [len(set(level.tolist())) for level in levels]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 150 and len(set(counts)) > 3
    for coarse, fine in zip(levels, levels[1:], strict=False):
        assert len({*zip(coarse.tolist(), fine.tolist(), strict=True)}) == len(set(fine.tolist()))


def test_a_tree_grown_further_has_the_same_regions():
    tokens = features(80)
    weights = cuts.affinity(cuts.unit(tokens))
    assert np.array_equal(cuts.token_labels(cuts.cut_tree(weights, 2), 0.8), cuts.token_labels(cuts.cut_tree(weights, 0.8), 0.8))


def test_scale_and_rotation_of_features_change_nothing():
    tokens = features(120)
    rotation = np.linalg.qr(features(6, 6, seed=3))[0]
    expected = regions(tokens, 0.8)
    assert len(set(expected.tolist())) > 2
    assert np.array_equal(regions(1000 * tokens, 0.8), expected)
    assert np.array_equal(regions(tokens @ rotation, 0.8), expected)
    lengths = np.random.default_rng(4).uniform(0.1, 9, (120, 1))
    assert np.array_equal(regions(lengths * tokens, 0.8), expected)


@pytest.mark.parametrize('count', [2, 3, 40, 200])
def test_a_cut_is_that_of_the_obvious_way(count):
    weights = cuts.affinity(cuts.unit(features(count)), 3) + 1e-3
    vector, value, side = obvious_cut(weights)
    found = cuts.second_vector(weights)
    assert np.abs(found / np.abs(found).max() - vector / np.abs(vector).max()).max() < 1e-6
    cut, own = cuts.best_cut(weights)
    assert cut == pytest.approx(value, abs=1e-9) and np.array_equal(own, side)


@pytest.mark.parametrize('groups', [(3, 3, 3), (40, 40, 40)])  # by a full decomposition, and by Lanczos' method
def test_ties_are_fixed(groups):
    weights = scipy.linalg.block_diag(*(np.ones((count, count)) for count in groups)) + 0.1
    vector = cuts.second_vector(weights)
    names = np.repeat([0, 1, 2], groups)
    means = np.array([vector[names == name].mean() for name in range(3)])
    assert np.abs(vector - means[names]).max() < 1e-9  # inside the space of both vectors
    assert abs(means.sum()) < 1e-9 and vector.max() >= -vector.min() * (1 - 1e-9)
    assert same(cuts.token_labels(cuts.cut_tree(weights, 0.9), 0.9), names)
    fixed = cuts.fixed_vector(len(names))
    nearest = np.array([fixed[names == name].mean() for name in range(3)]) - fixed.mean()
    assert abs(np.corrcoef(nearest, means)[0, 1]) > 1 - 1e-9
    assert np.array_equal(vector, cuts.second_vector(weights.copy()))


def test_features_that_are_all_alike_are_one_region():
    weights = cuts.affinity(cuts.unit(np.full((300, 8), 0.3)))
    assert (weights == 1).all()
    assert not regions(np.full((300, 8), 0.3), 0.5).any()
    assert cuts.best_cut(weights)[0] == pytest.approx(1)


def test_released_graphs_drop_tokens_and_whole_ones_keep_them():
    tokens = features(100)
    weights = cuts.affinity(cuts.unit(tokens), 3)
    dropped = (weights == 0).any(1)
    whole, released = (cuts.cut_tree(weights, 1.2, own) for own in (False, True))
    assert dropped.sum() == 2 and len(released) > 3
    assert all(len(node.graph) == len(node.tokens) for node in whole)
    assert all(np.array_equal(node.graph, node.tokens[~dropped[node.tokens]]) for node in released[1:])


def test_autosc_finds_the_number_of_groups():
    centres = np.linalg.qr(features(8, 8))[0][:4]
    tokens = np.repeat(centres, 30, 0) + 0.1 * features(120, 8)
    assert same(cuts.automatic_clusters(cuts.unit(tokens)), np.repeat(np.arange(4), 30))


def test_prototypes_are_means_of_units():
    found = cuts.prototypes(np.array([[1.0, 0], [0, 1], [0.6, 0.8]]), np.array([0, 0, 1]))
    assert np.allclose(found, [[0.5, 0.5], [0.6, 0.8]])
