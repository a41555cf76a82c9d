"""Real processes that are killed, or find the disk full, at every single change they make to the output folder."""

from __future__ import annotations

import os

import numpy as np
import PIL.Image
import pytest
from support import faults
from support.processes import start

from padseg.run import engine
from padseg.run.job import Job

# what is killed, and before which of its changes: before all with PADSEG_TEST_EVERY=1
ACTIONS = {'run': 9, 'overwrite': 50, 'overwrite shards': 50, 'shards overwrite shards': 120, 'join': 5, 'collect': 5, 'merge': 50}


@pytest.fixture
def pictures(tmp_path):
    for name, size in (('a.png', (40, 56)), ('sub/b.png', (48, 40))):
        rng = np.random.default_rng(len(name))
        path = tmp_path / 'in' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 200, (2, 2, 3)).repeat(-(-size[0] // 2), 0).repeat(-(-size[1] // 2), 1)[: size[0], : size[1]]
        PIL.Image.fromarray((coarse + rng.integers(0, 30, coarse.shape)).astype(np.uint8)).save(path)
    return tmp_path / 'in'


@pytest.fixture(scope='module')
def specks(tmp_path_factory):
    """Two pictures of eight pixels, one for each of two shards."""
    folder = tmp_path_factory.mktemp('specks')
    for name in ('a.png', 'c.png'):
        PIL.Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3)).save(folder / name)
    return folder


@pytest.fixture(scope='module')
def maps(specks, sd3_folder, tmp_path_factory):
    """Their token maps."""
    out = tmp_path_factory.mktemp('maps')
    engine.run(Job(specks, out, model=str(sd3_folder), device='cpu', save_maps=True))
    return out


@pytest.mark.parametrize('action', ACTIONS)
def test_killed_at_every_change_no_old_result_counts_as_a_new_one(specks, maps, tmp_path, action):
    every = int(os.environ.get('PADSEG_TEST_EVERY', ACTIONS[action]))
    ran = start(faults.at_every_event, specks, tmp_path, maps, action, every).wait()
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > (3 if action in faults.FROM_NOTHING else faults.BEGINNING // 2)


@pytest.mark.parametrize('fault', faults.ENDED_BY)
@pytest.mark.parametrize(('action', 'fewest'), [('run', 25), ('shards', 25), ('collect', 8), ('coco-panoptic', 3)])
def test_at_every_write_nothing_is_lost_or_left(pictures, sd3_folder, tmp_path, fault, action, fewest):
    every = int(os.environ.get('PADSEG_TEST_EVERY', '25' if action in ('run', 'shards') else '8' if action == 'collect' else '2'))
    (tmp_path / 'made').mkdir()
    ran = start(faults.at_every_write, pictures, tmp_path / 'made', str(sd3_folder), action, fault, every).wait()
    assert ran.returncode == 0, ran.stderr
    print(f'{action}: {ran.stdout.strip()} times {fault}')
    assert int(ran.stdout) >= fewest // every
