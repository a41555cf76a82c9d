"""`padseg analyze`: which blocks of a model group pictures, how they share out attention, how long their values are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from padseg.commands.label import names_of
from padseg.methods.seg4diff import Options
from padseg.system.libraries import require
from padseg.system.progress import shown
from padseg.system.text import say

FOLDER = click.Path(path_type=Path)


@click.command('analyze')
@click.option('--dir', 'images', type=FOLDER, required=True, help='folder of pictures')
@click.option('--labels', type=FOLDER, required=True, help='folder of label maps x.png, or x_0.png, … of several annotators')
@click.option('--out', type=FOLDER, default='out', show_default=True, help='folder for the results')
@click.option('--model', default='tiny', show_default=True, help='a model of `padseg models`, a hub id, or a folder')
@click.option('--revision', help='branch, tag or commit on the hub')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best there is)')
@click.option('--dtype', help="float32, bfloat16 or float16 (default: the device's own)")
@click.option('--count', type=click.IntRange(min=1), default=50, show_default=True, help='pictures at most')
@click.option('--normalisation', help="of token maps, as for `padseg run` (default: the model's own)")
@click.option('--classes-file', type=FOLDER, help='names of the labels from 0, one a line: also measures how words find classes')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object in place of tables')
@click.option('-q', '--quiet', is_flag=True, help='no progress on stderr')
def command(
    images: Path,
    labels: Path,
    out: Path,
    model: str,
    revision: str | None,
    device: str | None,
    dtype: str | None,
    count: int,
    normalisation: str | None,
    classes_file: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure what every block of a model does.

    On pictures with labels: how well a block groups them, where its attention goes, how long its values are. Prints tables.
    Results: OUT/analysis.json, the figures OUT/grouping.png and OUT/anatomy.png, and OUT/maps.png, the token maps of the first
    picture.
    """
    require('matplotlib', 'train')
    from padseg.analysis.figures import map_sheet, tables, write_analysis
    from padseg.analysis.measure import analyze, as_object, labelled_pictures
    from padseg.backbones import load

    classes = names_of(None, classes_file) if classes_file else ()
    pairs = labelled_pictures(images, labels, count)
    given: dict[str, Any] = {'normalisation': normalisation}
    backbone, options = load(model, revision=revision, device=device, dtype=dtype, whole=True), Options(**given)
    analysis = analyze(pairs, backbone, options, classes, shown(quiet))
    write_analysis(analysis, map_sheet(pairs[0][0], backbone, options), out)
    say(*[json.dumps(as_object(analysis))] if as_json else '\n'.join(tables(analysis)).split('\n'))
    return 0
