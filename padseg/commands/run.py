"""`padseg run`: a folder of pictures to label maps and masks."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Callable
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import click

from padseg.images import MAX_PIXELS
from padseg.options import Options

if TYPE_CHECKING:
    from padseg.engine import Counts

SOME_FAILED = 3
SIGNALLED = 128  # plus the number of the signal, as shells have it


def option_flags(function: Callable[..., Any], only: Collection[str] | None = None) -> Callable[..., Any]:
    """A flag for each field of Options, or for some."""
    types = typing.get_type_hints(Options)
    for field in reversed([field for field in dataclasses.fields(Options) if only is None or field.name in only]):
        kind = next(kind for kind in (bool, int, float, str) if kind in (types[field.name], *typing.get_args(types[field.name])))
        name = field.name.replace('_', '-')
        flag = f'--{name}/--no-{name}' if kind is bool else f'--{name}'
        choices = field.metadata.get('choices')
        shown = "the model's own" if field.default is None else field.default
        text = f'{field.metadata["help"]} (default: {shown})'
        function = click.option(flag, type=click.Choice(choices) if choices else kind, default=field.default, help=text)(function)
    return function


@click.command('run')
@click.option('--dir', 'source', type=click.Path(path_type=Path), required=True, help='folder of pictures, or one picture')
@click.option('--out', type=click.Path(path_type=Path), default='out', show_default=True, help='folder for the results')
@click.option('--model', default='tiny', show_default=True, help='a model of `padseg models`, a hub id, or a folder')
@click.option('--revision', help='branch, tag or commit on the hub')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best there is)')
@click.option('--dtype', help="float32, bfloat16 or float16 (default: the device's own)")
@click.option('--batch', type=click.IntRange(min=1), default=1, show_default=True, help='pictures of a forward pass; results stay the same')
@click.option('--workers', type=click.IntRange(min=1), default=1, show_default=True, help='threads that read, and as many that write')
@click.option('--include', multiple=True, metavar='PATTERN', help='only pictures with such names, as *.jpg or cats/*; may be repeated')
@click.option('--exclude', multiple=True, metavar='PATTERN', help='no pictures with such names; may be repeated')
@click.option('--shard', metavar='I/N', help='only the I-th of N parts, from 1: every picture is in one part')
@click.option('--limit', type=click.IntRange(min=1), help='only the first so many pictures')
@click.option('--max-failures', type=click.IntRange(min=0), help='stop when more pictures than this have failed')
@click.option('--max-pixels', type=click.IntRange(min=1), default=MAX_PIXELS, show_default=True, help='larger pictures fail undecoded')
@click.option('--checksum', is_flag=True, help='tell changed pictures by their content, not by size and time of change')
@click.option('--dry-run', is_flag=True, help='print the pictures that would be worked on, and do nothing')
@click.option('--overlay', is_flag=True, help='also write the picture with its regions in colour')
@click.option('--coco', is_flag=True, help='also write OUT/coco: instances.json, and panoptic.json with its PNGs')
@click.option('--save-maps', is_flag=True, help='also keep the token maps, for `padseg merge`')
@click.option('--overwrite', is_flag=True, help='do everything again, also over results of other settings')
@click.option('--json', 'as_json', is_flag=True, help='print the counts as one JSON object on stdout')
@click.option('--no-progress', is_flag=True, help='no progress on stderr')
@click.option('-q', '--quiet', is_flag=True, help='nothing on stderr but errors')
@option_flags
def command(as_json: bool, no_progress: bool, quiet: bool, dry_run: bool, **settings: Any) -> int:
    """Segment every picture of a folder, without labels.

    Running it again continues: pictures that are done are skipped, failed ones tried again. Results: OUT/labels (one indexed
    PNG a picture), OUT/masks (one PNG a region, metadata.csv), OUT/manifest.jsonl, OUT/failures.jsonl, OUT/run.json.
    """
    options = Options(**{field.name: settings.pop(field.name) for field in dataclasses.fields(Options)})

    from padseg.engine import Job
    from padseg.engine import choose
    from padseg.engine import plan
    from padseg.engine import run
    from padseg.progress import shown
    from padseg.selection import Selection
    from padseg.selection import parse_shard

    shard = parse_shard(settings.pop('shard'))
    selection = Selection(settings.pop('include'), settings.pop('exclude'), shard, settings.pop('limit'))
    job = Job(options=options, selection=selection, **settings)
    if dry_run:
        pending = [picture.name for picture in plan(job, *choose(job)).pending]
        print(json.dumps({'pending': pending}) if as_json else '\n'.join(pending))
        return 0
    counts = run(job, shown(quiet or no_progress))
    return report(counts, job.out, quiet, as_json)


def report(counts: Counts, out: Path, quiet: bool, as_json: bool) -> int:
    """Say how a run went; its exit code."""
    if not quiet:
        print(summary(counts, out), file=sys.stderr)
    if as_json:
        print(json.dumps({**counts._asdict(), 'out': str(out)}))
    if counts.signal:
        return SIGNALLED + counts.signal
    return SOME_FAILED if counts.failed else 0


def summary(counts: Counts, out: Path) -> str:
    """One line for the end of a run."""
    before = f' ({counts.skipped} by an earlier run)' if counts.skipped else ''
    remaining = counts.images - counts.done - counts.failed
    left = f', {remaining} left: the same command continues' if remaining else ''
    failed = f'{counts.failed} failed' + (f' (see {out / "failures.jsonl"})' if counts.failed else '')
    return f'{counts.done} done{before}, {failed}{left}, {counts.regions:.1f} regions a picture on average; label maps in {out / "labels"}'
