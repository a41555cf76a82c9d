"""Installed versions, read without importing the packages."""

from __future__ import annotations

import importlib.metadata
import platform

LIBRARIES = ('torch', 'diffusers', 'transformers', 'numpy', 'scipy', 'scikit-image', 'opencv-python', 'opencv-python-headless', 'pillow')


def versions() -> dict[str, str]:
    """Versions of Python and of each installed library that can affect results."""
    installed = {name: version(name) for name in LIBRARIES}
    return {'python': platform.python_version(), **{name: number for name, number in installed.items() if number}}


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
