"""Data flows one way: a module imports only from those above it; and the command line starts without torch."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'padseg'

# From first to last. A package stands for its modules, but for those named on their own; modules of one package may import each other.
ORDER = (
    'errors',
    'types',
    'versions',
    'signals',
    'progress',
    'pipeline',
    'backbones.spec',
    'options',
    'pixels',
    'decode',
    'images',
    'selection',
    'attention',
    'backbones',
    'prompts',
    'latents',
    'maps',
    'proposals',
    'refine',
    'join',
    'labels',
    'segment',
    'label',
    'exports',
    'metrics',
    'analysis',
    'boundaries',
    'protocols',
    'datasets',
    'scores',
    'saved_maps',
    'predict',
    'evaluate',
    'textures',
    'shapes',
    'scenes',
    'mask_loss',
    'tiny',
    'training_data',
    'training',
    'train_tiny',
    'records',
    'sharing',
    'job',
    'convert',
    'stages',
    'sheet',
    'reports',
    'benchmark',
    'space',
    'cluster',
    'engine',
    'bench',
    'collect',
    'doctor',
    'commands',
    'cli',
)
EXCEPTED = ('__init__', '__main__')


def modules() -> list[str]:
    """Dotted names below padseg: 'errors', 'backbones.spec', 'backbones.__init__'."""
    return sorted('.'.join(path.relative_to(PACKAGE).with_suffix('').parts) for path in PACKAGE.rglob('*.py'))


def place(module: str) -> int | None:
    """Position in ORDER of the module, or of the nearest package that holds it; None if neither is listed."""
    parts = module.split('.')
    names = ('.'.join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((ORDER.index(name) for name in names if name in ORDER), None)


def is_module(name: str) -> bool:
    return (PACKAGE / Path(*name.split('.'))).with_suffix('.py').exists() or (PACKAGE / Path(*name.split('.'))).is_dir()


def imported(source: str, module: str) -> Iterator[str]:
    """Names below padseg that the source of a module imports at any depth; '__init__' for a public name, nothing for the version."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split('.')[0] == 'padseg':
                    yield alias.name.partition('.')[2] or '__init__'
        elif isinstance(node, ast.ImportFrom):
            package = f'padseg.{module}'.rpartition('.')[0]
            origin = importlib.util.resolve_name('.' * node.level + (node.module or ''), package)
            if origin.split('.')[0] == 'padseg':
                base = origin.partition('.')[2]
                for alias in node.names:
                    if (base, alias.name) == ('', '__version__'):
                        continue
                    name = f'{base}.{alias.name}'.lstrip('.')
                    yield name if is_module(name) else base or '__init__'


def wrong(source: str, module: str) -> list[str]:
    """What a module imports from below it in ORDER."""
    own = place(module)
    assert own is not None
    return [name for name in imported(source, module) if not allowed(module, own, name)]


def allowed(module: str, own: int, name: str) -> bool:
    other = place(name)
    if other is None:
        return False
    return other < own or (other == own and '.' in module)


@pytest.mark.parametrize('module', [module for module in modules() if module.split('.')[-1] not in EXCEPTED])
def test_a_module_imports_only_from_those_above_it(module: str) -> None:
    assert place(module) is not None, f'padseg.{module} has no place in ORDER'
    path = (PACKAGE / Path(*module.split('.'))).with_suffix('.py')
    assert wrong(path.read_text(encoding='utf-8'), module) == []


@pytest.mark.parametrize(
    ('module', 'source', 'expected'),
    [
        ('options', 'from padseg.errors import UsageError', []),
        ('options', 'import numpy', []),
        ('options', 'from padseg.backbones.spec import Spec', []),
        ('options', 'from padseg.backbones import spec', []),
        ('options', 'from padseg.backbones import load', ['backbones']),
        ('options', 'import padseg.cli', ['cli']),
        ('options', 'import padseg', ['__init__']),
        ('options', 'from padseg import load', ['__init__']),
        ('options', 'from padseg import errors', []),
        ('options', 'from padseg import __version__', []),
        ('options', 'from . import cli', ['cli']),
        ('options', 'from .cli import main', ['cli']),
        ('options', 'def run():\n    from padseg.cli import main', ['cli']),
        ('options', 'if TYPE_CHECKING:\n    from padseg.cli import main', ['cli']),
        ('options', 'from padseg.options import Options', ['options']),
        ('exports.png', 'from padseg.exports.files import atomic', []),
        ('exports.png', 'from ..engine import run', ['engine']),
        ('exports.png', 'from .files import atomic', []),
        ('backbones.spec', 'from padseg.backbones.base import Backbone', ['backbones.base']),
    ],
)
def test_the_check_sees_every_form_of_import(module: str, source: str, expected: list[str]) -> None:
    assert wrong(source, module) == expected


def fresh_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, *arguments), cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


def test_the_command_line_is_imported_without_torch() -> None:
    ran = fresh_python('-c', "import sys, padseg, padseg.cli; print('torch' in sys.modules)")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, 'False\n', '')


@pytest.mark.parametrize('command', [(), ('run',), ('label',), ('export',), ('eval',), ('models',), ('doctor',)])
def test_help_answers_where_torch_cannot_be_imported(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / 'torch.py').write_text("raise ImportError('no torch here')\n")
    assert 'no torch here' in fresh_python('-c', 'import torch', PYTHONPATH=str(tmp_path)).stderr
    ran = fresh_python('-m', 'padseg', *command, '--help', PYTHONPATH=str(tmp_path))
    assert (ran.returncode, ran.stderr) == (0, '')
    assert 'Usage' in ran.stdout
