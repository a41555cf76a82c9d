"""Transformer blocks compiled by torch, which pays off when there are many pictures."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterable

from torch import nn

from padseg.errors import UsageError


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Have torch compile the blocks on first use, once for all picture shapes. Raises UsageError if compiling is impossible here."""
    compiler = shlex.split(os.environ.get('CXX') or ('clang++' if sys.platform == 'darwin' else 'g++'))[0]
    if shutil.which(compiler) is None:
        raise UsageError(f'compiling needs a C++ compiler, and there is no {compiler}: install it, or omit --compile')
    headers = pathlib.Path(sysconfig.get_path('include'))
    if not (headers / 'Python.h').exists():
        raise UsageError(f'compiling needs the Python headers in {headers}: install them (python3-dev), or omit --compile')
    for block in blocks:
        block.compile(dynamic=True)  # compiled per shape, results would depend on the pictures that came before
