"""bin/bench: a small run prints every measure, and its simpler ways to the counts are what they are compared with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from padseg import speed
from padseg import speed_engine
from padseg.exports import read_label_map
from padseg.metrics import hungarian_counts
from padseg.metrics import match
from padseg.metrics import widened

ROOT = Path(__file__).parent.parent


def benched(*arguments):
    """A run in a process of its own, with a folder of its own for temporary files."""
    return subprocess.run(
        [sys.executable, '-m', 'padseg.bench', *arguments],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_small_run(tmp_path, monkeypatch):
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    ran = benched('eval', '--pairs', '6', '--size', '64', '--classes', '5', '--json')
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(ran.stdout)
    assert (measured['pairs'], measured['size'], measured['classes']) == (6, 64, 5)
    assert list(measured['pairs_per_second']) == list(measured['with_start']) == ['1', '2']
    assert 1 < measured['with_start']['2'] < measured['with_start']['1'] < 1e5  # two workers take longer to start than so few pairs
    taken = measured['milliseconds']
    assert list(taken) == ['decode', 'classes', 'count', 'scikit_image', 'loop']
    assert all(0 < value < 1000 for value in taken.values())
    assert measured['loop_to_count'] == taken['loop'] / taken['count']
    assert measured['scikit_image_to_count'] == taken['scikit_image'] / taken['count']
    assert list(measured['memory_mib']) == ['3', '30']
    assert all(20 < value < 2000 for value in measured['memory_mib'].values())
    assert measured['memory_many_to_few'] == pytest.approx(measured['memory_mib']['30'] / measured['memory_mib']['3'])
    assert list(tmp_path.iterdir()) == []


def test_words_for_people():
    measured = {
        'size': 32,
        'classes': 27,
        'processors': 2,
        'load': 0.5,
        'pairs_per_second': {1: 100.0, 2: None},
        'with_start': {1: 90.0, 2: 40.0},
        'two_workers_to_one': None,
        'milliseconds': {'decode': 1.0, 'classes': 0.5, 'count': 2.0, 'scikit_image': 5.0, 'loop': 30.0},
        'scikit_image_to_count': 2.5,
        'loop_to_count': 15.0,
        'memory_mib': {3: 100.0, 30: 101.0},
        'memory_many_to_few': 1.01,
    }
    lines = speed.in_words(measured).splitlines()
    assert lines[0] == 'pairs of 32 x 32, 27 classes; 2 processors, load 0.50'
    assert lines[1].split() == 'one worker 100.00 pairs/s; 90.0 with its start'.split()
    assert lines[2].split() == 'two workers too short pairs/s; 40.0 with their start'.split()
    assert lines[7].split() == 'by a loop 30.00 ms; 15.0 x'.split()
    assert lines[9].split() == 'memory of 30 pairs 101.00 MiB; 1.010 x'.split()
    measured = {**measured, 'pairs_per_second': {1: 100.0, 2: 190.0}, 'two_workers_to_one': 1.9}
    assert speed.in_words(measured).splitlines()[2].split()[-4:] == '1.90 x one worker'.split()


def test_pairs_are_palette_pngs_with_all_that_is_asked_for(tmp_path):
    speed.make_pairs(tmp_path, 3, 64, 27)
    for number in range(3):
        with PIL.Image.open(tmp_path / 'truth' / f'{number}.png') as truth, PIL.Image.open(tmp_path / 'pred' / f'{number}.png') as pred:
            assert truth.mode == pred.mode == 'P' and truth.size == pred.size == (64, 64)
            labels, regions = np.asarray(truth), np.asarray(pred)
        assert (labels[:2] == speed.IGNORE).all() and labels[2:].max() < 27
        assert regions[0, 0] == 1 and set(np.unique(regions)) == set(range(1, regions.max() + 1))
        counts = speed.matched(speed.loop_table(regions, labels, 27))
        assert 0.3 < counts.true_positive.sum() / counts.total < 1


def test_the_simpler_ways_by_hand():
    truth, pred = np.array([[0, 0, 2, 2, 255]]), np.array([[1, 2, 2, 2, 3]])
    expected = [[1, 1, 0], [0, 0, 0], [0, 2, 0]]
    assert speed.loop_table(pred, truth, 3).tolist() == speed.skimage_table(pred, truth, 3).tolist() == expected
    column = match(widened(np.array(expected)))
    assert column.tolist() == [0, 2, 1]
    classes = np.where(truth == 255, -1, truth)
    assert speed.same(speed.matched(np.array(expected)), hungarian_counts(pred, classes, 3))
    assert not speed.same(speed.matched(np.array(expected) * 2), hungarian_counts(pred, classes, 3))


def test_runs_too_short_to_tell_have_no_rate():
    assert speed.rate(10, 2.0) == 5.0
    assert speed.rate(10, -0.1) is None


def test_a_small_run_of_the_engine(tmp_path):
    ran = benched('engine', '--pictures', '10', '--many', '100', '--folder', str(tmp_path), '--json')
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(ran.stdout)
    assert list(measured['milliseconds']) == ['own', 'system', 'wall']
    assert all(-50 < value < 1000 for value in measured['milliseconds'].values())  # ten pictures are few
    assert list(measured['steps']) == ['decode', 'labels', 'masks'] and all(0 < value < 1000 for value in measured['steps'].values())
    assert list(measured['memory_mib']) == ['10', '100']
    assert measured['memory_many_to_few'] == pytest.approx(measured['memory_mib']['100'] / measured['memory_mib']['10'])
    assert list(tmp_path.iterdir()) == []
    words = speed_engine.in_words(measured | {'memory_mib': {10: 1.0, 100: 1.5}, 'memory_many_to_few': 1.5})
    assert 'memory of 100 pictures        1.50 MiB; 1.500 x' in words


def test_the_engines_work_is_that_of_a_run(tmp_path):
    """The pictures that are timed have their label maps and masks, as after a run."""
    folder = speed_engine.make_pictures(tmp_path / 'in', (48, 64), 30)
    cost = speed_engine.work(folder, tmp_path / 'out', 28)
    assert cost.wall > 0 and cost.peak > 20
    expected = speed_engine.label_map((48, 64)).labels
    names = sorted(path.name for path in (tmp_path / 'out/labels').iterdir())
    assert names == [f'{number:06}.jpg.png' for number in range(28)]
    assert all(np.array_equal(read_label_map(tmp_path / 'out/labels' / name), expected) for name in names)
    assert len(list((tmp_path / 'out/masks').rglob('*.png'))) == 28 * expected.max()
    assert len((tmp_path / 'out/manifest.jsonl').read_text().splitlines()) == 28
