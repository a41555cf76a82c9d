"""Settings and helpers that the benchmarks sd3, load, scale and label share: model, pictures, device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import cv2
import numpy as np
import torch

from padseg.backbones import DTYPES, load
from padseg.backbones.source import cache_home
from padseg.bench.measure import output_flags, peak, surface
from padseg.bench.model import SIZES
from padseg.types import Image

QUIET = {'TRANSFORMERS_VERBOSITY': 'error', 'DIFFUSERS_VERBOSITY': 'error', 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}


class BenchSetting(NamedTuple):
    """Settings of one process.

    vae: a folder, or None for the model's own; passes: timed batches; compile: whether ours compiles its blocks; product: side of the
    matrices whose product gives the ceiling.
    """

    folder: Path
    side: int
    batch: int = 1
    vae: Path | None = None
    dtype: str = 'bfloat16'
    device: str = 'cpu'
    passes: int = 1
    compile: bool = False
    product: int = 4096


def shared_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Add the flags that these benchmarks share."""
    flags = (
        click.option(
            '--size', type=click.Choice(list(SIZES)), default='full', show_default=True, help='SD3-medium, or a small model for tests'
        ),
        click.option('--repeats', type=click.IntRange(1), default=3, show_default=True, help='repetitions, each in fresh processes'),
        click.option('--dtype', type=click.Choice(DTYPES), default='bfloat16', show_default=True, help='of weights and activations'),
        click.option('--device', default='cpu', show_default=True, help='cpu or cuda'),
        click.option('--folder', type=click.Path(path_type=Path), default=default_folder, help='where generated models are kept'),
    )
    for flag in reversed(flags):
        function = flag(function)
    return output_flags(function)


def default_folder() -> Path:
    return cache_home() / 'bench'


def own_side(size: str) -> int:
    return 8 * SIZES[size].transformer['sample_size']


def import_libraries() -> None:
    """Import the modules that `load` would import, so that imports are not timed."""
    import padseg.backbones.flux
    import padseg.backbones.loading
    import padseg.backbones.sd3  # noqa: F401


def bench_backbone(setting: BenchSetting) -> Any:
    other = str(setting.vae) if setting.vae else None
    backbone = load(str(setting.folder), device=setting.device, dtype=setting.dtype, vae=other, compile=setting.compile)
    synchronize(setting.device)
    return backbone


def synchronize(device: str) -> None:
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)


def memory(device: str) -> float:
    """Return the peak memory of this process so far, in MiB: GPU memory on a GPU, else main memory."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.startswith('cuda') else peak()


def bench_picture(side: int, number: int) -> Image:
    """Draw smooth shapes in plain colours with noise: (side, side, 3)."""
    rng = np.random.default_rng(number)
    shapes = cv2.resize(surface(rng, 64), (side, side), interpolation=cv2.INTER_CUBIC).argmax(2)
    colours = rng.integers(0, 256, (shapes.max() + 1, 3))
    return (colours[shapes] + rng.normal(0, 12, (side, side, 3))).clip(0, 255).astype(np.uint8)
