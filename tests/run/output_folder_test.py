"""Output folders with links, pipes or strange shards in them, and a read-only one."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from support import jobs
from support.processes import start
from support.runs import put_picture

from padseg.errors import OutputConflict
from padseg.run import engine
from padseg.run.collect import collect
from padseg.run.convert import convert
from padseg.run.locks import shard_homes
from padseg.run.selection import Selection


@pytest.mark.parametrize('links', [False, True])
def test_strange_folders_of_shards(job, links):
    engine.run(job._replace(selection=Selection(shard=(1, 1))))
    for name in ('0-of-2', '3-of-2', '1-of-99999999999', '²-of-3', '01-of-2'):
        shutil.copytree(job.out / 'shards' / '1-of-1', job.out / 'shards' / name)
    (job.out / 'shards' / '2-of-2').symlink_to(job.source)
    assert shard_homes(job.out).keys() == {(1, 1)}
    if links:
        (job.out / 'shards').rename(job.out / 'theirs')
        (job.out / 'shards').symlink_to('theirs')
        with pytest.raises(OutputConflict, match='link'):
            engine.run(job)
    else:
        assert engine.run(job).skipped == 3


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'link'])
@pytest.mark.parametrize('record', ['run.json', 'manifest.jsonl', 'failures.jsonl'])
def test_records_that_are_no_files(job, tmp_path, kind, record):
    engine.run(job)
    (job.out / record).unlink()
    if kind == 'folder':
        (job.out / record).mkdir()
    elif kind == 'pipe':
        os.mkfifo(job.out / record)
    else:
        (tmp_path / 'precious').write_text('precious')
        (job.out / record).symlink_to(tmp_path / 'precious')
    put_picture(job.source / 'new.png')
    for attempt in (job, job._replace(overwrite=True), job._replace(selection=Selection(shard=(1, 2)))):
        with pytest.raises(OutputConflict, match=record):
            engine.run(attempt)
    with pytest.raises(OutputConflict, match=record):
        collect([job.out], job.out)
    if record != 'failures.jsonl':
        with pytest.raises(OutputConflict, match=record):
            convert(job.out, 'coco')
    assert kind != 'link' or (tmp_path / 'precious').read_text() == 'precious'


@pytest.mark.parametrize('place', ['labels', 'masks', 'labels/sub'])
def test_results_are_not_written_through_links(job, tmp_path, place):
    (tmp_path / 'elsewhere').mkdir()
    (job.out / place).parent.mkdir(parents=True)
    (job.out / place).symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(OutputConflict, match='is a link'):
        engine.run(job)
    assert not list((tmp_path / 'elsewhere').iterdir())


@pytest.fixture
def for_all():
    """A folder that other users can read, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_an_output_folder_that_is_read_only(job, for_all):
    job = job._replace(source=shutil.copytree(job.source, for_all / 'in'), out=for_all / 'out')
    engine.run(job)
    job.out.chmod(0o555)
    grid = ('--dir', str(job.source), '--out', str(job.out), '--method', 'grid', '--cells', '2')
    for arguments in (('run', *grid), ('run', *grid, '--overwrite'), ('run', '--collect', str(job.out)), ('run', *grid, '--shard', '1/2')):
        ran = start(jobs.as_nobody, arguments).wait()
        assert (ran.returncode, len(ran.stderr.splitlines())) == (6, 1), ran.stderr
        assert ran.stderr.startswith('padseg: cannot write to ')
    job.out.chmod(0o755)
