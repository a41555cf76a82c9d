"""Overhead of a run without the model: bin/bench engine."""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import cv2
import numpy as np
import PIL.Image
import torch

from padseg.bench.measure import TIMED, finish_bench, fresh, measured_on, output_flags, peak, surface, surroundings, timed
from padseg.evaluation.metrics import compact
from padseg.exports import write_label_map, write_masks
from padseg.images import find, read
from padseg.run import engine
from padseg.run.job import Job
from padseg.run.picture import Stages
from padseg.run.plan import plan
from padseg.run.records import as_recorded
from padseg.system.signals import Stop
from padseg.types import Frame, LabelMap, TokenMaps

KINDS = 25  # distinct pictures; the others are hard links to them
SMALL = (48, 64)
MAPS = TokenMaps(torch.zeros(1, 1, 1), ('',), Frame((1, 1), (0, 0, 1, 1)))  # a placeholder: these runs do not save maps


class Cost(NamedTuple):
    """Seconds of a run. own: user CPU time of all threads; system: CPU time in the kernel, for files; wall: elapsed time.

    peak: peak memory of the process in MiB.
    """

    own: float
    system: float
    wall: float
    peak: float


@click.command('engine')
@click.option('--pictures', type=click.IntRange(min=10), default=200, show_default=True, help='number of 481 x 321 pictures to time')
@click.option(
    '--many',
    type=click.IntRange(min=20),
    default=10_000,
    show_default=True,
    help='number of small pictures for the memory test, which also runs on a tenth of them',
)
@click.option('--folder', type=click.Path(exists=True, path_type=Path), help='a folder on the disk to test (default: the temporary folder)')
@output_flags
def command(pictures: int, many: int, folder: Path | None, record: bool, as_json: bool) -> None:
    """Measure a run without the model: reading and decoding pictures, and writing label maps, masks and records.

    A fixed label map with 14 regions replaces the model. Times are differences between a long and a short run, so they exclude start-up.
    """
    with tempfile.TemporaryDirectory(prefix='padseg-bench-', dir=folder) as name:
        large, small = (make_pictures(Path(name) / kind, size, count) for kind, size, count in sizes(pictures, many))
        costs = {count: fresh(run_stages, large, Path(name) / f'large-{count}', count) for count in (pictures // 5, pictures)}
        memory = {count: fresh(run_stages, small, Path(name) / f'small-{count}', count).peak for count in (many // 10, many)}
        single = fresh(engine_steps, large, Path(name) / 'steps')
    short, long = costs.values()
    per_picture = {
        name: 1000 * (getattr(long, name) - getattr(short, name)) / (pictures - pictures // 5) for name in ('own', 'system', 'wall')
    }
    measured = {
        'pictures': pictures,
        **surroundings(),
        'milliseconds': per_picture,
        'steps': single,
        'memory_mib': memory,
        'memory_many_to_few': memory[many] / memory[many // 10],
    }
    finish_bench('engine', f'{pictures}-pictures', measured, record, as_json, in_words)


def sizes(pictures: int, many: int) -> tuple[tuple[str, tuple[int, int], int], ...]:
    return ('large', (321, 481), pictures), ('small', SMALL, many)


def make_pictures(folder: Path, size: tuple[int, int], count: int) -> Path:
    """Write JPEG stand-ins for photographs, smooth blobs with noise, to a new folder and return it. size: (height, width)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f'{number:06}.jpg'
        if number < KINDS:
            shapes = cv2.resize(surface(rng, 64)[..., :3], size[::-1], interpolation=cv2.INTER_CUBIC)
            noisy = 128 + 60 * shapes + rng.normal(0, 8, shapes.shape)
            PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        else:
            path.hardlink_to(folder / f'{number % KINDS:06}.jpg')
    return folder


def make_labels(size: tuple[int, int]) -> LabelMap:
    """Make a label map (H, W) of smooth blobs."""
    blobs = surface(np.random.default_rng(1), 512).argmax(2).astype(np.uint8)
    labels = compact(cv2.resize(blobs, size[::-1], interpolation=cv2.INTER_NEAREST)).astype(np.int32) + 1
    return LabelMap(labels, tuple((number,) for number in range(int(labels.max()))))


def run_stages(folder: Path, out: Path, count: int) -> Cost:
    """Run the engine without the model on the first `count` pictures and return the cost. Raises ClickException if any picture fails."""
    pictures = find(folder)[:count]
    height, width = read(pictures[0].path).shape[:2]
    labels = make_labels((height, width))

    stages = Stages(lambda taken: [picture._replace(maps=MAPS) for picture in taken], lambda image, maps: labels)
    job = Job(folder, out)
    out.mkdir()
    with Stop() as stop:
        began = os.times()
        pending, records, *_ = plan(job, pictures, pictures)
        for entry in engine.work(job, engine.results(job, stages, pending, stop), pending, records.values(), stop):
            records[entry.input] = as_recorded(entry)
        ended = os.times()
    cost = Cost(ended.user - began.user, ended.system - began.system, ended.elapsed - began.elapsed, peak())
    failed = [record.line for record in records.values() if record.status == 'failed']
    if failed or len(records) != count:
        raise click.ClickException(f'{len(failed)} of {count} pictures failed: {failed[:1]}')
    return cost


def engine_steps(folder: Path, out: Path) -> dict[str, float]:
    """Elapsed milliseconds of each step: the median over pictures, each timed as the fastest of several calls."""
    taken: dict[str, list[float]] = {'decode': [], 'labels': [], 'masks': []}
    for picture in find(folder)[:TIMED]:
        image = timed(taken['decode'], read, picture.path)
        labels = make_labels(image.shape[:2])
        timed(taken['labels'], write_label_map, labels, out / 'a.png')
        timed(taken['masks'], write_masks, labels, out / 'a')
    return {name: statistics.median(times) for name, times in taken.items()}


def in_words(measured: dict[str, Any]) -> str:
    """Format the figures, one line each."""
    (few, less), (many, more) = measured['memory_mib'].items()
    taken = measured['milliseconds']
    rows = [
        ('per picture', taken['own'], 'ms of CPU time'),
        ('  in the kernel', taken['system'], 'ms, to create files and flush them to disk'),
        ('  elapsed', taken['wall'], 'ms'),
        *((f'  {name}', value, 'ms elapsed, measured alone') for name, value in measured['steps'].items()),
        (f'memory of {few} pictures', less, 'MiB'),
        (f'memory of {many} pictures', more, f'MiB; {measured["memory_many_to_few"]:.3f} x'),
    ]
    head = f'pictures of 481 x 321 with 14 regions; {measured_on(measured)}'
    return '\n'.join([head, *(f'{name:24} {value:9.2f} {unit}' for name, value, unit in rows)])
