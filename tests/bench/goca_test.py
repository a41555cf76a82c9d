"""The benchmark of GoCA: small runs, what it says, and what is kept, by hand."""

from __future__ import annotations

import math

import click
import numpy as np
import pytest
import torch

from padseg.bench import goca
from padseg.methods.stages import cross_maps


@pytest.mark.slow
def test_a_small_run(bench):
    measured, seconds = bench('goca', '--size', 'small', '--repeats', '1')
    assert (measured['model'], measured['side'], measured['layers'], len(measured['read'])) == ('sd1.5', 64, 16, 16)
    taken = measured['seconds']
    assert list(taken) == ['plain', 'ours', 'obvious'] and min(map(min, taken.values())) > 0 and sum(map(sum, taken.values())) < seconds
    own = measured['processor_seconds']
    assert list(own) == list(taken) and min(map(min, own.values())) > 0
    assert measured['ours_to_plain']['median'] == own['ours'][0] / own['plain'][0]
    assert measured['obvious_to_ours']['median'] == own['obvious'][0] / own['ours'][0]
    peaks = measured['peak_mib']
    assert {name: [peaks[name][0] - peaks['plain'][0]] for name in ('ours', 'obvious')} == measured['beyond_plain_mib']
    assert 0 < measured['difference'] <= goca.LIMIT
    assert measured['reckoned']['sdxl 1024']['ours'] < 1e9 < measured['reckoned']['flux 1024']['ours'] < 2.5e9


@pytest.mark.slow
def test_of_fewer_layers_both_ways_are_compared(bench):
    measured, _ = bench('goca', '--model', 'pixart-sigma', '--size', 'small', '--repeats', '1', '--layers', '2')
    assert measured['layers'] == 4 and measured['read'] == [2, 3]
    assert list(measured['seconds']) == ['plain', 'ours', 'same_layers', 'obvious']
    assert 0 < measured['difference'] <= goca.LIMIT
    lines = goca.in_words(measured).splitlines()
    assert lines[1].split('   ')[-1].strip() == 'obvious, 2 of 4 layers'
    assert lines[5].startswith('  beyond plain') and len(lines[5]) == len(lines[4])
    assert len(lines) == 9 + 5


def test_a_run_that_the_obvious_way_has_no_memory_for():
    turn = {'plain': goca.Taken(2.5, 2.0, 1000.0, None), 'ours': goca.Taken(9.0, 3.0, 1100.5, np.ones((2, 1, 1, 1)))}
    measured = goca.summary(goca.GocaSetting('sd1.5', 'small', 64, tuple(range(16)), 'cpu', 'float32'), (), [turn])
    assert (measured['difference'], measured['obvious_to_ours'], measured['beyond_plain_mib']) == (None, None, {'ours': [100.5]})
    lines = goca.in_words(measured).splitlines()
    assert lines[6].startswith('ours takes 1.500 (1.500..1.500) x') and lines[7] == 'the obvious way was left out'


def test_other_maps_are_told(monkeypatch, bench):
    monkeypatch.setattr(goca, 'LIMIT', 0.0)
    with pytest.raises(click.ClickException, match='of their maximum'):
        bench('goca', '--model', 'pixart-sigma', '--size', 'small', '--repeats', '1')


def test_the_obvious_way_weighs_heads_and_layers():
    backbone = goca.random_backbone('sd1.5', 'small')
    prompt, latent, plan = goca.random_prompt(backbone), goca.random_latent(64, backbone), goca.goca_plan(backbone)
    expected = goca.obvious(latent, backbone, prompt, plan)
    same = goca.ours(latent, backbone, prompt, plan)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(same, expected, strict=True))
    for other in (plan._replace(heads='average'), plan._replace(by='uniform')):
        maps, _ = goca.ours(latent, backbone, prompt, other)
        assert goca.difference(maps[None].numpy(), expected[0][None].numpy()) > goca.LIMIT


def test_layers_that_refine_may_be_finer_than_the_result(monkeypatch):
    """As those of SD1.5 at 1024 pixels, whose 128 x 128 are reduced to 64 x 64: of square pixels, bilinear means of four neighbours."""
    monkeypatch.setattr(cross_maps, 'MOST_PIXELS', 16)
    backbone = goca.random_backbone('sd1.5', 'small')
    prompt, latent, plan = goca.random_prompt(backbone), goca.random_latent(64, backbone), goca.goca_plan(backbone)
    for refine in ((0, 11), (15,), (2, 3)):  # of 8 x 8 and 4 x 4 pixels, 8 x 8 alone, and 4 x 4 and 2 x 2
        same, expected = (way(latent, backbone, prompt, plan._replace(refine=refine)) for way in (goca.ours, goca.obvious))
        assert all(one.shape == other.shape and torch.allclose(one, other, atol=1e-6) for one, other in zip(same, expected, strict=True))


def test_difference_by_hand():
    one, other = np.zeros((2, 1, 1, 2)), np.zeros((2, 1, 1, 2))
    one[0, 0, 0], other[0, 0, 0] = (4, 1), (4, 3)
    one[1, 0, 0], other[1, 0, 0] = (1, 0), (1, 0.25)
    assert goca.difference(one, other) == 0.5
    one[1, 0, 0, 0] = np.nan
    assert math.isnan(goca.difference(one, other))


def test_what_is_kept_by_hand():
    layers = [goca.Layer(16, 3, 2, 8), goca.Layer(4, 3, 4, 16), goca.Layer(16, 3, 2, 8)]
    # heads x pixels x (text + pixels) + pixels x channels: 2*16*19 + 128, 4*4*7 + 64, the first again; and 16 pixels x 2 heads x 8
    assert goca.kept_by_obvious(layers) == 4 * (736 + 176 + 736 + 256)
    # up to the second layer, in its grid: 16*3 + 4*4, 4*3 + 4*4; its feature 4*4; the result of 16 pixels: 16*16
    assert goca.kept_by_ours(layers, 1) == 4 * (64 + 28 + 16 + 256)
    # up to the first, in whose grid the result is: 16*3 + 16*16; its feature 16*16
    assert goca.kept_by_ours(layers, 0) == 4 * (16 * 3 + 256 + 256)
    assert goca.around(1, layers, None) == (0, 1, 2) and goca.around(1, layers, 2) == (0, 1)


def test_the_obvious_way_keeps_no_more_than_fits(monkeypatch):
    layers = [goca.Layer(4, 1, 1, 1)] * 3  # each keeps 24 numbers, and 4 more are needed at the end
    for bytes_, expected in ((4 * 28 - 1, ()), (4 * 28, (2,)), (4 * 52, (1, 2)), (4 * 76, (0, 1, 2))):
        monkeypatch.setattr(goca, 'MOST', bytes_)
        assert goca.around(2, layers, None) == expected


def test_shapes_are_those_of_the_published_models():
    """SD1.5's 16 blocks on four grids; SDXL's 70, 10 of them fine; Sigma's 28 and Flux's 57, all the same."""
    shapes = {model: goca.layers_of(goca.random_backbone(model, device='meta'), 1024) for model in goca.NETWORKS}
    sides = [128] * 2 + [64] * 2 + [32] * 2 + [16] + [32] * 3 + [64] * 3 + [128] * 3
    assert [layer.pixels for layer in shapes['sd1.5']] == [side**2 for side in sides]
    assert set(shapes['sdxl']) == {goca.Layer(4096, 77, 10, 640), goca.Layer(1024, 77, 20, 1280)} and len(shapes['sdxl']) == 70
    assert sum(layer.pixels == 4096 for layer in shapes['sdxl']) == 10
    assert shapes['pixart-sigma'] == [goca.Layer(4096, 300, 16, 1152)] * 28
    assert shapes['flux'] == [goca.Layer(4096, 512, 24, 3072)] * 57
