"""What every stage of a training needs: checkpoints to go on from, curves, rates."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

SHOWN = 20  # steps whose means are printed and drawn
PIECE = 16 * 2**20  # bytes of one file of a checkpoint


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a training; it writes checkpoints, and the losses of every step as OUT/<name>.csv and OUT/<name>.png.

    columns: names of the losses; pictures: how many one step sees; made_with: what a checkpoint depends on.
    """

    out: pathlib.Path
    name: str
    steps: int
    pictures: int
    columns: tuple[str, ...]
    made_with: str
    save_every: int
    device: torch.device

    def file(self, suffix: str) -> pathlib.Path:
        return self.out / f'{self.name}{suffix}'

    def saves_after(self, step: int) -> bool:
        return (step + 1) % self.save_every == 0 or step + 1 == self.steps


def resume(stage: Stage, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer], averaged: Sequence[Tensor] = ()) -> int:
    """Load the stage's checkpoint if there is one; the step to go on with. UsageError for one that was made with other settings."""
    folders = checkpoints(stage)
    if not folders:
        write_rows(stage, [])
        return 0
    pieces = io.BytesIO(b''.join(piece.read_bytes() for piece in sorted(folders[-1].iterdir())))
    state = torch.load(pieces, map_location=stage.device, weights_only=True)
    if state['made_with'] != stage.made_with:
        raise click.UsageError(f'{folders[-1]} was made with {state["made_with"]}, this run has {stage.made_with}: choose another --out')
    model.load_state_dict(state['model'])
    for optimiser, saved in zip(optimisers, state['optimisers'], strict=True):
        optimiser.load_state_dict(saved)
    for weight, average in zip(averaged, state['averaged'], strict=True):
        weight.copy_(average)
    write_rows(stage, [row for row in read_rows(stage) if int(row['step']) < state['step']])  # what came after is done again
    return int(state['step'])


def finish_step(
    stage: Stage,
    step: int,
    losses: Mapping[str, Tensor],
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    averaged: Sequence[Tensor] = (),
) -> None:
    """Note the losses; now and then print them, save a checkpoint and draw the curves."""
    row = {'step': step, 'time': round(time.time(), 1), **{name: round(value.item(), 5) for name, value in losses.items()}}
    with stage.file('.csv').open('a', newline='') as file:
        csv.DictWriter(file, ('step', 'time', *stage.columns)).writerow(row)
    if (step + 1) % SHOWN == 0:
        click.echo(training_summary(stage, read_rows(stage)[-SHOWN:]), err=True)
    if stage.saves_after(step):
        state = {
            'step': step + 1,
            'model': model.state_dict(),
            'optimisers': [optimiser.state_dict() for optimiser in optimisers],
            'averaged': list(averaged),
            'made_with': stage.made_with,
        }
        write_checkpoint(stage, state)
        draw_curves(stage)


def checkpoints(stage: Stage) -> list[pathlib.Path]:
    """The whole checkpoints of a stage, the newest last; more than one only where a training was stopped between writing and deleting."""
    return sorted(path for path in stage.out.glob(f'{stage.name}.step-*') if path.suffix != '.partial')


def write_checkpoint(stage: Stage, state: Mapping[str, Any]) -> None:
    """OUT/<name>.step-000250/0000, 0001, ...: the state in pieces that any way to move files takes, in place of the one before."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    before = checkpoints(stage)
    folder = stage.file(f'.step-{state["step"]:06}')
    partial = folder.with_name(f'{folder.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for number, start in enumerate(range(0, buffer.tell(), PIECE)):
        (partial / f'{number:04}').write_bytes(buffer.getbuffer()[start : start + PIECE])
    partial.rename(folder)
    for old in before:
        shutil.rmtree(old)


def training_summary(stage: Stage, rows: Sequence[Mapping[str, str]]) -> str:
    """One line: the mean of each loss over some steps, and pictures a second."""
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
    """OUT/<name>.png: the losses, each point the mean of 20 steps."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    rows = read_rows(stage)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in stage.columns:
        points = [(int(row['step']), float(row[name])) for row in rows if row[name]]
        means = [np.mean(points[i : i + SHOWN], axis=0) for i in range(0, len(points), SHOWN)]
        if means:
            axes.plot(*zip(*means, strict=True), label=name)
    axes.set_xlabel('step')
    axes.set_ylabel('loss')
    axes.set_yscale('log')
    axes.legend()
    figure.savefig(stage.file('.png'), dpi=120)
    pyplot.close(figure)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)


def trapezoid(step: int, steps: int, warmup: int, decay: float) -> float:
    """Linear warm-up, level, linear decay over the last share of the steps: a stopped training can go on with more steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1.0, decay * steps))


def set_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Every group's own `rate` times the factor."""
    for group in optimiser.param_groups:
        group['lr'] = factor * group['rate']


@torch.no_grad()
def follow_average(averaged: Sequence[Tensor], weights: Sequence[Tensor], step: int, decay: float) -> None:
    """Move the averaged weights towards the present ones, faster in the first steps."""
    torch._foreach_lerp_(list(averaged), list(weights), 1 - min(decay, (step + 1) / (step + 10)))
