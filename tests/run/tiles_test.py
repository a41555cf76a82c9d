"""`padseg run --tiles`: label maps of the picture's own size, from a copy that is read reduced; and `padseg run PICTURE`."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
from support.runs import entries

from padseg.commands import main
from padseg.errors import UsageError
from padseg.exports import read_label_map
from padseg.images.decode import Reading, decode_with_notes, reduction
from padseg.methods.seg4diff import Options
from padseg.run.engine import run
from padseg.run.job import Job
from padseg.run.records import read_run


def put_large(path):
    """4096 x 4200 pixels in four fields of colour."""
    fields = np.array([[[200, 30, 30], [30, 200, 30]], [[30, 30, 200], [220, 220, 220]]], np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(fields.repeat(2048, 0).repeat(2100, 1)).save(path, compress_level=1)


@pytest.mark.slow
def test_a_run_with_tiles(tmp_path, sd3_folder):
    put_large(tmp_path / 'in' / 'large.png')
    options = Options(side=64, tiles=1024, overlap=128, threshold=0.0)
    job = Job(tmp_path / 'in' / 'large.png', tmp_path / 'out', options, model=str(sd3_folder), device='cpu', overlay=True)
    counts = run(job)
    assert (counts.done, counts.failed) == (1, 0)
    entry = entries(tmp_path / 'out')['large.png']
    assert entry['size'] == [4096, 4200] and entry['reduced_from'] is None and 'reduced from 4200x4096' in entry['notes']
    labels = read_label_map(tmp_path / 'out' / entry['outputs']['labels'])
    assert labels.shape == (4096, 4200) and labels.min() == 1 and labels.max() == entry['regions']
    for region in range(1, labels.max() + 1):
        mask = read_label_map(tmp_path / 'out' / entry['outputs']['masks'] / f'{region - 1}.png')
        np.testing.assert_array_equal(mask, np.where(labels == region, 255, 0))
    assert PIL.Image.open(tmp_path / 'out' / entry['outputs']['overlays']).size == (2100, 2048)
    record = read_run(tmp_path / 'out' / 'run.json')
    assert record is not None and (record.settings['tiles'], record.settings['overlap']) == (1024, 128)
    assert run(job).skipped == 1


def test_runs_without_tiles_record_what_they_did_before(tmp_path, sd3_folder):
    put = tmp_path / 'in' / 'a.png'
    put.parent.mkdir()
    PIL.Image.new('RGB', (40, 30), 'red').save(put)
    run(Job(put, tmp_path / 'out', Options(side=32), model=str(sd3_folder), device='cpu'))
    record = read_run(tmp_path / 'out' / 'run.json')
    assert record is not None and record.settings.keys().isdisjoint({'tiles', 'overlap'})


@pytest.mark.parametrize('more', [{'save_maps': True}, {'reading': Reading(shrink=1000)}])
def test_what_does_not_go_with_tiles_is_refused(tmp_path, sd3_folder, more):
    put_large(tmp_path / 'in' / 'large.png')
    with pytest.raises(UsageError, match='tiles'):
        run(Job(tmp_path / 'in', tmp_path / 'out', Options(tiles=1024), model=str(sd3_folder), device='cpu', **more))


@pytest.mark.parametrize(
    ('size', 'most', 'by'),
    [((1000, 1000), 4, 1), ((4200, 4096), 4, 2), ((4200, 4096), 1, 1), ((20000, 15000), 4, 4), ((20000, 15000), 99, 8)],
)
def test_pictures_are_reduced_as_far_as_enough_pixels_are_left(size, most, by):
    assert reduction(size, Reading(reduce=most)) == by


@pytest.mark.parametrize(('width', 'height', 'by'), [(9001, 7003, 2), (12001, 9003, 4), (9001, 7003, 3)])
def test_jpegs_are_reduced_by_the_same_factor(width, height, by):
    field = np.linspace(0, 255, width).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(np.broadcast_to(field, (height, width))).save(file, 'JPEG', quality=90)
    decoded = decode_with_notes(file.getvalue(), Reading(reduce=by, max_pixels=400_000_000))
    assert decoded.image.shape == (-(-height // by), -(-width // by), 3) and decoded.size == (height, width)
    columns = decoded.image[0, :, 0].astype(float)
    expected = np.add.reduceat(field, np.arange(0, width, by), dtype=float) / np.diff([*range(0, width, by), width])
    assert np.abs(columns - expected).max() <= 2


def test_a_picture_is_named_directly(tmp_path, capsys):
    put = tmp_path / 'in' / 'a.png'
    put.parent.mkdir()
    PIL.Image.new('RGB', (8, 6), 'red').save(put)
    arguments = ['run', str(put), '--method', 'grid', '--out', str(tmp_path / 'out'), '-q']
    assert main(arguments) == 0 and list(entries(tmp_path / 'out')) == ['a.png']
    assert main([*arguments, '--dir', str(put)]) == 2 and main([*arguments, str(put)]) == 2
    assert 'name one picture or folder' in capsys.readouterr().err


def test_open_shows_the_first_overlay(tmp_path, monkeypatch):
    shown = tmp_path / 'shown'
    browser = tmp_path / 'bin' / 'xdg-open'
    browser.parent.mkdir()
    browser.write_text(f'#!/bin/sh\necho "$1" > {shown}\n')
    browser.chmod(0o755)
    monkeypatch.setenv('PATH', str(browser.parent), prepend=':')
    for name in ('b.png', 'a.png'):
        PIL.Image.new('RGB', (8, 6), 'red').save(tmp_path / name)
    out = tmp_path / 'out'
    assert main(['run', str(tmp_path / 'a.png'), '--open', '--method', 'grid', '--out', str(out), '-q']) == 0
    for _ in range(100):
        if shown.exists() and shown.read_text():
            break
        __import__('time').sleep(0.05)
    assert shown.read_text().strip() == str(out / 'overlays' / 'a.png.jpg')
