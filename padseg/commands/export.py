"""`padseg export`: the results of a run in the formats of other tools."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from padseg.commands.run import SOME_FAILED
from padseg.exports import CONVERTERS

FOLDER = click.Path(path_type=Path)


@click.command('export')
@click.argument('results', metavar='OUT', type=FOLDER)
@click.option('--format', type=click.Choice(list(CONVERTERS)), required=True, help='output format')
@click.option('--out', type=FOLDER, help='folder to write to (default: a folder in OUT named after the format)')
@click.option('--images', type=FOLDER, help='folder of the pictures (default: where the run found them)')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object on stdout')
@click.option('-q', '--quiet', is_flag=True, help='only errors on stderr')
def command(results: Path, format: str, out: Path | None, images: Path | None, as_json: bool, quiet: bool) -> int:
    """Convert the label maps that `padseg run` wrote to OUT into the format of another tool, without the model.

    If some pictures cannot be converted, they are named, the rest are converted, and the exit code is 3. Repeated exports are identical
    byte for byte.
    """
    from padseg.run.convert import convert

    converted = convert(results, format, out, images)
    for name, reason in converted.failed.items():
        print(f'padseg: {printable(name)}: {printable(reason)}', file=sys.stderr)
    if not quiet:
        print(f'{converted.pictures} pictures in {converted.folder}, {len(converted.failed)} failed', file=sys.stderr)
    if as_json:
        print(json.dumps({**converted._asdict(), 'folder': str(converted.folder)}))
    return SOME_FAILED if converted.failed else 0


def printable(text: str) -> str:
    """Escape the undecodable bytes of a text."""
    return text.encode(errors='backslashreplace').decode()
