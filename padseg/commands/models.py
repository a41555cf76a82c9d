"""`padseg models`: the backbones that have a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from padseg.backbones.spec import BACKBONES, CARDS
from padseg.errors import ModelUnavailable

MEGABYTE = 1_000_000


@click.command('models')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object')
def command(as_json: bool) -> int:
    """List the models that have a name: whether they are here, how large, on which terms, and their settings."""
    rows = {name: model_row(name) for name in BACKBONES}
    if as_json:
        print(json.dumps(rows))
        return 0
    width = max(map(len, rows))
    for name, found in rows.items():
        size = '' if found['bytes'] is None else f', {found["bytes"] / MEGABYTE:.1f} MB'
        terms = f'{found["licence"]}{", gated" if found["gated"] else ""}'
        print(f'{name:{width}}  {found["state"]}{size}; {terms}; {found["repo"]}')
        print(f'{"":{width}}  {", ".join(f"{key} {value}" for key, value in found["settings"].items())}')
    return 0


def model_row(name: str) -> dict[str, Any]:
    """A named model: repo, family, state, local, folder, bytes on disk, licence, gated, settings. Nothing is downloaded."""
    from padseg.backbones.source import locate

    spec, folder = BACKBONES[name], None
    try:
        source = locate(name, fetch=False)
        spec, folder, state = source.spec, source.folder, 'here'
    except ModelUnavailable as error:
        state = 'not here' if error.state == 'offline and not cached' else error.state
    settings = spec._asdict()
    return {
        'repo': settings.pop('repo'),
        'family': settings.pop('family'),
        'state': state,
        'local': folder is not None,
        'folder': str(folder) if folder else None,
        'bytes': folder_size(folder) if folder else None,
        **CARDS[name]._asdict(),
        'settings': settings,
    }


def folder_size(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
