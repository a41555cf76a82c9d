"""Write an analysis: a table, a figure and a record; and print rows as a text table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from padseg.backbones import Backbone
from padseg.system.files import BEGINS_ANEW, atomic, full_disk
from padseg.system.text import csv_cell
from padseg.version import __version__

DOTS = 110  # per inch
Rows = Sequence[Mapping[str, Any]]


def write(out: Path, name: str, rows: Rows, figure: Any, record: Mapping[str, Any]) -> None:
    """Write OUT/name.csv, OUT/name.png and OUT/name.json. figure: of matplotlib, or a picture (H, W, 3) uint8 BGR.

    Raises ResourceExhausted, and OutputConflict if something came in the way since `check_output`.
    """
    with full_disk(out, BEGINS_ANEW):
        with atomic(out / f'{name}.csv') as temporary:
            temporary.write_text(as_csv(rows), encoding='utf-8')
        with atomic(out / f'{name}.png') as temporary:
            if isinstance(figure, np.ndarray):
                temporary.write_bytes(cv2.imencode('.png', figure)[1].tobytes())
            else:
                figure.savefig(temporary, format='png', dpi=DOTS)
        with atomic(out / f'{name}.json') as temporary:
            temporary.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')


def write_json(out: Path, name: str, values: Mapping[str, Any]) -> None:
    """Write OUT/name. Raises as `write`."""
    with full_disk(out, BEGINS_ANEW), atomic(out / name) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')


def files_of(name: str) -> tuple[str, ...]:
    """What `write` writes."""
    return f'{name}.csv', f'{name}.png', f'{name}.json'


def as_csv(rows: Rows) -> str:
    """Rows with the same keys as CSV with a heading; None is an empty cell."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
    table.writeheader()
    for row in rows:
        table.writerow({key: csv_cell(value) if isinstance(value, str) else value for key, value in row.items()})
    return text.getvalue()


def record_of(backbone: Backbone, settings: Mapping[str, Any], rows: Rows, **more: Any) -> dict[str, Any]:
    """The contents of OUT/name.json: the model, the settings, what else is given, and the rows of the table as `results`."""
    identity = backbone.identity
    lora = {'lora': identity.lora, 'lora_scale': identity.lora_scale} if identity.lora else {}
    model = {'padseg': __version__, 'model': identity.model, 'weights': identity.weights, **lora}
    return {**model, 'settings': dict(settings), **more, 'results': [dict(row) for row in rows]}


def aligned(rows: Rows) -> Iterator[str]:
    """Yield rows with the same keys as lines of a table: a heading, then four decimals for numbers that are not whole."""
    cells = [[*rows[0]], *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield '  '.join(f'{cell:>{width}}' for cell, width in zip(line, widths, strict=True)).rstrip()


def shown(value: Any) -> str:
    if value is None:
        return '-'
    return f'{value:.4f}' if isinstance(value, float) else str(value)
