"""Joining superpixels: the graph against passes over the pixels, the joining against recomputing everything at every step."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.sparse.csgraph import connected_components
from support.graphs import grouped_slowly, random_graph

from padseg.errors import UsageError
from padseg.methods.stages.join import BINS, LEAST_AREA, SPREAD, UNIT, WEIGHTS, Graph, contrasts, graph_of, joined, joins, owners, within
from padseg.methods.stages.labels import join_order, label_map
from padseg.types import Frame, Proposals


def joined_slowly(graph, threshold):
    """Groups of superpixels."""

    def mean(group, of):
        weight = graph.areas[group]
        return weight @ of[group] / weight.sum()

    def outline(group):
        return sum(length for a in group for b, (_, length) in graph.borders[a].items() if b not in group)

    def distance(one, other):
        edges = [graph.borders[a][b] for a in one for b in other if b in graph.borders[a]]
        if not edges:
            return np.inf
        total, length = np.sum(edges, axis=0)
        shares, colours, squares, histograms = ([mean(group, each) for group in (one, other)] for each in graph[:4])
        doubt = (1 - shares[0] @ shares[1]) ** 0.5
        deviations = [(square - colour**2).sum() ** 0.5 for square, colour in zip(squares, colours, strict=True)]
        odds = WEIGHTS.bias
        odds += WEIGHTS.proposals * (1 - np.sqrt(shares[0] * shares[1]).sum())
        odds += WEIGHTS.doubt * doubt + (WEIGHTS.border + WEIGHTS.doubted * doubt) * total / length
        odds += WEIGHTS.colours * sum((a - b) ** 2 / (a + b) for a, b in zip(*histograms, strict=True)) / 2
        odds += WEIGHTS.spreads * abs(deviations[0] - deviations[1]) / SPREAD
        odds += WEIGHTS.touching * length / min(outline(one), outline(other))
        odds += WEIGHTS.area * np.log(1 / (1 / graph.areas[one].sum() + 1 / graph.areas[other].sum()) + LEAST_AREA)
        return np.exp(odds)

    return grouped_slowly(len(graph.areas), distance, threshold)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(0, 3))
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
    borders = [{1: (5.0, 10.0)}, {0: (5.0, 10.0)}, {3: (5.0, 10.0)}, {2: (5.0, 10.0)}]
    colours = np.array([[0.0, 0, 0], [50, 0, 0]] * 2)
    graph = Graph(shares, colours, colours**2, np.full((4, 3 * BINS), 1 / (3 * BINS)), np.full(4, 0.25), borders)
    first, second = joins(graph, np.inf)
    assert (first.kept, first.gone, second.kept, second.gone) == (0, 1, 2, 3) and first.distance < 0.8 * second.distance


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
    bins = np.zeros((3, BINS))
    bins[0, 0] = bins[1, BINS // 2] = bins[2, BINS // 2] = 1 / 3
    np.testing.assert_allclose(graph.histograms[0], bins.ravel())  # black; a = b = 0
    assert np.abs(graph.squares[0] - graph.colours[0] ** 2).max() < 0.01


def test_what_a_guided_filter_takes_below_zero_counts_as_zero():
    """Shares have a root: one of -0.01 made every distance from its superpixel NaN, and NaN is never below the threshold."""
    index = np.repeat([[0, 1, 2]], 4, 0).repeat(4, 1)  # (4, 12)
    image = np.full((4, 12, 3), 128, np.uint8)
    values = np.array([[1.0, -0.01], [1.0, 0.0], [-0.01, 1.0]])
    graph = graph_of(index, values, image)
    assert graph.shares.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert np.isfinite([step.distance for step in joins(graph, np.inf)]).all()
    assert joins(graph, np.inf) == joins(graph_of(index, np.maximum(values, 0), image), np.inf)


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
    between = np.mean([step.distance for step in join_order(proposals, inside, grey).steps])
    by_proposals = label_map(proposals, inside, image=grey, join=between)
    assert by_proposals.labels[0, ::10].tolist() == [1, 2, 2] and by_proposals.tokens == ((0, 4), (7,))
    by_both = label_map(proposals, inside, image=striped, join=between)
    assert by_both.labels[0, ::10].tolist() == [1, 2, 3] and by_both.tokens == ((0, 4), (7,), (7,))
    assert label_map(proposals, inside, image=grey, join=100.0).labels.max() == 1
    with pytest.raises(UsageError, match='needs the picture'):
        label_map(proposals, inside, join=0.1)


@pytest.mark.parametrize('threshold', [0.0, 0.5, 1.0, 2.0])
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
