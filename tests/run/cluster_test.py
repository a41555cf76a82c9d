"""A run's stages on a real Ray: the same bytes as without it, whatever dies, fails or is full."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from support.jobs import connect_to
from support.processes import start

from padseg.commands import main
from padseg.errors import OutputConflict, ResourceExhausted, UsageError
from padseg.images import Found
from padseg.methods import METHODS
from padseg.run import engine, prepare
from padseg.run.cluster import Actor, Share, cluster_share, job_from_anywhere, knock, model_from_anywhere, without_torch
from padseg.run.collect import collect
from padseg.run.job import Job
from padseg.run.picture import Taken
from padseg.run.plan import choose
from padseg.run.records import Entry, Run
from padseg.run.selection import Selection, parse_shard
from padseg.system.progress import Silent
from padseg.types import Frame, TokenMaps

ray = pytest.importorskip('ray')
ROOT = Path(__file__).parents[2]
PICTURES = 24  # two of them are none
DOCS = (ROOT / 'docs' / 'cluster.md').read_text(encoding='utf-8')
BAD = ('bad.jpg', 'text.png')
SURROGATE = os.fsdecode(b'caf\xe9.png')  # a name that is no UTF-8

# In every process of the cluster: a disk on which nothing can be written, and a sudden death in the middle of work, once for every
# file of that name beside this module. Audit events tell what a process does: readers unpickle Found, the model's actor and writers Taken.
FAULTS = """
import collections, errno, os, signal, sys

seen = collections.Counter()

def hook(event, arguments):
    if event == 'open' and '/full/' in str(arguments[0]) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        raise OSError(errno.ENOSPC, 'No space left on device')
    if event == 'pickle.find_class' and arguments[1] in ('Found', 'Taken'):
        import ray
        actor = ray.get_runtime_context().get_actor_id()
        name = 'reader' if arguments[1] == 'Found' else 'actor' if actor else 'writer'
        seen[name] += 1
        if seen[name] % 4 == 0:
            die(name)

def die(name):
    try:
        os.unlink(os.path.join(os.path.dirname(__file__), name))
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
"""


@pytest.fixture(scope='module')
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the processes of a Ray that is started here inherit. The folder of FAULTS."""
    folder = tmp_path_factory.mktemp('site')
    (folder / 'sitecustomize.py').write_text(FAULTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', f'{folder}{os.pathsep}{ROOT}')
        patch.setenv('RAY_AUTH_TOKEN', secrets.token_hex(32))  # or Ray would put one in the home folder
        patch.setenv('RAY_USAGE_STATS_ENABLED', '0')
        patch.setenv('RAY_worker_niceness', '0')  # not behind the other tests, as it would be by default
        patch.delenv('RAY_ADDRESS', raising=False)
        yield folder


@pytest.fixture(scope='module')
def cluster(environment: Path) -> Iterator[str]:
    """The address of a Ray that runs before padseg comes and stays when it goes."""
    # a third processor, since the actor of a run that failed keeps one for a while
    context = ray.init('local', num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level='ERROR')
    yield context.address_info['address']
    ray.shutdown()


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several sizes, in blocks of a few, one of them with a name that is no UTF-8; and two files that are no pictures."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for number in range(PICTURES - 3):
        path = folder / ('sub' if number % 5 == 0 else '.') / f'{number:02}.png'
        path.parent.mkdir(exist_ok=True)
        put_picture(path, (200 + number, 420 - number), rng)
    put_picture(folder / SURROGATE, (40, 30), rng)
    (folder / 'bad.jpg').write_bytes(b'')
    (folder / 'text.png').write_text('no picture')
    return folder


def put_picture(path: Path, size: tuple[int, int], rng: np.random.Generator) -> None:
    coarse = rng.integers(0, 200, (3, 3, 3)).repeat(-(-size[0] // 3), 0).repeat(-(-size[1] // 3), 1)[: size[0], : size[1]]
    PIL.Image.fromarray((coarse + rng.integers(0, 30, coarse.shape)).astype(np.uint8)).save(path)


@pytest.fixture
def job(folder: Path, tmp_path: Path, sd3_folder: Path) -> Job:
    return Job(folder, tmp_path / 'ray', model=str(sd3_folder), device='cpu', batch=2, save_maps=True, engine='ray')


@pytest.fixture
def quick(job: Job) -> Job:
    """A job without a model, whose libraries take seconds to import in every process."""
    return job._replace(method='grid', options=METHODS['grid'].Options(), save_maps=False)


@pytest.fixture(scope='module')
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory, sd3_folder: Path) -> Path:
    """The output of a run without Ray."""
    job = Job(folder, tmp_path_factory.mktemp('plain') / 'out', model=str(sd3_folder), device='cpu', save_maps=True)
    assert engine.run(job)[:4] == (PICTURES, PICTURES - 2, 0, 2)
    return job.out


def prepared(job: Job) -> tuple[Run, list[Found]]:
    return prepare.from_model(job)[1], choose(job)[1]


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of each result by name; a file that was left half written would be among them."""
    files = (path for path in out.rglob('*') if path.is_file() and path.parent != out)
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def timeless(out: Path) -> list[dict[str, object]]:
    """The lines of the manifest, without what differs from run to run."""
    entries = [json.loads(line) for line in (out / 'manifest.jsonl').read_text().splitlines()]
    return [{**entry, 'seconds': 0, 'stages': sorted(entry['stages'])} for entry in entries]


def test_shards_make_the_same_bytes_and_records(job, plain):
    for number in (3, 1, 2):
        engine.run(job._replace(engine='local', selection=Selection(shard=(number, 3))))
    assert collect([job.out], job.out).missing == []
    assert digests(job.out) == digests(plain)
    assert timeless(job.out) == timeless(plain)


class Counting(Silent):
    pictures = 0

    def step(self, record: Mapping[str, Any] | None = None) -> None:
        self.pictures += 1


@pytest.mark.slow
def test_with_workers_killed_a_run_ends_with_the_same_bytes_and_records(job, plain, cluster, environment, monkeypatch):
    """One of the processes that read and one of those that write die in the middle of it."""
    mortal = [environment / name for name in ('reader', 'writer')]
    for path in mortal:
        path.touch()
    progress = Counting()
    assert engine.run(job, progress)[:4] == (PICTURES, PICTURES - 2, 0, 2)
    assert not any(path.exists() for path in mortal)
    assert progress.pictures == PICTURES
    assert digests(job.out) == digests(plain)
    assert timeless(job.out) == timeless(plain)
    assert ray.is_initialized()

    monkeypatch.setitem(sys.modules, 'ray', None)  # nothing is left to do, and so nothing is imported
    assert engine.run(job._replace(retry_failed=False)).skipped == PICTURES


def test_a_cluster_is_used_by_its_address_and_stays(job, cluster):
    ran = start(connect_to, job, cluster).wait()
    assert (ran.returncode, ran.stdout) == (0, '3.0\n'), ran.stderr
    assert ray.cluster_resources()['CPU'] == 3


def stopped(job: Job, number: signal.Signals) -> tuple[list[dict[str, Any]], int]:
    """Run `padseg run` and send its process group a signal after the first picture: its events, and its exit code."""
    given = ('--dir', job.source, '--out', job.out, '--method', job.method)
    engine = ('--engine', 'ray', '--log-json')
    fifo = job.out.with_name('events')
    os.mkfifo(fifo)
    running = start(main, ['run', *map(str, given), *engine], stderr=fifo, group=True, PADSEG_TEST=str(job.out))
    events: list[dict[str, Any]] = []
    with fifo.open(encoding='utf-8') as lines, contextlib.ExitStack() as whatever_happens:
        whatever_happens.callback(running.process.kill)
        for line in lines:
            events.append(json.loads(line))
            if [event['event'] for event in events].count('picture') == 1 and events[-1]['event'] == 'picture':
                others = [path for path in started_by(job) if b'padseg.images.worker' not in content(path / 'cmdline')]  # which decodes
                assert others != []
                os.killpg(running.process.pid, number)
        return events, running.wait().returncode


def started_by(job: Job) -> list[Path]:
    """The processes that a driver of the job started."""
    return [path.parent for path in Path('/proc').glob('[0-9]*/environ') if f'PADSEG_TEST={job.out}'.encode() in content(path)]


def has_ended(path: Path) -> bool:
    """Whether a process of /proc is gone, or goes in a while: Ray's processes see to the end of one another."""
    try:
        process = os.pidfd_open(int(path.name))
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 60)[0])
    finally:
        os.close(process)


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b''


@pytest.mark.slow
def test_a_run_without_address_brings_its_own_ray_and_takes_it_away(quick, cluster, environment, tmp_path):
    """Stopped after its first picture; then continued on a cluster, where the actor dies, with the results of a run without Ray."""
    events, code = stopped(quick, signal.SIGINT)  # as Ctrl-C sends it to the whole group; Ray's own processes would not survive SIGTERM
    assert (code, events[-1].get('signal')) == (130, 2), events[-1]
    done = [event['input'] for event in events if event['event'] == 'picture']
    assert 0 < len(done) < PICTURES
    assert all(has_ended(path) for path in started_by(quick))

    (environment / 'actor').touch()
    counts = engine.run(quick)
    assert not (environment / 'actor').exists()
    assert counts[:4] == (PICTURES, PICTURES - 2, len([name for name in done if name not in BAD]), 2)
    local = quick._replace(out=tmp_path / 'local', engine='local')
    engine.run(local)
    assert digests(quick.out) == digests(local.out)
    assert timeless(quick.out) == timeless(local.out)


@pytest.mark.slow
def test_too_many_failures_end_a_run(quick, cluster):
    counts = engine.run(quick._replace(max_failures=0, selection=Selection(include=(*BAD, '1*.png'))))
    assert counts.failed == 1


def test_other_weights_on_a_machine_are_refused(job):
    record, _ = prepared(job)
    other = record.model_copy(update={'settings': {**record.settings, 'weights': 'f' * 64}})
    with pytest.raises(OutputConflict, match=f'weights {"f" * 64} there, {record.settings["weights"]} now'):
        assert Actor(job, other, 'cpu').stages


@pytest.mark.slow
def test_a_full_disk_in_a_worker_is_one_in_the_run(quick, cluster):
    job = quick._replace(out=quick.out / 'full' / 'out')
    with pytest.raises(ResourceExhausted, match='No space left on device'):
        engine.run(job)
    assert list(job.out.rglob('*.png')) == []


def test_without_ray_installed_it_says_what_to_install(job, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(UsageError, match=r"needs Ray: pip install 'padseg\[ray\]'"):
        engine.run(job)


@pytest.mark.parametrize('address', ['127.0.0.1:1', 'nowhere.invalid:6379'])
def test_an_address_where_nobody_listens_is_a_mistake(address):
    with pytest.raises(UsageError, match=f'no Ray cluster answers at {address}'):
        knock(address)


@pytest.mark.parametrize(
    ('device', 'nodes', 'expected'),
    [
        (None, [{'CPU': 16.0, 'GPU': 2.0}, {'CPU': 4.0}, {'CPU': 8.0, 'GPU': 1.0}], Share(3, 'cuda', 0, 1)),
        ('cuda', [{'CPU': 16.0, 'GPU': 2.0}], Share(2, 'cuda', 0, 1)),
        ('cpu', [{'CPU': 16.0, 'GPU': 2.0}], Share(3, 'cpu', 4, 0)),
        (None, [{'CPU': 5.0}], Share(1, 'cpu', 4, 0)),
        (None, [{'CPU': 2.0}], Share(1, 'cpu', 1, 0)),
        (None, [{'CPU': 1.0}, {'CPU': 1.0}], Share(1, 'cpu', 1, 0)),
        (None, [{}, {'CPU': 10.0}, {'CPU': 4.0}], Share(2, 'cpu', 4, 0)),
    ],
)
def test_how_a_cluster_is_used(device, nodes, expected, job, record):
    """By a driver whose torch uses four threads."""
    there = [{'Alive': True, 'Resources': each} for each in nodes]
    gone = {'Alive': False, 'Resources': {'CPU': 64.0, 'GPU': 8.0}}
    assert cluster_share(job._replace(device=device), record, [*there, gone]) == expected


@pytest.mark.parametrize(
    ('device', 'cpus', 'words'),
    [('cuda:1', 2.0, 'the Ray cluster has no GPU for --device cuda:1'), (None, 1.0, 'fewer than two CPUs')],
)
def test_a_cluster_that_cannot_do_the_job_is_a_mistake(job, record, device, cpus, words):
    with pytest.raises(UsageError, match=words):
        cluster_share(job._replace(device=device), record, [{'Alive': True, 'Resources': {'CPU': cpus}}])


@pytest.fixture
def record(job: Job) -> Run:
    return prepare.from_model(job)[1].model_copy(update={'threads': 4})


def test_a_models_folder_is_found_from_anywhere_and_names_stay(tmp_path, monkeypatch):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'tiny').mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_from_anywhere('mine') == str(tmp_path / 'mine')
    assert [model_from_anywhere(name) for name in ('tiny', 'org/name', 'org/name@main')] == ['tiny', 'org/name', 'org/name@main']


def test_a_job_with_relative_paths_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / 'vae').mkdir()
    (tmp_path / 'tiny').mkdir()
    monkeypatch.chdir(tmp_path)
    found = job_from_anywhere(Job(tmp_path, Path('out'), vae='vae', lora='mine.safetensors'))
    assert (found.out, found.model) == (tmp_path / 'out', 'tiny')
    assert (found.vae, found.lora) == (str(tmp_path / 'vae'), str(tmp_path / 'mine.safetensors'))
    assert job_from_anywhere(Job(tmp_path, Path('out'), vae='tiny')).vae == 'tiny'
    assert job_from_anywhere(Job(tmp_path, Path('out')))[:2] == (tmp_path, tmp_path / 'out')


def test_maps_reach_other_processes_bit_by_bit():
    maps = torch.tensor([[[0.1, -0.0], [float('nan'), 1e-40]]])
    own = TokenMaps(maps, ('a',), Frame((2, 2), (0, 0, 2, 2)))
    taken = Taken(Entry(input=SURROGATE, status='failed'), None, maps=own)
    pickled = pickle.dumps(without_torch(taken))
    again = pickle.loads(pickled)
    assert again.entry == taken.entry and b'torch' not in pickled
    assert (again.maps.maps.tobytes(), again.maps.maps.dtype, again.maps[1:]) == (maps.numpy().tobytes(), np.float32, taken.maps[1:])


def blocks(language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```$', DOCS, re.MULTILINE | re.DOTALL)


def test_the_jobs_in_the_docs_do_every_shard_once():
    spec = yaml.safe_load(blocks('yaml')[0])['spec']
    (command,) = spec['template']['spec']['containers'][0]['args']
    shards = [shard_of(command, JOB_COMPLETION_INDEX=str(index)) for index in range(spec['completions'])]
    assert shards == [(i, len(shards)) for i in range(1, len(shards) + 1)]
    (slurm,) = (block for block in blocks('sh') if '#SBATCH --array' in block)
    first, last = map(int, re.findall(r'--array=(\d+)-(\d+)', slurm)[0])
    shards = [shard_of(slurm, SLURM_ARRAY_TASK_ID=str(index)) for index in range(first, last + 1)]
    assert shards == [(i, last) for i in range(1, last + 1)]


def shard_of(command: str, **environment: str) -> tuple[int, int] | None:
    """The shard that a shell makes of a command."""
    word = re.findall(r'--shard ("[^"]+"|\S+ \+ \S+)', command)[0]
    return parse_shard(subprocess.run(['bash', '-ec', f'echo {word}'], env=environment, capture_output=True, text=True).stdout.strip())


@pytest.mark.parametrize('block', blocks('sh'))
def test_shell_lines_in_the_docs_can_be_parsed(block):
    ran = subprocess.run(['bash', '-n'], input=block, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, '')


def test_sizes_in_the_docs_are_what_their_formula_gives():
    table = DOCS[DOCS.index('| pictures a second and GPU |') :].split('\n\n')[0].splitlines()
    gpus = [int(found) for found in re.findall(r'(\d+) GPU', table[0].replace('and GPU', ''))]
    rates = {float(row.split('|')[1]): re.findall(r'[\d.]+', row)[1:] for row in table[2:]}
    assert len(rates) == 3 and len(gpus) == 3
    for rate, hours in rates.items():
        assert hours == [f'{1e6 / (rate * number * 3600):.1f}' for number in gpus]
    assert f'{1e6 / (5 * 3600 * 8):.1f}, so {math.ceil(1e6 / (5 * 3600 * 8))} GPUs' in DOCS


def test_the_lines_for_sizing_run_on_a_manifest(plain):
    ran = subprocess.run([sys.executable, '-c', *blocks('python')], cwd=plain.parent, capture_output=True, text=True)
    entries = [json.loads(line) for line in (plain / 'manifest.jsonl').read_text().splitlines()]
    done = [entry for entry in entries if entry['status'] == 'done']
    rate = len(done) / sum(entry['stages']['segment'] + entry['stages']['labels'] for entry in done)
    files = len(list((plain / 'labels').rglob('*.png'))) + len(list((plain / 'masks').rglob('*'))) - 1  # sub/ is not of a picture
    expected = f'{rate:.1f} pictures a second .* fed by [\\d.]+ cores; {files / len(done):.0f} files'
    assert re.match(expected, ran.stdout), (expected, ran.stdout, ran.stderr)
