"""Which versions are installed, read without importing them."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import cache

LIBRARIES = ('torch', 'diffusers', 'transformers', 'numpy', 'scipy', 'scikit-image', 'opencv-python', 'opencv-python-headless', 'pillow')


def versions() -> dict[str, str]:
    """Version of Python and of each library that can change a result; one that is missing is left out."""
    installed = {name: version(name) for name in LIBRARIES}
    return {'python': platform.python_version(), **{name: number for name, number in installed.items() if number}}


@cache  # reading what is installed takes a few milliseconds
def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
