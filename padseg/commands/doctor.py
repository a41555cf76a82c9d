"""`padseg doctor`: whether a run would find all it needs, and the remedy if not."""

from __future__ import annotations

import json
from pathlib import Path

import click

from padseg.errors import ModelUnavailable


@click.command('doctor')
@click.option('--model', default='tiny', show_default=True, help='a model of `padseg models`, a hub id, or a folder')
@click.option('--revision', help='branch, tag or commit on the hub')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best there is)')
@click.option('--dtype', help="float32, bfloat16 or float16 (default: the device's own)")
@click.option('--out', type=click.Path(path_type=Path), default='.', show_default=True, help='where results would be written')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object')
def command(model: str, revision: str | None, device: str | None, dtype: str | None, out: Path, as_json: bool) -> int:
    """Look at versions, processors, disk and memory, and whether a model can be loaded. Downloads nothing.

    Exit code 0: a run can load the model, from here or from the hub. 4: it cannot, and the last lines say what to do.
    """
    from padseg.commands.doctor_report import as_lines, as_object, examine

    report = examine(model, revision, device, dtype, out)
    print(json.dumps(as_object(report)) if as_json else '\n'.join(as_lines(report)))
    return 0 if report.state.usable else ModelUnavailable.exit_code
