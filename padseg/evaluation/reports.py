"""Reports of an evaluation for people to read: a table of pictures, the scores in words, a chart, and a contact sheet."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from padseg.evaluation.boundaries import BoundaryCounts, precision_recall_f
from padseg.evaluation.evaluate import Task
from padseg.evaluation.scores import PictureScores, ScoresRecord
from padseg.evaluation.sheet import rating, shortened, write_sheet
from padseg.evaluation.words import OF_PARTITIONS, four_decimals, scores_in_words
from padseg.system.files import atomic
from padseg.system.text import csv_cell, printable

COLUMNS = ('name', 'status', 'reason', 'pixels', 'regions')
OF_CLASSES = ('accuracy', 'miou')

DOTS = 100  # a chart's pixels per inch
NAME_LENGTH = 32  # letters of a class on the chart
MOST_BARS = 1000  # more make a picture that is too tall for Matplotlib
BINS = 20


def write_reports(out: Path, report: ScoresRecord, task: Task, pictures: Callable[[], Iterable[PictureScores]]) -> None:
    """Write per_image.csv, scores.md, sheet.jpg and classes.png, or covering.png without classes. pictures: returns the records anew."""
    write_table(pictures(), bool(task.classes.names), out / 'per_image.csv')
    with atomic(out / 'scores.md') as temporary:
        temporary.write_text(scores_in_words(report), encoding='utf-8', errors='backslashreplace')
    if task.classes.names:
        write_class_chart(report.iou, report.scores['miou'], out / 'classes.png')
    else:
        write_covering_chart([value for picture in pictures() if (value := rating(picture)) is not None], out / 'covering.png')
    write_sheet(task, pictures(), out)


def write_table(pictures: Iterable[PictureScores], with_classes: bool, path: Path) -> None:
    """Write one line per picture, sorted by name, with missing scores left empty."""
    rows = sorted(table_row(picture, with_classes) for picture in pictures)
    with atomic(path) as temporary, temporary.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        table = csv.writer(file, lineterminator='\n')
        table.writerow(COLUMNS + (OF_CLASSES if with_classes else OF_PARTITIONS))
        table.writerows(rows)


def table_row(picture: PictureScores, with_classes: bool) -> tuple[str, ...]:
    name, reason = csv_cell(picture.name), csv_cell(picture.reason or '')
    known = (name, picture.status, reason, str(picture.pixels), str(picture.found))
    return known + tuple('' if value is None or math.isnan(value) else repr(value) for value in scores_of(picture, with_classes))


def scores_of(picture: PictureScores, with_classes: bool) -> tuple[float | None, ...]:
    """Values of OF_CLASSES or OF_PARTITIONS; the latter at the first threshold."""
    if with_classes:
        return picture.accuracy, picture.miou
    if not picture.regions:
        return (None,) * len(OF_PARTITIONS)
    first = picture.regions[0]
    return (first.covering, first.pri, first.vi, *precision_recall_f(BoundaryCounts(*first.boundary)))


def write_class_chart(iou: Mapping[str, float | None], mean: float | None, path: Path) -> None:
    """Bars of the classes that count, the best on top, as PNG; 5 classes take an inch. Of very many only the best and the worst."""
    ranked = sorted(((value, name) for name, value in iou.items() if value is not None), reverse=True)
    if len(ranked) > MOST_BARS:
        ranked = ranked[: MOST_BARS // 2] + ranked[-MOST_BARS // 2 :]

    from matplotlib.figure import Figure

    figure = Figure((8, 1.2 + 0.2 * len(ranked)), DOTS, layout='constrained')
    axes = figure.add_subplot()
    axes.barh(range(len(ranked)), [value for value, _ in ranked], color='#4477aa')
    # class names may hold dollar signs, which are no formulas
    axes.set_yticks(range(len(ranked)), [shortened(printable(name), NAME_LENGTH) for _, name in ranked], fontsize=8, parse_math=False)
    for place, (value, _) in enumerate(ranked):
        axes.text(value + 0.005, place, four_decimals(value), va='center', fontsize=7)
    axes.set(xlim=(0, 1.08), ylim=(len(ranked) - 0.4, -0.6), xlabel='IoU')
    mark_mean(axes, 'mIoU', mean)
    save_figure(figure, path)


def write_covering_chart(covering: list[float], path: Path) -> None:
    """Draw a histogram of the pictures' covering, as PNG."""
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
