"""`padseg analyze`: every sub-command writes a table, a figure and a record, and refuses what does not fit together."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.faults import run_in_child

from padseg.analysis import report
from padseg.commands import main
from padseg.errors import ResourceExhausted
from padseg.system.ledger import check_output

NAMES = ('cat', 'dog', 'grass')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """Three pictures with labels of classes, the names of these, and prompts."""
    folder = tmp_path_factory.mktemp('analyze')
    rng = np.random.default_rng(0)
    for name in ('images', 'labels'):
        (folder / name).mkdir()
    for number in range(3):
        truth = np.full((32, 48), number, np.uint8)
        truth[:, 24:] = 2 - number // 2
        cv2.imwrite(str(folder / 'labels' / f'{number}.png'), truth)
        cv2.imwrite(str(folder / 'images' / f'{number}.png'), (60 * truth[..., None] + rng.integers(0, 60, (32, 48, 3))).astype(np.uint8))
    (folder / 'classes.txt').write_text('\n'.join(NAMES))
    (folder / 'prompts.txt').write_text('a cat\na dog on grass\n')
    return folder


def analyze(place, model, name: str, *flags: str):
    """The record that a sub-command writes, the rows of its table, and its figure."""
    out = place / f'out-{name}'
    assert main(['analyze', name, '--model', str(model), '--device', 'cpu', '--out', str(out), '-q', *flags]) == 0
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [f'{name}.csv', f'{name}.json', f'{name}.png']
    record = json.loads((out / f'{name}.json').read_text())
    rows = list(csv.DictReader((out / f'{name}.csv').open()))
    assert len(rows) == len(record['results']) and [*rows[0]] == [*record['results'][0]]
    return record, rows, cv2.imread(str(out / f'{name}.png'))


def real(place) -> list[str]:
    return ['--dir', str(place / 'images'), '--labels', str(place / 'labels'), '--classes-file', str(place / 'classes.txt')]


def made(place) -> list[str]:
    return ['--prompts', str(place / 'prompts.txt'), '--denoising-steps', '2', '--size', '32', '--scale', '2']


def given(place, flags: list[str]) -> list[str]:
    names = {'DIR': 'images', 'LABELS': 'labels', 'CLASSES': 'classes.txt', 'PROMPTS': 'prompts.txt'}
    return [str(place / names[flag]) if flag in names else flag for flag in flags]


@pytest.mark.parametrize('name', ['shares', 'norms', 'pca'])
def test_on_real_pictures(name, place, sd3_folder, capsys):
    record, rows, figure = analyze(place, sd3_folder, name, *real(place), '--count', '2')
    assert record['settings']['pictures'] == [{'name': '0.png', 'text': 'cat grass'}, {'name': '1.png', 'text': 'dog grass'}]
    assert record['settings']['steps'] == [8, 28] and {row['step'] for row in rows} == {'8', '28'} and len(figure)
    assert capsys.readouterr().out.split()[:2] == ['step', 'layer']


def test_on_pictures_in_the_making(place, sd3_folder, capsys):
    record, rows, _ = analyze(place, sd3_folder, 'shares', *made(place), '--seeds', '3,5', '--steps', '1', '--json')
    assert [item['seed'] for item in record['settings']['pictures']] == [3, 5, 3, 5] and record['settings']['sampling']['scale'] == 2
    assert {row['step'] for row in rows} == {'1'} and json.loads(capsys.readouterr().out) == record


def test_tokens(place, sd3_folder):
    record, rows, figure = analyze(place, sd3_folder, 'tokens', '--dir', str(place / 'images'), '--text', 'cat on grass', '--layer', '1')
    assert [row['name'] for row in rows[:6]] == ['(start)', 'cat', 'on', 'grass', '(end)', '(pad)'] and len(rows) == 77
    assert record['settings']['layer'] == 1 and record['settings']['steps'] == [8] and figure.shape[1] > 1000


def test_grid(place, sd3_folder, capsys):
    record, rows, _ = analyze(place, sd3_folder, 'grid', *real(place), '--steps', '8', '--encoders', 'l,l+g')
    assert record['settings']['train'] == ['1.png'] and record['settings']['val'] == ['0.png', '2.png']
    assert len(rows) == 2 * 4 and record['settings']['own'] == {'encoders': 'l+g', 'step': 8, 'layer': 2}
    best = max(rows, key=lambda row: float(row['train_miou']))
    assert record['settings']['best'] == {'encoders': best['encoders'], 'step': int(best['step']), 'layer': int(best['layer'])}
    assert best['val_miou'] and sum(row['val_miou'] != '' for row in rows) in (1, 2)
    assert 'best of its encoders' in capsys.readouterr().out
    others = ['--val-dir', str(place / 'images'), '--val-labels', str(place / 'labels')]
    record, *_ = analyze(
        place, sd3_folder, 'grid', *real(place), *others, '--steps', '1', '--encoders', 'l', '--names', 'all', '--count', '1'
    )
    assert record['settings']['train'] == record['settings']['val'] == ['0.png']


def test_perturb(place, sd3_folder, clip_folder, dino_folder):
    scorers = ['--clip', str(clip_folder), '--dino', str(dino_folder)]
    record, rows, _ = analyze(place, sd3_folder, 'perturb', *made(place), *scorers, '--layers', '0,3', '--pad', 'symmetric', '--count', '1')
    assert [row['layer'] for row in rows] == ['', '0', '3'] and rows[0]['clip_i'] == '1.0'
    times = {path: path.stat().st_mtime_ns for path in (place / 'out-perturb' / 'pictures').glob('*/images/*.png')}
    again = analyze(place, sd3_folder, 'perturb', *made(place), *scorers, '--layers', '0', '--pad', 'symmetric', '--count', '1')
    assert again[1] == rows[:2] and len(times) == 3 and all(path.stat().st_mtime_ns == time for path, time in times.items())
    flags = ['analyze', 'perturb', '--model', str(sd3_folder), '--device', 'cpu', '--out', str(place / 'out-perturb'), '-q']
    assert main([*flags, *made(place), *scorers, '--layers', '0', '--count', '1']) == 6
    assert record['settings']['blur']['pad'] == 'symmetric' and len(record['settings']['clip']['weights']) == 64


@pytest.mark.parametrize(
    ('flags', 'code', 'words'),
    [
        (['shares'], 2, 'give either --dir, for real pictures, or --prompts'),
        (['shares', '--dir', 'x', '--prompts', 'y'], 2, 'give either --dir'),
        (['norms', '--prompts', 'y', '--text', 'a cat'], 2, '--text cannot be used with --prompts'),
        (['pca', '--dir', 'x', '--seeds', '1'], 2, '--seeds cannot be used with --dir'),
        (['pca', '--dir', 'DIR', '--classes-file', 'CLASSES'], 2, 'names of classes need the labels'),
        (['tokens', '--dir', 'nowhere'], 5, 'nowhere'),
        (['blocks', '--dir', 'nowhere', '--labels', 'LABELS'], 5, 'nowhere'),
        (['shares', '--dir', 'DIR', '--model', 'MODEL', '--steps', '29'], 2, 'steps are in 1..28'),
        (['tokens', '--dir', 'DIR', '--model', 'MODEL', '--layer', '4'], 2, 'layer is in 0..3'),
        (['grid', '--dir', 'DIR', '--labels', 'LABELS', '--classes-file', 'CLASSES', '--val-dir', 'DIR'], 2, '--val-labels together'),
        (['grid', '--dir', 'DIR', '--labels', 'LABELS', '--classes-file', 'CLASSES', '--count', '1'], 2, 'too few pictures'),
        (['perturb', '--prompts', 'PROMPTS', '--clip', 'nowhere'], 2, 'unknown CLIP nowhere'),
        (['perturb', '--prompts', 'PROMPTS', '--blur-size', '4'], 2, 'perturb_size is an odd number'),
        (['norms', '--prompts', 'PROMPTS', '--scale', '-1'], 2, 'scale is a strength'),
        (['bogus'], 2, "No such command 'bogus'"),
        ([], 2, "Missing option '--dir'"),
    ],
)
def test_what_does_not_fit_is_refused(flags, code, words, place, sd3_folder, capsys):
    assert main(['analyze', *[str(sd3_folder) if flag == 'MODEL' else flag for flag in given(place, flags)]]) == code
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ''


def outputs_in_the_way(folder: Path, name: str) -> dict[str, Path]:
    """Folders that results cannot be written to: a file, one below a file, and one with a folder in place of a figure."""
    (folder / 'file').write_text('')
    (folder / 'taken' / f'{name}.png').mkdir(parents=True)
    return {'cannot create': folder / 'file', 'file/below': folder / 'file' / 'below', 'not a regular file': folder / 'taken'}


@pytest.mark.parametrize(
    ('name', 'written', 'flags'),
    [
        ('blocks', 'grouping', ['--dir', 'DIR', '--labels', 'LABELS']),
        ('shares', 'shares', ['--dir', 'DIR']),
        ('norms', 'norms', ['--prompts', 'PROMPTS']),
        ('pca', 'pca', ['--dir', 'DIR']),
        ('grid', 'grid', ['--dir', 'DIR', '--labels', 'LABELS', '--classes-file', 'CLASSES']),
        ('tokens', 'tokens', ['--dir', 'DIR']),
        ('perturb', 'perturb', ['--prompts', 'PROMPTS', '--clip', 'no such CLIP']),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(name, written, flags, place, tmp_path, capsys):
    for words, out in outputs_in_the_way(tmp_path, written).items():
        code = main(['analyze', name, *given(place, flags), '--model', 'sd3', '--out', str(out)])  # whose files are not here
        told = capsys.readouterr()
        assert code in (2, 6) and words in told.err and told.err.count('\n') == 1


@pytest.mark.parametrize('number', [1, 2])
def test_a_full_disk_is_told_before_the_work_and_after(number, tmp_path):
    """The disk is full at the first or the second write: of the trial, or of the table."""

    def act():
        check_output(tmp_path, ['x.csv'])
        report.write(tmp_path, 'x', [{'a': 1}], np.zeros((4, 4, 3), np.uint8), {})

    assert run_in_child(act, tmp_path, 'full', number) == ResourceExhausted.exit_code


def test_other_families_are_refused_by_name(place, unet_folders, capsys):
    assert main(['analyze', 'shares', '--dir', str(place / 'images'), '--model', str(unet_folders['sd15'])]) == 2
    assert 'analyze does not support' in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_named(tmp_path, sd3_folder, capsys):
    (tmp_path / 'a.png').write_bytes(b'nothing')
    flags = ['--dir', str(tmp_path), '--model', str(sd3_folder), '--device', 'cpu', '--out', str(tmp_path / 'out'), '-q']
    assert main(['analyze', 'norms', *flags]) == 3
    said = capsys.readouterr().err
    assert said.startswith(f'padseg: {tmp_path / "a.png"}: ') and said.count('\n') == 1
