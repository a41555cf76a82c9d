"""Drawings, files that go after an hour, and who may be served. No Gradio is needed."""

from __future__ import annotations

import base64
import importlib.util
import os
import tempfile
import time
import zlib

import numpy as np
import pytest

from padseg.commands import main
from padseg.demo.downloads import LOCK, OURS, PREFIX, sweep, temporary_folder
from padseg.demo.drawing import DIMMED, GAP, SIDE, TOP, grid_of_maps, legend, numbers_for_page, preview, preview_size
from padseg.demo.models import offer, offers
from padseg.demo.regions import region_at
from padseg.demo.settings import Settings, is_local, warnings_for
from padseg.errors import UsageError
from padseg.exports.colours import voc_colours
from padseg.types import LabelMap


def test_preview():
    image = np.full((30, 60, 3), 100, np.uint8)
    labels = np.repeat([[1] * 30 + [2] * 30], 30, 0)
    labels[:, 50:] = 0
    drawn = preview(image, labels, 0.25)
    assert drawn.shape == image.shape
    np.testing.assert_array_equal(drawn[5, 5], np.round(75 + voc_colours()[1] * 0.25))
    assert (drawn[5, 55] == 100).all() and (drawn[5, 29] == 255).all()
    lit = preview(image, labels, 0.25, lit=2)
    assert (lit[5, 40] == 100).all() and (lit[5, 5] < 100 * DIMMED + 20).all()
    assert preview(np.zeros((10, 3000, 3), np.uint8), np.ones((10, 3000), int)).shape == (3, SIDE, 3)


@pytest.mark.parametrize('shape', [(7, 5), (1, 1), (1500, 401)])
def test_numbers_for_the_page_are_those_of_a_click(shape):
    labels = np.random.default_rng(0).integers(0, 70_000, shape)
    width, height, data = numbers_for_page(labels).split()
    size = int(height), int(width)
    assert size == preview_size(shape)
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(data)), '<u4').reshape(size)
    assert all(numbers[y, x] == region_at(labels, (x, y), size) for y in range(0, size[0], 3) for x in range(0, size[1], 3))


def test_grid_of_maps():
    maps = np.zeros((77, 2, 3), np.float32)
    maps[:, 0, 0] = 1
    drawn = grid_of_maps(maps)
    assert drawn.shape[1] <= SIDE and grid_of_maps(np.zeros((101, 2, 2))) is None
    high, low = drawn[GAP + TOP + 5, GAP + 5], drawn[GAP + TOP + 5, GAP + 80]
    assert high.tolist() == [253, 231, 37] and low.tolist() == [68, 1, 84]  # the ends of Viridis


def test_legend_escapes_names():
    text = legend(LabelMap(np.ones((1, 1), int), (), ('<script>x</script>', 'b\n')), {2: 0.25, 1: 0.75})
    assert '<script>' not in text and '&lt;script&gt;' in text and text.index('75.0%') < text.index('25.0%')
    assert f'#{bytes(voc_colours()[2].tolist()).hex()}' in text


def test_folder_of_a_killed_demo_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    left = tmp_path / f'{PREFIX}left'
    left.mkdir()
    (left / LOCK).touch()
    with temporary_folder() as running:
        assert not left.exists()
        with temporary_folder() as other:
            assert running.exists() and other != running
        assert not other.exists()
        old, new = running / OURS / 'old', running / OURS / 'new'
        for path in (old, new):
            path.mkdir()
        os.utime(old, (time.time() - 3600,) * 2)
        sweep(running / OURS, 3000)
        assert not old.exists() and new.exists()
    assert not running.exists()


def test_hosts():
    assert [is_local(host) for host in ('localhost', '127.0.0.1', '127.1.2.3', '::1')] == [True] * 4
    assert [is_local(host) for host in ('0.0.0.0', '::', '192.168.1.2', 'localhost.example.org')] == [False] * 4
    assert warnings_for(Settings()) == []
    with pytest.raises(UsageError, match='--auth'):
        warnings_for(Settings(host='0.0.0.0'))
    assert 'anybody' in warnings_for(Settings(host='0.0.0.0', public=True))[0]
    assert 'unencrypted' in warnings_for(Settings(host='0.0.0.0', auth=('a', 'b')))[0]


def test_command_refuses_an_open_door(capsys):
    assert main(['demo', '--host', '0.0.0.0']) == 2
    assert '--public' in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec('gradio') is not None, reason='Gradio is installed')
def test_command_says_what_to_install(capsys):
    assert main(['demo', '--model', 'tiny']) == 2
    assert "pip install 'padseg[demo]'" in capsys.readouterr().err


def test_offers_are_what_the_doctor_says(tmp_path):
    ready, gone = offers(['tiny', str(tmp_path)])
    assert ready.label == 'tiny – ready' and 'without a network' in ready.message
    assert gone.state != 'ready' and str(tmp_path) in offer(str(tmp_path)).message
