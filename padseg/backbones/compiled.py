"""Transformer blocks compiled by torch, which pays off for many pictures."""

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
    """Have torch compile blocks when they are first used, once for pictures of all shapes. UsageError where it could not."""
    compiler = shlex.split(os.environ.get('CXX') or ('clang++' if sys.platform == 'darwin' else 'g++'))[0]
    if shutil.which(compiler) is None:
        raise UsageError(f'compiling needs a C++ compiler, and there is no {compiler}: install it, or leave --compile out')
    headers = pathlib.Path(sysconfig.get_path('include'))
    if not (headers / 'Python.h').exists():
        raise UsageError(f'compiling needs the headers of Python in {headers}: install them (python3-dev), or leave --compile out')
    for block in blocks:
        block.compile(dynamic=True)  # by shape, results would depend on which pictures came before
