"""`padseg show`: a page of a run's pictures with their regions."""

from __future__ import annotations

from pathlib import Path

import click

from padseg.system.text import say, warn


@click.command('show')
@click.argument('results', metavar='OUT', type=click.Path(path_type=Path))
@click.option('--to', type=click.Path(path_type=Path), help='file to write (default: show.html in OUT)')
@click.option('--limit', type=click.IntRange(min=1), default=200, show_default=True, help='only the first N pictures')
@click.option('--open', 'open_it', is_flag=True, help='open the page in the browser')
@click.option('-q', '--quiet', is_flag=True, help='print only the path of the page')
def command(results: Path, to: Path | None, limit: int, open_it: bool, quiet: bool) -> int:
    """Write an HTML page of the pictures in OUT, where `padseg run` wrote its results; regions light up under the cursor.

    The page is one file, without scripts, and asks for nothing from elsewhere.
    """
    from padseg.run.page import write_page

    path = to or results / 'show.html'
    shown, done = write_page(results, path, limit)
    if not quiet:
        warn(f'{shown} of {done} pictures')
    say(str(path))
    if open_it:
        click.launch(str(path))
    return 0
