"""The benchmark of fine-tuning: a small run in which ours and the obvious way agree, and bytes that are reckoned from shapes."""

from __future__ import annotations

import gc

import click
import numpy as np
import pytest
import torch

from padseg.bench import train


def test_a_small_run(bench):
    measured, _ = bench('train', '--size', 'small', '--masks', '3', '--repeats', '1', '--dtype', 'float32', '--no-reckon')
    assert list(measured['seconds']) == list(measured['peak_mib']) == list(train.WAYS)
    assert min(map(min, measured['seconds'].values())) > 0
    assert max(measured['difference'].values()) <= train.LIMITS['float32']
    losses = measured['losses']
    assert losses['flow-alone']['flow'] == losses['ours']['flow'] > 0 == losses['flow-alone']['dice'] == losses['masks-alone']['flow']
    assert losses['masks-alone']['dice'] == pytest.approx(losses['ours']['dice'], rel=1e-5)
    assert len(train.in_words(measured).splitlines()) == 9


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


def test_what_fits_grows_with_the_card_and_the_obvious_way_needs_more():
    setting = train.TrainSetting('small', 128, 1, 3, 'paper')
    rows = {row['way']: row for row in train.reckoned_table(setting)}
    assert rows['masks-alone']['bytes'] <= rows['ours']['bytes'] < rows['obvious']['bytes']
    assert 0 < rows['ours']['bytes_more'] < rows['obvious']['bytes_more']
    assert 0 < rows['ours']['fits']['24'] < rows['ours']['fits']['48'] < rows['ours']['fits']['80']
    assert train.reckoned('ours', setting) < train.reckoned('ours', setting._replace(checkpointing=False))
