"""Scores and data set contents in words: scores.md, and lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from padseg.datasets.check import Check
from padseg.evaluation.evaluate import size_in_words
from padseg.evaluation.scores import ScoresRecord
from padseg.system.ledger import flattened
from padseg.system.text import printable

MEASURES = {
    'accuracy': 'pixel accuracy',
    'mean_accuracy': 'mean accuracy',
    'miou': 'mIoU',
    'miou_order_free': 'mIoU, order-free',
    'acc_by_2_minus_acc': 'accuracy / (2 - accuracy), which the released code calls mIoU',
    'mean_average_precision': 'mean average precision',
    'pri': 'probabilistic Rand index',
    'vi': 'variation of information (bits)',
    'precision': 'boundary precision',
    'recall': 'boundary recall',
    'f': 'boundary F',
    'regions': 'regions a picture',
}
COUNTS = {'pictures': 'scored', 'ignored': 'without a pixel that counts', 'failed': 'failed', 'missing': 'left out'}
OF_PARTITIONS = ('covering', 'pri', 'vi', 'precision', 'recall', 'f')
NONE = '–'
CHOSEN = 'best, chosen on these very pictures'


def score_lines(report: ScoresRecord) -> list[str]:
    """One line per measure, then one line per class or threshold."""
    lines = [f'{"protocol":16} {report.protocol}, compared at {report.settings["compare"]}']
    lines += [f'{name:16} {number}' for name, number in report.counts.items() if number or name == 'pictures']
    lines += [f'{name:16} {four_decimals(score)}' for name, score in report.scores.items()]
    iou = {printable(name): score for name, score in report.iou.items()}
    width = max(map(len, iou), default=0)
    lines += [f'  {name:{width}} {four_decimals(score)}' for name, score in iou.items()]
    if report.sweep:
        lines += [in_a_row(row) for row in report.sweep['rows']]
        lines += [f'{kind.upper():16} {in_a_row(report.sweep[kind])}' for kind in ('ods', 'ois') if kind in report.sweep]
        lines += [f'{CHOSEN}: {in_a_row(best)}' for best in report.sweep.get('best', {}).values()]
    return lines


def in_a_row(values: Mapping[str, Any]) -> str:
    return '  '.join(f'{name} {value if isinstance(value, str) else four_decimals(value)}' for name, value in values.items())


def check_lines(checked: Check) -> list[str]:
    """Describe what the data set holds, one line per fact."""
    published = f' of {checked.published} published' if checked.published else ''
    sizes = [size_in_words(size) for size in (checked.smallest, checked.largest) if size]
    lines = [
        f'data set         {checked.name}, {printable(checked.split)}: {checked.layout} below {printable(str(checked.root))}',
        f'pictures         {checked.pictures}{published}, {checked.labels} label maps',
        f'sizes            {checked.sizes}, from {" to ".join(sizes)}',
        f'classes          {checked.classes}',
    ]
    if checked.classes:
        lines.append(f'{"value":>9} {"pixels":>12} {"files":>7}  becomes')
        lines += [
            f'{value.value:9} {value.pixels:12} {value.files:7}  {printable(value.name)}{number(value.number)}' for value in checked.values
        ]
    lines += [f'nothing to score in {printable(name)}' for name in checked.empty]
    lines += [printable(f'cannot be used: {problem.path}: {problem.reason}') for problem in (*checked.unreadable, *checked.different)]
    return lines


def number(of: int | None) -> str:
    return '' if of is None else f' ({of})'


def scores_in_words(report: ScoresRecord) -> str:
    """Content of scores.md: what was evaluated and how, with all scores as shares with 4 decimals."""
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
        swept = settings['predictions'].get('swept')
        parts += [f'## Sweep over thresholds{f" of --{cell_text(swept)}" if swept else ""}', sweep_table(report.sweep)]
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
    """Scores at each threshold, then at the best threshold for the data set (ODS) and for each picture (OIS)."""
    if 'best' in sweep:
        measures = ('accuracy', 'miou')
        chosen = [(f'{CHOSEN}, at {best["threshold"]}', best) for best in sweep['best'].values()]
        named = [*((row['threshold'], row) for row in sweep['rows']), *chosen]
        lines = ((name, row['void'], *(four_decimals(row[measure]) for measure in measures)) for name, row in named)
        return listing(('threshold', 'void', *measures), lines)
    heads = ('threshold', *OF_PARTITIONS)
    ends = [(f'ODS, F at {sweep["ods"]["threshold"]}', sweep['ods']), ('OIS', sweep['ois'])]
    rows = [*((row['threshold'], row) for row in sweep['rows']), *ends]
    return listing(heads, ((name, *(four_decimals(row.get(measure)) for measure in OF_PARTITIONS)) for name, row in rows))


def listing(heads: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [heads, ('---',) * len(heads), *(tuple(map(cell_text, row)) for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def cell_text(value: object) -> str:
    """Text that stays in its cell and is shown as it is."""
    text = printable(' '.join(str(value).split()))
    return ''.join(f'\\{letter}' if letter in '\\|*_`<[&~' else letter for letter in text)


def four_decimals(value: float | None) -> str:
    return NONE if value is None else f'{value:.4f}'


def setting_rows(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Flatten nested settings to one row each."""
    for name, value in flattened(settings, ' ').items():
        shown = ', '.join(map(str, value)) or None if isinstance(value, list) else value
        yield name, NONE if shown is None else shown
