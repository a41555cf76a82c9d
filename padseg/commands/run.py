"""`padseg run`: turn a folder of pictures into label maps and masks."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from padseg.commands.flags import MethodCommand, job_flags, options_given, reading, reading_flags, refuse_lone_scale
from padseg.errors import PadsegError
from padseg.system.progress import EventHandler, Events, event, shown
from padseg.system.text import say, warn

if TYPE_CHECKING:
    from padseg.run.engine import Counts

SOME_FAILED = 3
SIGNALLED = 128  # plus the signal number, as in shells
log = logging.getLogger(__name__)


class RegionsCommand(MethodCommand):
    task = 'regions'


@click.command('run', cls=RegionsCommand)
@click.argument('folders', nargs=-1, metavar='[PICTURES]', type=click.Path(path_type=Path))
@job_flags
@click.option('--collect', is_flag=True, help='join the results of shards: `padseg run --collect OUT`, or --collect OUT1 OUT2 … --out OUT')
@reading_flags
def command(folders: tuple[Path, ...], collect: bool, log_json: bool, method: str, **settings: Any) -> int:
    """Segment a picture, or every picture of a folder, without labels.

    Running the command again continues: it skips finished pictures and retries failed ones. Results: OUT/labels (one indexed
    PNG per picture), OUT/masks (one PNG per region, and metadata.csv), OUT/manifest.jsonl, OUT/failures.jsonl, OUT/run.json.
    """
    if folders and not collect:
        if len(folders) > 1 or settings['source']:
            raise click.UsageError('name one picture or folder: its files and those of its folders are read')
        settings['source'] = folders[0]
    if not (settings['source'] or collect):
        raise click.UsageError('name a picture, or a folder of pictures')
    with as_events() if log_json else contextlib.nullcontext():
        if collect:
            return join(folders, log_json, **settings)
        return start_run(log_json, method=method, options=options_given(method, settings), **settings)


def start_run(
    log_json: bool, as_json: bool, no_progress: bool, quiet: bool, dry_run: bool, open_first: bool = False, **settings: Any
) -> int:
    """Run the job that the flags describe, or with dry_run only print its pending pictures. Returns the exit code."""
    from padseg.images import MAX_TILED_PIXELS
    from padseg.run.engine import run
    from padseg.run.job import Job
    from padseg.run.plan import choose, plan
    from padseg.run.selection import Selection, parse_shard

    refuse_lone_scale(settings)
    shard = parse_shard(settings.pop('shard'))
    selection = Selection(settings.pop('include'), settings.pop('exclude'), shard, settings.pop('limit'))
    read = reading(settings)
    if getattr(settings['options'], 'tiles', 0) and not given('max_pixels'):
        read = read._replace(max_pixels=MAX_TILED_PIXELS)
    settings['overlay'] |= open_first
    job = Job(selection=selection, reading=read, **settings)
    if dry_run:
        pending = [picture.name for picture in plan(job, *choose(job)).pending]
        say(*[json.dumps({'pending': pending})] if as_json else pending)
        return 0
    counts = run(job, Events() if log_json else shown(quiet or no_progress))
    if open_first and counts.done:
        click.launch(str(min((job.out / 'overlays').rglob('*.jpg'))))
    return report(counts, job.out, quiet, as_json, log_json)


def join(folders: tuple[Path, ...], log_json: bool, out: Path, coco: bool, quiet: bool, as_json: bool, **unused: Any) -> int:
    """Join the results of shards in these folders, or in OUT. Returns the exit code."""
    from padseg.run.collect import collect

    out_given = given('out')
    if len(folders) > 1 and not out_given:
        raise click.UsageError('to join several folders, name the output folder with --out OUT')
    target = out if out_given or not folders else folders[0]
    counts, missing = collect(folders or (out,), target, coco)
    if missing:
        log.warning('no finished run was found for the shards %s', ', '.join(missing))
    return report(counts, target, quiet, as_json, log_json) or (SOME_FAILED if missing else 0)


def given(name: str) -> bool:
    """Whether the user gave a parameter of the present command."""
    return click.get_current_context().get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


@contextlib.contextmanager
def as_events() -> Iterator[None]:
    """Write errors and library log messages to stderr as events."""
    handler = EventHandler()
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    except PadsegError as error:
        event('error', message=str(error), exit_code=error.exit_code)
        raise click.exceptions.Exit(error.exit_code) from error
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)


def report(counts: Counts, out: Path, quiet: bool, as_json: bool, log_json: bool = False) -> int:
    """Print the outcome of a run and return its exit code."""
    if log_json:
        event('end', **counts._asdict(), out=str(out))
    elif not quiet:
        warn(run_summary(counts, out))
    if as_json:
        say(json.dumps({**counts._asdict(), 'out': str(out)}))
    if counts.signal:
        return SIGNALLED + counts.signal
    return SOME_FAILED if counts.failed or counts.unreadable else 0


def run_summary(counts: Counts, out: Path) -> str:
    """Summarise a run in one line."""
    before = f' ({counts.skipped} by an earlier run)' if counts.skipped else ''
    remaining = counts.images - counts.done - counts.failed
    left = f', {remaining} left: the same command continues' if remaining else ''
    failed = f'{counts.failed} failed' + (f' (see {out / "failures.jsonl"})' if counts.failed else '')
    regions = f'{counts.regions:.1f} regions per picture on average'
    return f'{counts.done} done{before}, {failed}{left}, {regions}; label maps in {out / "labels"}'
