"""Code shared by all training stages: checkpoints, loss curves and learning-rate schedules."""

from __future__ import annotations

import csv
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_wsd_schedule

from padseg.errors import UsageError
from padseg.system.files import atomic

WINDOW = 20  # steps averaged in each printed line and each point of a curve


class Stateful(Protocol):
    """An optimiser, or a scaler of gradients: what goes on as it was after a restart."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training. It writes checkpoints, and the losses of every step to OUT/<name>.csv and OUT/<name>.png.

    columns: names of the losses; pictures: images per step; made_with: the settings that a checkpoint depends on.
    """

    out: pathlib.Path
    name: str
    steps: int
    pictures: int
    columns: tuple[str, ...]
    made_with: str
    save_every: int
    device: torch.device
    unwritten: list[tuple[dict[str, float], Mapping[str, Tensor]]] = dataclasses.field(default_factory=list)

    def file(self, suffix: str) -> pathlib.Path:
        return self.out / f'{self.name}{suffix}'

    def saves_after(self, step: int) -> bool:
        return (step + 1) % self.save_every == 0 or step + 1 == self.steps


def resume(stage: Stage, model: nn.Module, optimisers: Sequence[Stateful], averaged: AveragedModel | None = None) -> int:
    """Load the stage's checkpoint, if any, and return the next step. Raises UsageError for a checkpoint made with other settings."""
    path = stage.file('.pt')
    if not path.exists():
        write_rows(stage, [])
        return 0
    state = torch.load(path, map_location=stage.device, weights_only=True)
    if state['made_with'] != stage.made_with:
        raise UsageError(f'{path} was made with {other_settings(state["made_with"], stage.made_with)}: choose another --out')
    model.load_state_dict(state['model'])
    for optimiser, saved in zip(optimisers, state['optimisers'], strict=True):
        optimiser.load_state_dict(saved)
    if averaged:
        averaged.load_state_dict(state['averaged'])
    write_rows(stage, [row for row in read_rows(stage) if int(row['step']) < state['step']])  # later steps are repeated
    return int(state['step'])


def other_settings(before: str, now: str) -> str:
    """What differs between two descriptions of settings, in words: where both are `name=value` between spaces, nothing else."""
    words = list(zip(before.split(), now.split(), strict=False))
    differing = [(one, other) for one, other in words if one != other]
    if differing and len(before.split()) == len(now.split()) and all('=' in one and '=' in other for one, other in differing):
        before, now = (' '.join(side) for side in zip(*differing, strict=True))
    return f'{before}, but this run has {now}'


def take_step(loss: Tensor, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer], schedules: Sequence[LambdaLR]) -> None:
    """Change the weights once, by gradients that are scaled down to a norm of 1 at most, and move the learning rates on."""
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser, schedule in zip(optimisers, schedules, strict=True):
        optimiser.step()
        schedule.step()


def finish_step(
    stage: Stage,
    step: int,
    losses: Mapping[str, Tensor],
    model: nn.Module,
    optimisers: Sequence[Stateful],
    averaged: AveragedModel | None = None,
    last: bool = False,
    said: bool = True,
) -> None:
    """Record the losses of a step. At intervals also print them to stderr, save a checkpoint and draw the curves.

    last: whether training stops here for now, which needs a checkpoint; said: whether anything is printed.
    """
    kept = {name: value.detach() for name, value in losses.items()}
    stage.unwritten.append(({'step': step, 'time': round(time.time(), 1)}, kept))
    saves = last or stage.saves_after(step)
    if saves or stage.device.type == 'cpu' or len(stage.unwritten) == WINDOW:  # reading a loss makes the program wait for a GPU
        append_rows(stage)
    if said and (step + 1) % WINDOW == 0:
        append_rows(stage)
        print(training_summary(stage, read_rows(stage)[-WINDOW:]), file=sys.stderr, flush=True)
    if saves:
        state = {
            'step': step + 1,
            'model': model.state_dict(),
            'optimisers': [optimiser.state_dict() for optimiser in optimisers],
            'averaged': averaged.state_dict() if averaged else None,
            'made_with': stage.made_with,
        }
        with atomic(stage.file('.pt')) as temporary, temporary.open('wb') as file:
            torch.save(state, file)  # given a path, torch refuses to create a hidden file
        draw_curves(stage)


def append_rows(stage: Stage) -> None:
    """Write the losses that were kept back."""
    with stage.file('.csv').open('a', newline='') as file:
        for row, losses in stage.unwritten:
            values = {name: round(value.item(), 5) for name, value in losses.items()}
            csv.DictWriter(file, ('step', 'time', *stage.columns)).writerow({**row, **values})
    stage.unwritten.clear()


def training_summary(stage: Stage, rows: Sequence[Mapping[str, str]]) -> str:
    """Format the mean of each loss over these rows, and the images per second, in one line."""
    seconds = float(rows[-1]['time']) - float(rows[0]['time'])
    rate = f'{(len(rows) - 1) * stage.pictures / seconds:.1f} pictures/s' if seconds > 0 else ''
    means = (f'{name} {np.mean(values):.4f}' for name in stage.columns if (values := [float(row[name]) for row in rows if row[name]]))
    return f'{stage.name} {int(rows[-1]["step"]) + 1}/{stage.steps} {" ".join(means)} {rate}'


def read_rows(stage: Stage) -> list[dict[str, str]]:
    with stage.file('.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def write_rows(stage: Stage, rows: Sequence[Mapping[str, str]]) -> None:
    with stage.file('.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, ('step', 'time', *stage.columns))
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(stage: Stage) -> None:
    """Plot the losses to OUT/<name>.png; each point is the mean of WINDOW steps."""
    from matplotlib.figure import Figure

    rows = read_rows(stage)
    figure = Figure((7, 4))
    axes = figure.add_subplot()
    for name in stage.columns:
        points = [(int(row['step']), float(row[name])) for row in rows if row[name]]
        means = [np.mean(points[i : i + WINDOW], axis=0) for i in range(0, len(points), WINDOW)]
        if means:
            axes.plot(*zip(*means, strict=True), label=name)
    axes.set_xlabel('step')
    axes.set_ylabel('loss')
    axes.set_yscale('log')
    axes.legend()
    with atomic(stage.file('.png')) as temporary:
        figure.savefig(temporary, format='png', dpi=120)


def cosine(optimiser: torch.optim.Optimizer, steps: int, warmup: int, start: int) -> LambdaLR:
    """Schedule with linear warm-up and cosine decay to 2 % of every group's `initial_lr`, resumed at step `start`."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)

    return LambdaLR(optimiser, factor, last_epoch=start - 1)


def trapezoid(optimiser: torch.optim.Optimizer, steps: int, warmup: int, decay: float, start: int) -> LambdaLR:
    """Schedule with linear warm-up, a plateau, and linear decay over the last `decay` of the steps, resumed at step `start`.

    It scales the `initial_lr` of every group. A finished training can continue with more steps. Rates are shifted by one step, because the
    schedule starts at 0.
    """
    return get_wsd_schedule(optimiser, warmup, round(decay * steps), steps + 1, decay_type='linear', last_epoch=start)


def moving_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Return the update rule of an AveragedModel: an exponential moving average with a smaller decay in the first steps."""

    def update(averaged: Sequence[Tensor], weights: Sequence[Tensor], number: Tensor | int) -> None:
        step = int(number)
        get_ema_multi_avg_fn(min(decay, (step + 1) / (step + 10)))(averaged, weights, number)

    return update
