"""Speed of scoring, compared with simpler implementations in the same run: bin/bench eval."""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np
from skimage.metrics import contingency_table

from padseg.bench.measure import REGIONS, TIMED, finish_bench, fresh, measured_on, output_flags, peak, surface, surroundings, timed
from padseg.datasets import Sample, label_folder
from padseg.evaluation.evaluate import Task, paired, score_stored, stored
from padseg.evaluation.metrics import ClassCounts, compact, counts_of, hungarian_counts, match_regions, widened
from padseg.evaluation.protocols import DEFAULT, protocol
from padseg.exports.png import read_label_map, write_label_map
from padseg.types import LabelMap

if TYPE_CHECKING:
    from padseg.types import Array

IGNORE = 255
NOISE = 0.6  # of the predictions, relative to the ground truth
BORDER = 32  # the top 1/BORDER of the rows is ignored


class Speed(NamedTuple):
    """seconds: scoring time, including the start of workers; peak: peak memory of the process in MiB."""

    seconds: float
    peak: float


@click.command('eval')
@click.option(
    '--pairs', type=click.IntRange(min=2), default=200, show_default=True, help='number of generated pairs of label map and ground truth'
)
@click.option('--size', type=click.IntRange(min=BORDER), default=512, show_default=True, help='side of the label maps in pixels')
@click.option('--classes', type=click.IntRange(1, IGNORE), default=27, show_default=True, help='classes of the ground truth')
@output_flags
def command(pairs: int, size: int, classes: int, record: bool, as_json: bool) -> None:
    """Measure the scoring of stored label maps: pairs per second, time of each step, and memory.

    Fresh processes score half and five times the number of generated pairs; the longer run reads files repeatedly. The rate comes from the
    difference between the two runs, so it excludes the start of processes.
    """
    few, many = pairs // 2, pairs * 5
    with tempfile.TemporaryDirectory(prefix='padseg-bench-') as name:
        folder = Path(name)
        fresh(make_pairs, folder, pairs, size, classes)
        milliseconds = fresh(eval_steps, folder, classes)
        speeds = {workers: [fresh(score, folder, classes, number, workers) for number in (few, many)] for workers in (1, 2)}
    per_second = {workers: rate(many - few, long.seconds - short.seconds) for workers, (short, long) in speeds.items()}
    memory = [speed.peak for speed in speeds[1]]
    measured = {
        'pairs': pairs,
        'size': size,
        'classes': classes,
        **surroundings(),
        'pairs_per_second': per_second,
        'with_start': {workers: rate(many, long.seconds) for workers, (_, long) in speeds.items()},
        'two_workers_to_one': per_second[2] / per_second[1] if per_second[1] and per_second[2] else None,
        'milliseconds': milliseconds,
        'scikit_image_to_count': milliseconds['scikit_image'] / milliseconds['count'],
        'loop_to_count': milliseconds['loop'] / milliseconds['count'],
        'memory_mib': dict(zip((few, many), memory, strict=True)),
        'memory_many_to_few': memory[1] / memory[0],
    }
    finish_bench('eval', f'{pairs}-pairs', measured, record, as_json, in_words)


def rate(pairs: int, seconds: float) -> float | None:
    """Pairs per second; None if the longer run was not slower, which means that both runs were too short."""
    return pairs / seconds if seconds > 0 else None


def make_pairs(folder: Path, pairs: int, size: int, classes: int) -> None:
    """Write truth/ and pred/: palette PNGs of smooth blobs; the top rows of the ground truth are ignored."""
    rng = np.random.default_rng(0)
    for number in range(pairs):
        surfaces, others = (surface(rng, size) for _ in range(2))  # (size, size, REGIONS)
        shown = rng.integers(0, classes, REGIONS)
        truth = shown[surfaces.argmax(2)]
        truth[: size // BORDER] = IGNORE
        pred = compact((surfaces + NOISE * others).argmax(2)) + 1
        for kind, labels in (('truth', truth), ('pred', pred)):
            write_label_map(LabelMap(labels, ()), folder / kind / f'{number}.png')


def task_of(folder: Path, classes: int) -> Task:
    dataset, preds = paired(label_folder(folder / 'truth', classes, IGNORE), stored(folder / 'pred'), allow_missing=False)
    return Task(dataset, protocol(DEFAULT, compare='native'), preds)


def score(folder: Path, classes: int, number: int, workers: int) -> Speed:
    """Score `number` pairs, reusing files if there are fewer. Raises ClickException if any pair fails."""
    task = task_of(folder, classes)
    samples = islice(cycle(task.dataset.samples), number)
    start = time.perf_counter()
    done = sum(picture.status == 'done' for picture in score_stored(task, samples, workers))
    seconds = time.perf_counter() - start
    if done != number:
        raise click.ClickException(f'{number - done} of {number} pairs could not be scored')
    return Speed(seconds, peak())


def eval_steps(folder: Path, classes: int) -> dict[str, float]:
    """Median milliseconds per pair of each step, and of two simpler ways to count. Raises ClickException if their counts differ."""
    task = task_of(folder, classes)
    taken: dict[str, list[float]] = {'decode': [], 'classes': [], 'count': [], 'scikit_image': [], 'loop': []}
    for sample in task.dataset.samples[:TIMED]:
        path = task.preds[sample.name]
        raw, pred = timed(taken['decode'], read_pair, task, sample)
        truth = timed(taken['classes'], task.dataset.to_classes, raw)
        counts = timed(taken['count'], hungarian_counts, pred, truth, classes)
        others = timed(taken['scikit_image'], by_scikit_image, pred, raw, classes), timed(taken['loop'], by_loop, pred, raw, classes)
        if not all(same_counts(counts, other) for other in others):
            raise click.ClickException(f'different counts for {path}: {counts} and {others}')
    return {name: statistics.median(times) for name, times in taken.items()}


def same_counts(a: ClassCounts, b: ClassCounts) -> bool:
    return a.total == b.total and np.array_equal(np.stack(a[:4]), np.stack(b[:4]))


def read_pair(task: Task, sample: Sample) -> tuple[Array, Array]:
    """Read the ground truth and the label map, (H, W) each."""
    (truth,) = task.dataset.read(sample)
    return truth, read_label_map(task.preds[sample.name])


def by_scikit_image(pred: Array, truth: Array, classes: int) -> ClassCounts:
    return matched_loop(skimage_table(pred, truth, classes))


def by_loop(pred: Array, truth: Array, classes: int) -> ClassCounts:
    return matched_loop(loop_table(pred, truth, classes))


def matched_loop(table: Array) -> ClassCounts:
    table = widened(table)
    return counts_of(table, match_regions(table))


def skimage_table(pred: Array, truth: Array, classes: int) -> Array:
    """Count the pixels of each class in each region with scikit-image: (classes, regions). truth: classes or IGNORE; pred: from 1."""
    table = contingency_table(truth, pred, ignore_labels=[IGNORE]).toarray().astype(np.int64)
    return np.pad(table, ((0, max(0, classes - len(table))), (0, 0)))[:classes, 1:]


def loop_table(pred: Array, truth: Array, classes: int) -> Array:
    """Count the same pixels in a loop over classes and regions."""
    regions = range(1, int(pred.max()) + 1)
    return np.array([[np.count_nonzero((truth == name) & (pred == region)) for region in regions] for name in range(classes)])


def in_words(measured: dict[str, Any]) -> str:
    """Format the figures, one line each, with ratios."""
    per_second, start, taken = measured['pairs_per_second'], measured['with_start'], measured['milliseconds']
    (few, less), (many, more) = measured['memory_mib'].items()
    ratio = measured['two_workers_to_one']
    size = f'{measured["size"]} x {measured["size"]}'
    rows = [
        ('one worker', per_second[1], f'pairs/s; {start[1]:.1f} with its start'),
        ('two workers', per_second[2], f'pairs/s; {start[2]:.1f} with their start' + (f'; {ratio:.2f} x one worker' if ratio else '')),
        ('decoding', taken['decode'], 'ms per pair'),
        ('values to classes', taken['classes'], 'ms'),
        ('matching and counting', taken['count'], 'ms'),
        ('  with scikit-image', taken['scikit_image'], f'ms; {measured["scikit_image_to_count"]:.1f} x'),
        ('  with a loop', taken['loop'], f'ms; {measured["loop_to_count"]:.1f} x'),
        (f'memory of {few} pairs', less, 'MiB'),
        (f'memory of {many} pairs', more, f'MiB; {measured["memory_many_to_few"]:.3f} x'),
    ]
    head = f'pairs of {size}, {measured["classes"]} classes; {measured_on(measured)}'
    return '\n'.join([head, *(f'{name:22} {"too short" if value is None else f"{value:9.2f}"} {unit}' for name, value, unit in rows)])
