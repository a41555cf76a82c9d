"""The benchmark of DiffSeg, DiffCut and ConceptAttention: small runs, in which both ways agree, and figures by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from padseg.bench import neighbours


@pytest.mark.slow
def test_a_small_run(bench):
    measured, seconds = bench('neighbours', '--method', 'concepts', '--size', 'small', '--blocks', '2')
    taken, own = measured['seconds'], measured['processor_seconds']
    assert list(taken) == ['forward', 'ours', 'obvious'] and min(map(min, taken.values())) > 0 and sum(map(sum, taken.values())) < seconds
    assert (measured['method'], measured['side'], measured['blocks'], measured['reckoned']) == ('concepts', 64, 2, {})
    assert measured['obvious_to_ours']['median'] == own['obvious'][0] / own['ours'][0]
    assert measured['difference'] <= neighbours.LIMIT['concepts'] and len(neighbours.in_words(measured).splitlines()) == 8


@pytest.mark.parametrize('method', ['diffseg', 'diffcut'])
def test_both_ways_agree(method):
    setting = neighbours.NeighbourSetting(method, 'small', 64)
    turn = {way: neighbours.taken(way, setting) for way in neighbours.ways(method)}
    measured = neighbours.summary(setting, [turn])
    assert list(measured['seconds']) == ['forward', 'ours', 'obvious', 'stage ours', 'stage obvious']
    assert measured['stage_obvious_to_ours']['median'] == turn['stage obvious'].own / turn['stage ours'].own
    assert measured['difference'] <= neighbours.LIMIT[method] and len(neighbours.in_words(measured).splitlines()) == 13
    picture, other = (turn[way].found for way in ('ours', 'obvious'))
    assert picture.min() == other.min() == 1 and picture.shape == (64, 64)


def test_differences_by_hand():
    assert neighbours.difference('diffcut', np.array([0, 1, 1, 2]), np.array([5, 0, 2, 2])) == 0.25
    assert neighbours.difference('diffseg', np.array([[1.0, 2]]), np.array([[1.0, 4]])) == 0.5
    assert math.isinf(neighbours.difference('diffseg', np.ones((1, 2)), np.ones((2, 2))))


def test_what_does_not_fit_at_full_size():
    reckoned = {method: neighbours.reckoned(neighbours.NeighbourSetting(method, 'full', 1024)) for method in neighbours.MODELS}
    assert reckoned['diffseg'] == {'all distances as one array': 4 * 256 * 4096**2} and reckoned['diffcut'] == {}
    assert reckoned['concepts'] == {'maps of all heads and layers': 4 * 24 * 24 * (4096 + 154 + 6) ** 2}


def test_made_up_regions_are_several():
    regions = neighbours.prepared_stage('stage ours', neighbours.NeighbourSetting('diffcut', 'small', 64))()
    assert 2 < regions.max() + 1 < 64
    proposals = neighbours.prepared_stage('stage ours', neighbours.NeighbourSetting('diffseg', 'small', 64))()
    assert 2 < len(proposals) < 64 and np.allclose(proposals.sum(1), 1)
