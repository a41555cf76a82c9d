"""What a person reads of an evaluation: a table of pictures, the scores in words, a chart, and a sheet of the best and worst pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from padseg.evaluation.boundaries import BoundaryCounts, precision_recall_f
from padseg.evaluation.evaluate import Task
from padseg.evaluation.scores import PictureScores
from padseg.evaluation.sheet import rating, shortened, write_sheet
from padseg.system.files import atomic

MEASURES = {
    'accuracy': 'pixel accuracy',
    'mean_accuracy': 'mean accuracy',
    'miou': 'mIoU',
    'miou_order_free': 'mIoU, order-free',
    'pri': 'probabilistic Rand index',
    'vi': 'variation of information (bits)',
    'precision': 'boundary precision',
    'recall': 'boundary recall',
    'f': 'boundary F',
    'regions': 'regions a picture',
}
COUNTS = {'pictures': 'scored', 'ignored': 'without a pixel that counts', 'failed': 'failed', 'missing': 'left out'}
COLUMNS = ('name', 'status', 'reason', 'pixels', 'regions')
OF_CLASSES = ('accuracy', 'miou')
OF_PARTITIONS = ('covering', 'pri', 'vi', 'precision', 'recall', 'f')
NONE = '–'

DOTS = 100  # a chart's pixels per inch
NAME_LENGTH = 32  # letters of a class on the chart
BINS = 20


class ReportedScores(Protocol):
    """What scores.json holds."""

    padseg: str
    protocol: str
    settings: dict[str, Any]
    counts: dict[str, int]
    scores: dict[str, float | None]
    iou: dict[str, float | None]
    sweep: dict[str, Any] | None
    failed: dict[str, str]
    versions: dict[str, str]


def write_reports(out: Path, report: ReportedScores, task: Task, pictures: Callable[[], Iterable[PictureScores]]) -> None:
    """Write per_image.csv, scores.md, sheet.jpg and classes.png, or without classes covering.png. pictures: gives the records anew."""
    write_table(pictures(), bool(task.classes.names), out / 'per_image.csv')
    with atomic(out / 'scores.md') as temporary:
        temporary.write_text(scores_in_words(report), encoding='utf-8', errors='backslashreplace')
    if task.classes.names:
        write_class_chart(report.iou, report.scores['miou'], out / 'classes.png')
    else:
        write_covering_chart([value for each in pictures() if (value := rating(each)) is not None], out / 'covering.png')
    write_sheet(task, pictures(), out)


def write_table(pictures: Iterable[PictureScores], with_classes: bool, path: Path) -> None:
    """One line a picture, by name; a score that there is not is left empty."""
    rows = sorted(table_row(each, with_classes) for each in pictures)
    with atomic(path) as temporary, temporary.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        table = csv.writer(file, lineterminator='\n')
        table.writerow(COLUMNS + (OF_CLASSES if with_classes else OF_PARTITIONS))
        table.writerows(rows)


def table_row(picture: PictureScores, with_classes: bool) -> tuple[str, ...]:
    known = (picture.name, picture.status, picture.reason or '', str(picture.pixels), str(picture.found))
    return known + tuple('' if value is None or math.isnan(value) else repr(value) for value in scores_of(picture, with_classes))


def scores_of(picture: PictureScores, with_classes: bool) -> tuple[float | None, ...]:
    """Values of OF_CLASSES or OF_PARTITIONS, the latter for the first threshold."""
    if with_classes:
        return picture.accuracy, picture.miou
    if not picture.regions:
        return (None,) * len(OF_PARTITIONS)
    first = picture.regions[0]
    return (first.covering, first.pri, first.vi, *precision_recall_f(BoundaryCounts(*first.boundary)))


def scores_in_words(report: ReportedScores) -> str:
    """scores.md: what was evaluated and how, with all scores as shares with 4 decimals."""
    settings = dict(report.settings)
    rules = settings.pop('rules')
    counts = {f'pictures {word}': report.counts[name] for name, word in COUNTS.items()}
    parts = [
        f'# {cell_text(settings["dataset"])} {cell_text(settings["split"])}, protocol {cell_text(report.protocol)}',
        listing(('evaluated', ''), [*((name, settings.pop(name)) for name in ('dataset', 'split', 'layout', 'root')), *counts.items()]),
        '## Scores',
        listing(('measure', 'value'), ((MEASURES.get(name, name), four_decimals(value)) for name, value in report.scores.items())),
    ]
    if report.sweep:
        parts += ['## Sweep over thresholds', sweep_table(report.sweep)]
    if report.iou:
        parts += ['## Classes', listing(('class', 'IoU'), ((name, four_decimals(value)) for name, value in report.iou.items()))]
    parts += ['## Rules of the protocol', '\n'.join(f'- **{name}**: {cell_text(text)}' for name, text in rules.items())]
    parts += ['## Settings and versions', listing(('', ''), [*setting_rows(settings), ('padseg', report.padseg), *report.versions.items()])]
    if report.failed:
        more = report.counts['failed'] - len(report.failed)
        parts += ['## Failed pictures', listing(('picture', 'reason'), report.failed.items())]
        parts += [f'And {more} more: per_image.csv lists all.'] if more else []
    return '\n\n'.join(parts) + '\n'


def sweep_table(sweep: Mapping[str, Any]) -> str:
    """Scores at each threshold, then each at its best for the data set (ODS) and for each picture (OIS)."""
    heads = ('threshold', *OF_PARTITIONS)
    ends = [(f'ODS, F at {sweep["ods"]["threshold"]}', sweep['ods']), ('OIS', sweep['ois'])]
    rows = [*((row['threshold'], row) for row in sweep['rows']), *ends]
    return listing(heads, ((name, *(four_decimals(row.get(measure)) for measure in OF_PARTITIONS)) for name, row in rows))


def listing(heads: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """A table in Markdown."""
    lines = [heads, ('---',) * len(heads), *(tuple(map(cell_text, row)) for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def cell_text(value: object) -> str:
    """Text that stays in its cell and is shown as it is."""
    text = ' '.join(str(value).split())
    return ''.join(f'\\{letter}' if letter in '\\|*_`<[' else letter for letter in text)


def four_decimals(value: float | None) -> str:
    return NONE if value is None else f'{value:.4f}'


def setting_rows(settings: Mapping[str, Any], before: str = '') -> Iterator[tuple[str, Any]]:
    """Settings within settings as lines of their own."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from setting_rows(value, f'{before}{name} ')
        elif isinstance(value, list):
            yield f'{before}{name}', ', '.join(map(str, value)) or NONE
        else:
            yield f'{before}{name}', NONE if value is None else value


def write_class_chart(iou: Mapping[str, float | None], mean: float | None, path: Path) -> None:
    """Bars of the classes that count, the best on top, as PNG; 5 classes take an inch."""
    ranked = sorted(((value, name) for name, value in iou.items() if value is not None), reverse=True)

    from matplotlib.figure import Figure

    figure = Figure((8, 1.2 + 0.2 * len(ranked)), DOTS, layout='constrained')
    axes = figure.add_subplot()
    axes.barh(range(len(ranked)), [value for value, _ in ranked], color='#4477aa')
    # class names may hold dollar signs, which are no formulas
    axes.set_yticks(range(len(ranked)), [shortened(name, NAME_LENGTH) for _, name in ranked], fontsize=8, parse_math=False)
    for place, (value, _) in enumerate(ranked):
        axes.text(value + 0.005, place, four_decimals(value), va='center', fontsize=7)
    axes.set(xlim=(0, 1.08), ylim=(len(ranked) - 0.4, -0.6), xlabel='IoU')
    mark_mean(axes, 'mIoU', mean)
    save_figure(figure, path)


def write_covering_chart(covering: list[float], path: Path) -> None:
    """How many pictures have which covering, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure((8, 4), DOTS, layout='constrained')
    axes = figure.add_subplot()
    axes.hist(covering, BINS, range=(0, 1), color='#4477aa')
    axes.set(xlim=(0, 1), xlabel='covering', ylabel='pictures')
    mark_mean(axes, 'mean', float(np.mean(covering)) if covering else None)
    save_figure(figure, path)


def mark_mean(axes: Any, name: str, mean: float | None) -> None:
    if mean is not None:
        axes.axvline(mean, color='#cc3311', label=f'{name} {four_decimals(mean)}')
        axes.legend(fontsize=8)


def save_figure(figure: Any, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format='png')
