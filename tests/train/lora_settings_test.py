"""Presets of fine-tuning: what differs between the paper and the released code, and what a step really uses."""

from __future__ import annotations

import dataclasses
import math

import pytest
from torch import nn

from padseg.errors import UsageError
from padseg.train.lora import make_optimiser, rate
from padseg.train.lora_settings import PRESETS, LoraSettings, preset, rate_factor


@pytest.mark.parametrize(
    ('name', 'rates', 'batch', 'steps'), [('paper', 1e-5, 16, 3000), ('released-coco', 1e-4, 8, 3000), ('released-sa1b', 1e-4, 4, 1000)]
)
def test_effective_rates_and_batch(name, rates, batch, steps):
    """Not what the released settings say, 1e-4 x 0.1 and batches accumulated twice, but what their trainer does."""
    settings = preset(name)
    assert (settings.batch, settings.steps) == (batch, steps)
    optimiser = make_optimiser(nn.ModuleDict({'lora': nn.Linear(2, 2), 'score': nn.Linear(2, 2)}), settings)
    rate(optimiser, settings.warmup, settings)
    after = (1 + math.cos(math.pi * 500 / steps)) / 2
    assert [group['lr'] for group in optimiser.param_groups] == pytest.approx([rates * after] * 2)
    assert {(group['betas'], group['weight_decay']) for group in optimiser.param_groups} == {((0.9, 0.999), 1e-4)}


def test_presets_differ_as_documented():
    paper = PRESETS['paper']
    differing = {
        name: {field.name for field in dataclasses.fields(paper) if getattr(settings, field.name) != getattr(paper, field.name)}
        for name, settings in PRESETS.items()
    }
    released = {'rate', 'score_rate', 'batch', 'crop', 'columns', 'focal', 'count'}
    assert differing == {
        'paper': set(),
        'released-coco': released | {'prompt', 'candidates', 'matching'},
        'released-sa1b': released | {'steps'},
    }


def test_the_rate_rises_in_a_line_and_falls_by_half_a_cosine():
    settings = preset('paper', steps=1000, warmup=100)
    at = (1 + math.cos(math.pi * 0.1)) / 2
    assert [rate_factor(step, settings) for step in (0, 50, 100, 500, 1000)] == pytest.approx([0.01, (0.01 + at) / 2, at, 0.5, 0])


@pytest.mark.parametrize(
    ('changed', 'words'),
    [
        ({'rank': 0}, 'rank is a number >= 1'),
        ({'focal': 'wrong'}, 'focal is one of correct, released'),
        ({'matching': 'names'}, 'needs --candidates tokens'),
        ({'matching': 'names', 'candidates': 'tokens'}, 'needs --prompt classes'),
        ({'flow_weight': 0.0}, 'needs --flow-every 0'),
        ({'rate': float('inf')}, 'rate is a finite number'),
    ],
)
def test_settings_that_cannot_be(changed, words):
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(LoraSettings(), **changed)


def test_unknown_presets_are_refused():
    with pytest.raises(UsageError, match='paper, released-coco, released-sa1b; got mine'):
        preset('mine')
