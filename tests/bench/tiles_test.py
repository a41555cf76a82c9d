"""The benchmark of large pictures: a small run, and the memory of several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from padseg.bench import tiles

HOLD = 'import sys; held = b"x" * (50 << 20); print(flush=True); sys.stdin.read()'
PARENT = f'import subprocess, sys; child = subprocess.Popen([sys.executable, "-c", {HOLD!r}]); child.wait()'
needs_proc = pytest.mark.skipif(
    not Path('/proc/self', tiles.MEMORY).exists(), reason='the system does not say how much memory a process shares with others'
)


@needs_proc
@pytest.mark.slow
def test_a_small_run(bench, tmp_path):
    arguments = ['--width', '700', '--height', '500', '--tiles', '300', '--overlap', '60', '--format', 'tiff', '--folder', str(tmp_path)]
    measured, seconds = bench('tiles', *arguments)
    with PIL.Image.open(tmp_path / '700x500.tiff') as file:
        np.testing.assert_array_equal(np.asarray(file), tiles.mosaic(500, 700))
    with PIL.Image.open(tmp_path / 'out-tiff-300-60/labels/700x500.tiff.png') as file:
        assert np.asarray(file).shape == (500, 700) and np.asarray(file).max() == measured['regions'] > 1
    assert 0 < measured['own'] and measured['seconds'] < seconds
    assert 100 < measured['peak'] < 3000 and measured['looks'] > 3
    assert '--tiles 300 --overlap 60: ' in tiles.in_words(measured)


@needs_proc
def test_memory_of_a_child_counts():
    with subprocess.Popen([sys.executable, '-c', PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b'\n'
        assert len(tiles.with_children(process.pid)) == 2
        assert 50 < tiles.memory_of_all(process.pid) / 2**20 < 120
        process.stdin.close()
    assert tiles.memory_of_all(process.pid) == 0


def test_mosaic_fills_the_picture():
    picture = tiles.mosaic(400, 1500)
    assert picture.shape == (400, 1500, 3) and picture[-1].any() and picture[:, -1].any()
    np.testing.assert_array_equal(picture, tiles.mosaic(400, 1500))
