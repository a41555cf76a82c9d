"""`padseg score-images`: score generated pictures by CLIPScore, FID, CLIP-I and DINO similarity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from padseg.commands.flags import Several, hide_bars
from padseg.commands.run import SOME_FAILED
from padseg.evaluation.image_scores import RESIZES, SCORES
from padseg.system.progress import shown
from padseg.system.text import say, warn

FOLDER = click.Path(path_type=Path)


@click.command('score-images')
@click.option('--dir', 'folder', type=FOLDER, required=True, help='what `padseg generate` made, or any folder of pictures')
@click.option('--captions', type=FOLDER, help='CSV file with columns file and prompt, perhaps seed, if --dir has no manifest')
@click.option('--against', type=FOLDER, help='a second folder, with the same names: differences, CLIP-I and DINO similarity of the pairs')
@click.option('--reference', type=FOLDER, help='folder of real pictures, for FID')
@click.option('--categories', type=FOLDER, help='prompts with their categories: JSON, CSV, or a folder such as that of T2I-CompBench++')
@click.option('--scores', type=Several(str), default=(), help=f'some of {",".join(SCORES)} (default: all that have their input)')
@click.option('--clip', help="hub id or folder of a CLIP in transformers' layout (default: openai/clip-vit-base-patch32)")
@click.option('--dino', help="hub id or folder of a DINO in transformers' layout (default: facebook/dino-vits16)")
@click.option('--inception', type=FOLDER, help='file with Inception for FID, inception-2015-12-05.pt; it is run, so it must be trusted')
@click.option('--fid-resize', 'resize', type=click.Choice(RESIZES), default='clean', show_default=True, help='how pictures get its size')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best available)')
@click.option('--resamples', type=click.IntRange(100, 1_000_000), default=10_000, show_default=True, help='of the bootstrap')
@click.option('--seed', type=click.IntRange(min=0), default=0, show_default=True, help='of the bootstrap')
@click.option(
    '--confidence', type=click.FloatRange(0.5, 0.9999), default=0.95, show_default=True, help='share of resampled means in an interval'
)
@click.option('--out', type=FOLDER, default='scores', show_default=True, help='folder for image-scores.json and per_image.csv')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object instead of a table')
@click.option('-q', '--quiet', is_flag=True, callback=hide_bars, help='no progress on stderr')
def command(out: Path, as_json: bool, quiet: bool, resamples: int, seed: int, confidence: float, **given: Any) -> int:
    """Score generated pictures: CLIPScore, FID, CLIP-I and DINO similarity.

    \b
    padseg score-images --dir A                                CLIPScore
    padseg score-images --dir A --categories PROMPTS           CLIPScore by category
    padseg score-images --dir A --against B                    differences A - B of pairs, CLIP-I, DINO
    padseg score-images --dir A --reference R --inception F    FID against real pictures

    Intervals are made by bootstrap: prompts, and seeds, are drawn anew.
    """
    strange = [score for score in given['scores'] if score not in SCORES]
    if strange:
        raise click.UsageError(f'--scores takes {", ".join(SCORES)}; got {strange[0]}')
    from padseg.evaluation.bootstrap import Bootstrap
    from padseg.evaluation.image_reports import image_lines, run_image_scores
    from padseg.evaluation.image_scores import ScoringJob

    record = run_image_scores(ScoringJob(**given, how=Bootstrap(resamples, seed, confidence)), out, shown(quiet))
    say(*[json.dumps(record.model_dump())] if as_json else image_lines(record))
    warn(*(f'padseg: {name}: {reason}' for name, reason in record.failed.items()))
    return SOME_FAILED if record.failed else 0
