"""Pictures to run on, what is in an output folder, and output folders like those of `padseg run` with handmade label maps."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from padseg.exports import write_label_map
from padseg.run.records import Entry, ModelRecord, Run
from padseg.system.ledger import line, write_header, write_lines
from padseg.types import LabelMap

HAND_MADE = np.array([[0, 1, 1, 2], [3, 1, 2, 2]], np.int32)


MAPS = {
    'a b.png': HAND_MADE,
    'sub/test/é.png': np.array([[1, 1], [0, 0], [2, 1]], np.int32),
    'sub/many.png': np.arange(300, dtype=np.int32).reshape(15, 20) + 1,  # more than 255 regions: 16 bits
    'void.png': np.zeros((2, 3), np.int32),
}


def put_run(folder: Path, maps: dict[str, np.ndarray], source: Path | None = None) -> Path:
    """Imitate `padseg run`: write noise pictures to folder/in, and these label maps and their records to folder/out, which is returned."""
    entries = []
    for seed, (name, labels) in enumerate(maps.items()):
        path = folder / 'in' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 256, (*labels.shape, 3)).astype(np.uint8)
        PIL.Image.fromarray(noise).save(path)
        write_label_map(LabelMap(labels, ()), folder / 'out' / 'labels' / f'{name}.png')
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        where = {'labels': f'labels/{name}.png'}
        entries.append(Entry(input=name, status='done', sha256=digest, size=labels.shape, regions=int(labels.max()), outputs=where))
    entries.append(Entry(input='bad.png', status='failed', error='ImageError', reason='empty file'))
    write_lines(map(line, entries), folder / 'out' / 'manifest.jsonl')
    run = Run(
        padseg='1.2.3',
        source=str(source or folder / 'in'),
        requested={},
        settings={},
        key='',
        model=ModelRecord(model='tiny', folder='', revision='abc', weights='f00'),
        device='cpu',
        dtype='float32',
        threads=1,
        platform='',
        versions={},
        batch=1,
        started='2026-01-01T00:00:00+00:00',
    )
    write_header(run, folder / 'out' / 'run.json')
    return folder / 'out'


def put_picture(path: Path, size: tuple[int, int] = (4, 6), seed: int = 0) -> None:
    """Write a picture of noise, in a format that the name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)).save(path)


def entries(out: Path) -> dict[str, dict[str, Any]]:
    """The records in a manifest, by input."""
    return {entry['input']: entry for entry in map(json.loads, (out / 'manifest.jsonl').read_text().splitlines())}


def files(out: Path) -> dict[str, bytes]:
    """Name and bytes of all that a run wrote but for its records."""
    paths = [path for path in out.rglob('*') if path.is_file() and path.parent != out and 'shards' not in path.parts]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}
