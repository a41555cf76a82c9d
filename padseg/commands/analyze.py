"""`padseg analyze`: how well the blocks of a model group pictures, where their attention goes, and the norms of their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from padseg.commands.flags import lora_flags, refuse_lone_scale
from padseg.commands.label import names_of
from padseg.methods.options import require_family
from padseg.methods.seg4diff import FAMILIES, Options
from padseg.system.progress import shown
from padseg.system.text import say

FOLDER = click.Path(path_type=Path)


@click.command('analyze')
@click.option('--dir', 'images', type=FOLDER, required=True, help='folder of pictures')
@click.option('--labels', type=FOLDER, required=True, help='folder of label maps x.png, or x_0.png, x_1.png, … from several annotators')
@click.option('--out', type=FOLDER, default='out', show_default=True, help='folder for the results')
@click.option('--model', default='tiny', show_default=True, help='a model of `padseg models`, a hub id, or a folder')
@click.option('--revision', help='branch, tag or commit on the hub')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best available)')
@click.option('--dtype', help='float32, bfloat16 or float16 (default: depends on the device)')
@lora_flags
@click.option('--count', type=click.IntRange(min=1), default=50, show_default=True, help='maximum number of pictures')
@click.option('--normalisation', help="of token maps, as for `padseg run` (default: the model's own)")
@click.option('--classes-file', type=FOLDER, help='names of the labels from 0, one per line; also measures how well words find classes')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object instead of tables')
@click.option('-q', '--quiet', is_flag=True, help='no progress on stderr')
def command(
    images: Path,
    labels: Path,
    out: Path,
    model: str,
    revision: str | None,
    device: str | None,
    dtype: str | None,
    lora: str | None,
    lora_scale: float,
    count: int,
    normalisation: str | None,
    classes_file: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure every block of a model on labelled pictures.

    Prints tables of how well each block groups the pictures, where its attention goes, and the norms of its values.
    Results: OUT/analysis.json, the figures OUT/grouping.png and OUT/anatomy.png, and OUT/maps.png with the token maps of the first
    picture.
    """
    from padseg.analysis.figures import map_sheet, tables, write_analysis
    from padseg.analysis.measure import analyze, as_object, labelled_pictures
    from padseg.backbones import load

    how: dict[str, Any] = {'revision': revision, 'device': device, 'dtype': dtype, 'lora': lora, 'lora_scale': lora_scale}
    refuse_lone_scale(how)
    classes = names_of(None, classes_file) if classes_file else ()
    pairs = labelled_pictures(images, labels, count)
    given: dict[str, Any] = {'normalisation': normalisation}
    backbone, options = load(model, whole=True, **how), Options(**given)
    require_family('analyze', FAMILIES, backbone)
    analysis = analyze(pairs, backbone, options, classes, shown(quiet))
    write_analysis(analysis, map_sheet(pairs[0][0], backbone, options), out)
    say(*[json.dumps(as_object(analysis))] if as_json else '\n'.join(tables(analysis)).split('\n'))
    return 0
