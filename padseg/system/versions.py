"""Which versions are installed, read without importing them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

from padseg.errors import PadsegError

LIBRARIES = ('torch', 'diffusers', 'transformers', 'numpy', 'scipy', 'scikit-image', 'opencv-python', 'opencv-python-headless', 'pillow')


def versions() -> dict[str, str]:
    """Version of Python and of each library that can change a result; one that is missing is left out."""
    installed = {name: version(name) for name in LIBRARIES}
    return {'python': platform.python_version(), **{name: number for name, number in installed.items() if number}}


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def require(library: str, extra: str) -> None:
    """Raises PadsegError where a library is missing; the extra of padseg installs it."""
    if importlib.util.find_spec(library) is None:
        raise PadsegError(f"this needs {library}, which is not installed: pip install 'padseg[{extra}]'")
