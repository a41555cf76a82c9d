"""Recipes of docs/tools.md for libraries that the test environment does not have, run where they are installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import padseg

ROOT = Path(__file__).parents[2]


def test_fiftyone(monkeypatch):
    pytest.importorskip('fiftyone', reason='fiftyone is not installed')
    monkeypatch.chdir(ROOT)
    page = (ROOT / 'docs/tools.md').read_text(encoding='utf-8')
    recipe = re.search(r'## FiftyOne\n\n```text\n(.*?)```', page, re.DOTALL)
    assert recipe
    names: dict = {}
    exec(compile(recipe[1], 'docs/tools.md', 'exec'), names)
    masks = padseg.segment('data/images/chelsea.jpg').masks()
    found = names['sample']['regions'].detections
    assert [detection.mask.sum() for detection in found] == [mask['area'] for mask in masks]
