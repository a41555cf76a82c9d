"""Other libraries, as commands use them."""

from __future__ import annotations

import importlib.util
import os

from padseg.errors import PadsegError


def quiet() -> None:
    """Hide advice to programmers from transformers and diffusers, unless the user has chosen a level.

    Call this before they are imported; processes that this one starts are quiet too.
    """
    for library in ('TRANSFORMERS', 'DIFFUSERS'):
        os.environ.setdefault(f'{library}_VERBOSITY', 'error')


def require(library: str, extra: str) -> None:
    """Raises PadsegError where a library is missing; the extra of padseg installs it."""
    if importlib.util.find_spec(library) is None:
        raise PadsegError(f"this needs {library}, which is not installed: pip install 'padseg[{extra}]'")
