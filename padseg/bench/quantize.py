"""What weights in 8 bits do to memory, time and token maps of SD3-medium's shape with random weights: bin/bench quantize."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from padseg.backbones import QUANTIZED, load
from padseg.bench.measure import finish_bench, fresh, measured_on, surroundings
from padseg.bench.model import make_model
from padseg.bench.setting import QUIET, bench_picture, import_libraries, memory, own_side, shared_flags, synchronize
from padseg.evaluation.metrics import region_scores
from padseg.methods.seg4diff import Options, regions, token_maps
from padseg.types import TokenMaps

FORMS = (None, *QUANTIZED)


@click.command('quantize')
@click.option('--side', type=click.IntRange(min=64), help="of the pictures, in pixels (default: the model's own)")
@shared_flags
def command(side: int | None, size: str, repeats: int, dtype: str, device: str, folder: Path, record: bool, as_json: bool) -> None:
    """Measure --quantize int8 and fp8: weights, time of a picture, and how like maps and regions are to those of whole weights.

    Each form runs in a fresh process, where the fastest of --repeats pictures counts, after one that does not.
    """
    os.environ.update({name: os.environ.get(name) or value for name, value in QUIET.items()})
    model = make_model(folder / f'sd3-{size}', size)
    across = side or own_side(size)
    found = {form or dtype: fresh(measure, model, form, dtype, device, across, repeats) for form in FORMS}
    whole = found[dtype].pop('maps')
    for form in QUANTIZED:
        found[form] |= likeness(whole, found[form].pop('maps'), across)
    measured = {'size': size, 'side': across, 'dtype': dtype, **surroundings(device), 'forms': found}
    finish_bench('quantize', f'{size}-{across}-{dtype}', measured, record, as_json, in_words)


def measure(folder: Path, form: str | None, dtype: str, device: str, side: int, repeats: int) -> dict[str, Any]:
    """Bytes of the transformer's weights in MiB, seconds for the token maps of a picture, most memory in MiB, and the maps (T, h, w)."""
    import_libraries()
    backbone = load(str(folder), device=device, dtype=dtype, quantize=form)
    options = Options(side=side)
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        maps = token_maps(bench_picture(side, 0), backbone, options)
        synchronize(device)
        times.append(time.perf_counter() - began)
    weights = sum(held(weight) for weight in backbone.transformer.parameters()) / 2**20
    return {'weights_mib': weights, 'seconds': min(times[1:]), 'peak_mib': memory(device), 'maps': maps.maps.cpu().numpy()}


def held(weight: Any) -> int:
    """Bytes of a weight, of one in 8 bits with its scales."""
    return int(weight.qdata.nbytes + weight.scale.nbytes) if hasattr(weight, 'qdata') else int(weight.nbytes)


def likeness(whole: Any, other: Any, side: int) -> dict[str, float]:
    """Mean correlation of two sets of maps (T, h, w), map by map, and how far the regions of one cover those of the other, in 0..1."""
    import torch

    from padseg.types import Frame

    centred = [maps.reshape(len(maps), -1) - maps.reshape(len(maps), -1).mean(1, keepdims=True) for maps in (whole, other)]
    norms = np.linalg.norm(centred[0], axis=1) * np.linalg.norm(centred[1], axis=1)
    names, frame = tuple(map(str, range(len(whole)))), Frame((side, side), (0, 0, side, side))
    options = Options(normalisation='released', threshold=0.02, refine='none', superpixels=0.0, join=0.0, components=False, min_area=0.0)
    labels = [regions(bench_picture(side, 0), TokenMaps(torch.from_numpy(maps), names, frame), options).labels for maps in (whole, other)]
    return {'correlation': float(((centred[0] * centred[1]).sum(1) / norms).mean()), 'covering': region_scores(*labels).covering}


def in_words(measured: dict[str, Any]) -> str:
    """Format the figures, one line for each form."""
    lines = [f'SD3, {measured["size"]}, {measured["side"]} pixels, {measured["dtype"]}; {measured_on(measured)}']
    lines.append(f'{"":10}{"weights":>14}{"most memory":>14}{"seconds":>10}{"maps":>10}{"regions":>10}')
    for form, one in measured['forms'].items():
        like = f'{one["correlation"]:10.4f}{one["covering"]:10.4f}' if 'covering' in one else ''
        lines.append(f'{form:10}{one["weights_mib"]:10.0f} MiB{one["peak_mib"]:10.0f} MiB{one["seconds"]:10.2f}{like}')
    return '\n'.join(lines)
