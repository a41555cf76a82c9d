"""The public names, loaded when they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import padseg

ROOT = Path(__file__).parent.parent
NAMES = [
    'ConceptOptions',
    'DiffCutOptions',
    'DiffSegNamesOptions',
    'DiffSegOptions',
    'GocaOptions',
    'LabelOptions',
    'Options',
    'compare',
    'evaluate',
    'export',
    'label',
    'label_map',
    'load',
    'merge',
    'pipeline',
    'regions',
    'segment',
    'token_maps',
]


def python(program: str) -> str:
    ran = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_public_names_are_there():
    assert sorted(padseg.__all__) == sorted([*NAMES, '__version__'])
    assert set(NAMES) <= set(dir(padseg))
    for name in NAMES:
        assert callable(getattr(padseg, name))
        assert getattr(padseg, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match='No padseg attribute nothing'):
        padseg.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    assert python('import sys, padseg; print(sorted({"numpy", "torch", "cv2", "PIL"} & set(sys.modules)))') == '[]\n'
