"""A training of a few small steps of small networks: what a test starts in a process of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from padseg.train import tiny_model
from padseg.train.settings import TrainingSettings, without_masks

SMALL = dataclasses.replace(
    TrainingSettings(),
    vae_steps=1,
    vae_batch=1,
    vae_crops=1,
    size=2,
    together=dataclasses.replace(TrainingSettings.together, steps=2),
    transformer=dataclasses.replace(TrainingSettings.transformer, steps=1),
)
# as many parts and blocks as the embedded model has, but narrow ones
TRANSFORMER = {**tiny_model.TRANSFORMER, 'num_attention_heads': 2, 'attention_head_dim': 16}
VAE = {**tiny_model.VAE, 'block_out_channels': (8, 8, 8, 8)}


def train_small(out: Path, start: Path | None = None, workers: int = 0, settings: TrainingSettings | None = None) -> None:
    """Train in all stages with a checkpoint after every step; with `start`, from that model in the last one alone, without mask losses.

    settings: others instead.
    """
    import torch

    from padseg.train.tiny import train_tiny

    torch.set_num_threads(1)
    settings = settings or (without_masks(SMALL) if start else SMALL)
    train_tiny(out, settings, (), start, 'cpu', workers, save_every=1, shown=1, transformer=TRANSFORMER, vae=VAE)
