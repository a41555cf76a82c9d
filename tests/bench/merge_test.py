"""bin/bench merge: a small run prints every step, and its plain ways are what they are compared with."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pytest
import torch

from padseg.bench import merge as steps
from padseg.methods.stages.labels import label_map
from padseg.methods.stages.proposals import merge
from padseg.types import Frame, LabelMap, Proposals, TokenMaps

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_small_run(bench):
    measured, seconds = bench('merge', '--maps', '30', '--size', '600', '500', '--seconds', '0.001')
    assert measured['maps'] == 30 and list(measured['pictures']) == ['481 x 321', '600 x 500']
    for taken in measured['pictures'].values():
        assert set(taken) == set(steps.STEPS)
        assert min(step['ours'] for step in taken.values()) > 0 and sum(sum(step.values()) for step in taken.values()) < 2000 * seconds
        plain = [step for name, step in taken.items() if name != 'superpixels']
        assert all(step['ratio'] == step['plain'] / step['ours'] for step in plain)
    memory = measured['memory_mib']
    one_map = 600 * 500 * 4 / 2**20
    assert list(memory) == ['proposals', 'three_times_as_many', 'plainly', 'attention'] and memory['plainly'] > steps.KINDS * one_map
    assert abs(memory['three_times_as_many'] - memory['proposals']) < 4 * one_map
    assert 0 < memory['attention'] < 300  # one head's scores of all tokens are 66 MiB, of all heads 1.5 GiB
    lines = steps.in_words(measured).splitlines()
    assert len(lines) == 1 + 2 * 7 + 5 and lines[1].split() == 'picture of 481 x 321 ms plainly ratio'.split()
    merging = measured['pictures']['481 x 321']['merge']
    assert lines[3] == f'  {"merging, with the distances":28} {merging["ours"]:8.2f} {merging["plain"]:10.2f} {merging["ratio"]:7.1f} x'


def test_the_maps_make_as_many_proposals_as_there_are_kinds():
    tokens = steps.random_maps(77, (30, 40))
    assert tokens.maps.shape == (77, steps.SIDE, steps.SIDE) and tokens.maps.dtype == torch.float32
    proposals = merge(tokens, steps.THRESHOLD, steps.NORMALISATION)
    assert proposals.members == tuple(tuple(range(kind, 77, 25)) for kind in range(25))
    assert merge(tokens, steps.RELEASED_THRESHOLD, 'released').members == proposals.members


def test_the_plain_ways_by_hand():
    maps = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]], [[0.5, 0.5]]])
    kl = (0.5 * np.log(2) + 0.5 * np.log(2 / 3) + 0.25 * np.log(1 / 2) + 0.75 * np.log(3 / 2)) / 2
    distances = steps.plain_distances(maps.double().flatten(1))
    np.testing.assert_allclose(distances, [[0, kl, 0], [kl, 0, kl], [0, kl, 0]], atol=1e-15)
    apart = torch.tensor([[[1.0, 0]], [[0, 1]], [[1, 0]]])
    merged = steps.plain_merge(TokenMaps(apart, ('', '', ''), Frame((1, 2), (0, 0, 1, 2))))
    assert merged.members == ((0, 2), (1,)) and merged.maps.tolist() == [[[1, 0]], [[0, 1]]]
    regions = np.array([[1, 1, 2], [1, 3, 3]])
    assert steps.plain_absorb(regions, 1).tolist() == regions.tolist()
    assert steps.plain_absorb(regions, 2).tolist() == [[1, 1, 1], [1, 3, 3]]  # a border of one edge with both, and 1 is larger
    assert steps.plain_absorb(np.array([[1, 1, 2, 3, 3, 3]]), 3).tolist() == [[3] * 6]  # the least first, which is 2


def test_the_plain_label_map_by_hand():
    maps = torch.tensor([[[1.0, 0, 0.4, 0]], [[0, 1, 0, 0.5]]], dtype=torch.float64)
    proposals = Proposals(maps, ((4,), (7,)), Frame((1, 4), (0, 0, 1, 4)))
    assert steps.same_maps(steps.plain_label_map(proposals), LabelMap(np.array([[1, 2, 1, 2]]), ((4,), (7,))))
    inside = np.array([[0, 0, 1, 1]])
    refined = steps.plain_refined(proposals, inside, components=True, min_area=0.0)
    assert refined.labels.tolist() == [[1, 1, 2, 2]] and refined.tokens == ((4,), (7,))
    one = steps.plain_refined(proposals, inside, components=True, min_area=0.6)
    assert one.labels.tolist() == [[1] * 4] and one.tokens == label_map(proposals, inside, True, 0.6).tokens


def test_another_result_is_no_comparison():
    quick, slow = torch.ones(3), torch.tensor([1, 1, 1.001])
    with pytest.raises(click.ClickException, match='a different result'):
        steps.compared(lambda: quick, lambda: slow, 0)
    labels = LabelMap(np.array([[1]]), ((0,),))
    assert steps.same_maps(labels, labels) and not steps.same_maps(labels, labels._replace(tokens=((1,),)))
    assert not steps.same_maps(labels, quick)
