"""`padseg models`: list the named models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from padseg.backbones.spec import BACKBONES
from padseg.methods import seg4diff
from padseg.system.disk import human

HEADS = ('name', 'here?', 'size', 'licence', 'gated', 'repo')


@click.command('models')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object')
@click.option('-v', '--verbose', is_flag=True, help='also print the settings of each model')
def command(as_json: bool, verbose: bool) -> int:
    """List the named models.

    Shows whether each is on this machine, its size on disk, and its licence. Downloads nothing.
    """
    from padseg.backbones.named import model_row

    rows = {name: model_row(name, seg4diff.settings_of) for name in BACKBONES}
    if as_json:
        print(json.dumps(rows))
        return 0
    cells = {name: cells_of(name, row) for name, row in rows.items()}
    widths = [max(map(len, column)) for column in zip(HEADS, *cells.values(), strict=True)]
    print(aligned(HEADS, widths))
    for name, row in rows.items():
        print(aligned(cells[name], widths))
        if verbose:
            print(f'{"":{widths[0]}}  {", ".join(f"{key} {value}" for key, value in row["settings"].items())}')
    return 0


def cells_of(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a row, in the order of HEADS."""
    size = '' if row['bytes'] is None else human(row['bytes'])
    return name, row['state'], size, row['licence'], 'yes' if row['gated'] else 'no', row['repo']


def aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    return '  '.join(f'{cell:{width}}' for cell, width in zip(cells, widths, strict=True)).rstrip()
