"""The main job as a user starts it: bin/padseg on pictures, with the embedded model."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from support.processes import padseg

from padseg.exports import read_label_map, read_masks

ROOT = pathlib.Path(__file__).parent.parent
PICTURES = ('chelsea.jpg', 'more/rocket.jpg', 'scene-22.png')


@pytest.fixture(scope='module')
def job(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with three pictures in images/, and the output of `padseg run --dir images` beside it, in out/."""
    if not (ROOT / '.venv').is_dir():
        pytest.skip('bin/padseg would install its environment first: run bin/test')
    folder = tmp_path_factory.mktemp('job')
    for name in PICTURES:
        (folder / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / 'data' / 'images' / name, folder / 'images' / name)
    command = [ROOT / 'bin' / 'padseg', 'run', '--dir', 'images/', '--overlay', '--json']
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)['done'] == 3
    return folder


def digests(folder: pathlib.Path) -> dict[str, str]:
    files = (path for part in ('labels', 'masks', 'overlays') for path in (folder / part).rglob('*') if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_picture_has_all_results(job):
    for name in PICTURES:
        width, height = Image.open(job / 'images' / name).size
        labels = read_label_map(job / 'out' / 'labels' / f'{name}.png')
        assert labels.shape == (height, width)
        assert 2 <= labels.max() < 60 and labels.min() == 1
        np.testing.assert_array_equal(read_masks(job / 'out' / 'masks' / name), labels)
        assert Image.open(job / 'out' / 'overlays' / f'{name}.jpg').size == (width, height)
    lines = [json.loads(line) for line in (job / 'out' / 'manifest.jsonl').read_text().splitlines()]
    assert [line['input'] for line in lines] == sorted(PICTURES)
    assert {line['status'] for line in lines} == {'done'}
    run = json.loads((job / 'out' / 'run.json').read_text())
    assert run['model']['model'] == 'tiny'
    assert {name for name, value in run['settings'].items() if value is None} == {'value_range', 'shrink'}


def test_batch_and_order_change_no_byte(job, tmp_path):
    names = {'z.jpg': PICTURES[0], 'a.jpg': PICTURES[1], 'm.png': PICTURES[2]}
    (tmp_path / 'images').mkdir()
    for new, old in names.items():
        shutil.copy(job / 'images' / old, tmp_path / 'images' / new)
    result = padseg('run', '--dir', 'images', '--batch', '3', folder=tmp_path)
    assert result.returncode == 0, result.stderr
    for new, old in names.items():
        assert (tmp_path / 'out/labels' / f'{new}.png').read_bytes() == (job / 'out/labels' / f'{old}.png').read_bytes()


def test_again_does_nothing_and_a_broken_file_stops_nothing(job):
    before = digests(job / 'out')
    again = padseg('run', '--dir', 'images', '--overlay', '--json', folder=job)
    assert again.returncode == 0 and json.loads(again.stdout)['skipped'] == 3
    (job / 'images' / 'cut.jpg').write_bytes((job / 'images' / PICTURES[0]).read_bytes()[:5000])
    broken = padseg('run', '--dir', 'images', '--overlay', '--json', folder=job)
    assert broken.returncode == 3
    assert json.loads(broken.stdout)['failed'] == 1
    (line,) = map(json.loads, (job / 'out' / 'failures.jsonl').read_text().splitlines())
    assert line['input'] == 'cut.jpg' and 'truncated' in line['reason']
    assert digests(job / 'out') == before


def test_what_cannot_work_says_why(job):
    for arguments, code, words in (
        (('--model', 'sd4'), 2, 'tiny, sd3, sd3.5'),
        (('--layer', '6'), 2, '0..5'),
        (('--step', '0'), 2, 'from 1'),
        (('--threshold', '-1'), 2, '>= 0'),
        (('--dir', 'nowhere'), 5, 'nowhere'),
    ):
        result = padseg('run', '--dir', 'images', '--out', 'other', *arguments, folder=job)
        assert result.returncode == code and words in result.stderr, (arguments, result.stderr)
