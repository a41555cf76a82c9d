"""A fine-tuning of a few small steps: what a test starts, also in processes of its own."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from padseg.train.lora_settings import PRESETS, LoraSettings

SMALL = dataclasses.replace(
    PRESETS['paper'],
    steps=4,
    batch=4,
    rate=1e-2,
    score_rate=1e-3,
    warmup=1,
    rank=2,
    alpha=2.0,
    side=64,
    clip=1.0,
    prompt='classes',
    focal_weight=1.0,
)
NAMES = ('cat', 'dog', 'grass')


def put_annotated(root: Path, count: int = 3, side: int = 64) -> str:
    """Pictures of three flat classes with noise, as `images/`, `labels/` and `classes.txt`."""
    rng = np.random.default_rng(0)
    for folder in ('images', 'labels'):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        labels = np.zeros((side, side), np.uint8)
        labels[:, : 16 + 8 * number] = 1
        labels[32:, 40:] = 2
        pixels = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])[labels] + rng.integers(0, 30, (side, side, 3))
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(root / 'images' / f'{number}.png')
        PIL.Image.fromarray(labels).save(root / 'labels' / f'{number}.png')
    (root / 'classes.txt').write_text('\n'.join(NAMES) + '\n')
    return str(root)


def fine_tune(out: Path, model: Path, source: str, settings: LoraSettings = SMALL, killed: int | None = None, **given: Any) -> None:
    """Fine-tune with a checkpoint after every second step. killed: end the process after the losses of this step are written."""
    import torch

    torch.set_num_threads(1)
    from padseg.train import lora
    from padseg.train.annotated import open_annotated

    if killed is not None:
        finish = lora.finish_step

        def finish_and_die(stage: Any, step: int, *rest: Any, **named: Any) -> None:
            finish(stage, step, *rest, **named)
            if step == killed:
                os.kill(os.getpid(), signal.SIGKILL)

        lora.finish_step = finish_and_die
    run = lora.LoraRun(out, settings, str(model), device='cpu', **{'save_every': 2, 'shown': 1, 'quiet': True, **given})
    lora.train_lora(run, open_annotated([source]))


def in_process(rank: int, count: int, port: int, out: Path, model: Path, source: str, settings: LoraSettings = SMALL) -> None:
    """One of several processes of a training, as torchrun starts them."""
    os.environ |= {
        'RANK': str(rank),
        'LOCAL_RANK': str(rank),
        'WORLD_SIZE': str(count),
        'LOCAL_WORLD_SIZE': str(count),
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(port),
    }
    fine_tune(out, model, source, settings)
