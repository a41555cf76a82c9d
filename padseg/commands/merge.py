"""`padseg merge`: merge saved token maps again with other settings, without the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from padseg.commands.config import METHOD
from padseg.commands.flags import option_flags
from padseg.commands.run import report
from padseg.methods import DEFAULTS, METHODS, Kept, kept_method
from padseg.system.files import opened
from padseg.system.ledger import LARGEST

OF_METHODS = {option for name in METHODS for option in getattr(kept_method(name), 'LATER', ())}


class LaterCommand(click.Command):
    """A command with the options of the stages after the maps, of the method that made them; of all methods if there are no maps."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        made = method_made(args)
        ctx.meta[METHOD] = [made] if made else [name for name in METHODS if kept_method(name)]
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help_flag = super().get_params(ctx)
        flags: dict[str, click.Option] = {}
        for name in ctx.meta.get(METHOD, [DEFAULTS['regions']]):
            method = later_method(name)
            flags = {flag.opts[0]: flag for flag in option_flags(method.Options, method.LATER)} | flags
        return [*own, *flags.values(), help_flag]


def later_method(name: str) -> Kept:
    """The method of a run, or the default where its maps cannot be merged again."""
    method = (kept_method(name) if name in METHODS else None) or kept_method(DEFAULTS['regions'])
    assert method
    return method


def method_made(args: Sequence[str]) -> str | None:
    """The method of the first run among the arguments, if there is one; whether its record is sound is seen later."""
    for before, arg in zip(['', *args], args, strict=False):
        if before in ('--out', '--dir'):
            continue
        try:
            with opened(Path(arg) / 'run.json') as file:
                text = file.read(LARGEST)  # of a longer one, the rest is missing, and it is refused later
        except (OSError, ValueError):
            continue
        try:
            return str(json.loads(text)['settings'].get('method', DEFAULTS['regions']))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return DEFAULTS['regions']
    return None


@click.command('merge', cls=LaterCommand)
@click.argument('made', metavar='OUT', type=click.Path(path_type=Path))
@click.option('--out', type=click.Path(path_type=Path), required=True, help='folder for the new results')
@click.option('--dir', 'source', type=click.Path(path_type=Path), help='folder of the pictures (default: where the run found them)')
@click.option('--overlay', is_flag=True, help='also write the picture with its regions in colour')
@click.option('--overwrite', is_flag=True, help='redo everything, even over results made with other settings')
@click.option('--workers', type=click.IntRange(min=1), default=1, show_default=True, help='threads for reading, and as many for writing')
@click.option('--json', 'as_json', is_flag=True, help='print the counts as one JSON object on stdout')
@click.option('-q', '--quiet', is_flag=True, help='only errors on stderr')
def command(made: Path, source: Path | None, as_json: bool, quiet: bool, **settings: Any) -> int:
    """Merge the token maps of `padseg run --save-maps --out OUT` again, into another folder.

    Settings not given are those of that run, of whose method the options are. Only the maps and the pictures are loaded.
    """
    method = later_method(click.get_current_context().meta[METHOD][0])
    given = {name: settings.pop(name) for name in {*method.LATER, *settings} if name in OF_METHODS}
    options = method.Options(**{name: given[name] for name in method.LATER})

    from padseg.errors import NoImages, OutputConflict, UsageError
    from padseg.run.engine import run
    from padseg.run.job import Job, parsed, settings_from
    from padseg.run.records import read_run
    from padseg.system.progress import shown

    earlier = read_run(made / 'run.json')
    if earlier is None:
        raise NoImages(f'there are no results of `padseg run` in {made}')
    if settings['out'].resolve() == made.resolve():
        raise UsageError(f'--out must be a folder other than {made}')
    reading = settings_from(earlier.settings).reading
    if earlier.settings.get('levels') and getattr(options, 'levels', ()) is None:  # they have files of their own
        try:
            levels = parsed(method.Options, 'levels', earlier.settings['levels'])
            dataclasses.replace(method.Options(), levels=levels)  # refuses those that no run has
        except (ValueError, UsageError) as error:
            raise OutputConflict(f'the recorded settings are not those of a run: levels: {error}') from error
        try:
            options = dataclasses.replace(options, levels=levels)
        except UsageError as error:
            raise UsageError(f"{error}; --levels '' leaves out those of {made}") from error
    job = Job(
        source or Path(earlier.source),
        options=options,
        method=next(name for name, known in METHODS.items() if known is method),
        maps=made,
        model=earlier.model.model if earlier.model else 'tiny',
        reading=reading,
        **settings,
    )
    counts = run(job, shown(quiet))
    return report(counts, job.out, quiet, as_json)
