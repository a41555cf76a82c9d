"""Several runs and one output folder: what they may do at a time, and what comes of joining them."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from support import jobs
from support.processes import FORKS, padseg, start
from support.runs import files

from padseg.commands import main
from padseg.errors import NoImages, OutputConflict
from padseg.methods.seg4diff import Options
from padseg.run import engine
from padseg.run.collect import collect
from padseg.run.convert import convert
from padseg.run.job import Job
from padseg.run.locks import all_records, exclusive, shared, unfinished
from padseg.run.records import read_run
from padseg.run.selection import Selection
from padseg.system.files import atomic, sweep
from padseg.system.progress import Silent

FOREIGN = 'scores.json'


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    for seed in range(9):
        path = folder / ('sub' if seed % 2 else '') / f'{seed}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 200, (2, 2, 3)).repeat(20, 0).repeat(24, 1)
        PIL.Image.fromarray((coarse + rng.integers(0, 30, coarse.shape)).astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def job(source, tmp_path, sd3_folder):
    return Job(source, tmp_path / 'out', model=str(sd3_folder), device='cpu')


@pytest.fixture(scope='module')
def whole(source, sd3_folder, tmp_path_factory):
    """The output of one run over all pictures."""
    out = tmp_path_factory.mktemp('whole') / 'out'
    engine.run(Job(source, out, model=str(sd3_folder), device='cpu'))
    return out


def part(job: Job, i: int, n: int) -> Job:
    return job._replace(selection=Selection(shard=(i, n)))


def alike(out: Path) -> list[dict]:
    """The manifest but for times."""
    entries = [json.loads(line) for line in (out / 'manifest.jsonl').read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in ('seconds', 'stages')} for entry in entries]


def test_shards_joined_are_one_run(job, whole):
    counts = [engine.run(part(job, i, 3)) for i in (1, 2, 3)]
    assert sum(each.images for each in counts) == 9 and max(each.images for each in counts) < 9
    assert not (job.out / 'manifest.jsonl').exists()
    assert {name: record.status for name, record in all_records(job.out).items()} == {entry['input']: 'done' for entry in alike(whole)}
    joined = collect([job.out], job.out)
    assert (joined.missing, joined.counts[:4]) == ([], (9, 9, 9, 0))
    assert (files(job.out), alike(job.out)) == (files(whole), alike(whole))
    record, expected = read_run(job.out / 'run.json'), read_run(whole / 'run.json')
    assert (record.status, record.settings, record.counts.done) == ('finished', expected.settings, 9)
    assert not (job.out / 'shards').exists()
    assert engine.run(job).skipped == 9


def test_a_run_without_shards_joins_them_too(job, whole):
    engine.run(part(job, 1, 2))
    done = len(all_records(job.out))
    assert engine.run(job).skipped == done
    assert (files(job.out), alike(job.out)) == (files(whole), alike(whole))
    assert not (job.out / 'shards').exists()


def test_results_of_shards_can_be_exported_before_they_are_joined(job):
    engine.run(part(job, 1, 2))
    engine.run(part(job, 2, 2))
    assert convert(job.out, 'coco').pictures == 9


def test_another_number_of_shards_continues(job, whole):
    engine.run(part(job, 1, 2))
    done = len(all_records(job.out))
    assert sum(engine.run(part(job, i, 3)).skipped for i in (1, 2, 3)) == done
    assert collect([job.out], job.out).missing == []
    assert (files(job.out), alike(job.out)) == (files(whole), alike(whole))


def test_a_missing_shard_is_named(job):
    engine.run(part(job, 2, 4))
    assert unfinished([job.out]) == ['1/4', '3/4', '4/4']
    ran = padseg('run', '--collect', job.out, '-q', '--json')
    assert ran.returncode == 3
    assert ran.stderr == 'no finished run was found for the shards 1/4, 3/4, 4/4\n'
    assert json.loads(ran.stdout)['done'] == len(alike(job.out))
    for i in (1, 3, 4):
        engine.run(part(job, i, 4))
    assert main(['run', '--collect', '--out', str(job.out)]) == 0
    assert len(alike(job.out)) == 9


def test_output_folders_of_several_machines(job, whole, tmp_path):
    for i in (1, 2, 3):
        engine.run(part(job, i, 3)._replace(out=tmp_path / f'out-{i}'))
    folders = [tmp_path / f'out-{i}' for i in (1, 2, 3)]
    assert main(['run', '--collect', *map(str, folders)]) == 2
    for _ in range(2):
        assert main(['run', '--collect', *map(str, folders), '--out', str(job.out), '-q']) == 0
        assert (files(job.out), alike(job.out)) == (files(whole), alike(whole))
    assert all((folder / 'labels').is_dir() for folder in folders)
    path = next((folders[0] / 'labels').rglob('*.png'))
    (job.out / path.relative_to(folders[0])).unlink()
    shutil.rmtree(job.out / 'masks')
    collect(folders, job.out)
    assert files(job.out) == files(whole)


def test_what_cannot_be_joined(job, tmp_path):
    job = job._replace(source=shutil.copytree(job.source, tmp_path / 'in'))
    one, two = (job._replace(out=tmp_path / name) for name in ('one', 'two'))
    engine.run(one)
    with pytest.raises(NoImages, match='no results of `padseg run` in .*two'):
        collect([one.out, two.out], tmp_path / 'all')
    engine.run(two._replace(options=Options(threshold=0.3)))
    with pytest.raises(OutputConflict, match=r'two holds results made with other settings \(threshold 0\.1 there, 0\.3 now\)|threshold'):
        collect([one.out, two.out], tmp_path / 'all')
    shutil.copy(job.source / '0.png', job.source / '2.png')
    engine.run(two._replace(overwrite=True))
    with pytest.raises(OutputConflict, match='different pictures named 2.png'):
        collect([one.out, two.out], tmp_path / 'all')


def test_runs_at_a_time(job, whole):
    """Real processes: the shards of one number run side by side, all others are refused while one is there."""
    lines = [FORKS.Pipe() for _ in range(2)]
    running = [start(jobs.held, part(job, i, 2), theirs) for i, (_, theirs) in enumerate(lines, start=1)]
    assert [ours.recv() for ours, _ in lines] == ['ready', 'ready']
    with pytest.raises(OutputConflict, match='shard 1/2 is writing to'):
        engine.run(job)
    with pytest.raises(OutputConflict, match='another run of shard 2/2 is writing'):
        engine.run(part(job, 2, 2))
    with pytest.raises(OutputConflict, match='shard 1/2 is writing to .* only shards of the same N'):
        engine.run(part(job, 1, 3))
    with pytest.raises(OutputConflict, match='is writing to'):
        collect([job.out], job.out)
    for ours, _ in lines:
        ours.send('go on')
    assert [process.wait().returncode for process in running] == [0, 0]
    assert collect([job.out], job.out).missing == []
    assert (files(job.out), alike(job.out)) == (files(whole), alike(whole))


def test_a_shard_of_other_settings_is_refused(job):
    engine.run(part(job, 1, 2))
    for change in ({}, {'overwrite': True}):
        with pytest.raises(OutputConflict, match=r'threshold 0\.1 there, 0\.3 now'):
            engine.run(part(job, 2, 2)._replace(options=Options(threshold=0.3), **change))
    before = files(job.out)
    counts = engine.run(part(job, 1, 2)._replace(overwrite=True))
    assert (counts.skipped, counts.done) == (0, counts.images) and files(job.out) == before


def test_locks(tmp_path):
    out = tmp_path / 'out'
    with shared(out, (1, 2), FOREIGN), shared(out, (2, 2), FOREIGN):
        for other in (exclusive(out, FOREIGN), shared(out, (1, 2), FOREIGN), shared(out, (1, 3), FOREIGN)):
            with pytest.raises(OutputConflict), other:
                pass
    with exclusive(out, FOREIGN), pytest.raises(OutputConflict, match='another run'), exclusive(out, FOREIGN):
        pass
    with shared(out, (1, 3), FOREIGN):  # those of two have ended
        pass
    (out / FOREIGN).write_text('')
    for foreign in (exclusive(out, FOREIGN), shared(out, (1, 2), FOREIGN)):
        with pytest.raises(OutputConflict, match='results of another command'), foreign:
            pass


def half_written(path: Path) -> Path:
    """The temporary file that a killed run would leave of this one."""
    with contextlib.suppress(SystemExit), atomic(path) as temporary:
        temporary.write_text('half')
        left = temporary.rename(f'{temporary}-kept')
        raise SystemExit
    return left


def test_a_shard_sweeps_up_only_after_itself(tmp_path):
    """A killed run leaves temporary files; those of a run that lives beside it have to stay."""
    left = {name: half_written(tmp_path / name) for name in ('mine.png', 'theirs.png')}
    folder = tmp_path / 'folder'
    folder.mkdir()
    sweep(tmp_path, {'mine.png'})
    assert sorted(tmp_path.iterdir()) == sorted([left['theirs.png'], folder])
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize('stopped', [1, 4])
def test_a_killed_shard_is_continued_beside_another(job, whole, stopped):
    engine.run(part(job, 2, 2))
    assert start(jobs.killed, part(job, 1, 2), stopped).wait().returncode == -signal.SIGKILL
    assert unfinished([job.out]) == ['1/2']
    again = engine.run(part(job, 1, 2), Silent())
    assert again.skipped == stopped
    assert collect([job.out], job.out).missing == []
    assert (files(job.out), alike(job.out)) == (files(whole), alike(whole))
    assert not list(job.out.rglob('.padseg-*'))
