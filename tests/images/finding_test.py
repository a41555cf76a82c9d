"""What is found in a folder, and what is said of the rest."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support import jobs
from support.processes import start

from padseg.commands import main
from padseg.errors import NoImages
from padseg.images import find, listing

NAMES = [
    *('a.png', 'g.JPEG', 'h.PnG', 'real/r.png', 'folder.png/inside.png'),
    *('b.HEIC', 'c.jxl', 'd.jp2', 'i.tga', 'e.png ', 'f.jpg_large', 'j.png~', 'k.png.bak', 'like'),
    *('README', 'notes.txt', 'a.png.xml', 'Thumbs.db', '.DS_Store', '._a.png', '.h.png', '.hidden/h.png', '__MACOSX/._x.png'),
]


def put_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, 'PNG')


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        put_picture(tmp_path / 'in' / name)
    (tmp_path / 'in/README').write_text('words')
    (tmp_path / 'in/linked').symlink_to('real')
    (tmp_path / 'in/link.png').symlink_to('a.png')
    return tmp_path / 'in'


def test_what_is_left_out_is_counted(folder):
    found = listing(folder)
    assert [picture.name for picture in found.pictures] == ['a.png', 'folder.png/inside.png', 'g.JPEG', 'h.PnG', 'link.png', 'real/r.png']
    likely = {'.heic': 1, '.jxl': 1, '.jp2': 1, '.tga': 1, '.png ': 1, '.jpg_large': 1, '.png~': 1, '.bak': 1}
    assert found.like_pictures == likely | {'no suffix': 1, 'linked folder': 1, 'hidden': 1}
    assert found.left_out == likely | {'.txt': 1, '.xml': 1, '.db': 1, 'no suffix': 2, 'linked folder': 1, 'hidden': 4}
    assert found.runs == [] and found.unreadable == {}


def run(*arguments: object) -> int:
    return main(['run', '--method', 'grid', *map(str, arguments)])


def test_it_is_said_in_a_line_and_recorded(folder, tmp_path, caplog):
    assert run('--dir', folder, '--out', tmp_path / 'out', '-q') == 0
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith('not read, though they may be pictures: 1 .bak, 1 .heic, 1 .jp2') and '\n' not in said
    record = json.loads((tmp_path / 'out/run.json').read_text())
    assert record['left_out'] == listing(folder).left_out and record['unreadable'] == {}


def test_nothing_is_said_of_files_that_are_no_pictures(tmp_path, caplog):
    for name in ('a.png', 'a.json', 'a.png.xml', 'notes.txt', '.DS_Store', '._a.png', 'sub/.git/b.png'):
        put_picture(tmp_path / 'in' / name)
    (tmp_path / 'in/LICENSE').write_text('words')
    assert run('--dir', tmp_path / 'in', '--out', tmp_path / 'out', '-q') == 0
    assert caplog.text == ''


@pytest.mark.parametrize(('name', 'words'), [('a.HEIC', '1 .heic: convert them to JPEG or PNG'), ('a', '1 no suffix'), ('b/a.jpg', '')])
def test_a_folder_of_nothing_else_is_told_what_to_do(name, words, tmp_path, capsys):
    put_picture(tmp_path / 'x' / name)
    (tmp_path / 'in').mkdir()
    if '/' in name:
        (tmp_path / 'in/b').symlink_to(tmp_path / 'x/b')
        words = '1 linked folder: name the folder itself'
    else:
        shutil.move(tmp_path / 'x' / name, tmp_path / 'in' / name)
    assert run('--dir', tmp_path / 'in', '--out', tmp_path / 'out') == 5
    assert f'there are no pictures in {tmp_path / "in"} that padseg reads, but {words}' in capsys.readouterr().err


def test_results_of_a_run_are_no_pictures(tmp_path, caplog, monkeypatch):
    put_picture(tmp_path / 'a.png')
    put_picture(tmp_path / 'sub/b.png')
    monkeypatch.chdir(tmp_path)
    for out in ('first', 'sub/second', 'third'):
        assert run('--dir', '.', '--out', out, '-q') == 0
        assert [json.loads(line)['input'] for line in Path(out, 'manifest.jsonl').read_text().splitlines()] == ['a.png', 'sub/b.png']
    assert caplog.messages[-1] == 'left out because they hold results of a run: first, sub/second'
    assert [picture.name for picture in find(Path('first'))] != []  # the folder that was named is not left out


def test_a_folder_that_cannot_be_listed_is_left_out_and_said():
    place = Path(tempfile.mkdtemp(prefix='padseg-test-'))
    try:
        for name in ('in/a.png', 'in/closed/b.png'):
            put_picture(place / name)
        (place / 'out').mkdir(mode=0o777)
        for path, mode in ((place, 0o755), (place / 'in/closed', 0), (place / 'out', 0o777)):
            path.chmod(mode)
        arguments = ['run', '--method', 'grid', '--dir', str(place / 'in'), '--out', str(place / 'out'), '--json', '-q']
        ran = start(jobs.as_nobody, arguments).wait()
        assert ran.returncode == 3, ran.stderr
        assert ran.stderr.splitlines() == ['left out because it cannot be listed: closed: Permission denied']
        assert json.loads(ran.stdout)['done'] == 1 and json.loads(ran.stdout)['unreadable'] == 1
        assert json.loads((place / 'out/run.json').read_text())['unreadable'] == {'closed': 'Permission denied'}
        closed = start(jobs.as_nobody, [*arguments[:4], str(place / 'in/closed'), *arguments[5:]]).wait()
        assert closed.returncode == 5 and f'cannot list {place / "in/closed"}: Permission denied' in closed.stderr
    finally:
        (place / 'in/closed').chmod(0o755)
        shutil.rmtree(place)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(NoImages, match='there is no folder'):
        listing(tmp_path / 'nowhere')


def test_records_from_before_are_read(tmp_path):
    put_picture(tmp_path / 'in/a.png')
    assert run('--dir', tmp_path / 'in', '--out', tmp_path / 'out', '-q') == 0
    path = tmp_path / 'out/run.json'
    record = json.loads(path.read_text())
    del record['left_out'], record['unreadable']
    path.write_text(json.dumps(record))
    put_picture(tmp_path / 'in/b.png')
    assert run('--dir', tmp_path / 'in', '--out', tmp_path / 'out', '-q') == 0
    assert len((tmp_path / 'out/manifest.jsonl').read_text().splitlines()) == 2


def test_a_pipe_without_a_suffix_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    os.mkfifo(tmp_path / 'pipe.png')
    assert listing(tmp_path).left_out == {'no suffix': 1, 'special file': 1}


def test_a_file_that_becomes_a_pipe_while_it_is_opened_is_not_waited_for(tmp_path):
    path = tmp_path / 'a.png'
    PIL.Image.new('L', (2, 2)).save(path)
    assert start(jobs.read_while_swapped, str(path)).wait().stdout == 'not a regular file\n'
