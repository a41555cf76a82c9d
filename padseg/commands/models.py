"""`padseg models`: the backbones that have a name."""

from __future__ import annotations

import json
from pathlib import Path

import click

from padseg.backbones.spec import BACKBONES

INDEX = 'model_index.json'  # the file that every model in diffusers' layout has


@click.command('models')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object')
def command(as_json: bool) -> int:
    """List the models that have a name, and whether they are here."""
    rows = {name: {'repo': spec.repo, 'family': spec.family, 'local': is_local(spec.repo)} for name, spec in BACKBONES.items()}
    if as_json:
        print(json.dumps(rows))
        return 0
    width = max(map(len, rows))
    for name, row in rows.items():
        print(f'{name:{width}}  {"local" if row["local"] else "not here":8}  {row["repo"]}')
    return 0


def is_local(repo: str) -> bool:
    """Whether a model's folder exists, or the hub's cache on this machine holds it."""
    if Path(repo).is_absolute():
        return Path(repo, INDEX).is_file()

    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, INDEX), str)
