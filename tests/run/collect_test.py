"""Joining output folders: which results are joined, and that nothing outside these folders is read or written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import jobs
from support.processes import start
from support.runs import entries, files, put_picture

from padseg.errors import OutputConflict
from padseg.methods.classical import GridOptions
from padseg.run import engine
from padseg.run.collect import collect


def edit(out: Path, name: str, **changes: object) -> None:
    """Change the record of a picture."""
    recorded = entries(out)
    recorded[name] |= changes
    (out / 'manifest.jsonl').write_text(''.join(json.dumps(entry) + '\n' for entry in recorded.values()))


@pytest.fixture
def bundle(job, tmp_path):
    """A folder of results from elsewhere, and an output folder to join it in, both with private files beside them."""
    engine.run(job._replace(out=tmp_path / 'theirs' / 'out'))
    home = tmp_path / 'home'
    (home / '.ssh').mkdir(parents=True)
    (home / '.ssh' / 'id').write_text('mine')
    (tmp_path / 'theirs' / '.ssh').mkdir()
    (tmp_path / 'theirs' / '.ssh' / 'id').write_text('theirs')
    return tmp_path / 'theirs' / 'out', home / 'all'


@pytest.mark.parametrize(
    'outputs',
    [
        {'masks': '../.ssh'},
        {'labels': '../.ssh/id'},
        {'labels': '/etc/passwd'},
        {'labels': 'labels/b.png.png'},
        {'.ssh': '.ssh'},
        {'labels': 'labels/../../.ssh/id'},
        {},
    ],
)
def test_records_that_lead_elsewhere_are_not_joined(bundle, outputs):
    theirs, ours = bundle
    edit(theirs, 'a.png', outputs={'labels': 'labels/a.png.png', **outputs} if outputs else {})
    with pytest.raises(OutputConflict, match='manifest.jsonl, line 1 is not a record'):
        collect([theirs], ours)
    assert (ours.parent / '.ssh' / 'id').read_text() == 'mine' and not (ours / 'labels').exists()


@pytest.mark.parametrize('place', ['labels/a.png.png', 'masks/a.png/0.png', 'masks/a.png', 'labels', 'labels/sub'])
@pytest.mark.parametrize('side', ['theirs', 'ours'])
def test_links_are_not_followed_when_results_are_joined(bundle, tmp_path, place, side):
    theirs, ours = bundle
    path = (theirs if side == 'theirs' else ours) / place
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    secret = tmp_path / 'secret'
    secret.mkdir()
    (secret / '0.png').write_text('secret')
    path.symlink_to(secret / '0.png' if path.suffix == '.png' and place.count('.') > 1 else secret)
    if side == 'ours' and place == 'masks/a.png/0.png':
        collect([theirs], ours)  # a whole folder takes the place of the one with the link
    else:
        with pytest.raises(OutputConflict):
            collect([theirs], ours)
    assert {path.name: path.read_text() for path in secret.iterdir()} == {'0.png': 'secret'}
    assert not [name for name, data in files(ours).items() if data == b'secret' and not (ours / name).is_symlink() and side == 'theirs']


def test_results_of_pictures_of_another_folder_are_not_joined(job, tmp_path, caplog):
    engine.run(job)
    put_picture(tmp_path / 'others' / 'other.png', seed=5)
    other = job._replace(source=tmp_path / 'others', out=tmp_path / 'two')
    engine.run(other)
    with pytest.raises(OutputConflict, match=r'two holds results of the pictures in .*others; .*in has 0 of these 1 unchanged'):
        collect([job.out, other.out], tmp_path / 'all')
    shutil.move(job.source, tmp_path / 'away')
    assert collect([job.out, other.out], tmp_path / 'all').counts.done == 4  # which cannot be told any more
    assert 'hold the same pictures' in caplog.text


def test_a_collection_that_was_killed_does_not_lend_its_results_to_another(job, tmp_path):
    """Results were copied, but no header has their settings: they do not count."""
    engine.run(job)
    collect([job.out], tmp_path / 'all')
    (tmp_path / 'all' / 'run.json').unlink()
    other = job._replace(options=GridOptions(1), out=tmp_path / 'two')
    engine.run(other)
    collect([other.out], tmp_path / 'all')
    assert files(tmp_path / 'all') == files(other.out)


def test_a_full_disk_while_results_are_joined(bundle):
    theirs, ours = bundle
    ran = start(jobs.with_full_disk, ['run', '--collect', str(theirs), '--out', str(ours)], '/all/masks/').wait()
    assert (ran.returncode, len(ran.stderr.splitlines())) == (7, 1), ran.stderr
    assert collect([theirs], ours).counts.done == 3
