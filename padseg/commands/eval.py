"""`padseg eval`: score a model or stored label maps against ground truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from padseg.commands.config import METHOD, config_flag
from padseg.commands.flags import (
    MethodCommand,
    compile_flag,
    hide_bars,
    lora_flags,
    named_in,
    option_flags,
    options_given,
    quantize_flag,
    refuse_lone_scale,
)
from padseg.commands.run import SOME_FAILED
from padseg.methods import DEFAULTS, METHODS
from padseg.methods.options import kind_of
from padseg.methods.seg4diff import Options
from padseg.system.progress import shown
from padseg.system.text import say, warn

if TYPE_CHECKING:
    from padseg.evaluation.job import Asked, Contender, Evaluation
    from padseg.system.progress import Progress

FOLDER = click.Path(path_type=Path)
NAMING = 'seg4diff-ovss'  # the protocol in which the model gets class names
NAMES = ('present', 'all')
ONE_OF = {'layer': 'layers', 'step': 'steps'}


class EvalCommand(MethodCommand):
    """A command whose default --method depends on --protocol."""

    def methods(self) -> list[str]:
        return list(METHODS)

    @property
    def shown_default(self) -> str:
        return f'{DEFAULTS["regions"]}; {DEFAULTS["classes"]} with --protocol {NAMING}'

    def default(self, args: Sequence[str]) -> str:
        return DEFAULTS['classes' if named_in(args, '--protocol') == NAMING else 'regions']

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help_flag = super().get_params(ctx)
        fields = METHODS[ctx.meta.get(METHOD, DEFAULTS['regions'])].Options.__dataclass_fields__
        one = [name for name, several in ONE_OF.items() if several in fields]
        return [*own, *option_flags(Options, one), help_flag]


@click.command('eval', cls=EvalCommand)
@click.argument('dataset', required=False)
@click.option('--root', type=FOLDER, help='folder with the data set')
@click.option('--split', help='part of the data set (default: the one usually reported)')
@click.option('--check', is_flag=True, help='only check the data: layout, sizes, labels')
@click.option('--pred', type=FOLDER, help='score these label maps, such as OUT/labels of `padseg run`, instead of running a model')
@click.option('--labels', type=FOLDER, help='without DATASET: folder of ground truth with the same names as --pred')
@click.option('--num-classes', type=click.IntRange(min=1), help='with --labels or folder: classes of the ground truth')
@click.option('--ignore', type=int, default=255, show_default=True, help='with --labels or folder: value of pixels that do not count')
@click.option('--background', type=click.IntRange(min=0), help='with --labels or folder: class that is the background')
@click.option('--regions', is_flag=True, help='with --labels or folder: the ground truth has no classes, compare partitions')
@click.option('--protocol', help='how regions become classes and what is compared, see docs/evaluation.md (default: seg4diff-paper)')
@click.option(
    '--compare',
    help=(
        'pixels that are compared: native, crop, 512, 128, whole-64, whole-224, short-640, short-640-cut '
        "(default: the protocol's; native with --pred)"
    ),
)
@click.option('--raw-ids', is_flag=True, help='match ids of predictions as they are, gaps included, as released code does')
@click.option('--resize', is_flag=True, help="bring predictions of another size to the ground truth's by nearest neighbour")
@click.option('--allow-missing', is_flag=True, help='score the other pictures when some are missing')
@click.option('--sweep', help='partitions: thresholds to try, as 0.01,0.02,0.05; the token maps are kept in OUT/maps')
@click.option('--tau-sweep', is_flag=True, help='GoCA: score thresholds of the background from -0.4 to 0.4, too, as released')
@click.option('--workers', type=click.IntRange(min=1), default=1, show_default=True, help='processes that score stored label maps')
@click.option('--out', type=FOLDER, help='folder for scores.json, tables, charts, and records from which the same command continues')
@click.option('--overwrite', is_flag=True, help='score everything again')
@click.option('--model', default='tiny', show_default=True, help='a model of `padseg models`, a hub id, or a folder')
@click.option('--revision', help='branch, tag or commit on the hub')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best available)')
@click.option('--dtype', help='float32, bfloat16 or float16 (default: depends on the device)')
@click.option('--vae', help="a faster VAE for SD3's latents: tiny (TAESD3), a hub id, or a folder with an AutoencoderTiny")
@compile_flag
@quantize_flag
@lora_flags
@config_flag
@click.option('--names', type=click.Choice(NAMES), help=f'{NAMING}: use the class names present in a picture, or all (default: {NAMES[0]})')
@click.option('--quiet', '-q', is_flag=True, callback=hide_bars, help='no progress on stderr')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object')
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, quiet: bool, check: bool, **given: Any) -> int:
    """Score a model, or stored label maps, against ground truth.

    \b
    padseg eval DATASET --root DIR [--model M]          run the model and score it
    padseg eval DATASET --root DIR --pred LABELS        score stored label maps
    padseg eval --pred LABELS --labels TRUTH --num-classes N
    padseg eval DATASET --root DIR --check              only check the data

    A label map a.jpg.png or a.png belongs to the ground truth a.png; with --regions also to a_0.png, a_1.png, … from several
    annotators, whose scores are averaged. Every value of a prediction is a region, including 0.
    """
    must_fit_together(given, check)
    if check:
        return show_check(given, as_json, shown(quiet))
    from padseg.evaluation.engine import run_evaluation
    from padseg.evaluation.words import score_lines

    report = run_evaluation(job_of(ctx, given), shown(quiet)).report
    say(*[json.dumps(report.model_dump())] if as_json else score_lines(report))
    warn(*(f'padseg: {name}: {reason}' for name, reason in report.failed.items()))
    return SOME_FAILED if report.counts['failed'] else 0


def show_check(given: dict[str, Any], as_json: bool, progress: Progress) -> int:
    """Print the contents of the data set. Returns 3 if files are unusable or values are out of range, else 0."""
    from padseg.evaluation.job import check_of
    from padseg.evaluation.words import check_lines

    checked = check_of(asked_of(given), progress)
    say(*[json.dumps(checked.as_dict())] if as_json else check_lines(checked))
    return 0 if checked.good else SOME_FAILED


def must_fit_together(given: dict[str, Any], check: bool) -> None:
    """Raise click.UsageError for options that contradict each other."""
    refuse_lone_scale(given)
    if given['lora'] is not None and (given['pred'] or check):
        raise click.UsageError('--lora changes a model, and none runs here: leave it out with --pred and --check.')
    if given['quantize'] and (given['pred'] or check):
        raise click.UsageError('--quantize changes a model, and none runs here: leave it out with --pred and --check.')
    if given['dataset']:
        if not given['root']:
            raise click.UsageError('DATASET needs --root, the folder with the data set.')
        if given['labels'] or (given['dataset'] != 'folder' and (given['num_classes'] or given['regions'])):
            raise click.UsageError('--labels, --num-classes and --regions describe your own ground truth: leave them out with DATASET.')
    elif check:
        raise click.UsageError('--check needs DATASET and --root.')
    elif not (given['pred'] and given['labels']):
        raise click.UsageError('Give DATASET and --root, or --pred and --labels.')
    elif given['regions'] == (given['num_classes'] is not None):
        raise click.UsageError('Give either --num-classes or --regions.')


def job_of(ctx: click.Context, given: dict[str, Any]) -> Evaluation:
    """Build the evaluation that the options describe."""
    from padseg.evaluation.job import ground_of, of_method, of_stored, seen_as

    asked = asked_of(given)
    ground = ground_of(asked)
    if ground.warning:
        warn(f'padseg: {ground.protocol}: {ground.warning}')
    if asked.pred:
        return of_stored(asked, ground)
    contender = contender_of(given)
    if ctx.get_parameter_source('geometry') is click.core.ParameterSource.DEFAULT:
        contender = contender._replace(options=seen_as(contender.options, ground.rules))
    return of_method(asked, ground, contender)


def asked_of(given: dict[str, Any]) -> Asked:
    from padseg.evaluation.job import Asked

    return Asked(**{name: given[name] for name in Asked._fields})


def contender_of(given: dict[str, Any]) -> Contender:
    from padseg.evaluation.job import Contender

    for one, several in ONE_OF.items():  # for methods that read several blocks and noise levels
        if several in given and given[one] is not None:
            if given[several] is not None:
                raise click.UsageError(f'Give either --{one} or --{several}.')
            kind, _ = kind_of(METHODS[given['method']].Options, several)
            given[several] = (kind(given[one]),)
    options = options_given(given['method'], given)
    return Contender(options=options, **{name: given[name] for name in Contender._fields if name != 'options'})
