"""How commands deal with other libraries."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from types import ModuleType


def imported(name: str) -> ModuleType:
    """Import a module that brings large libraries, without looking for garbage meanwhile, over and over in all that was imported."""
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.enable()


def quiet() -> None:
    """Hide developer advice from transformers and diffusers, unless the user has chosen a log level.

    Call this before importing them. Child processes are quiet too.
    """
    for library in ('TRANSFORMERS', 'DIFFUSERS'):
        os.environ.setdefault(f'{library}_VERBOSITY', 'error')
    for name in ('torchao', 'torch.utils._pytree'):  # which complain when diffusers imports torchao, if that is installed
        logging.getLogger(name).setLevel(logging.ERROR)
