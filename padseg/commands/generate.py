"""`padseg generate`: make pictures from texts, with guidance by the model's attention."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from padseg.commands.flags import POSITIVE, hide_bars, lora_flags, option_flags, refuse_lone_scale
from padseg.commands.run import SIGNALLED, SOME_FAILED, as_events
from padseg.generation.prompts import checked, parse_seeds, read_prompts
from padseg.generation.settings import SamplingSettings
from padseg.system.progress import Events, event, shown
from padseg.system.text import say, warn

if TYPE_CHECKING:
    from padseg.generation.pictures import GenerationCounts

FOLDER = click.Path(path_type=Path)


@click.command('generate')
@click.option('--prompt', 'texts', multiple=True, metavar='TEXT', help='what to show; may be repeated')
@click.option('--prompts', 'file', type=FOLDER, help='file of prompts: .txt (one a line), .csv or .tsv, .json, .jsonl')
@click.option('--seeds', default='0', show_default=True, metavar='SEEDS', help='seeds of every prompt: 7, 0..4, or a list such as 0..2,10')
@click.option('--out', type=FOLDER, default='out', show_default=True, help='folder for the results')
@click.option('--model', default='tiny', show_default=True, help='a model of `padseg models`, a hub id, or a folder')
@click.option('--revision', help='branch, tag or commit on the hub')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best available)')
@click.option('--dtype', help='float32, bfloat16 or float16 (default: depends on the device)')
@click.option('--vae', help="a faster VAE: tiny (the one for the model's family), a hub id, or a folder with an AutoencoderTiny")
@lora_flags
@click.option('--batch', type=POSITIVE, default=1, show_default=True, help='pictures per forward pass on a GPU')
@click.option('--keep-texts', is_flag=True, help="keep embeddings of prompts in padseg's cache, 2.5 MB each for SD3")
@click.option(
    '--preview', type=click.IntRange(min=0), default=0, show_default=True, help='also write strips of this many moments on the way'
)
@click.option('--shard', metavar='I/N', help='only the I-th of N parts, from 1; runs of different parts may share OUT')
@click.option('--limit', type=POSITIVE, help='only the first N pictures')
@click.option('--retry-failed/--no-retry-failed', default=True, show_default=True, help='try pictures again that failed before')
@click.option('--max-failures', type=click.IntRange(min=0), help='stop when more pictures than this have failed')
@click.option('--dry-run', is_flag=True, help='only print the names of the pictures that would be made')
@click.option('--overwrite', is_flag=True, help='make everything again, even over pictures made with other settings')
@click.option('--json', 'as_json', is_flag=True, help='print the counts as one JSON object on stdout')
@click.option('--log-json', is_flag=True, callback=hide_bars, help='write JSON to stderr, one line per picture and event')
@click.option('--no-progress', is_flag=True, callback=hide_bars, help='no progress on stderr')
@click.option('-q', '--quiet', is_flag=True, callback=hide_bars, help='only errors on stderr')
def command(log_json: bool, **settings: Any) -> int:
    """Make pictures from texts.

    Running the command again continues: it makes the pictures that are missing. The same prompt and seed start from the same noise with any
    guidance, batch or order. Results: OUT/images (one PNG per prompt and seed), OUT/sheet.png, OUT/manifest.jsonl, OUT/failures.jsonl,
    OUT/run.json.
    """
    with as_events() if log_json else contextlib.nullcontext():
        return start(log_json, **settings)


def start(
    log_json: bool, texts: tuple[str, ...], file: Path | None, as_json: bool, no_progress: bool, quiet: bool, dry_run: bool, **given: Any
) -> int:
    """Run the job that the flags describe, or with dry_run only print its pending pictures. Returns the exit code."""
    refuse_lone_scale(given)
    options = SamplingSettings(**{field.name: given.pop(field.name) for field in dataclasses.fields(SamplingSettings)})
    refuse_unused(options)
    if not texts and file is None:
        raise click.UsageError('say what to show with --prompt TEXT, or name a file with --prompts FILE')
    prompts = (*map(checked, texts), *(read_prompts(file) if file else ()))
    seeds = parse_seeds(given.pop('seeds'))

    from padseg.generation.pictures import GenerationJob, generate, plan
    from padseg.run.selection import Selection, parse_shard

    selection = Selection(shard=parse_shard(given.pop('shard')), limit=given.pop('limit'))
    job = GenerationJob(prompts, seeds, settings=options, selection=selection, **given)
    if dry_run:
        pending = [item.name for item in plan(job).pending]
        say(*[json.dumps({'pending': pending})] if as_json else pending)
        return 0
    counts = generate(job, Events() if log_json else shown(quiet or no_progress))
    return report(counts, job.out, quiet, as_json, log_json)


def refuse_unused(options: SamplingSettings) -> None:
    """Raise click.UsageError for flags that the guidance does not read."""
    source = click.get_current_context().get_parameter_source
    unused = [field.name for field in dataclasses.fields(options) if field.name.startswith('perturb_') and options.guidance != 'perturbed']
    unused += ['scale'] if options.guidance == 'none' else []
    named = [f'--{name.replace("_", "-")}' for name in unused if source(name) not in (None, click.core.ParameterSource.DEFAULT)]
    if named:
        raise click.UsageError(f'{", ".join(named)}: no option of --guidance {options.guidance}.')


def report(counts: GenerationCounts, out: Path, quiet: bool, as_json: bool, log_json: bool) -> int:
    """Print the outcome and return the exit code."""
    if log_json:
        event('end', **counts._asdict(), out=str(out))
    elif not quiet:
        warn(summary(counts, out))
    if as_json:
        say(json.dumps({**counts._asdict(), 'out': str(out)}))
    if counts.signal:
        return SIGNALLED + counts.signal
    return SOME_FAILED if counts.failed else 0


def summary(counts: GenerationCounts, out: Path) -> str:
    """Summarise a run in one line."""
    before = f' ({counts.skipped} by an earlier run)' if counts.skipped else ''
    remaining = counts.images - counts.done - counts.failed
    left = f', {remaining} left: the same command continues' if remaining else ''
    failed = f'{counts.failed} failed' + (f' (see {out / "failures.jsonl"})' if counts.failed else '')
    return f'{counts.done} done{before}, {failed}{left}; pictures in {out / "images"}'


command.params += option_flags(SamplingSettings)
