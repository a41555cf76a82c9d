"""Checkpoints, rates and the moving average against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from padseg.errors import UsageError
from padseg.train import loop
from padseg.train.muon import Muon
from padseg.train.settings import TrainingSettings


def learner() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(20, 30)
    return model, torch.optim.SGD([{'params': [model.weight], 'initial_lr': 2.0}, {'params': [model.bias], 'initial_lr': 0.5}])


def rates(make, steps: int, start: int = 0) -> list[list[float]]:
    """What each group's rate is over its full rate, step by step."""
    _, optimiser = learner()
    schedule = make(optimiser, start)
    seen = []
    for _ in range(start, steps):
        seen.append([group['lr'] / group['initial_lr'] for group in optimiser.param_groups])
        optimiser.step()
        schedule.step()
    return seen


@pytest.mark.parametrize('course', [TrainingSettings.together, TrainingSettings.transformer])
def test_rates_of_a_course_rise_stay_level_and_fall_to_nothing(course):
    def make(optimiser, start):
        return loop.trapezoid(optimiser, course.steps, course.warmup, course.decay, start)

    seen = rates(make, course.steps)
    decay = course.decay * course.steps
    expected = [min(1.0, (step + 1) / course.warmup, (course.steps - step) / decay) for step in range(course.steps)]
    assert [first for first, _ in seen] == pytest.approx(expected, abs=1e-12)
    assert [second for _, second in seen] == pytest.approx(expected, abs=1e-12)
    assert rates(make, course.steps, start=1500) == seen[1500:]


def test_rates_of_the_autoencoder_rise_and_fall_by_half_a_cosine():
    def make(optimiser, start):
        return loop.cosine(optimiser, 300, 50, start)

    seen = rates(make, 300)
    for step, (rate, _) in enumerate(seen):
        assert rate == pytest.approx(min(1, (step + 1) / 50) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / 300))))
    assert rates(make, 300, start=70) == seen[70:]


def test_the_average_follows_faster_in_the_first_steps():
    model, _ = learner()
    averaged = AveragedModel(model, multi_avg_fn=loop.moving_average(0.9))
    expected = None
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(step**0.5)
        averaged.update_parameters(model)
        decay = min(0.9, (step + 1) / (step + 10))
        expected = step**0.5 if expected is None else decay * expected + (1 - decay) * step**0.5
        assert averaged.module.weight[0, 0].item() == pytest.approx(expected, rel=1e-5)
    assert averaged.module.bias.equal(model.bias)


def stage_in(folder, made_with: str = 'settings') -> loop.Stage:
    return loop.Stage(folder, 'x', 3, 1, ('loss',), made_with, 1, torch.device('cpu'))


def test_a_checkpoint_is_one_file_and_replaces_the_one_before(tmp_path):
    model, optimiser = learner()
    averaged = AveragedModel(model)
    stage = stage_in(tmp_path)
    assert loop.resume(stage, model, [optimiser], averaged) == 0
    for step in range(2):
        averaged.update_parameters(model)
        loop.finish_step(stage, step, {'loss': torch.tensor(1.0)}, model, [optimiser], averaged)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['x.csv', 'x.png', 'x.pt']
    with stage.file('.csv').open('a') as file:
        file.write('2,0,1.0\n')  # a step after the checkpoint, which is done again
    other, its_optimiser = learner()
    its_average = AveragedModel(other)
    assert loop.resume(stage, other, [its_optimiser], its_average) == 2
    assert other.weight.equal(model.weight) and its_average.module.weight.equal(model.weight) and its_average.n_averaged == 2
    assert [row['step'] for row in loop.read_rows(stage)] == ['0', '1']


def trained_until(stop: int, folder) -> AveragedModel:
    """The average after steps up to `stop` of six, with the optimisers and the schedule of the real training; goes on from a checkpoint."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    matrices, rest = ([weight for weight in model.parameters() if (weight.ndim == 2) == wanted] for wanted in (True, False))
    muon = Muon([{'params': matrices, 'initial_lr': 0.1}], weight_decay=0.02, adjust_lr_fn='match_rms_adamw')
    optimisers = [muon, torch.optim.AdamW([{'params': rest, 'initial_lr': 0.1}], betas=(0.9, 0.98))]
    averaged = AveragedModel(model, multi_avg_fn=loop.moving_average(0.8))
    stage = loop.Stage(folder, 'x', 6, 1, ('loss',), 'settings', 1, torch.device('cpu'))
    start = loop.resume(stage, model, optimisers, averaged)
    schedules = [loop.trapezoid(optimiser, 6, 2, 0.5, start) for optimiser in optimisers]
    for step in range(start, stop):
        inputs = torch.randn((5, 8), generator=torch.Generator().manual_seed(step))
        loss = model(inputs).square().sum()
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
        averaged.update_parameters(model)
        loop.finish_step(stage, step, {'loss': loss}, model, optimisers, averaged)
    return averaged


def test_a_training_that_goes_on_is_the_same_to_the_last_bit(tmp_path):
    for folder in ('straight', 'stopped'):
        (tmp_path / folder).mkdir()
    straight = trained_until(6, tmp_path / 'straight').state_dict()
    half = trained_until(3, tmp_path / 'stopped').state_dict()
    whole = trained_until(6, tmp_path / 'stopped').state_dict()
    assert all(straight[name].equal(whole[name]) for name in straight)
    assert not any(half[name].equal(whole[name]) for name in half)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    model, optimiser = learner()
    stage = stage_in(tmp_path)
    loop.resume(stage, model, [optimiser])
    loop.finish_step(stage, 0, {'loss': torch.tensor(1.0)}, model, [optimiser])

    def full(state, file):
        file.write(b'half')
        raise OSError('no space left on this device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='no space'):
        loop.finish_step(stage, 1, {'loss': torch.tensor(1.0)}, model, [optimiser])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['x.csv', 'x.png', 'x.pt']
    assert loop.resume(stage, model, [optimiser]) == 1


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    model, optimiser = learner()
    loop.resume(stage_in(tmp_path), model, [optimiser])
    loop.finish_step(stage_in(tmp_path), 0, {'loss': torch.tensor(1.0)}, model, [optimiser])
    with pytest.raises(UsageError, match='made with settings, but this run has others: choose another --out'):
        loop.resume(stage_in(tmp_path, 'others'), model, [optimiser])
