"""`padseg compare`: methods and models on one data set, in one table for each protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from padseg.commands.eval import NAMES, NAMING
from padseg.commands.flags import POSITIVE, Several, hide_bars
from padseg.commands.run import SOME_FAILED
from padseg.system.text import say

if TYPE_CHECKING:
    from padseg.evaluation.comparison_rows import Row

FOLDER = click.Path(path_type=Path)


@click.command('compare')
@click.argument('dataset')
@click.option('--root', type=FOLDER, required=True, help='folder with the data set')
@click.option('--out', type=FOLDER, required=True, help='folder for the tables, the chart, the sheet, and a folder for each evaluation')
@click.option('--methods', type=Several(str), default='all', show_default=True, help='methods, perhaps with options: diffcut:tau=0.3')
@click.option('--models', type=Several(str), default='tiny', show_default=True, help='models of `padseg models`, hub ids, or folders')
@click.option('--protocols', type=Several(str), default='', help=f'protocols of `padseg eval` (default: seg4diff-paper, {NAMING})')
@click.option('--classical/--no-classical', default=True, show_default=True, help='also the methods without a model')
@click.option('--papers', is_flag=True, help='also published figures for this data set and protocol, marked as such')
@click.option('--split', help='part of the data set (default: the one usually reported)')
@click.option('--sample', type=POSITIVE, metavar='N', help='only N pictures, spread evenly over the split')
@click.option(
    '--names', type=click.Choice(NAMES), help=f'class names to give to methods: those present in a picture, or all (default: {NAMES[0]})'
)
@click.option('--sheet', type=click.Choice(('even', 'worst')), default='even', show_default=True, help='pictures to show side by side')
@click.option('--num-classes', type=click.IntRange(min=1), help='with folder: classes of the ground truth')
@click.option('--ignore', type=int, default=255, show_default=True, help='with folder: value of pixels that do not count')
@click.option('--background', type=click.IntRange(min=0), help='with folder: class that is the background')
@click.option('--regions', is_flag=True, help='with folder: the ground truth has no classes, compare partitions')
@click.option('--allow-missing', is_flag=True, help='score the other pictures when some are missing')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best available)')
@click.option('--dtype', help='float32, bfloat16 or float16 (default: depends on the device)')
@click.option('--vae', help="a faster VAE for SD3's latents: tiny (TAESD3), a hub id, or a folder with an AutoencoderTiny")
@click.option('--apart/--no-apart', default=True, show_default=True, help='run every method in a process of its own, to measure its memory')
@click.option('--overwrite', is_flag=True, help='score everything again')
@click.option('--quiet', '-q', is_flag=True, callback=hide_bars, help='no progress on stderr')
@click.option('--json', 'as_json', is_flag=True, help='print the rows as one JSON object')
def command(dataset: str, root: Path, out: Path, as_json: bool, **given: Any) -> int:
    """Compare methods and models on a data set.

    \b
    padseg compare bsds500 --root DIR --out OUT --models tiny
    padseg compare camvid --root DIR --out OUT --methods seg4diff,diffcut,diffcut:tau=0.3 --protocols diffcut,seg4diff-paper

    Every method with every model is an evaluation as of `padseg eval --out`, in a folder of its own below OUT: the same command continues
    it, and what is done is kept. Results: OUT/compare.csv, OUT/compare.md, OUT/compare.png, OUT/sheet.jpg. Figures of two protocols never
    stand in one column.
    """
    if dataset != 'folder' and (given['num_classes'] or given['regions']):
        raise click.UsageError('--num-classes and --regions describe your own ground truth, the data set folder.')
    from padseg.evaluation.comparison import compare

    rows = compare(dataset, root, out, **given)
    say(*[json.dumps({'rows': [as_object(row) for row in rows], 'out': str(out)})] if as_json else lines(rows, out))
    return SOME_FAILED if any(row.state == 'failed' or row.counts.get('failed') for row in rows) else 0


def as_object(row: Row) -> dict[str, Any]:
    """A row as JSON."""
    values = row._asdict()
    del values['rules']
    return {**values.pop('shown')._asdict(), **values}


def lines(rows: list[Row], out: Path) -> list[str]:
    """One line for each row with its main score, and where the table is."""
    from padseg.evaluation.comparison_reports import label, main_score
    from padseg.evaluation.comparison_rows import PUBLISHED, tables

    words = []
    for protocol, part in tables(rows).items():
        score = main_score(part)
        words.append(f'{protocol}: {score}')
        for row in part:
            value = row.scores.get(score)
            end = {'measured': '', 'published': PUBLISHED}.get(row.state, f'{row.state}: {row.reason}')
            words.append(f'  {"–" if value is None else f"{value:.4f}"}  {label(row)}{f"  ({end})" if end else ""}')
    return [*words, f'tables in {out / "compare.md"} and {out / "compare.csv"}, pictures in {out / "sheet.jpg"}']
