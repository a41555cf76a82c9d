"""Other libraries, as commands use them."""

from __future__ import annotations

import os


def quiet() -> None:
    """Hide advice to programmers from transformers and diffusers, unless the user has chosen a level.

    Call this before they are imported; processes that this one starts are quiet too.
    """
    for library in ('TRANSFORMERS', 'DIFFUSERS'):
        os.environ.setdefault(f'{library}_VERBOSITY', 'error')
