"""The models that have a name: whether they are here, and on which terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from padseg.backbones.source import locate
from padseg.backbones.spec import BACKBONES, CARDS
from padseg.errors import ModelUnavailable


def model_row(name: str) -> dict[str, Any]:
    """A named model: repo, family, state, local, folder, bytes on disk, licence, gated, settings. Nothing is downloaded."""
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
