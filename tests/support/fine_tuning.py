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
    alpha=2,
    side=32,
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


def fine_tune(out: Path, model: Path, source: str, settings: LoraSettings = SMALL, validate: Any = (), **given: Any) -> None:
    """Fine-tune on one thread."""
    import torch

    from padseg.train.annotated import open_annotated
    from padseg.train.lora import LoraRun, train_lora

    torch.set_num_threads(1)
    run = LoraRun(out, settings, str(model), device='cpu', **{'shown': 0, 'quiet': True, **given})
    train_lora(run, open_annotated([source]), validate)


def fine_tune_and_die(out: Path, model: Path, source: str) -> None:
    """Fine-tune with a checkpoint after the second step. The validation of the fourth kills the process, before its losses are written."""

    def die(backbone: Any, folder: Path, done: int) -> dict[str, float]:
        if done:
            os.kill(os.getpid(), signal.SIGKILL)
        return {'score': 0.0}

    fine_tune(out, model, source, save_every=2, check_every=4, validate=[die])


def in_process(rank: int, count: int, port: int, out: Path, model: Path, source: str) -> None:
    """One of several processes that train for two steps, as torchrun starts them."""
    os.environ |= {
        'RANK': str(rank),
        'LOCAL_RANK': str(rank),
        'WORLD_SIZE': str(count),
        'LOCAL_WORLD_SIZE': str(count),
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(port),
    }
    fine_tune(out, model, source, max_steps=2)
