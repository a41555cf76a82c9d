"""The named models: whether they are available locally, and their licences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from padseg.backbones.source import locate
from padseg.backbones.spec import BACKBONES, CARDS, Spec
from padseg.errors import ModelUnavailable


def model_row(name: str, settings_of: Callable[[Spec], dict[str, Any]]) -> dict[str, Any]:
    """Describe a named model: repo, family, state, local, folder, bytes on disk, licence, gated, settings. Downloads nothing.

    settings_of: returns a method's settings for the model, which are listed together with the model's own facts.
    """
    spec, folder = BACKBONES[name], None
    try:
        source = locate(name, fetch=False)
        spec, folder, state = source.spec, source.folder, 'here'
    except ModelUnavailable as error:
        state = 'not here' if error.state == 'offline and not cached' else error.state
    facts = spec._asdict() | settings_of(spec)
    return {
        'repo': spec.repo,
        'family': spec.family,
        'state': state,
        'local': folder is not None,
        'folder': str(folder) if folder else None,
        'bytes': folder_size(folder) if folder else None,
        **CARDS[name]._asdict(),
        'settings': {name: value for name, value in facts.items() if name not in ('repo', 'family', 'own')},
    }


def folder_size(folder: Path) -> int:
    """Total size in bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
