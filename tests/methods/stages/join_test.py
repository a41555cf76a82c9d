"""Joining superpixels: the graph against passes over the pixels, the joining against recomputing everything at every step."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.sparse.csgraph import connected_components

from padseg.errors import UsageError
from padseg.methods.stages.join import AREA, BORDER, COLOUR, UNIT, Graph, contrasts, graph_of, joined, joins, owners, within
from padseg.methods.stages.labels import label_map
from padseg.types import Frame, Proposals


def random_graph(seed, count, maps=3):
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(maps), count)
    borders = [{} for _ in range(count)]
    for one in range(count):
        for other in range(one + 1, count):
            if rng.random() < 0.4 or other == one + 1:
                borders[one][other] = borders[other][one] = (float(rng.uniform(0, 5)), float(rng.integers(1, 20)))
    return Graph(shares, rng.uniform(0, 100, (count, 3)), rng.dirichlet(np.ones(count)), borders)


def joined_slowly(graph, threshold):
    """Groups of superpixels; before every step all distances anew from the members."""
    groups = [[number] for number in range(len(graph.areas))]

    def distance(one, other):
        weight = [graph.areas[group] for group in (one, other)]
        shares = [each @ graph.shares[group] / each.sum() for each, group in zip(weight, (one, other), strict=True)]
        colours = [each @ graph.colours[group] / each.sum() for each, group in zip(weight, (one, other), strict=True)]
        edges = [graph.borders[a][b] for a in one for b in other if b in graph.borders[a]]
        if not edges:
            return np.inf
        total, length = np.sum(edges, axis=0)
        area = 1 / (1 / weight[0].sum() + 1 / weight[1].sum())
        apart = 1 - np.sqrt(shares[0] * shares[1]).sum()
        pictured = COLOUR * np.abs(colours[0] - colours[1]).sum() / UNIT + BORDER * total / length
        return (apart + (1 - shares[0] @ shares[1]) ** 0.5 * pictured) * area**AREA

    while True:
        pairs = [(distance(a, b), i, j) for i, a in enumerate(groups) for j, b in enumerate(groups) if i < j]
        nearest, i, j = min(pairs, default=(np.inf, 0, 0))
        if not nearest < threshold:
            return {frozenset(group) for group in groups}
        groups[i] += groups.pop(j)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(0, 0.8))
def test_joining_equals_the_slow_way(seed, count, threshold):
    graph = random_graph(seed, count)
    owner = joined(graph, threshold)
    assert {frozenset(np.flatnonzero(owner == region).tolist()) for region in set(owner.tolist())} == joined_slowly(graph, threshold)
    assert all(owner[region] == region for region in owner)


def test_zero_joins_nothing_and_everything_that_touches_is_joined_at_last():
    graph = random_graph(3, 12)
    assert joined(graph, 0.0).tolist() == list(range(12))
    assert len(set(joined(graph, 1e9).tolist())) == 1
    islands = graph._replace(borders=[{} for _ in range(12)])
    assert joined(islands, 1e9).tolist() == list(range(12))


def test_sure_proposals_outweigh_the_picture():
    """Two pairs of neighbours with the same colours and the same border, each with equal shares; only the first pair is sure of them."""
    shares = np.array([[1.0, 0, 0], [1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]])
    border = {'0-1': (5.0, 10.0), '2-3': (5.0, 10.0)}
    borders = [{1: border['0-1']}, {0: border['0-1']}, {3: border['2-3']}, {2: border['2-3']}]
    graph = Graph(shares, np.array([[0.0, 0, 0], [50, 0, 0]] * 2), np.full(4, 0.25), borders)
    assert joined(graph, 0.05).tolist() == [0, 0, 2, 3]


def test_contrasts_equal_the_loop():
    rng = np.random.default_rng(0)
    index, lab = rng.integers(0, 4, (6, 7)), rng.uniform(0, 100, (6, 7, 3))
    expected: dict[tuple[int, int], list[float]] = {}
    for y in range(6):
        for x in range(7):
            for dy, dx in ((0, 1), (1, 0)):
                if y + dy < 6 and x + dx < 7 and index[y, x] != index[y + dy, x + dx]:
                    before = lab[max(y - dy, 0), max(x - dx, 0)]
                    after = lab[min(y + 2 * dy, 5), min(x + 2 * dx, 6)]
                    pair = tuple(sorted((int(index[y, x]), int(index[y + dy, x + dx]))))
                    expected.setdefault(pair, []).append(np.abs(before - after).sum() / UNIT)
    found = contrasts(index, lab, 4)
    assert {(a, b) for a in range(4) for b in found[a] if a < b} == set(expected)
    for (a, b), values in expected.items():
        np.testing.assert_allclose(found[a][b], (sum(values), len(values)))
        assert found[a][b] == found[b][a]


def test_colours_are_means_and_shares_sum_to_one():
    image = np.zeros((8, 12, 3), np.uint8)
    image[:, 6:] = 255
    index = np.repeat([[0] * 3 + [1] * 3 + [2] * 6], 8, 0)
    graph = graph_of(index, np.array([[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]]), image)
    assert graph.areas.tolist() == [0.25, 0.25, 0.5]
    assert graph.shares.tolist() == [[0.25, 0.75], [0.0, 0.0], [0.5, 0.5]]
    assert graph.colours[0] == pytest.approx(0, abs=0.1) and graph.colours[2, 0] > 90
    assert graph.borders[0].keys() == {1} and graph.borders[1].keys() == {0, 2}
    assert graph.borders[0][1][0] < 0.1 * graph.borders[1][2][0]


def test_what_a_guided_filter_takes_below_zero_counts_as_zero():
    """Shares have a root: one of -0.01 made every distance from its superpixel NaN, and NaN is never below the threshold."""
    index = np.repeat([[0, 1, 2]], 4, 0).repeat(4, 1)  # (4, 12)
    image = np.full((4, 12, 3), 128, np.uint8)
    values = np.array([[1.0, -0.01], [1.0, 0.0], [-0.01, 1.0]])
    graph = graph_of(index, values, image)
    assert graph.shares.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert joined(graph, 0.5).tolist() == [0, 0, 2]  # the two that agree are 0 apart, the others (1 / 6) ** 0.18 or more
    assert joined(graph_of(index, np.maximum(values, 0), image), 0.5).tolist() == [0, 0, 2]


def test_a_large_picture_is_reduced_and_loses_no_superpixel():
    rng = np.random.default_rng(1)
    small = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
    image = cv2.resize(small, (1600, 1200), interpolation=cv2.INTER_NEAREST)
    index = np.arange(12, dtype=np.int32).reshape(3, 4).repeat(400, 0).repeat(400, 1)
    graph = graph_of(index, np.ones((12, 2)), image)
    whole = graph_of(index[::4, ::4], np.ones((12, 2)), image[::4, ::4])
    assert [set(each) for each in graph.borders] == [set(each) for each in whole.borders]
    assert np.abs(graph.colours - whole.colours).max() < 3


def test_the_label_map_of_joined_superpixels():
    """Three stripes, proposals that tell only the first from the others, and a picture that tells the last from the others."""
    maps = torch.tensor([[[0.9, 0.1, 0.1]], [[0.1, 0.9, 0.9]]], dtype=torch.float64).repeat(1, 3, 1)
    size = (30, 30)
    proposals = Proposals(maps, ((0, 4), (7,)), Frame(size, (0, 0, *size)))
    inside = np.repeat([[5] * 10 + [6] * 10 + [9] * 10], 30, 0)
    grey = np.full((*size, 3), 90, np.uint8)
    striped = grey.copy()
    striped[:, 20:] = (250, 30, 20)
    by_proposals = label_map(proposals, inside, image=grey, join=0.1)
    assert by_proposals.labels[0, ::10].tolist() == [1, 2, 2] and by_proposals.tokens == ((0, 4), (7,))
    by_both = label_map(proposals, inside, image=striped, join=0.1)
    assert by_both.labels[0, ::10].tolist() == [1, 2, 3] and by_both.tokens == ((0, 4), (7,), (7,))
    assert label_map(proposals, inside, image=grey, join=100.0).labels.max() == 1
    with pytest.raises(UsageError, match='needs the picture'):
        label_map(proposals, inside, join=0.1)


@pytest.mark.parametrize('threshold', [0.0, 0.05, 0.2, 0.6])
def test_steps_of_a_higher_threshold_begin_with_those_of_a_lower(threshold):
    graph = random_graph(3, 40)
    every = joins(graph, np.inf)
    assert len(every) == 39
    np.testing.assert_array_equal(owners(every, 40, threshold), joined(graph, threshold))


@pytest.mark.parametrize('seed', range(20))
def test_only_superpixels_of_the_same_region_join(seed):
    graph = random_graph(seed, 12)
    regions = np.random.default_rng(seed).integers(0, 3, 12)
    linked = np.array([[other in each for other in range(12)] for each in graph.borders]) & (regions[:, None] == regions)
    _, expected = connected_components(linked, directed=False)
    found = joined(within(graph, regions), np.inf)
    np.testing.assert_array_equal(found[:, None] == found, expected[:, None] == expected)
