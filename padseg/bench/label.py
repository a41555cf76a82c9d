"""Cost of naming masks by number of classes, compared with regions without names: bin/bench label."""

from __future__ import annotations

import itertools
import os
import statistics
import string
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click

from padseg.bench.measure import between, finish_bench, fresh, measured_on, spread, surroundings
from padseg.bench.model import make_model
from padseg.bench.setting import QUIET, BenchSetting, bench_backbone, bench_picture, own_side, shared_flags, synchronize
from padseg.methods import open_vocabulary
from padseg.methods.open_vocabulary import LabelOptions
from padseg.methods.seg4diff import Options, segment
from padseg.types import Image

COUNTS = (1, 10, 37, 38, 75, 150)  # numbers of classes; 37 names of two tokens fill one prompt
NAMES = [''.join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2)]


class Named(NamedTuple):
    """Seconds. words: encode the names, text encoders loaded; again: the same from the cache; picture: label a whole picture."""

    words: float
    again: float
    picture: float
    prompts: int


class Turn(NamedTuple):
    """Figures of one process. run: seconds per picture without names; named: by number of classes."""

    run: float
    named: dict[int, Named]


@click.command('label')
@shared_flags
@click.option('--classes', multiple=True, type=click.IntRange(1, len(NAMES)), default=COUNTS, show_default=True, help='numbers of classes')
def command(size: str, repeats: int, dtype: str, device: str, folder: Path, record: bool, as_json: bool, classes: tuple[int, ...]) -> None:
    """Measure seconds per picture by number of classes, compared with regions without names.

    The model is SD3-medium with random weights. Every name has two tokens. One forward pass suffices as long as one prompt holds all names.
    """
    os.environ |= QUIET  # inherited by the processes
    setting = BenchSetting(fresh(make_model, folder / size, size), own_side(size), dtype=dtype, device=device)
    turns = [fresh(turn, setting, classes) for _ in range(repeats)]
    measured = {
        'size': size,
        'side': setting.side,
        'dtype': dtype,
        **surroundings(device),
        'run': [turn.run for turn in turns],
        'classes': {count: label_columns([turn.named[count] for turn in turns]) for count in classes},
    }
    finish_bench('label', f'{size}-{dtype}', measured, record, as_json, in_words)


def label_columns(rows: list[Named]) -> dict[str, Any]:
    values: dict[str, Any] = {name: [getattr(one, name) for one in rows] for name in ('words', 'again', 'picture')}
    return {'prompts': rows[0].prompts, **values}


def turn(setting: BenchSetting, counts: tuple[int, ...]) -> Turn:
    """Take all measurements in one process, with its own cache of embeddings."""
    backbone = bench_backbone(setting)
    image = bench_picture(setting.side, 0)
    segment(image, backbone, Options(side=setting.side // 4))  # warm up
    run = seconds(setting, lambda: segment(image, backbone, Options(side=setting.side)))
    named = {}
    with tempfile.TemporaryDirectory(prefix='padseg-bench-') as cache:
        os.environ['PADSEG_CACHE'] = cache
        options = LabelOptions(side=setting.side)
        for count in counts:
            words, again = (seconds(setting, partial(open_vocabulary.prepare, backbone, options, NAMES[:count])) for _ in range(2))
            prepared = open_vocabulary.prepare(backbone, options, NAMES[:count])

            named[count] = Named(words, again, seconds(setting, partial(label_one, image, prepared)), len(prepared.prompts))
    return Turn(run, named)


def label_one(image: Image, prepared: open_vocabulary.Prepared) -> None:
    open_vocabulary.labels(image, open_vocabulary.maps([image], prepared)[0], prepared)


def seconds(setting: BenchSetting, function: Any) -> float:
    start = time.perf_counter()
    function()
    synchronize(setting.device)
    return time.perf_counter() - start


def in_words(measured: dict[str, Any]) -> str:
    """Format the figures, one line per number of classes."""
    run = statistics.median(measured['run'])
    lines = [
        f'SD3 {measured["size"]}, {measured["side"]} x {measured["side"]}, {measured["dtype"]}; {measured_on(measured)}',
        f'regions without names: {between(spread(measured["run"]))} s per picture',
        f'{"classes":>8}{"prompts":>9}{"per picture, s":>26}{"of run":>8}{"words, s":>24}{"from the cache, s":>26}',
    ]
    for count, row in measured['classes'].items():
        times = [between(spread(row[name])) for name in ('picture', 'words', 'again')]
        of_run = statistics.median(row['picture']) / run
        lines.append(f'{count:>8}{row["prompts"]:>9}{times[0]:>26}{of_run:>8.2f}{times[1]:>24}{times[2]:>26}')
    return '\n'.join(lines)
