"""The scores of pictures for people and programs: image-scores.json, per_image.csv, and lines for a terminal."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from padseg.evaluation.image_scores import ImageRow, ImageScores, Mean, ScoringJob, inputs, loaded, scored
from padseg.system.files import BEGINS_ANEW, atomic
from padseg.system.ledger import owned, refuse_strange, write_header
from padseg.system.progress import Progress
from padseg.system.text import csv_cell, printable

RECORD, TABLE = 'image-scores.json', 'per_image.csv'
FOREIGN = ('run.json', 'scores.json')  # headers of other commands' results
COLUMNS = ('name', 'prompt', 'seed', 'categories', 'clip', 'against', 'difference', 'clip_i', 'dino', 'reason')
BETWEEN = ';'  # categories of a prompt
NONE = '–'


def run_image_scores(asked: ScoringJob, out: Path, progress: Progress) -> ImageScores:
    """Score pictures and write image-scores.json and per_image.csv to OUT.

    Raises UsageError, NoImages, ModelUnavailable, ResourceExhausted, and OutputConflict before anything is loaded or computed.
    """
    given = inputs(asked)
    with owned(out, *FOREIGN, then=BEGINS_ANEW):
        refuse_strange(out, (RECORD, TABLE))
        models = loaded(asked, given.scores)
        record, rows = scored(asked, given, models, progress)
        with atomic(out / TABLE) as temporary, temporary.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file:
            table = csv.writer(file, lineterminator='\n')
            table.writerow(COLUMNS)
            table.writerows(map(cells, rows))
        write_header(record, out / RECORD)
    return record


def cells(row: ImageRow) -> list[str]:
    """A row of the table: texts of others are made safe for spreadsheets, and what is not known is empty."""
    values = {**row.model_dump(), 'categories': BETWEEN.join(row.categories)}
    return ['' if (value := values[name]) is None else csv_cell(value) if isinstance(value, str) else repr(value) for name in COLUMNS]


def image_lines(record: ImageScores) -> Iterator[str]:
    """Yield the lines of a table of all scores: CLIPScore by category and of all, FID, CLIP-I and DINO."""
    yield ', '.join(f'{name}: {count}' for name, count in record.counts.items())
    if record.clip:
        yield f'CLIPScore is {record.convention}'
    share = f'{record.settings["bootstrap"]["confidence"]:.0%}'
    yield from columns([('', 'pictures', 'here', 'against', 'difference', f'{share} over prompts', f'{share} over seeds'), *table(record)])
    for note in record.notes:
        yield f'note: {printable(note)}'


def table(record: ImageScores) -> Iterator[tuple[str, ...]]:
    for name, category in record.categories.items():
        yield line(f'CLIPScore, {printable(name)}', category.clip, category.against, category.difference)
    if record.clip:
        yield line('CLIPScore', record.clip, record.against, record.difference)
    if record.fid:
        theirs, difference = record.fid_against, record.fid_difference
        yield (
            *('FID', str(record.fid.pictures), number(record.fid.all), number(theirs.all if theirs else None)),
            *('' if difference is None else f'{difference.mean:+.3f}', NONE, interval(difference, 'seeds')),
        )
    for name, mean in (('CLIP-I', record.clip_i), ('DINO', record.dino)):
        if mean:
            yield name, str(mean.pictures), number(mean.mean, 4), '', '', interval(mean, 'prompts', 4), interval(mean, 'seeds', 4)


def line(name: str, ours: Mean, theirs: Mean | None, difference: Mean | None) -> tuple[str, ...]:
    """A row with a comparison: its intervals are those of the difference, if there is one."""
    shown = difference or ours
    return (
        *(name, str(shown.pictures), number(ours.mean), number(theirs.mean if theirs else None)),
        *('' if difference is None else f'{difference.mean:+.3f}', interval(shown, 'prompts'), interval(shown, 'seeds')),
    )


def number(value: float | None, digits: int = 3) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def interval(mean: Mean | None, kind: str, digits: int = 3) -> str:
    if mean is None or kind not in mean.intervals:
        return NONE
    low, high = mean.intervals[kind]
    return f'{low:.{digits}f} … {high:.{digits}f}'


def columns(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield rows as lines, the first column to the left and the others to the right; columns without a value are left out."""
    known = list(rows)
    used = [place for place in range(len(known[0])) if any(row[place].strip(NONE) for row in known[1:])]
    widths = {place: max(len(row[place]) for row in known) for place in used}
    for row in known:
        yield '  '.join(row[place].ljust(widths[place]) if place == 0 else row[place].rjust(widths[place]) for place in used).rstrip()
