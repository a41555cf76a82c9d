"""Which source the results in an output folder belong to, and which sources are refused."""

from __future__ import annotations

import PIL.Image
import pytest
from support.runs import entries, files, put_picture

from padseg.commands import main
from padseg.errors import OutputConflict, UsageError
from padseg.run import engine
from padseg.run.convert import convert
from padseg.run.records import read_run
from padseg.run.selection import Selection


def test_results_belong_to_the_pictures_of_one_folder(job, tmp_path):
    engine.run(job)
    before = files(job.out), (job.out / 'manifest.jsonl').read_bytes()
    for name, seed in (('a.png', 7), ('other.png', 8)):
        put_picture(tmp_path / 'others' / name, seed=seed)
    other = job._replace(source=tmp_path / 'others')
    for changed in (other, other._replace(selection=Selection(shard=(1, 1))), other._replace(source=job.source / 'sub')):
        with pytest.raises(OutputConflict, match='; .* has 0 of these 3 unchanged'):
            engine.run(changed)
    assert main(['run', '--dir', str(other.source), '--out', str(job.out), '--method', 'grid', '--cells', '2', '--dry-run']) == 6
    assert before == (files(job.out), (job.out / 'manifest.jsonl').read_bytes())
    engine.run(other._replace(overwrite=True))
    assert entries(job.out).keys() == {'a.png', 'other.png'}


def test_a_folder_that_has_moved_is_the_same(job, tmp_path):
    engine.run(job._replace(source=job.source / 'a.png'))
    assert engine.run(job).skipped == 1  # one of its pictures before
    moved = job.source.rename(tmp_path / 'moved')
    put_picture(moved / 'b.png', seed=9)
    counts = engine.run(job._replace(source=moved))
    assert (counts.done, counts.skipped) == (3, 2)
    assert read_run(job.out / 'run.json').source == str(moved)
    (tmp_path / 'link').symlink_to(moved)
    assert engine.run(job._replace(source=tmp_path / 'link')).skipped == 3


@pytest.mark.parametrize('spelling', ['plain', 'link', 'below', 'file', 'linked results', 'export', 'shard'])
def test_a_place_of_results_is_no_source(job, tmp_path, spelling):
    engine.run(job)
    source, changed = job.out / 'labels', job
    if spelling == 'link':
        (tmp_path / 'link').symlink_to(source)
        source = tmp_path / 'link'
    elif spelling == 'below':
        source = source / 'sub'
    elif spelling == 'file':
        source = source / 'a.png.png'
    elif spelling == 'linked results':
        source.rename(tmp_path / 'elsewhere')
        source.symlink_to(tmp_path / 'elsewhere')
        source = tmp_path / 'elsewhere'
    elif spelling == 'export':
        convert(job.out, 'hf-imagefolder')
        source = job.out / 'hf-imagefolder' / 'images'
    elif spelling == 'shard':
        changed = job._replace(selection=Selection(shard=(1, 1)))
    before = files(job.out)
    with pytest.raises(UsageError, match='lies where results go'):
        engine.run(changed._replace(source=source))
    assert files(job.out) == before


def test_pictures_beside_results_are_a_source(job):
    put_picture(job.out / 'mine' / 'a.png')
    assert engine.run(job._replace(source=job.out / 'mine')).done == 1


def test_merge_refuses_such_a_source_too(kept, tmp_path, capsys):
    engine.run(kept._replace(save_maps=True))
    out = tmp_path / 'merged'
    assert main(['merge', str(kept.out), '--out', str(out), '-q']) == 0
    assert main(['merge', str(kept.out), '--out', str(out), '--dir', str(out / 'labels'), '-q']) == 2
    assert 'lies where results go' in capsys.readouterr().err


def test_a_folder_with_the_name_of_a_frame(job):
    """Its results would lie among the masks of that frame."""
    frames = [PIL.Image.new('L', (4, 4), shade) for shade in (0, 255)]
    frames[0].save(job.source / 'x.gif', save_all=True, append_images=frames[1:])
    put_picture(job.source / 'x.gif.f0000' / 'y.png')
    assert engine.run(job).done == 5
    reading = job.reading._replace(frames='all')
    with pytest.raises(UsageError, match=r'x\.gif\.f0000 is both a frame of a file and the folder of x\.gif\.f0000/y\.png'):
        engine.run(job._replace(reading=reading, overwrite=True))
    selection = Selection(exclude=('x.gif.f0000/*',))
    assert engine.run(job._replace(reading=reading, overwrite=True, selection=selection)).done == 5
