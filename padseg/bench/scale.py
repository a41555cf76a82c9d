"""Cost by picture size, number of pictures and batch size, and the gain from compiling: bin/bench scale."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from scipy.optimize import nnls

from padseg.backbones import Backbone
from padseg.bench.engine import make_pictures
from padseg.bench.measure import between, finish_bench, fresh, measured_on, peak, spread, surroundings
from padseg.bench.model import TINY_VAE, make_model
from padseg.bench.setting import QUIET, BenchSetting, bench_backbone, bench_picture, memory, own_side, shared_flags, synchronize
from padseg.methods.seg4diff import Options
from padseg.methods.stages.latents import encode
from padseg.methods.stages.token_maps import latent_token_maps
from padseg.run import engine
from padseg.run.job import Job

TIMES = ('vae', 'transformer')
LATER = 3  # pictures after the first, whose median is reported
PATCH = 16  # side of an image token in pixels
PICTURE = (321, 481)  # height and width of those in a folder


class Sized(NamedTuple):
    """Seconds for a picture, not the first one, and peak memory in MiB."""

    vae: float
    transformer: float
    peak: float


class Forwards(NamedTuple):
    """Seconds from latent to maps, for the first picture and for a later one."""

    first: float
    later: float


class Ran(NamedTuple):
    """A run over a folder. seconds: including loading; peak: peak memory in MiB."""

    seconds: float
    peak: float


@click.command('scale')
@shared_flags
@click.option(
    '--pictures', type=click.IntRange(6), default=50, show_default=True, help='number of pictures in the longest run of the embedded model'
)
@click.option(
    '--quarters',
    type=click.IntRange(1),
    multiple=True,
    default=(1, 2, 3, 4),
    help="a side to measure, in quarters of the model's own; repeat",
)
@click.option('--batches', type=click.IntRange(1), multiple=True, default=(1, 4, 16), help='a batch size to measure; repeat')
@click.option(
    '--compile/--no-compile', 'compiling', default=True, show_default=True, help='also measure after how many pictures compiling pays off'
)
def command(
    size: str,
    repeats: int,
    dtype: str,
    device: str,
    folder: Path,
    record: bool,
    as_json: bool,
    pictures: int,
    quarters: tuple[int, ...],
    batches: tuple[int, ...],
    compiling: bool,
) -> None:
    """Measure cost by picture size, number of pictures and batch size, and after how many pictures compiling pays off.

    Sizes and compiling use SD3's architecture; numbers and batches use runs of the embedded model over a folder.
    """
    os.environ |= QUIET  # inherited by the processes
    setting = BenchSetting(fresh(make_model, folder / size, size), own_side(size), dtype=dtype, device=device)
    fresh(at_side, setting._replace(side=setting.side // 4))  # caches the empty prompt
    sides = [setting.side * quarter // 4 for quarter in quarters]
    by_side = {side: [fresh(at_side, setting._replace(side=side)) for _ in range(repeats)] for side in sides}
    with tempfile.TemporaryDirectory(prefix='padseg-bench-') as name:
        place = Path(name)
        photographs = make_pictures(place / 'pictures', PICTURE, pictures)

        def runs(count: int, batch: int) -> list[Ran]:
            return [fresh(run_over, photographs, place / f'{count}-{batch}-{turn}', count, batch, device) for turn in range(repeats)]

        counts = {count: runs(count, 1) for count in dict.fromkeys((1, pictures // 5, pictures))}
        by_batch = {batch: runs(pictures // 3, batch) for batch in batches}
    measured = {
        'size': size,
        'dtype': dtype,
        **surroundings(device),
        'sides': {side: scale_columns(by_side[side]) for side in sides},
        'law': {part: law(sides, [statistics.median(getattr(one, part) for one in by_side[side]) for side in sides]) for part in TIMES},
        'pictures': {count: scale_columns(ran) for count, ran in counts.items()},
        'batched': pictures // 3,
        'batches': {batch: scale_columns(ran) for batch, ran in by_batch.items()},
        'compiling': compiled(setting, repeats) if compiling else None,
    }
    finish_bench('scale', f'{size}-{dtype}', measured, record, as_json, in_words)


def scale_columns(rows: list[Any]) -> dict[str, list[float]]:
    """Collect the values of all repeats by field name."""
    return {name: [getattr(one, name) for one in rows] for name in rows[0]._fields}


def at_side(setting: BenchSetting) -> Sized:
    backbone = bench_backbone(setting)
    one_picture(setting._replace(side=setting.side // 4), backbone)  # warm up
    return Sized(*one_picture(setting, backbone), memory(setting.device))


def one_picture(setting: BenchSetting, backbone: Backbone) -> tuple[float, float]:
    """Time one picture: seconds from image to latent, and from latent to maps."""
    options = Options(side=setting.side).resolve(backbone.spec)
    image = bench_picture(setting.side, 0)
    start = time.perf_counter()
    latent = encode(image, backbone, options)
    synchronize(setting.device)
    middle = time.perf_counter()
    latent_token_maps([latent], backbone, options)
    synchronize(setting.device)
    return middle - start, time.perf_counter() - middle


def law(sides: list[int], seconds: list[float]) -> dict[str, float]:
    """Fit seconds = a n + b n² for n image tokens, by least squares on the relative error. error: the largest relative error."""
    tokens = (np.array(sides) / PATCH) ** 2
    terms = np.stack([tokens, tokens**2], 1)
    scaled = terms / np.array(seconds)[:, None]
    unit = scaled.max(0)
    factors = nnls(scaled / unit, np.ones(len(sides)))[0] / unit
    return {'linear': float(factors[0]), 'square': float(factors[1]), 'error': float(np.abs(scaled @ factors - 1).max())}


def run_over(folder: Path, out: Path, count: int, batch: int, device: str) -> Ran:
    """Time `padseg run` on the first `count` pictures, from loading the model to the last file. Raises ClickException if any fails."""
    from padseg.run.selection import Selection

    start = time.perf_counter()
    counts = engine.run(Job(folder, out, batch=batch, device=device, selection=Selection(limit=count)))
    if counts.done != count:
        raise click.ClickException(f'{counts.failed} of {count} pictures failed')
    return Ran(time.perf_counter() - start, peak())


def compiled(setting: BenchSetting, repeats: int) -> dict[str, Any]:
    """Time forward passes: not compiled, compiled, and compiled with the disk cache of an earlier process.

    pays: the number of pictures from which compiling saves time.
    """
    turns = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix='padseg-bench-') as cache:
            os.environ['TORCHINDUCTOR_CACHE_DIR'] = cache
            quick = setting._replace(vae=setting.folder / TINY_VAE)  # the VAE is not timed here, so take the fast one
            kinds = {'plain': False, 'compiled': True, 'again': True}
            turns.append({name: fresh(forwards, quick._replace(compile=compiles)) for name, compiles in kinds.items()})
    result: dict[str, Any] = {name: scale_columns([turn[name] for turn in turns]) for name in turns[0]}
    middle = {name: Forwards(*map(statistics.median, result[name].values())) for name in turns[0]}
    pays = {name: pays_after(middle['plain'], middle[name]) for name in ('compiled', 'again')}
    return {**result, 'gain': 1 - middle['compiled'].later / middle['plain'].later, 'pays': pays}


def forwards(setting: BenchSetting) -> Forwards:
    backbone = bench_backbone(setting)
    options = Options(side=setting.side).resolve(backbone.spec)
    latent = encode(bench_picture(setting.side, 0), backbone, options)
    taken = []
    for _ in range(1 + LATER):
        start = time.perf_counter()
        latent_token_maps([latent], backbone, options)
        synchronize(setting.device)
        taken.append(time.perf_counter() - start)
    return Forwards(taken[0], statistics.median(taken[1:]))


def pays_after(plain: Forwards, other: Forwards) -> int | None:
    """Return the number of pictures from which compiling saves time; None if it never does."""
    gain = plain.later - other.later
    return max(1, 1 + int(np.ceil((other.first - plain.first) / gain))) if gain > 0 else None


def in_words(measured: dict[str, Any]) -> str:
    """Format the figures, one table per quantity."""
    lines = [f'{measured["size"]} model, {measured["dtype"]}; {measured_on(measured)}']
    lines.append(heading('side', 'VAE, s', 'transformer, s', 'peak memory, MiB'))
    for side, taken in measured['sides'].items():
        lines.append(fitted_line(side, *taken.values()))
    for part, law in measured['law'].items():
        lines.append(
            f'{part}: {1e3 * law["linear"]:.3g} ms n + {1e6 * law["square"]:.3g} us n^2 for n image tokens, within {law["error"]:.0%}'
        )
    for name, key in (('pictures', 'pictures'), (f'batch, {measured["batched"]} pictures', 'batches')):
        lines.append(heading(name, 'run of tiny, s', 'peak memory, MiB'))
        lines += [fitted_line(number, *taken.values()) for number, taken in measured[key].items()]
    if compiling := measured['compiling']:
        lines.append(heading('transformer', 'first, s', 'later, s'))
        names = {'plain': 'not compiled', 'compiled': 'compiled', 'again': 'from disk cache'}
        lines += [fitted_line(words, *compiling[name].values()) for name, words in names.items()]
        after, before = (f'from picture {number} on' if number else 'never' for number in compiling['pays'].values())
        lines.append(f'compiling saves {compiling["gain"]:.1%} of a later forward pass and pays off {after}; from disk cache, {before}')
    return '\n'.join(lines)


def heading(*names: str) -> str:
    return f'{names[0]:20}' + ''.join(f'{name:>26}' for name in names[1:])


def fitted_line(name: object, *values: list[float]) -> str:
    return f'{name!s:20}' + ''.join(f'{between(spread(column), 0 if min(column) > 100 else 2):>26}' for column in values)
