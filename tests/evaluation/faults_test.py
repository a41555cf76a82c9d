"""Evaluations that are killed, or find the disk full, and output folders in which something lies in the way."""

from __future__ import annotations

import os
import shutil

import numpy as np
import PIL.Image
import pytest
from support import eval_faults
from support.eval_faults import as_nobody
from support.jobs import with_small_files
from support.processes import padseg, start

from padseg.commands import main


@pytest.fixture
def command(tmp_path):
    """Label maps of three pictures, of which the first two regions of a truth are one in the prediction, and the words that score them."""
    for number, name in enumerate('abc'):
        truth = np.repeat([[0, 0, 1, 2, 2, 2]], 4, 0).astype(np.uint8)
        for folder, labels in (('truth', truth), ('pred', np.maximum(truth, number % 2 + 1))):
            (tmp_path / folder).mkdir(exist_ok=True)
            PIL.Image.fromarray(labels).save(tmp_path / folder / f'{name}.png')
    folders = ['--pred', tmp_path / 'pred', '--labels', tmp_path / 'truth', '--num-classes', '4', '--out', tmp_path / 'out']
    return ['eval', '-q', '--json', *map(str, folders)]


@pytest.mark.parametrize(('fault', 'overwrite', 'first'), [('kill', False, 0), ('kill', True, 6), ('full', True, 0)])
def test_at_every_write_nothing_is_lost_and_scores_of_other_settings_never_count(command, tmp_path, fault, overwrite, first):
    every = int(os.environ.get('PADSEG_TEST_EVERY', '68'))
    new, old = [*command[:-2], '--protocol', 'diffcut-fixed'], [*command[:-2], '--protocol', 'seg4diff-release']
    end = command[-2:]
    arguments = ([*new, '--overwrite', *end], [*old, *end]) if overwrite else ([*new, *end], [])
    ran = start(eval_faults.at_every_write, *arguments, tmp_path / 'out', fault, first, every).wait()
    assert ran.returncode == 0, ran.stderr


IN_THE_WAY = {
    'scores.json is a folder': lambda out: (out / 'scores.json').mkdir(),
    'scores.json is a pipe': lambda out: os.mkfifo(out / 'scores.json'),
    'scores.json is text': lambda out: (out / 'scores.json').write_text('text'),
    'scores.json is deep': lambda out: (out / 'scores.json').write_text('[' * 100_000),
    'records are a folder': lambda out: (out / 'pictures.jsonl').mkdir(),
    'records are a pipe': lambda out: os.mkfifo(out / 'pictures.jsonl'),
    'the lock is a folder': lambda out: (out / '.lock').mkdir(),
    'a table is a folder': lambda out: (out / 'per_image.csv').mkdir(),
    'words are a folder': lambda out: (out / 'scores.md').mkdir(),
    'a chart is a folder': lambda out: (out / 'classes.png').mkdir(),
    'the sheet is a folder': lambda out: (out / 'sheet.jpg').mkdir(),
}


@pytest.mark.parametrize('what', IN_THE_WAY)
def test_what_lies_in_the_way_is_said_in_one_line(command, tmp_path, what, capsys):
    (tmp_path / 'out').mkdir()
    IN_THE_WAY[what](tmp_path / 'out')
    assert main(command) == 6
    said = capsys.readouterr().err
    assert said.startswith('padseg: ') and said.count('\n') == 1 and str(tmp_path / 'out') in said


def test_a_folder_that_must_not_be_written_to(command, tmp_path):
    (tmp_path / 'out').mkdir(mode=0o555)
    ran = start(as_nobody, tmp_path, command).wait()
    assert ran.returncode == 6, ran.stderr
    assert ran.stderr.startswith('padseg: cannot write to ') and ran.stderr.count('\n') == 1


@pytest.mark.parametrize('size', [400, 3000, 9000])
def test_a_full_disk_has_its_exit_code(command, tmp_path, size):
    """Files cannot grow larger than so many bytes: the settings, the records, the table, the words, the chart or the sheet do not fit."""
    for name in map(str, range(40)):
        for folder in ('truth', 'pred'):
            shutil.copy(tmp_path / folder / 'a.png', tmp_path / folder / f'{name}.png')
    ran = start(with_small_files, command, size).wait()
    assert ran.returncode == 7, (ran.returncode, ran.stderr)
    assert ran.stderr.startswith('padseg: ') and ran.stderr.count('\n') == 1
    assert padseg(*command).returncode == 0


@pytest.fixture
def by_grid(tmp_path):
    """Two pictures with a truth, and the words that score a method without a model, whose label maps are kept."""
    for name in 'ab':
        for folder, pixels in (('img', np.zeros((6, 8, 3), np.uint8)), ('gt', np.repeat([[0, 1]], 6, 0).repeat(4, 1).astype(np.uint8))):
            (tmp_path / 'root' / folder).mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(tmp_path / 'root' / folder / f'{name}.png')
    (tmp_path / 'root' / 'padseg.toml').write_text('images = "img"\nlabels = "gt"\nnum_classes = 2\n')
    (tmp_path / 'victim').mkdir()
    out = tmp_path / 'out'
    return ['eval', 'folder', '--root', str(tmp_path / 'root'), '--method', 'grid', '-q', '--json', '--out', str(out)], out


@pytest.mark.parametrize('folder', ['labels', 'maps'])
def test_a_folder_of_results_that_is_a_link_is_refused(by_grid, tmp_path, folder, capsys):
    command, out = by_grid
    out.mkdir()
    (out / folder).symlink_to(tmp_path / 'victim')
    assert main(command) == 6
    assert f'{out / folder} is a link, which is not followed' in capsys.readouterr().err
    assert not any((tmp_path / 'victim').iterdir())


def test_a_label_map_that_is_a_link_is_replaced(by_grid, tmp_path):
    command, out = by_grid
    (out / 'labels').mkdir(parents=True)
    (tmp_path / 'victim' / 'a.png').write_text('kept')
    (out / 'labels' / 'a.png').symlink_to(tmp_path / 'victim' / 'a.png')
    assert main(command) == 0
    assert (tmp_path / 'victim' / 'a.png').read_text() == 'kept' and not (out / 'labels' / 'a.png').is_symlink()
