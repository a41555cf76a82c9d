"""A training of a few small steps: what a test starts in a process of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from padseg.train.settings import TrainingSettings

SMALL = dataclasses.replace(
    TrainingSettings(),
    vae_steps=2,
    vae_batch=1,
    vae_crops=1,
    size=2,
    together=dataclasses.replace(TrainingSettings.together, steps=3),
    transformer=dataclasses.replace(TrainingSettings.transformer, steps=1),
)


def train_small(out: Path, start: Path | None = None) -> None:
    """Train in all stages with a checkpoint after every second step, or with `start` from that model in the last one alone."""
    import torch

    from padseg.train.tiny import train_tiny

    torch.set_num_threads(1)
    train_tiny(out, SMALL, start=start, device='cpu', workers=0, save_every=2, shown=1)
