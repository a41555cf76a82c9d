"""The maps of all tokens: names, likeness, and the same maps as a run reads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from padseg import Options, token_maps
from padseg.analysis import tokens
from padseg.analysis.charts import CAPTION, COLUMNS, WIDTH, tokens_sheet
from padseg.analysis.recording import Pictures, Subject, Text
from padseg.analysis.tokens import alike, slot_names
from padseg.system.progress import Silent
from padseg.types import Tokens


def test_slots_are_named_by_what_they_stand_for():
    clip = Tokens(0, 6, ((0, 0), (0, 1), (2, 5), (0, 0)), (True, False, False, True))
    t5 = Tokens(6, 4, ((0, 1), (0, 0), (2, 5), (0, 0)), (False, False, False, True), (1,))
    names = slot_names(Text('a cat', None, {'clip': clip, 't5': t5}))
    assert names == {0: '(start)', 1: 'a', 2: 'cat', 3: '(end)', 4: '(pad)', 5: '(pad)', 6: 'a', 7: '(blank)', 8: 'cat', 9: '(end)'}
    assert slot_names(Text('', None, {'t5': Tokens(0, 2, ((0, 0),), (True,))})) == {0: '(end)', 1: '(pad)'}


def test_maps_alike():
    maps = np.array([[[0, 1], [2, 3]], [[0, 2], [4, 6.0]], [[3, 1], [1, 0]], [[1, 1], [1, 1]]])
    assert alike(maps).tolist() == [2, 2, 1, 1]


def test_maps_are_those_that_a_run_reads(backbone, picture):
    options = dataclasses.replace(Options(side=32).resolve(backbone.spec), layer=1)
    (sheet,) = tokens.measure(Pictures([Subject('a.png', picture, '')], backbone, options, (options.step,), Silent()), 1)
    assert sheet.maps == pytest.approx(token_maps(picture, backbone, options).maps.numpy(), abs=1e-7)
    assert sheet.columns == list(range(77)) and sheet.names[:3] == ['(start)', '(end)', '(pad)']
    rows = tokens.rows([sheet])
    assert len(rows) == 77 and rows[3]['mean'] == pytest.approx(sheet.maps[3].mean())
    assert sheet.maps[3][rows[3]['row'], rows[3]['column']] == rows[3]['largest']
    height, width = sheet.maps.shape[1:]
    drawn = tokens_sheet(sheet)
    assert drawn.shape == (8 * (round(WIDTH * height / width) + CAPTION + 2), COLUMNS * (WIDTH + 4), 3) and drawn.dtype == np.uint8
