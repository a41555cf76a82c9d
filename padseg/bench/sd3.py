"""SD3-medium at full size, from picture to label map, compared with the whole pipeline in the same run: bin/bench sd3."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import click
import numpy as np
import torch

from padseg.backbones.source import locate, read_json
from padseg.bench import flops
from padseg.bench.measure import between, finish_bench, fresh, measured_on, row_of_numbers, spread, surroundings
from padseg.bench.model import TINY_VAE, make_model
from padseg.bench.setting import (
    QUIET,
    BenchSetting,
    bench_backbone,
    bench_picture,
    import_libraries,
    memory,
    own_side,
    shared_flags,
    synchronize,
)
from padseg.methods.seg4diff import Options
from padseg.methods.stages.forwards import batched
from padseg.methods.stages.labels import label_map
from padseg.methods.stages.latents import encode
from padseg.methods.stages.proposals import merge
from padseg.methods.stages.token_maps import latent_token_maps
from padseg.types import Array

TimedRun = Callable[[int, dict[str, float]], 'Comparison']  # takes the side in pixels and a dict for the seconds of each stage

STAGES = ('text', 'vae', 'transformer', 'merge', 'labels')
THRESHOLD = 0.003  # maps from random weights are so similar that the published 0.1 would merge them all
LIMITS = {'float32': 1e-4, 'bfloat16': 0.1, 'float16': 0.1}  # on the RMS difference of maps, in standard deviations
WARM_UP = 128  # side in pixels of the warm-up picture
PRODUCT = {'full': 4096, 'small': 512}  # side of the matrices whose product gives the ceiling
PRODUCTS = {'cpu': 2, 'cuda': 50}  # matrix products to time


class Comparison(NamedTuple):
    """Result for one picture. maps: (T, h, w) float32; groups: members of each proposal; labels: (H, W) int32, regions from 1."""

    maps: Array
    groups: tuple[tuple[int, ...], ...]
    labels: Array


class Figures(NamedTuple):
    """Figures of one process, which runs either implementation.

    loading: seconds; loaded, peak: peak memory after loading and in total, in MiB; seconds: per picture, by stage; outcome: result for the
    first picture; ceiling: operations per second by dtype, measured at the end.
    """

    loading: float
    loaded: float
    peak: float
    seconds: dict[str, float]
    outcome: Comparison
    ceiling: dict[str, float]


@click.command('sd3')
@shared_flags
@click.option('--side', type=click.IntRange(WARM_UP), help="side of the pictures in pixels (default: the model's own)")
@click.option(
    '--batch', type=click.IntRange(1), default=1, show_default=True, help='batch size of ours; the reference takes one picture at a time'
)
@click.option(
    '--passes', type=click.IntRange(1), default=1, show_default=True, help='timed batches in each process; the median is reported'
)
@click.option(
    '--vae', type=click.Choice(('exact', 'tiny')), default='exact', show_default=True, help="VAE of ours: SD3's own, or an AutoencoderTiny"
)
@click.option('--compile', is_flag=True, help='compile the blocks of ours; the time to compile is not counted')
def command(
    size: str,
    repeats: int,
    dtype: str,
    device: str,
    folder: Path,
    record: bool,
    as_json: bool,
    side: int | None,
    batch: int,
    passes: int,
    vae: str,
    compile: bool,
) -> None:
    """Measure the way from picture to label map with SD3-medium and random weights, compared with the whole pipeline.

    The reference runs text encoders, VAE and all blocks for every picture, forms the full attention matrix of the expert block, and
    merges in a loop. Both process the same pictures, in alternating fresh processes, and must find the same maps.
    """
    os.environ |= QUIET  # inherited by the processes
    model = fresh(make_model, folder / size, size)
    other = model / TINY_VAE if vae == 'tiny' else None
    setting = BenchSetting(model, side or own_side(size), batch, other, dtype, device, passes, compile, PRODUCT[size])
    fresh(open_once, setting)  # caches the empty prompt
    turns = [(fresh(ours, setting), fresh(reference, setting)) for _ in range(repeats)]
    measured = summarise(setting, size, turns)
    case = f'{size}-{vae}-{setting.side}-batch-{batch}-{dtype}' + ('-compiled' if compile else '')
    finish_bench('sd3', case, measured, record, as_json, in_words)
    require_same_maps(measured)


def open_once(setting: BenchSetting) -> None:
    bench_backbone(setting)


def ours(setting: BenchSetting) -> Figures:
    """Measure padseg on the pictures, in batches."""
    import_libraries()
    start = time.perf_counter()
    backbone = bench_backbone(setting)
    loading, loaded = time.perf_counter() - start, memory(setting.device)

    def run(side: int, taken: dict[str, float]) -> Comparison:
        stage = partial(timed_stage, taken, setting.device, setting.batch)
        options = Options(side=side, threshold=THRESHOLD).resolve(backbone.spec)
        images = [bench_picture(side, number) for number in range(setting.batch)]
        with stage('vae'):
            latents = [encode(image, backbone, options) for image in images]
        with stage('transformer'):
            maps = batched(latents, backbone, partial(latent_token_maps, backbone=backbone, options=options))
        with stage('merge'):
            merged = [merge(token_maps, options.threshold, options.normalisation) for token_maps in maps]
        with stage('labels'):
            labels = [label_map(proposals) for proposals in merged]
        return Comparison(maps[0].maps.cpu().numpy(), merged[0].members, labels[0].labels)

    return Figures(loading, loaded, *repeated(run, setting))


def reference(setting: BenchSetting) -> Figures:
    """Measure the whole pipeline on the same pictures, one at a time."""
    from padseg.bench.reference import load_pipeline, segment_naively

    start = time.perf_counter()
    pipeline = load_pipeline(setting.folder, torch.device(setting.device), getattr(torch, setting.dtype))
    spec = locate(str(setting.folder)).spec
    synchronize(setting.device)
    loading, loaded = time.perf_counter() - start, memory(setting.device)

    def run(side: int, taken: dict[str, float]) -> Comparison:
        stage = partial(timed_stage, taken, setting.device, 1)
        options = Options(side=side, threshold=THRESHOLD).resolve(spec)
        result = segment_naively(bench_picture(side, 0), pipeline, options, stage)
        return Comparison(result.maps.cpu().numpy(), result.groups, number_regions(result.labels))

    return Figures(loading, loaded, *repeated(run, setting))


def number_regions(winners: Array) -> Array:
    """Number regions from 1 in order of first appearance: (H, W) int32."""
    names, places, index = np.unique(winners, return_index=True, return_inverse=True)
    ranks = np.empty(len(names), np.int32)
    ranks[np.argsort(places)] = np.arange(1, len(names) + 1)
    return ranks[index].reshape(winners.shape)


def repeated(run: TimedRun, setting: BenchSetting) -> tuple[float, dict[str, float], Comparison, dict[str, float]]:
    """Warm up, run the timed passes, and return the last four fields of Figures. On the CPU the warm-up picture is small."""
    run(WARM_UP if setting.device == 'cpu' else setting.side, {})
    passes: list[dict[str, float]] = [{} for _ in range(setting.passes)]
    for taken in passes:
        outcome = run(setting.side, taken)
    seconds = {stage: statistics.median(taken[stage] for taken in passes) if stage in passes[0] else 0.0 for stage in STAGES}
    return memory(setting.device), seconds, outcome, ceiling(setting)


@contextmanager
def timed_stage(taken: dict[str, float], device: str, pictures: int, name: str) -> Iterator[None]:
    """Record the seconds per picture that the `with` block takes."""
    start = time.perf_counter()
    yield
    synchronize(device)
    taken[name] = (time.perf_counter() - start) / pictures


def ceiling(setting: BenchSetting) -> dict[str, float]:
    """Measure operations per second of a square matrix product in each dtype: the fastest of several."""
    return {name: fastest_product(setting, getattr(torch, name)) for name in sorted({'bfloat16', 'float32', setting.dtype})}


def fastest_product(setting: BenchSetting, dtype: torch.dtype) -> float:
    side = setting.product
    factor = torch.rand(side, side, device=setting.device).to(dtype)
    times = []
    for _ in range(PRODUCTS[factor.device.type]):
        synchronize(setting.device)
        start = time.perf_counter()
        factor @ factor
        synchronize(setting.device)
        times.append(time.perf_counter() - start)
    return flops.linear(side, side, side) / min(times)


def operations(setting: BenchSetting) -> dict[str, dict[str, int]]:
    """Count the operations per picture: those that ours needs, and those of the whole pipeline."""
    spec = locate(str(setting.folder)).spec
    transformer, vae = (SimpleNamespace(**read_json(setting.folder / part / 'config.json')) for part in ('transformer', 'vae'))
    image = (setting.side // 2 ** (len(vae.block_out_channels) - 1) // transformer.patch_size) ** 2
    whole = flops.encoder(vae, setting.side, setting.side)
    smaller = setting.vae and SimpleNamespace(**read_json(setting.vae / 'config.json'))
    needed = flops.tiny_encoder(smaller, setting.side, setting.side) if smaller else whole
    return {
        'ours': {'vae': needed, 'transformer': flops.proposals(transformer, image, 2 * spec.sequence, spec.layer)},
        'reference': {'vae': whole, 'transformer': flops.transformer(transformer, image, 2 * spec.sequence)},
    }


def summarise(setting: BenchSetting, size: str, turns: list[tuple[Figures, Figures]]) -> dict[str, Any]:
    """Collect all figures for the JSON report, with the values of all repeats."""
    sides = {'ours': [a for a, _ in turns], 'reference': [b for _, b in turns]}
    best = {name: max(one.ceiling[name] for turn in turns for one in turn) for name in turns[0][0].ceiling}
    seconds = {name: {stage: [one.seconds[stage] for one in column] for stage in STAGES} for name, column in sides.items()}
    total = {name: [sum(one.seconds.values()) for one in column] for name, column in sides.items()}
    needed = operations(setting)
    return {
        'size': size,
        'product': setting.product,
        'side': setting.side,
        'batch': setting.batch,
        'vae': 'tiny' if setting.vae else 'exact',
        'compile': setting.compile,
        'dtype': setting.dtype,
        **surroundings(setting.device),
        'ceiling': best,
        'operations': needed,
        'seconds': seconds,
        'total': total,
        'reference_to_ours': spread([b / a for a, b in zip(total['ours'], total['reference'], strict=True)]),
        'ceiling_share': {
            name: {stage: stages[stage] / statistics.median(seconds[name][stage]) / best[setting.dtype] for stage in stages}
            for name, stages in needed.items()
        },
        'rest_share': statistics.median(1 - (a.seconds['vae'] + a.seconds['transformer']) / sum(a.seconds.values()) for a in sides['ours']),
        'peak_mib': {name: [one.peak for one in column] for name, column in sides.items()},
        'memory_ours_to_reference': spread([a.peak / b.peak for a, b in turns]),
        'loading': {name: [one.loading for one in column] for name, column in sides.items()},
        'loaded_mib': {name: [one.loaded for one in column] for name, column in sides.items()},
        'alike': compare(turns[0][0].outcome, turns[0][1].outcome) if setting.vae is None else None,
    }


def require_same_maps(measured: dict[str, Any]) -> None:
    """Raise ClickException if the two implementations found different maps."""
    alike = measured['alike']
    if alike and not alike['of_deviation'] <= LIMITS[measured['dtype']]:
        raise click.ClickException(f'the maps differ by {alike["of_deviation"]:.2g} standard deviations (RMS)')


def compare(a: Comparison, b: Comparison) -> dict[str, Any]:
    """Measure how close two results are.

    of_greatest: maximum difference of the maps, relative to their maximum; of_deviation: RMS difference, relative to the mean standard
    deviation of a map.
    """
    difference = np.abs(a.maps - b.maps)
    return {
        'of_greatest': float(difference.max() / b.maps.max()),
        'of_deviation': float(np.sqrt((difference**2).mean()) / b.maps.std((1, 2)).mean()),
        'groups': [len(a.groups), len(b.groups)],
        'same_groups': a.groups == b.groups,
        'same_pixels': float((a.labels == b.labels).mean()),
    }


def in_words(measured: dict[str, Any]) -> str:
    """Format a table of ours and the reference, one line per stage: medians with minimum and maximum."""
    seconds, operations, share, best = (measured[name] for name in ('seconds', 'operations', 'ceiling_share', 'ceiling'))
    lines = [
        f'{measured["size"]} model, {measured["side"]} x {measured["side"]}, {measured["dtype"]}, {measured["vae"]} VAE, '
        f'batches of {measured["batch"]}; {measured_on(measured)}',
        f'matrix product, {measured["product"]} x {measured["product"]}: '
        + ', '.join(f'{name} {value / 1e9:.0f} GFLOP/s' for name, value in best.items()),
        f'{"":22}{"ours":>28}{"reference":>28}',
    ]
    for stage in STAGES:
        lines.append(row_of_numbers(f'{stage}, s', *(seconds[name][stage] for name in seconds)))
        if stage in share['ours']:
            lines.append(f'{"  TFLOP":22}' + ''.join(f'{operations[name][stage] / 1e12:28.4g}' for name in seconds))
            lines.append(f'{"  share of matmul rate":22}' + ''.join(f'{share[name][stage]:28.1%}' for name in seconds))
    lines += [
        row_of_numbers('per picture, s', *measured['total'].values()),
        row_of_numbers('peak memory, MiB', *measured['peak_mib'].values(), digits=0),
        row_of_numbers('loading, s', *measured['loading'].values()),
        row_of_numbers('  peak memory, MiB', *measured['loaded_mib'].values(), digits=0),
        f'speed {between(measured["reference_to_ours"])} x the reference; memory {between(measured["memory_ours_to_reference"])} x; '
        f'{measured["rest_share"]:.1%} of the time outside VAE and transformer',
    ]
    if alike := measured['alike']:
        lines.append(
            f'maps differ by at most {alike["of_greatest"]:.1e} of their maximum, {alike["of_deviation"]:.1e} standard deviations (RMS); '
            f'groups {"the same" if alike["same_groups"] else "different"} ({alike["groups"][0]} and {alike["groups"][1]}); '
            f'{alike["same_pixels"]:.2%} of the pixels labelled the same'
        )
    return '\n'.join(lines)
