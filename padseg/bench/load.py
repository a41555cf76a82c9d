"""Loading only the parts of SD3 that the maps need, compared with loading the whole model: bin/bench load."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from padseg.bench.measure import between, finish_bench, fresh, measured_on, row_of_numbers, spread, surroundings
from padseg.bench.model import make_model
from padseg.bench.setting import QUIET, BenchSetting, bench_backbone, import_libraries, memory, own_side, shared_flags, synchronize


class Loading(NamedTuple):
    """seconds: loading time; before, peak: peak memory before the first file is opened and in total, in MiB."""

    seconds: float
    before: float
    peak: float


@click.command('load')
@shared_flags
def command(size: str, repeats: int, dtype: str, device: str, folder: Path, record: bool, as_json: bool) -> None:
    """Measure time and memory to load what the maps need, compared with the whole transformer and VAE.

    The whole is loaded by our own reader and by diffusers' pipeline. Files already read come from the system's file cache, if they fit.
    """
    os.environ |= QUIET  # inherited by the processes
    setting = BenchSetting(fresh(make_model, folder / size, size), own_side(size), dtype=dtype, device=device)
    fresh(load_ours, setting)
    turns = [(fresh(load_ours, setting), fresh(load_whole, setting), fresh(load_published, setting)) for _ in range(repeats)]
    columns = dict(zip(('ours', 'whole', 'pipeline'), zip(*turns, strict=True), strict=True))
    measured = {
        'size': size,
        'dtype': dtype,
        **surroundings(device),
        'seconds': {name: [loading.seconds for loading in column] for name, column in columns.items()},
        'before_mib': {name: [loading.before for loading in column] for name, column in columns.items()},
        'peak_mib': {name: [loading.peak for loading in column] for name, column in columns.items()},
        'whole_to_ours': spread([b.seconds / a.seconds for a, b, _ in turns]),
        'pipeline_to_ours': spread([c.seconds / a.seconds for a, _, c in turns]),
        'memory_ours_to_whole': spread([a.peak / b.peak for a, b, _ in turns]),
        'memory_ours_to_pipeline': spread([a.peak / c.peak for a, _, c in turns]),
        'added_ours_to_whole': spread(
            [(a.peak - a.before) / max(1.0, b.peak - b.before) for a, b, _ in turns]
        ),  # a small model may fit into memory that the imports left free
    }
    finish_bench('load', f'{size}-{dtype}', measured, record, as_json, in_words)


def load_ours(setting: BenchSetting) -> Loading:
    import_libraries()
    start, before = time.perf_counter(), memory(setting.device)
    bench_backbone(setting)
    return Loading(time.perf_counter() - start, before, memory(setting.device))


def load_whole(setting: BenchSetting) -> Loading:
    from padseg.bench.reference import load_models

    start, before = time.perf_counter(), memory(setting.device)
    kept = load_models(setting.folder, torch.device(setting.device), getattr(torch, setting.dtype))
    synchronize(setting.device)
    return Loading(time.perf_counter() - start, before, memory(setting.device) if kept else 0.0)


def load_published(setting: BenchSetting) -> Loading:
    """Load the pipeline in the usual way of diffusers, without its text encoders."""
    from diffusers import StableDiffusion3Pipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    start, before = time.perf_counter(), memory(setting.device)
    absent: dict[str, Any] = dict.fromkeys(('text_encoder', 'text_encoder_2', 'text_encoder_3', 'tokenizer_3'))
    pipeline = StableDiffusion3Pipeline.from_pretrained(setting.folder, dtype=getattr(torch, setting.dtype), **absent)
    pipeline.to(setting.device)
    synchronize(setting.device)
    return Loading(time.perf_counter() - start, before, memory(setting.device))


def in_words(measured: dict[str, Any]) -> str:
    """Format time and memory of ours, the whole model, and diffusers' pipeline: medians with minimum and maximum."""
    return '\n'.join(
        [
            f'{measured["size"]} model, {measured["dtype"]}; {measured_on(measured)}',
            f'{"":22}{"ours":>28}{"whole":>28}{"from_pretrained":>28}',
            row_of_numbers('loading, s', *measured['seconds'].values()),
            row_of_numbers('peak memory, MiB', *measured['peak_mib'].values(), digits=0),
            row_of_numbers('  before loading', *measured['before_mib'].values(), digits=0),
            f'the whole takes {between(measured["whole_to_ours"])} x the time; '
            f'ours takes {between(measured["memory_ours_to_whole"])} x the memory, {between(measured["added_ours_to_whole"])} x without '
            'Python and its libraries',
            f"diffusers' pipeline without text encoders takes {between(measured['pipeline_to_ours'])} x the time; "
            f'ours takes {between(measured["memory_ours_to_pipeline"])} x the memory',
        ]
    )
