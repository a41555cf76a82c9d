"""The reckoning of disk space against what results really take, and a real small disk."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from padseg.commands import main
from padseg.images import Reading, find
from padseg.run import engine
from padseg.run.job import Job
from padseg.run.space import reckon_space, warn_if_short
from padseg.system.disk import free_space

ROOT = Path(__file__).parents[2]
PICTURES = ('astronaut.jpg', 'coffee.jpg', 'chelsea.jpg', 'more/rocket.jpg')


@pytest.fixture
def pictures(tmp_path):
    for name in PICTURES:
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / 'data/images' / name, tmp_path / 'in' / name)
    return tmp_path / 'in'


def blocks(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in path.rglob('*') if file.is_file())


@pytest.mark.slow
@pytest.mark.parametrize('more', [{}, {'overlay': True, 'coco': True, 'save_maps': True}])
def test_results_take_about_what_was_reckoned(pictures, tmp_path, more):
    job = Job(pictures, tmp_path / 'out', device='cpu', **more)
    found = find(pictures)
    (pictures / 'bad.jpg').write_bytes(b'')
    engine.run(job)
    taken = blocks(job.out)
    assert 0.7 * taken < reckon_space(job, found, 256) < 4 * taken
    assert reckon_space(job, found * 50, 256) == pytest.approx(50 * reckon_space(job, found, 256), rel=0.2)
    small = job._replace(reading=Reading(shrink=1000))
    assert reckon_space(small._replace(save_maps=False), found, 256) < 10_000
    assert reckon_space(job, find(pictures), 256) <= reckon_space(job, found, 256) * 5 / 4


def test_a_warning_where_there_is_less(pictures, tmp_path, caplog):
    job = Job(pictures, tmp_path / 'not/yet', device='cpu')
    found = find(pictures)
    warn_if_short(job, found, 256)
    assert caplog.text == ''
    enough = free_space(tmp_path) // reckon_space(job, found, 256) + 1
    warn_if_short(job, Many(found, enough * 3), 256)
    assert 'If the disk fills up, the run ends and nothing is lost' in caplog.text


class Many(list):
    """Very many pictures, without the memory for them."""

    def __init__(self, pictures, times):
        super().__init__(pictures)
        self.times = times

    def __len__(self):
        return super().__len__() * self.times


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for some of the results."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=200k', 'tmpfs', folder], capture_output=True)
    if mounted.returncode:
        pytest.skip('file systems can be mounted only by root')
    yield folder
    subprocess.run(['umount', folder], check=True)


def test_a_small_disk(pictures, tmp_path, small_disk, capsys, caplog):
    """Warned of before, stopped when it is full, continued when there is room again: all label maps as if nothing had been."""
    arguments = ['run', '--dir', str(pictures), '--overlay', '--method', 'grid', '--out']
    assert main([*arguments, str(small_disk / 'out')]) == 7
    assert 'finished results are kept, and the same command continues' in capsys.readouterr().err
    assert 'has 20' in caplog.text and 'the results of 4 pictures take about' in caplog.text
    assert not list(small_disk.rglob('.padseg-*'))
    shutil.copytree(small_disk / 'out', tmp_path / 'out')
    for name in ('out', 'whole'):
        assert main([*arguments, str(tmp_path / name)]) == 0
    for path in (tmp_path / 'whole').rglob('*.*'):
        if path.is_file() and path.suffix not in ('.json', '.jsonl') and path.name[0] != '.':
            assert (tmp_path / 'out' / path.relative_to(tmp_path / 'whole')).read_bytes() == path.read_bytes()
