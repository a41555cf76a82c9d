"""A comparison for people to read: one table for each protocol, as CSV and Markdown, a chart, and the same pictures side by side."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from PIL import ImageDraw, ImageFont

from padseg.datasets import Sample
from padseg.errors import PadsegError
from padseg.evaluation.comparison_rows import PUBLISHED, Row, measures, tables
from padseg.evaluation.contenders import evenly
from padseg.evaluation.evaluate import Task
from padseg.evaluation.job import Ground
from padseg.evaluation.protocols import WORDS
from padseg.evaluation.reports import DOTS, NAME_LENGTH, save_figure
from padseg.evaluation.scores import PictureScores
from padseg.evaluation.sheet import (
    GAP,
    LETTERS,
    SheetRow,
    blank,
    first_cells,
    prediction_cell,
    rating,
    save_sheet,
    seen_picture,
    sheet,
    shortened,
)
from padseg.evaluation.words import MEASURES, NONE, cell_text, four_decimals, listing
from padseg.system.files import atomic, inside
from padseg.system.ledger import read_lines
from padseg.system.text import csv_cell, printable

FILES = ('compare.csv', 'compare.md', 'compare.png', 'sheet.jpg')
COUNTED = ('pictures', 'ignored', 'failed', 'missing')
PICTURES = 6  # on the sheet
MIB = 2**20
MOST_BARS = 400
COLOURS = {'model': '#4477aa', 'classical': '#88ccee', 'published': '#bbbbbb'}
MEANING = (
    'Seconds a picture: the median, from the decoded picture to the label map, without reading and scoring; beside it, seconds of all '
    'processors. MiB: the most that the process of the method had in RAM while it worked on a picture, libraries and model included.'
)


def write_comparison(out: Path, rows: Sequence[Row], grounds: Sequence[Ground], chosen: str) -> None:
    """Write FILES. grounds: one for each protocol; chosen: how the pictures of the sheet are chosen, 'even' or 'worst'."""
    parts = tables(rows)
    write_csv(parts, out / 'compare.csv')
    with atomic(out / 'compare.md') as temporary:
        temporary.write_text(in_words(parts, grounds), encoding='utf-8', errors='backslashreplace')
    write_chart(parts, out / 'compare.png')
    write_sheets(parts, grounds, chosen, out)


# tables


def label(row: Row) -> str:
    """Method, model and options that were given, in one line."""
    given = ', '.join(f'{name} {value}' for name, value in row.shown.stated.items())
    return ' '.join(filter(None, (row.shown.method, row.shown.model, given)))


def by_names(rows: Sequence[Row]) -> str:
    """The protocol of a table, with the names that methods are given where these are not the usual ones."""
    names = next((row.rules['names'] for row in rows if row.state == 'measured'), None)
    return rows[0].shown.protocol + (' with all names' if names == 'all' else '')


def write_csv(parts: Mapping[str, Sequence[Row]], path: Path) -> None:
    """One line for each row. The columns of scores have the name of their protocol, and lines of others leave them empty."""
    columns = [(protocol, name) for protocol, rows in parts.items() for name in measures(rows)]
    heads = [f'{by_names(parts[protocol])}: {name}' for protocol, name in columns]
    with atomic(path) as temporary, temporary.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        table = csv.writer(file, lineterminator='\n')
        table.writerow(
            ['protocol', 'method', 'model', 'state', 'settings', 'hash', 'device', *COUNTED, *heads]
            + ['seconds', 'processor_seconds', 'memory_mib', 'gpu_memory_mib', 'folder', 'reason', 'source', 'measured_with']
        )
        for row in (row for rows in parts.values() for row in rows):
            shown = row.shown
            scores = [row.scores.get(name) if protocol == shown.protocol else None for protocol, name in columns]
            state = PUBLISHED if row.state == 'published' else row.state
            cells = [shown.protocol, shown.method, shown.model, state, settings_text(row.settings), row.mark, row.device]
            counts = [row.counts.get(name) for name in COUNTED]
            costs = [row.seconds, row.processor, mebibytes(row.memory), mebibytes(row.gpu)]
            texts = [row.folder, row.reason, row.source, row.measured_with]
            table.writerow([*map(csv_cell, cells), *map(number, counts), *map(number, scores), *map(number, costs), *map(csv_cell, texts)])


def number(value: float | None) -> str:
    return '' if value is None or math.isnan(value) else repr(value)


def mebibytes(value: int | None) -> float | None:
    return None if value is None else round(value / MIB, 1)


def settings_text(settings: Mapping[str, Any]) -> str:
    return ', '.join(f'{name} {value}' for name, value in settings.items())


def in_words(parts: Mapping[str, Sequence[Row]], grounds: Sequence[Ground]) -> str:
    """Content of compare.md."""
    dataset = grounds[0].dataset
    texts = [f'# {cell_text(dataset.name)} {cell_text(dataset.split)}: comparison', f'{len(dataset.samples)} pictures. {MEANING}']
    for ground in grounds:
        rows = parts[ground.protocol]
        texts += [f'## {cell_text(by_names(rows))}', rules_text(ground), table_text(rows), *notes(rows, ground)]
    return '\n\n'.join(texts) + '\n'


def rules_text(ground: Ground) -> str:
    rules = ground.rules
    if not ground.dataset.classes:
        return 'Regions without classes: means over annotators, then over pictures; boundary F from counts summed over pictures.'
    return f'Compared: {WORDS["compare"][rules.compare]}. Classes: {WORDS["matching"][rules.matching]}.'


def table_text(rows: Sequence[Row]) -> str:
    names = measures(rows)
    on_gpu = any(row.gpu is not None for row in rows)
    scores = (MEASURES.get(name, name) for name in names)
    heads = ('method', 'model', 'settings', 'hash', 'pictures', *scores, 's a picture', 'of processors', 'MiB')
    lines = []
    sources: list[str] = []
    for row in rows:
        what = ''
        if row.state == 'published':
            source = f'{row.source}. Measured with: {row.measured_with}.'
            sources += [source] if source not in sources else []
            what = f'{PUBLISHED}, note {sources.index(source) + 1}'
        elif row.state != 'measured':
            what = f'{row.state}: {row.reason}'
        costs = (in_seconds(row.seconds), in_seconds(row.processor), in_mib(row.memory), *([in_mib(row.gpu)] if on_gpu else []))
        lines.append(
            (
                row.shown.method,
                row.shown.model or NONE,
                what or settings_text(row.settings) or NONE,
                row.mark or NONE,
                row.counts.get('pictures', NONE),
                *(four_decimals(row.scores.get(name)) for name in names),
                *costs,
            )
        )
    numbered = [f'{place}. {cell_text(source)}' for place, source in enumerate(sources, start=1)]
    return '\n\n'.join([listing((*heads, *(['MiB on the GPU'] if on_gpu else [])), lines), *(['\n'.join(numbered)] if numbered else [])])


def in_seconds(value: float | None) -> str:
    return NONE if value is None else f'{value:.3f}'


def in_mib(value: int | None) -> str:
    return NONE if value is None else f'{value / MIB:.0f}'


def notes(rows: Sequence[Row], ground: Ground) -> list[str]:
    """What has to be said below a table."""
    texts = []
    counts = {(row.counts['pictures'], row.counts['ignored']) for row in rows if row.state == 'measured'}
    if len(counts) > 1:
        texts.append('Not all rows have scores of the same pictures: see the folders of those that have fewer.')
    if ground.dataset.classes and ground.rules.matching == 'none':
        texts.append('Methods that give regions without names, such as the classical ones, cannot be scored by this protocol.')
    return texts


# chart


def main_score(rows: Sequence[Row]) -> str:
    return 'covering' if any('covering' in row.scores for row in rows) else 'miou'


def write_chart(parts: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Bars of the main score of each row, with the seconds a picture; one part of the chart for each protocol."""
    from matplotlib.figure import Figure

    drawn = {name: [row for row in rows if row.scores.get(main_score(rows)) is not None][:MOST_BARS] for name, rows in parts.items()}
    heights = [1.0 + 0.26 * max(1, len(rows)) for rows in drawn.values()]
    figure = Figure((9, sum(heights)), DOTS, layout='constrained')
    several = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, rows in zip(several, drawn.values(), strict=True):
        part = parts[rows[0].shown.protocol] if rows else []
        score = main_score(part)
        values = [row.scores[score] or 0.0 for row in rows]
        colours = [COLOURS['published' if row.state == 'published' else 'classical' if row.shown.classical else 'model'] for row in rows]
        axes.barh(range(len(rows)), values, color=colours, hatch=['//' if row.state == 'published' else '' for row in rows])
        axes.set_yticks(range(len(rows)), [bar_name(row) for row in rows], fontsize=8, parse_math=False)
        for place, (row, value) in enumerate(zip(rows, values, strict=True)):
            seconds = '' if row.seconds is None else f'   {row.seconds:.2f} s'
            axes.text(value + 0.005, place, f'{value:.4f}{seconds}', va='center', fontsize=7)
        axes.set(xlim=(0, 1.15), ylim=(len(rows) - 0.4, -0.6), xlabel=MEASURES.get(score, score))
        axes.set_title(by_names(part) if part else '', fontsize=9, parse_math=False)
    save_figure(figure, path)


def bar_name(row: Row) -> str:
    return shortened(printable(label(row)), NAME_LENGTH) + (' (published)' if row.state == 'published' else '')


# sheet


def write_sheets(parts: Mapping[str, Sequence[Row]], grounds: Sequence[Ground], chosen: str, out: Path) -> None:
    """Write sheet.jpg: for each protocol the same pictures, with their truth and what each method made of them."""
    drawn = []
    for ground in grounds:
        rows = [row for row in parts[ground.protocol] if row.state == 'measured']
        task = Task(ground.dataset, ground.rules)
        samples = worst(rows, ground, out) if chosen == 'worst' else evenly_chosen(ground)
        first = ['picture', 'ground truth'][0 if any(sample.image for sample in samples) else 1 :]
        lines = [side_by_side(task, sample, [out / row.folder for row in rows]) for sample in samples]
        drawn.append((by_names(parts[ground.protocol]), sheet(lines, [*first, *(printable(label(row)) for row in rows)])))
    save_sheet(stacked(drawn), out)


def evenly_chosen(ground: Ground) -> list[Sample]:
    samples = ground.dataset.samples
    return [samples[place] for place in evenly(len(samples), PICTURES)]


def worst(rows: Sequence[Row], ground: Ground, out: Path) -> list[Sample]:
    """The pictures with the lowest mean score over all methods, in the order of their names."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        for picture in read_lines(inside(out, f'{row.folder}/pictures.jsonl'), PictureScores):
            value = rating(picture)
            if value is not None:
                scores.setdefault(picture.name, []).append(value)
    lowest = sorted(scores, key=lambda name: (sum(scores[name]) / len(scores[name]), name))[:PICTURES]
    return [sample for sample in ground.dataset.samples if sample.name in lowest]


def side_by_side(task: Task, sample: Sample, folders: Sequence[Path]) -> SheetRow:
    """A picture, its truth and the predictions in these folders; a grey square for one that cannot be read."""
    title = ascii(sample.name)[1:-1]
    try:
        picture = seen_picture(task, sample)
        cells = first_cells(task, sample, picture)
    except (PadsegError, OSError) as error:
        return SheetRow(f'{title}: {ascii(str(error))[1:-1]}', [])
    for folder in folders:
        try:
            cells.append(prediction_cell(task, sample, picture, folder))
        except (PadsegError, OSError):
            cells.append(blank())
    return SheetRow(title, cells)


def stacked(drawn: Sequence[tuple[str, PIL.Image.Image]]) -> PIL.Image.Image:
    """Sheets below one another, each under its name."""
    line = LETTERS + 2 * GAP
    size = max(image.width for _, image in drawn), sum(line + image.height for _, image in drawn)
    whole = PIL.Image.new('RGB', size, 'white')
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(LETTERS)
    top = 0
    for name, image in drawn:
        pen.text((GAP, top + GAP), ascii(name)[1:-1], 'black', font)
        whole.paste(image, (0, top + line))
        top += line + image.height
    return whole
