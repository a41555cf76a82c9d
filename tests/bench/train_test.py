"""The benchmark of fine-tuning: a small run in which ours and the obvious way agree, and bytes that are reckoned from shapes."""

from __future__ import annotations

import gc

import click
import numpy as np
import pytest
import torch

from padseg.bench import flops, train
from padseg.train import lora

SMALL = train.TrainSetting('small', 128, 1, 3, 'paper', 'float32')
NEEDS = [('ours', SMALL), ('obvious', SMALL), ('ours', SMALL._replace(checkpointing=False))]


def test_a_small_run(bench):
    flags = ('--size', 'small', '--masks', '3', '--repeats', '1', '--dtype', 'float32', '--no-reckon', '--ways', 'ours,obvious')
    measured, _ = bench('train', *flags)
    assert list(measured['seconds']) == list(measured['peak_mib']) == ['ours', 'obvious']
    assert min(map(min, measured['seconds'].values())) > 0
    assert max(measured['difference'].values()) <= train.LIMITS['float32']
    assert len(train.in_words(measured).splitlines()) == 6


def test_losses_alone_are_those_of_both():
    steps = {name: train.measured_step(name, SMALL) for name in train.WAYS}
    losses = {name: step.losses for name, step in steps.items()}
    assert losses['flow-alone']['flow'] == pytest.approx(losses['ours']['flow']) and losses['flow-alone']['dice'] == 0
    assert losses['masks-alone']['dice'] == pytest.approx(losses['ours']['dice'], rel=1e-5) and losses['masks-alone']['flow'] == 0
    for one, other in train.COMPARED.values():
        assert train.difference(steps[one], steps[other]) <= train.LIMITS['float32']
    assert train.difference(steps['ours'], steps['flow-alone']) > 0.5
    lora_of_last = slice(24, 32)  # four layers with two matrices in each of four blocks; the expert is block 2
    assert (steps['ours'].gradients[lora_of_last] > 0).all() and not steps['masks-alone'].gradients[lora_of_last].any()


def test_other_losses_are_told():
    with pytest.raises(click.BadParameter, match='one of ours, obvious'):
        train.command.main(['--ways', 'mine'], standalone_mode=False)
    one = train.Step(1.0, 1.0, {'total': 2.0, 'flow': 0.0}, np.array([1.0, 4.0]))
    assert train.difference(one, one) == 0
    assert train.difference(one, one._replace(losses={'total': 2.5, 'flow': 0.0})) == pytest.approx(0.2)
    assert train.difference(one, one._replace(gradients=np.array([0.0, 4.0]))) == 0.25


def test_bytes_are_those_of_living_tensors():
    with train.shapes_alone() as held:
        one = torch.empty(1000, dtype=torch.float32)
        two = one + 1
        view = two[:10]
        del one
        gc.collect()
        three = torch.empty(500, dtype=torch.bfloat16)
        assert (held.now, held.most) == (5000, 8000)
        del two
        assert held.now == 5000  # the view holds all of it
        del view, three
    assert (held.now, held.most) == (0, 8000)


@pytest.mark.slow
def test_the_obvious_way_needs_more_bytes_and_so_does_keeping_what_blocks_computed():
    ours, obvious, kept = (train.reckoned(way, setting) for way, setting in NEEDS)
    assert 0 < ours.bytes < obvious.bytes and 0 < ours.flops < obvious.flops
    assert ours.bytes < kept.bytes and ours.flops > kept.flops


def test_operations_of_a_forward_pass_are_those_of_the_formula():
    backbone = train.random_backbone(SMALL)
    lessons = train.random_lessons(backbone, SMALL, SMALL.side, None)
    with torch.no_grad(), train.Held() as held:
        lora.velocity_of(lessons, torch.zeros(1, 16, SMALL.side // 8, SMALL.side // 8), torch.tensor([500.0]), backbone)
    config, image = backbone.transformer.config, (SMALL.side // 16) ** 2
    assert held.flops == flops.transformer(config, image, 2 * backbone.spec.sequence)


def test_what_fits_by_hand():
    """Two gigabytes are left free."""
    assert train.FEW == 1 and train.ASIDE == 2e9
    assert train.fitting(6e9, 3e9) == {'24': 1 + 5, '48': 1 + 13, '80': 1 + 24}
    assert train.fitting(60e9, 7e9) == {'24': 0, '48': 0, '80': 1 + 2}
