"""`padseg merge`: merge saved token maps again with other settings, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from padseg.commands.flags import option_flags
from padseg.commands.run import report
from padseg.methods.seg4diff import LATER, Options


class LaterCommand(click.Command):
    """A command with the options of the stages after the token maps."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help_flag = super().get_params(ctx)
        return [*own, *option_flags(Options, LATER), help_flag]


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

    Settings not given are those of that run. Only the maps and the pictures are loaded.
    """
    options = Options(**{name: settings.pop(name) for name in LATER})

    from padseg.errors import NoImages, UsageError
    from padseg.run.engine import run
    from padseg.run.job import Job, settings_from
    from padseg.run.records import read_run
    from padseg.system.progress import shown

    earlier = read_run(made / 'run.json')
    if earlier is None:
        raise NoImages(f'there are no results of `padseg run` in {made}')
    if settings['out'].resolve() == made.resolve():
        raise UsageError(f'--out must be a folder other than {made}')
    reading = settings_from(earlier.settings).reading
    job = Job(
        source or Path(earlier.source),
        options=options,
        maps=made,
        model=earlier.model.model if earlier.model else 'tiny',
        reading=reading,
        **settings,
    )
    counts = run(job, shown(quiet))
    return report(counts, job.out, quiet, as_json)
