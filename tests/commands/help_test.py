"""The command line starts without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from padseg.commands import COMMANDS

ROOT = Path(__file__).parents[2]


def fresh_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, *arguments), cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


def test_the_command_line_is_imported_without_torch() -> None:
    ran = fresh_python('-c', "import sys, padseg, padseg.commands; print('torch' in sys.modules)")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, 'False\n', '')


@pytest.mark.parametrize('command', [(), *((name,) for name in COMMANDS)])
def test_help_answers_where_torch_cannot_be_imported(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / 'torch.py').write_text("raise ImportError('no torch here')\n")
    assert 'no torch here' in fresh_python('-c', 'import torch', PYTHONPATH=str(tmp_path)).stderr
    ran = fresh_python('-m', 'padseg', *command, '--help', PYTHONPATH=str(tmp_path))
    assert (ran.returncode, ran.stderr) == (0, '')
    assert 'Usage' in ran.stdout
