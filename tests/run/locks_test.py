"""Several runs and one output folder: what they may do at a time, and what comes of joining them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

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

ROOT = Path(__file__).parents[2]
FOREIGN = 'scores.json'


@pytest.fixture
def job(tmp_path, sd3_folder):
    for seed in range(9):
        path = tmp_path / 'in' / ('sub' if seed % 2 else '') / f'{seed}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 200, (2, 2, 3)).repeat(20, 0).repeat(24, 1)
        PIL.Image.fromarray((coarse + rng.integers(0, 30, coarse.shape)).astype(np.uint8)).save(path)
    return Job(tmp_path / 'in', tmp_path / 'out', model=str(sd3_folder), device='cpu')


def part(job: Job, i: int, n: int) -> Job:
    return job._replace(selection=Selection(shard=(i, n)))


def files(out: Path) -> dict[str, bytes]:
    """Name and bytes of all that a run wrote but for its records."""
    paths = [path for path in out.rglob('*') if path.is_file() and path.parent != out and 'shards' not in path.parts]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def alike(out: Path) -> list[dict]:
    """The manifest but for times."""
    entries = [json.loads(line) for line in (out / 'manifest.jsonl').read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in ('seconds', 'stages')} for entry in entries]


@pytest.fixture
def whole(job, tmp_path):
    engine.run(job._replace(out=tmp_path / 'whole'))
    return tmp_path / 'whole'


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
    command = [sys.executable, '-m', 'padseg', 'run', '--collect', job.out, '-q', '--json']
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 3
    assert ran.stderr == 'no finished run was found of the shards 1/4, 3/4, 4/4\n'
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
    one, two = (job._replace(out=tmp_path / name) for name in ('one', 'two'))
    engine.run(one)
    with pytest.raises(NoImages, match='no results of `padseg run` in .*two'):
        collect([one.out, two.out], tmp_path / 'all')
    engine.run(two._replace(options=Options(threshold=0.3)))
    with pytest.raises(OutputConflict, match=r'two holds results of other settings \(threshold 0\.1 there, 0\.3 now\)|threshold'):
        collect([one.out, two.out], tmp_path / 'all')
    shutil.copy(job.source / '0.png', job.source / '2.png')
    engine.run(two._replace(overwrite=True))
    with pytest.raises(OutputConflict, match='different pictures of the name 2.png'):
        collect([one.out, two.out], tmp_path / 'all')


def test_runs_at_a_time(job, whole):
    """Real processes: the shards of one number run side by side, all others are refused while one is there."""
    program = (
        'import sys; from pathlib import Path; from padseg.run import engine; from padseg.run.job import Job\n'
        'from padseg.system.progress import Silent; from padseg.run.selection import Selection\n'
        'class Wait(Silent):\n'
        '    def start(self, total):\n'
        '        print("ready", flush=True); sys.stdin.readline()\n'
        'source, out, model, i, n = sys.argv[1:]\n'
        'job = Job(Path(source), Path(out), model=model, device="cpu", selection=Selection(shard=(int(i), int(n))))\n'
        'engine.run(job, Wait())\n'
    )
    arguments = [sys.executable, '-c', program, job.source, job.out, job.model]
    options = {'cwd': ROOT, 'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
    running = [subprocess.Popen([*arguments, str(i), '2'], **options) for i in (1, 2)]
    assert [process.stdout.readline() for process in running] == ['ready\n', 'ready\n']
    with pytest.raises(OutputConflict, match='shard 1/2 is writing to'):
        engine.run(job)
    with pytest.raises(OutputConflict, match='another run of shard 2/2 is writing'):
        engine.run(part(job, 2, 2))
    with pytest.raises(OutputConflict, match='shard 1/2 is writing to .* shards of one number only'):
        engine.run(part(job, 1, 3))
    with pytest.raises(OutputConflict, match='is writing to'):
        collect([job.out], job.out)
    for process in running:
        process.stdin.write('\n')
        process.stdin.flush()
    assert [process.wait() for process in running] == [0, 0]
    for process in running:
        process.stdin.close()
        process.stdout.close()
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


def test_a_shard_sweeps_up_only_after_itself(tmp_path):
    """A killed run leaves temporary files; those of a run that lives beside it have to stay."""
    left = {}
    for name in ('mine.png', 'theirs.png'):
        with pytest.raises(SystemExit), atomic(tmp_path / name) as temporary:
            temporary.write_text('half')
            left[name] = tmp_path / f'{temporary.name}-kept'
            temporary.rename(left[name])
            raise SystemExit
    folder = tmp_path / 'folder'
    folder.mkdir()
    sweep(tmp_path, {'mine.png'})
    assert sorted(tmp_path.iterdir()) == sorted([left['theirs.png'], folder])
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize('stopped', [1, 4])
def test_a_killed_shard_is_continued_beside_another(job, whole, stopped):
    program = (
        'import os, sys; from pathlib import Path; from padseg.run import engine; from padseg.run.job import Job\n'
        'from padseg.system.progress import Silent; from padseg.run.selection import Selection\n'
        'class Kill(Silent):\n'
        '    seen = 0\n'
        '    def step(self, record=None):\n'
        '        self.seen += 1\n'
        f'        if self.seen == {stopped}: os.kill(os.getpid(), 9)\n'
        'source, out, model = sys.argv[1:]\n'
        'engine.run(Job(Path(source), Path(out), model=model, device="cpu", selection=Selection(shard=(1, 2))), Kill())\n'
    )
    engine.run(part(job, 2, 2))
    killed = subprocess.run([sys.executable, '-c', program, job.source, job.out, job.model], cwd=ROOT, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert unfinished([job.out]) == ['1/2']
    again = engine.run(part(job, 1, 2), Silent())
    assert again.skipped == stopped
    assert collect([job.out], job.out).missing == []
    assert (files(job.out), alike(job.out)) == (files(whole), alike(whole))
    assert not list(job.out.rglob('.padseg-*'))
