"""The public names: ten, loaded when they are used, and always the functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import padseg

ROOT = Path(__file__).parent.parent
NAMES = ['LabelOptions', 'Options', 'evaluate', 'export', 'label', 'label_map', 'load', 'merge', 'segment', 'token_maps']


def python(program: str) -> str:
    ran = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_public_names_are_there():
    assert sorted(padseg.__all__) == NAMES
    assert set(NAMES) <= set(dir(padseg))
    for name in NAMES:
        assert callable(getattr(padseg, name))
        assert getattr(padseg, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'padseg' has no attribute 'nothing'"):
        padseg.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    assert python('import sys, padseg; print(sorted({"numpy", "torch", "cv2", "PIL"} & set(sys.modules)))') == '[]\n'


@pytest.mark.parametrize(
    'program',
    [
        'import padseg.segment, padseg.evaluate',
        'from padseg.segment import segment_batch; import padseg; import padseg.evaluate as _',
        'import padseg; padseg.segment; padseg.evaluate; import padseg.segment, padseg.evaluate',
        'import importlib, padseg; importlib.import_module("padseg.segment"); importlib.import_module("padseg.evaluate")',
    ],
)
def test_importing_a_module_of_the_same_name_leaves_the_function(program):
    shown = 'print(type(padseg.segment).__name__, type(padseg.evaluate).__name__)\nfrom padseg import segment; print(segment.__module__)'
    assert python(f'{program}\n{shown}') == 'function function\npadseg.segment\n'
