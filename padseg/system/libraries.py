"""How commands deal with other libraries."""

from __future__ import annotations

import importlib.util
import os

from padseg.errors import PadsegError


def quiet() -> None:
    """Hide developer advice from transformers and diffusers, unless the user has chosen a log level.

    Call this before importing them. Child processes are quiet too.
    """
    for library in ('TRANSFORMERS', 'DIFFUSERS'):
        os.environ.setdefault(f'{library}_VERBOSITY', 'error')


def require(library: str, extra: str) -> None:
    """Raise PadsegError if a library is missing; the message names the padseg extra that installs it."""
    if importlib.util.find_spec(library) is None:
        raise PadsegError(f"this needs {library}, which is not installed: pip install 'padseg[{extra}]'")
