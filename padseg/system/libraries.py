"""How commands deal with other libraries."""

from __future__ import annotations

import os


def quiet() -> None:
    """Hide developer advice from transformers and diffusers, unless the user has chosen a log level.

    Call this before importing them. Child processes are quiet too.
    """
    for library in ('TRANSFORMERS', 'DIFFUSERS'):
        os.environ.setdefault(f'{library}_VERBOSITY', 'error')
