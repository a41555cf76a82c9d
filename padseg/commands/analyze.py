"""`padseg analyze`: what the attention of a model does, block by block. One sub-command for each analysis."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from padseg.commands.eval import NAMES
from padseg.commands.flags import Several, hide_bars, lora_flags, refuse_lone_scale
from padseg.commands.label import names_of
from padseg.commands.run import SIGNALLED
from padseg.generation.settings import PADS
from padseg.methods.open_vocabulary import PROMPTS, SCORES, UNUSED
from padseg.methods.options import TOKENS
from padseg.methods.seg4diff import Options
from padseg.system.ledger import check_output
from padseg.system.progress import shown
from padseg.system.text import say, warn

if TYPE_CHECKING:
    from padseg.analysis.asked import Asked
    from padseg.backbones import Backbone

FOLDER = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)
CONFIG = 'padseg.json'
DEFAULT = 'blocks'  # what the command was before it had sub-commands


class Analyses(click.Group):
    """A group in which options without the name of a sub-command are those of the first one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith('-') and args[0] not in ctx.help_option_names):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def flagged(*flags: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add flags to a command, in this order."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for flag in reversed(flags):
            function = flag(function)
        return function

    return add


def count_flag(default: int) -> Callable[..., Any]:
    return click.option('--count', type=POSITIVE, default=default, show_default=True, help='maximum number of pictures')


def model_flags(out: str = 'out') -> tuple[Callable[..., Any], ...]:
    return (
        click.option('--out', type=FOLDER, default=out, show_default=True, help='folder for the results'),
        click.option('--model', default='tiny', show_default=True, help='a model of `padseg models`, a hub id, or a folder'),
        click.option('--revision', help='branch, tag or commit on the hub'),
        click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best available)'),
        click.option('--dtype', help='float32, bfloat16 or float16 (default: depends on the device)'),
        lora_flags,
    )


PRINTED = (
    click.option('--json', 'as_json', is_flag=True, help='print one JSON object instead of tables'),
    click.option('-q', '--quiet', is_flag=True, callback=hide_bars, help='no progress on stderr'),
)
READ = (
    click.option('--dir', 'images', type=FOLDER, help='folder of pictures; or give --prompts'),
    click.option('--labels', type=FOLDER, help='folder of label maps x.png; only pictures with labels are read'),
    click.option(
        '--classes-file',
        type=FOLDER,
        help='names of the labels from 0, one per line; the text of each picture is then the names of its classes',
    ),
    click.option('--text', help='the same text for all pictures (default: the empty one, or the names of the classes)'),
)
MADE = (
    click.option('--seeds', help='seeds of the pictures to be made, as 0..4 or 0,2 (default: 0)'),
    click.option('--scale', type=float, help="strength of classifier-free guidance (default: the model's own)"),
    click.option('--denoising-steps', type=POSITIVE, help="steps of denoising (default: the model's own)"),
    click.option('--size', type=POSITIVE, help="side of the pictures to be made, in pixels (default: the model's own)"),
)
PROMPTS_FILE = 'texts to make pictures from: one per line in .txt; or .csv, .tsv, .json, .jsonl'
SOURCE = (*READ, click.option('--prompts', type=FOLDER, help=f'{PROMPTS_FILE}; attention is read while they are made'), *MADE)
STEPS = click.option(
    '--steps',
    type=Several(int),
    default=(),
    help="noise levels to read, counted from the end of the schedule, from 1 (default: the model's own and the noisiest)",
)


@click.group('analyze', cls=Analyses)
def command() -> None:
    """Measure what the attention of a model does, block by block.

    Options without a sub-command are those of `blocks`. Every sub-command writes a table (CSV), a figure (PNG) and a record (JSON) to OUT.
    """


@command.command('blocks')
@flagged(
    click.option('--dir', 'images', type=FOLDER, required=True, help='folder of pictures'),
    click.option('--labels', type=FOLDER, required=True, help='folder of label maps x.png, or x_0.png, x_1.png, … from several annotators'),
    *model_flags(),
    count_flag(50),
    click.option('--normalisation', help="of token maps, as for `padseg run` (default: the model's own)"),
    click.option('--classes-file', type=FOLDER, help='names of the labels from 0, one per line; also measures how well words find classes'),
    *PRINTED,
)
def blocks_command(
    images: Path,
    labels: Path,
    out: Path,
    count: int,
    normalisation: str | None,
    classes_file: Path | None,
    as_json: bool,
    quiet: bool,
    **how: Any,
) -> int:
    """Measure every block of a model on labelled pictures.

    Prints tables of how well each block groups the pictures, where its attention goes, and the norms of its values.
    Results: OUT/analysis.json, OUT/analysis.csv, the figures OUT/grouping.png and OUT/anatomy.png, and OUT/maps.png with the token maps of
    the first picture.
    """
    from padseg.analysis.asked import refuse_unsupported
    from padseg.analysis.figures import FILES, map_sheet, tables, write_analysis
    from padseg.analysis.measure import analyze, as_object, labelled_pictures
    from padseg.backbones import load

    refuse_lone_scale(how)
    classes = names_of(None, classes_file) if classes_file else ()
    pairs = labelled_pictures(images, labels, count)
    refuse_unsupported(how)
    check_output(out, FILES)
    given: dict[str, Any] = {'normalisation': normalisation}
    backbone, options = load(whole=True, **how), Options(**given)
    analysis = analyze(pairs, backbone, options, classes, shown(quiet))
    write_analysis(analysis, map_sheet(pairs[0][0], backbone, options), out)
    say(*[json.dumps(as_object(analysis))] if as_json else '\n'.join(tables(analysis)).split('\n'))
    return 0


@command.command('shares')
@flagged(*SOURCE, STEPS, count_flag(50), *model_flags(), *PRINTED)
def shares_command(**given: Any) -> int:
    """Measure where attention goes: from image tokens to text tokens, and back (Seg4Diff, Sec. 3).

    Text tokens are taken all together, and in sets: the slots of CLIP and of T5, slots that no text encoder fills, the tokens of the text
    itself, and the start token. Prints the mean over heads, queries and pictures; OUT/shares.csv has all pairs of sets, with the standard
    deviation over pictures, what attention without preference would give, and the quotient of both.
    """
    from padseg.analysis import charts, shares

    asked = asked_for(given, 'shares')
    found = shares.measure(asked.source)
    return tell(asked.backbone, asked.settings, given, 'shares', shares.rows(found), shares.summary(found), charts.shares_figure(found))


@command.command('norms')
@flagged(*SOURCE, STEPS, count_flag(50), *model_flags(), *PRINTED)
def norms_command(**given: Any) -> int:
    """Measure the norms of values: of the image and of sets of text tokens, for each block and head (Seg4Diff, Fig. 4 and 28).

    Slots that no text encoder fills, such as those of T5 in SD3 without T5, are a set of their own and do not count as text.
    """
    from padseg.analysis import charts, norms

    asked = asked_for(given, 'norms')
    found = norms.measure(asked.source)
    return tell(asked.backbone, asked.settings, given, 'norms', norms.rows(found), norms.summary(found), charts.norms_figure(found))


@command.command('pca')
@flagged(*SOURCE, STEPS, count_flag(50), *model_flags(), *PRINTED)
def pca_command(**given: Any) -> int:
    """Draw queries, keys and values of the image as colours, and measure what explains them.

    The colours are the first three principal components of image tokens, all heads together, of the first picture. R² tells how much of
    them is explained by the place in the picture (sines and cosines), and with labels by the true regions. Signs and colours of components
    are arbitrary: compare shapes.
    """
    from padseg.analysis import charts, pca

    asked = asked_for(given, 'pca')
    found = pca.measure(asked.source)
    return tell(asked.backbone, asked.settings, given, 'pca', pca.rows(found), pca.summary(found), charts.pca_figure(found))


@command.command('perturb')
@flagged(
    click.option('--prompts', type=FOLDER, required=True, help=PROMPTS_FILE),
    *MADE,
    click.option('--layers', type=Several(int), default=(), help='blocks to blur, one at a time, counted from 0 (default: all)'),
    click.option('--blur-size', type=POSITIVE, default=5, show_default=True, help='taps of the blur, an odd number'),
    click.option('--blur-sigma', type=float, default=9.0, show_default=True, help='standard deviation of the blur, in tokens'),
    click.option('--pad', type=click.Choice(PADS), default=PADS[0], show_default=True, help='what is beyond the first and the last token'),
    click.option('--renorm', is_flag=True, help='keep the share of attention that text has, which reflect changes'),
    click.option('--slots', type=POSITIVE, help="text slots that are blurred, from the first (default: SD3: CLIP's; else all)"),
    click.option('--prompt-branch-only', is_flag=True, help='leave the branch of the empty prompt as it is'),
    click.option('--clip', default='openai/clip-vit-base-patch32', show_default=True, help='CLIP to compare with: a hub id or a folder'),
    click.option('--dino', default='facebook/dino-vits16', show_default=True, help='DINO to compare with: a hub id or a folder'),
    click.option('--overwrite', is_flag=True, help='make all pictures again, even over pictures made with other settings'),
    count_flag(50),
    *model_flags(),
    *PRINTED,
)
def perturb_command(**given: Any) -> int:
    """Make pictures with the attention from image to text blurred in one block at a time, and compare them with plain ones.

    Prints CLIP-I and DINO similarity to the plain picture of the same seed, and CLIP-T, the CLIPScore with the prompt. Makes one picture
    more than there are blocks for every prompt and seed, in OUT/pictures; running the command again continues.
    """
    from padseg.analysis import charts, perturb
    from padseg.analysis.asked import blurred_pictures

    refuse_lone_scale(given)
    folder, ready = given['out'] / 'pictures', ready_for(given, 'perturb')
    asked = blurred_pictures(how=how_of(given), out=folder, ready=ready, **but_for(given, *HOW, *TOLD))
    signal = perturb.make(asked.jobs, asked.sampler, shown(given['quiet']))
    if signal:
        warn(f'padseg: stopped; the pictures in {folder} are kept, and the same command continues')
        return SIGNALLED + signal
    found = perturb.measure(asked.items, asked.jobs, asked.clip, asked.dino)
    rows, summary = perturb.rows(found), perturb.summary(found)
    return tell(asked.sampler.backbone, asked.settings, given, 'perturb', rows, summary, charts.perturb_figure(found))


@command.command('grid')
@flagged(
    click.option('--dir', 'images', type=FOLDER, required=True, help='folder of pictures to choose by'),
    click.option('--labels', type=FOLDER, required=True, help='folder of their label maps x.png; values are classes from 0, others void'),
    click.option('--classes-file', type=FOLDER, required=True, help='names of the labels from 0, one per line'),
    click.option('--val-dir', type=FOLDER, help='folder of pictures to report on (default: part of --dir)'),
    click.option('--val-labels', type=FOLDER, help='folder of their label maps'),
    click.option(
        '--train-share',
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        default=0.5,
        show_default=True,
        help='without --val-dir: share of the pictures to choose by',
    ),
    click.option('--encoders', type=Several(str), default=(), help='text encoders to compare (default: l,g,l+g; of Flux t5)'),
    click.option(
        '--steps',
        type=Several(int),
        default=(),
        help='noise levels to compare, counted from the end of the schedule (default: ten of them)',
    ),
    click.option('--names', type=click.Choice(NAMES), default=NAMES[0], show_default=True, help='classes that prompts name'),
    click.option('--prompt', type=click.Choice(PROMPTS), default='joined', show_default=True, help='as for `padseg label`'),
    click.option('--scores', type=click.Choice(SCORES), help='as for `padseg label` (default: raw; minmax with per-class)'),
    click.option('--unused', type=click.Choice(UNUSED), default=UNUSED[0], show_default=True, help='as for `padseg label`'),
    click.option('--count', type=POSITIVE, default=200, show_default=True, help='maximum number of pictures of each folder'),
    *model_flags(),
    *PRINTED,
)
def grid_command(**given: Any) -> int:
    """Find the noise level, block and text encoders that find classes best (Yamaguchi and Yanai).

    Measures the mIoU of every combination on some labelled pictures, chooses the best, and reports it on others, beside the combination
    that `padseg label` uses.
    """
    from padseg.analysis import charts, grid
    from padseg.analysis.asked import best_of_grid

    refuse_lone_scale(given)
    given['classes'] = names_of(None, given.pop('classes_file'))
    backbone, settings, found = best_of_grid(
        how=how_of(given), progress=shown(given['quiet']), ready=ready_for(given, 'grid'), **but_for(given, *HOW, *TOLD)
    )
    return tell(backbone, settings, given, 'grid', grid.rows(found), grid.summary(found), charts.grid_figure(found))


@command.command('expert')
@flagged(
    click.option('--dir', '--data', 'images', type=FOLDER, required=True, help='folder of pictures'),
    click.option('--labels', type=FOLDER, help='folder of label maps x.png of regions or classes; only pictures with labels are read'),
    click.option(
        '--steps',
        type=Several(int),
        default=(),
        help='noise levels to look at, counted from the end of the schedule (default: five of them)',
    ),
    click.option(
        '--normalisations', type=Several(str), default=(), help="of token maps, as for `padseg run`, to compare (default: the model's own)"
    ),
    click.option('--tokens', type=click.Choice(list(TOKENS)), help="which tokens are read, as for `padseg run` (default: the model's own)"),
    count_flag(8),
    *model_flags(),
    *PRINTED,
)
def expert_command(**given: Any) -> int:
    """Find the block, noise level and threshold with which a model groups pictures best, and write them as settings.

    With labels, the score is the covering of their regions. Without, it is how much regions tell of those with another noise, more than of
    those of another picture, in bits, times the square of their coherence. Also writes OUT/padseg.json, which `padseg run --config` reads.
    """
    from padseg.analysis import charts, expert
    from padseg.analysis.asked import found_expert
    from padseg.analysis.report import files_of, write_json

    refuse_lone_scale(given)
    if given['out'].resolve() == Path(given['model']).resolve():
        raise click.UsageError(f'--out is the folder of the model, whose {CONFIG} would be overwritten: name another one')
    ready = partial(check_output, given['out'], (*files_of('expert'), CONFIG))
    backbone, settings, found = found_expert(how=how_of(given), progress=shown(given['quiet']), ready=ready, **but_for(given, *HOW, *TOLD))
    code = tell(backbone, settings, given, 'expert', expert.rows(found), expert.summary(found), charts.expert_figure(found))
    write_json(given['out'], CONFIG, expert.settings(found, **({'tokens': given['tokens']} if given['tokens'] else {})))
    if not given['as_json']:
        say(f'wrote {given["out"] / CONFIG}: padseg run --model {given["model"]} --config {given["out"] / CONFIG} --dir PICTURES')
    return code


@command.command('tokens')
@flagged(
    *SOURCE,
    click.option('--steps', type=Several(int), default=(), help="noise level to read, as above (default: the model's own)"),
    click.option('--layer', type=click.IntRange(min=0), help="block to read, counted from 0 (default: the model's own)"),
    count_flag(1),
    *model_flags(),
    *PRINTED,
)
def tokens_command(layer: int | None, **given: Any) -> int:
    """Draw the maps of all text tokens: of SD3 CLIP's 77 slots.

    The figure shows those of the first picture, each from its minimum to its maximum, with the token's name and its mean share of the
    attention; the table has those of all pictures.
    """
    from padseg.analysis import charts, tokens
    from padseg.analysis.asked import layer_of

    asked = asked_for(given, 'tokens', last_too=False)
    chosen = layer_of(asked.backbone, layer)
    found = tokens.measure(asked.source, chosen)
    rows = tokens.rows(found)
    return tell(asked.backbone, asked.settings | {'layer': chosen}, given, 'tokens', rows, rows, charts.tokens_sheet(found[0]))


HOW = ('model', 'revision', 'device', 'dtype', 'lora', 'lora_scale')
TOLD = ('out', 'as_json', 'quiet')


def how_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `load`."""
    return {name: given[name] for name in HOW}


def but_for(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


def asked_for(given: Mapping[str, Any], name: str, last_too: bool = True) -> Asked:
    """Open what the flags of a source ask for. name: of the analysis."""
    from padseg.analysis.asked import Wanted, opened

    refuse_lone_scale(given)
    classes = names_of(None, given['classes_file']) if given['classes_file'] else ()
    wanted = Wanted(**but_for(given, 'classes_file', *HOW, *TOLD), classes=classes)
    return opened(wanted, how_of(given), shown(given['quiet']), last_too, ready_for(given, name))


def ready_for(given: Mapping[str, Any], name: str) -> Callable[[], None]:
    """What makes sure, before the work, that the results of an analysis can be written."""
    from padseg.analysis.report import files_of

    return partial(check_output, given['out'], files_of(name))


def tell(
    backbone: Backbone,
    settings: Mapping[str, Any],
    given: Mapping[str, Any],
    name: str,
    rows: Sequence[Mapping[str, Any]],
    summary: Sequence[Mapping[str, Any]],
    figure: Any,
) -> int:
    """Write the results of an analysis, and print them."""
    from padseg.analysis.report import aligned, record_of, write

    record = record_of(backbone, settings, rows)
    write(given['out'], name, rows, figure, record)
    say(*[json.dumps(record)] if given['as_json'] else aligned(summary))
    return 0
