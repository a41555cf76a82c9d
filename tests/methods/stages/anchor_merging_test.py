"""DiffSeg's merging: against loops over pairs of maps, on grids of any shape, and within its memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support.cuts import merge_a_large_picture
from support.processes import start

from padseg.methods.stages import anchor_merging as merging
from padseg.methods.stages.aggregation import enlarged


def random_maps(grid, seed=0, sharp=2.0):
    pixels = grid[0] * grid[1]
    return (sharp * torch.randn(pixels, pixels, generator=torch.Generator().manual_seed(seed))).softmax(1)


def kl(p, q):
    return float(((p - q).double() * (p.double().log() - q.double().log())).sum() / 2)


@pytest.mark.parametrize(
    ('length', 'count', 'points'),
    [(64, 16, range(1, 62, 4)), (64, 8, range(0, 64, 9)), (5, 5, range(5)), (7, 1, [3]), (6, 2, [0, 5]), (1, 1, [0])],
)
def test_points_of_an_axis(length, count, points):
    assert merging.axis_points(length, count).tolist() == list(points)


def test_anchors_of_a_grid_that_is_not_square():
    assert merging.anchors((2, 9), 4).tolist() == [row * 9 + column for row in (0, 1) for column in (1, 3, 5, 7)]


@pytest.mark.parametrize('to', [(4, 6), (5, 7)])
def test_maps_are_aggregated_as_pictures_one_by_one(to):
    grids = [to, (2, 3)]
    maps = {grid: random_maps(grid) for grid in grids}
    weights = [length / sum(np.prod(grid) ** 0.5 for grid in grids) for length in (np.prod(grid) ** 0.5 for grid in grids)]
    expected = torch.zeros(*to, *to)
    for (grid, own), weight in zip(maps.items(), weights, strict=True):
        for row, column in itertools.product(*map(range, to)):
            source = (row * grid[0] // to[0]) * grid[1] + column * grid[1] // to[1]
            picture = enlarged(own[source].view(grid), to)
            expected[row, column] += float(weight) * picture / picture.sum()
    found = merging.aggregated_maps({grid: own.clone() for grid, own in maps.items()}, to)
    assert torch.allclose(found.view(*to, *to), expected, rtol=1e-5, atol=1e-8)
    assert torch.allclose(found.sum(1), torch.ones(to[0] * to[1]))


def test_the_first_pass_is_that_of_loops():
    maps, points = random_maps((4, 5), sharp=1.0), torch.tensor([1, 7, 13])
    distances = torch.tensor([[kl(maps[point], own) for own in maps] for point in points])
    ordered = distances.flatten().sort().values
    threshold = float(ordered[29:31].mean())
    near = distances < threshold
    found, counts = merging.first_pass(maps, points, threshold)
    assert counts.tolist() == near.sum(1).tolist() and 1 < counts.min() < counts.max() < 20
    assert torch.allclose(found, torch.stack([maps[own].double().mean(0) for own in near]))


def test_thresholds_at_both_ends():
    maps, points = random_maps((4, 5)), torch.arange(0, 20, 3)
    assert torch.allclose(merging.merged(maps, points, (0.0,) * 3), maps[points].double())
    assert torch.allclose(merging.merged(maps, points, (float('inf'),) * 3), maps.double().mean(0, keepdim=True))


def test_small_values_in_16_bits_and_in_64():
    maps = torch.full((2, 4), 0.25)
    maps[1] = torch.tensor([1e-9, 0.25, 0.25, 0.5])
    assert torch.isnan(merging.half_distances(maps, maps)).tolist() == [[False, True], [True, True]]
    found, counts = merging.first_pass(maps, torch.tensor([0, 1]), 0.5, half=True)
    assert counts.tolist() == [1, 0] and len(found) == 1
    assert merging.first_pass(maps, torch.tensor([0, 1]), 0.5)[1].tolist() == [1, 1]
    close = random_maps((3, 3), sharp=0.5)
    exact = torch.tensor([[kl(p, q) for q in close] for p in close])
    assert torch.allclose(merging.half_distances(close, close), exact, atol=2e-3)


def test_exact_zeros_do_not_spread():
    maps = torch.eye(6) * 0.5 + torch.eye(6).roll(1, 1) * 0.5
    found = merging.merged(maps, torch.arange(6), (0.1, 0.1))
    assert torch.equal(found, maps.double())


def test_k_means_keeps_planted_clusters_and_drops_empty_ones():
    maps = torch.cat([random_maps((3, 3), sharp=0.1)[:, :9], torch.eye(9) * 0.9 + 0.1 / 9])
    groups = torch.tensor([0] * 9 + list(range(1, 10)))
    starts = torch.stack([maps[groups == number].double().mean(0) for number in range(10)])
    far = torch.full((1, 9), 5.0, dtype=torch.float64)
    found = merging.clustered(maps, torch.cat([far, starts]))
    assert torch.allclose(found, starts)


def test_words_of_regions():
    labels = torch.tensor([[0, 0, 1], [0, 1, 1]])
    words = torch.tensor([[[9.0, 0, 0], [0, 0, 0]], [[1, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 1]]])
    assert merging.words_of_regions(labels, words) == [1, 2]
    assert merging.words_of_regions(labels, words, 'majority') == [1, 2]
    shares = merging.word_maps({(1, 2): torch.tensor([[3.0, 1], [0, 0]]), (2, 4): torch.ones(8, 2)}, (2, 4))
    assert torch.allclose(shares[:, 0, 0], torch.tensor([1.25, 0.75])) and shares[:, 1, 3].tolist() == [0.5, 0.5]


def test_merging_takes_little_memory():
    ran = start(merge_a_large_picture).wait()
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 200
