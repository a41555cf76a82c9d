"""Time and memory of a run with windows over one large picture: bin/bench tiles."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import cv2
import numpy as np
import PIL.Image

from padseg.bench.measure import CHECKOUT, finish_bench, fresh, measured_on, output_flags, surroundings
from padseg.types import Image

HEIGHTS = 300, 3000  # pixels; of the rows of photographs
EVERY = 0.25  # seconds between two looks at the memory
FORMATS: dict[str, dict[str, Any]] = {'png': {'compress_level': 1}, 'tiff': {}, 'jpeg': {'quality': 90}}
MEMORY = 'smaps_rollup'  # a file of /proc


class Taken(NamedTuple):
    """seconds: wall time of the run; own: processor time; peak: most memory of all its processes together, in MB; looks: how often it was
    read; regions: of the label map."""

    seconds: float
    own: float
    peak: float
    looks: int
    regions: int


@click.command('tiles')
@click.option('--width', type=click.IntRange(1), default=20000, show_default=True, help='of the picture')
@click.option('--height', type=click.IntRange(1), default=15000, show_default=True, help='of the picture')
@click.option('--tiles', type=click.IntRange(1), default=1024, show_default=True, help='as in padseg run')
@click.option('--overlap', type=click.IntRange(1), default=128, show_default=True, help='as in padseg run')
@click.option(
    '--format', 'kind', type=click.Choice(list(FORMATS)), default='png', show_default=True, help='of the file; TIFF is not compressed'
)
@click.option('--folder', type=click.Path(path_type=Path), help='for the picture and the results (default: a temporary one)')
@output_flags
def command(width: int, height: int, tiles: int, overlap: int, kind: str, folder: Path | None, record: bool, as_json: bool) -> None:
    """Run the embedded model over a picture that is put together from the photographs in data/images. Only on Linux.

    Memory is the sum of the proportional set sizes (PSS) of all processes of `padseg run`, looked at every quarter of a second.
    """
    if not Path('/proc/self', MEMORY).exists():
        raise click.ClickException('this system does not say how much memory a process shares with others')
    with tempfile.TemporaryDirectory(prefix='padseg-bench-') as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        picture = place / f'{width}x{height}.{kind}'
        if not picture.exists():
            fresh(write_mosaic, picture, kind, height, width)
        setting = {'width': width, 'height': height, 'format': kind, 'file_mb': picture.stat().st_size / 1e6}
        taken = run_and_look(picture, place / f'out-{kind}-{tiles}-{overlap}', tiles, overlap)
    measured = {**setting, 'tiles': tiles, 'overlap': overlap, **taken._asdict(), **surroundings()}
    finish_bench('tiles', f'{width}x{height} {kind} {tiles}', measured, record, as_json, in_words)


def write_mosaic(path: Path, kind: str, height: int, width: int) -> None:
    part = path.with_suffix('.part')
    PIL.Image.fromarray(mosaic(height, width)).save(part, kind, **FORMATS[kind])
    part.rename(path)


def mosaic(height: int, width: int) -> Image:
    """A picture (height, width, 3) put together from enlarged photographs, in rows of different heights; always the same."""
    names = sorted(path for path in (CHECKOUT / 'data/images').rglob('*') if path.suffix in ('.jpg', '.png'))
    photographs = []
    for name in names:
        with PIL.Image.open(name) as file:
            photographs.append(np.asarray(file.convert('RGB')))
    rng = np.random.default_rng(0)
    canvas = np.zeros((height, width, 3), np.uint8)
    top = 0
    while top < height:
        rows, left = round(math.exp(rng.uniform(math.log(HEIGHTS[0]), math.log(HEIGHTS[1])))), 0
        while left < width:
            one = photographs[rng.integers(len(photographs))]
            columns = round(one.shape[1] * rows / one.shape[0])
            part = canvas[top : top + rows, left : left + columns]
            part[:] = cv2.resize(one, (columns, rows), interpolation=cv2.INTER_CUBIC)[: part.shape[0], : part.shape[1]]
            left += columns
        top += rows
    return canvas


def run_and_look(picture: Path, out: Path, tiles: int, overlap: int) -> Taken:
    """Run `padseg run` over a picture in a process of its own and look at its memory until it has ended."""
    words = ('run', picture, '--out', out, '--tiles', str(tiles), '--overlap', str(overlap), '--overwrite', '--json', '--quiet')
    start, before, most, looks = time.perf_counter(), os.times(), 0, 0
    with subprocess.Popen((sys.executable, '-m', 'padseg', *words), stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            most, looks = max(most, memory_of_all(process.pid)), looks + 1
            time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(process.returncode)
    seconds, after = time.perf_counter() - start, os.times()
    own = after.children_user - before.children_user + after.children_system - before.children_system
    (line,) = (out / 'manifest.jsonl').read_text().splitlines()
    return Taken(seconds, own, most / 1e6, looks, json.loads(line)['regions'])


def memory_of_all(process: int) -> int:
    """Bytes that a process and all processes below it hold; what several share is counted once."""
    found = 0
    for each in with_children(process):
        try:
            lines = Path(f'/proc/{each}/{MEMORY}').read_text().splitlines()
        except OSError:  # it has ended
            continue
        found += sum(1024 * int(line.split()[1]) for line in lines if line.startswith('Pss:'))
    return found


def with_children(process: int) -> list[int]:
    found = [process]
    for each in found:  # which grows
        for names in Path(f'/proc/{each}/task').glob('*/children'):
            try:
                found.extend(map(int, names.read_text().split()))
            except OSError:
                continue
    return found


def in_words(measured: dict[str, Any]) -> str:
    file = f'{measured["format"].upper()} of {measured["file_mb"]:.0f} MB'
    return '\n'.join(
        (
            f'{measured["width"]} x {measured["height"]}, {file}; {measured_on(measured)}',
            f'--tiles {measured["tiles"]} --overlap {measured["overlap"]}: {measured["regions"]} regions',
            f'{measured["seconds"]:.0f} s, {measured["own"]:.0f} s of the processors',
            f'most memory of all processes: {measured["peak"] / 1000:.2f} GB, in {measured["looks"]} looks',
        )
    )
