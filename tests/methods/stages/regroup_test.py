"""Regions that do not touch: features by hand, grouping against a loop over all groups, and whole label maps with a mast before the sky."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.graphs import grouped_slowly, random_graph

from padseg.methods.stages import regroup
from padseg.methods.stages.join import BINS, LEAST_AREA
from padseg.methods.stages.labels import label_map
from padseg.methods.stages.regroup import APART, NEVER, odds_apart, of_regions, regrouped
from padseg.types import Frame, Proposals


def odds_slowly(graph, one, other):
    shares, histograms, areas = graph.shares[[one, other]], graph.histograms[[one, other]], graph.areas[[one, other]]
    odds = APART.bias + APART.proposals * (1 - np.sqrt(shares[0] * shares[1]).sum()) + APART.doubt * (1 - shares[0] @ shares[1]) ** 0.5
    odds += APART.colours * sum((a - b) ** 2 / (a + b) for a, b in zip(*histograms, strict=True)) / 2
    return np.exp(odds + APART.area * np.log(1 / (1 / areas[0] + 1 / areas[1]) + LEAST_AREA))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(0, 5))
def test_grouping_equals_the_slow_way(seed, count, threshold):
    graph = random_graph(seed, count)
    group = regrouped(graph, np.arange(count), count, threshold)

    def odds(one, other):
        touch = any(b in graph.borders[a] for a in one for b in other)
        return np.inf if touch else max(odds_slowly(graph, a, b) for a in one for b in other)

    assert {frozenset(np.flatnonzero(group == each).tolist()) for each in set(group.tolist())} == grouped_slowly(count, odds, threshold)
    assert all(graph.areas[each] <= graph.areas[largest] for each, largest in enumerate(group))


def test_odds_between_regions_equal_those_of_their_means():
    graph = random_graph(4, 8)
    regions = np.array([0, 0, 1, 2, 2, 2, 4, 1])  # region 3 has no superpixel
    found = of_regions(graph, regions, 5)
    inside = regions == 2
    weight = graph.areas[inside] / graph.areas[inside].sum()
    assert found.areas == pytest.approx([graph.areas[regions == region].sum() for region in range(5)])
    for name in ('shares', 'colours', 'squares', 'histograms'):
        np.testing.assert_allclose(getattr(found, name)[2], weight @ getattr(graph, name)[inside])
    lengths = sum(graph.borders[a][b][1] for a in (0, 1) for b in (3, 4, 5) if b in graph.borders[a])
    assert found.borders[0][2][1] == pytest.approx(lengths) and found.borders[3] == {}
    odds = odds_apart(found._replace(borders=[{}, {2: (1.0, 1.0)}, {1: (1.0, 1.0)}, {}, {}]), np.array([4, 2, 1]), APART)
    assert odds[0, 1] == odds[1, 0] == pytest.approx(odds_slowly(found, 4, 2))
    assert odds[1, 2] == odds[2, 1] == NEVER and odds.diagonal().tolist() == [0, 0, 0]


def test_regions_that_touch_and_those_without_superpixels_stay_alone(monkeypatch):
    graph = random_graph(5, 6)
    alike = graph._replace(shares=np.full((6, 3), 1 / 3), histograms=np.full((6, 3 * BINS), 1 / (3 * BINS)))
    chain = [{other: (1.0, 1.0) for other in (own - 1, own + 1) if 0 <= other < 6} for own in range(6)]
    group = regrouped(alike._replace(borders=chain), np.arange(6), 7, 1e300)
    assert group[6] == 6 and len(set(group.tolist())) < 6
    assert all(group[one] != group[one + 1] for one in range(6))
    monkeypatch.setattr(regroup, 'MOST', 2)
    islands = alike._replace(borders=[{} for _ in range(6)])
    largest = np.argsort(-alike.areas)[:2]
    assert set(np.flatnonzero(regrouped(islands, np.arange(6), 6, 1e300) != np.arange(6)).tolist()) == {largest[1]}
    assert regrouped(islands, np.arange(6), 6, 0.0).tolist() == list(range(6))


def mast_before_the_sky():
    """The sky on both sides of a mast, and the ground: picture, superpixels and proposals of the sky, the mast and the ground."""
    index = np.repeat([[0] * 9 + [1] * 2 + [2] * 13], 16, 0)
    index[12:] = 3
    image = np.array([[120, 170, 230], [30, 20, 10], [122, 171, 229], [70, 120, 40]], np.uint8)[index]
    maps = torch.stack([torch.tensor(np.isin(index, seen), dtype=torch.float32) for seen in ((0, 2), (1,), (3,))])
    return image, index, Proposals(maps, ((0,), (1,), (2,)), Frame((16, 24), (0, 0, 16, 24)))


def test_the_sky_on_both_sides_of_a_mast_gets_one_number():
    image, index, proposals = mast_before_the_sky()
    apart = label_map(proposals, index, True, image=image, join=0.8)
    assert apart.labels[[0, 0, 0, 15], [0, 10, 20, 0]].tolist() == [1, 2, 3, 4] and apart.tokens == ((0,), (1,), (0,), (2,))
    together = label_map(proposals, index, True, image=image, join=0.8, regroup=0.8)
    assert together.labels.tolist() == np.array([0, 1, 2, 1, 3])[apart.labels].tolist() and together.tokens == ((0,), (1,), (2,))
    sky = label_map(proposals, index, True, image=image, join=0.8, regroup=1e-9)
    assert (sky.labels == apart.labels).all() and sky.tokens == apart.tokens


def test_what_the_model_did_not_see_stays_unassigned():
    image, index, proposals = mast_before_the_sky()
    shifted = proposals._replace(frame=Frame((16, 30), (0, 6, 16, 24)))
    wide = np.pad(image, ((0, 0), (6, 0), (0, 0)))
    found = label_map(shifted, np.pad(index, ((0, 0), (6, 0))), True, image=wide, join=0.8, regroup=0.8)
    assert (found.labels[:, :6] == 0).all() and found.labels[0, [6, 16, 26]].tolist() == [1, 2, 1]
