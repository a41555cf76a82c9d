"""A run's stages on a real Ray of two processors: the same bytes as without it, whatever dies, fails or is full."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from padseg import engine
from padseg.cluster import Share
from padseg.cluster import knock
from padseg.cluster import model_from_anywhere
from padseg.cluster import on_cpu
from padseg.cluster import results_on_ray
from padseg.cluster import share
from padseg.errors import OutputConflict
from padseg.errors import UsageError
from padseg.images import Found
from padseg.job import Job
from padseg.records import Entry
from padseg.records import Run
from padseg.signals import Stop
from padseg.stages import Taken
from padseg.types import Frame
from padseg.types import TokenMaps

ray = pytest.importorskip('ray')
ROOT = Path(__file__).parent.parent
PICTURES = 50
SURROGATE = os.fsdecode(b'caf\xe9.png')  # a name that is no UTF-8

# In every process of the cluster: a disk on which nothing can be written.
FULL_DISK = """
import errno, os, sys

def hook(event, arguments):
    if event == 'open' and '/full/' in str(arguments[0]) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        raise OSError(errno.ENOSPC, 'No space left on device')

sys.addaudithook(hook)
"""

# A run of its own process: prints a line for each record, then how it ended.
DRIVER = """
import sys
from pathlib import Path
from padseg import engine
from padseg.cluster import results_on_ray
from padseg.job import Job
from padseg.signals import Stop

source, out, model, address = sys.argv[1:]
job = Job(Path(source), Path(out), model=model, device='cpu')
pending = engine.choose(job)[1]
record = engine.from_model(job)[1]
with Stop() as stop:
    for entry in results_on_ray(job, record, pending, stop, address or None):
        print(entry.status, flush=True)
print('signal', stop.signal)
"""


@pytest.fixture(scope='module')
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the processes of a Ray that is started here inherit."""
    folder = tmp_path_factory.mktemp('site')
    (folder / 'sitecustomize.py').write_text(FULL_DISK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', f'{folder}{os.pathsep}{ROOT}')
        patch.setenv('RAY_AUTH_TOKEN', secrets.token_hex(32))  # or Ray would put one in the home folder
        patch.setenv('RAY_USAGE_STATS_ENABLED', '0')
        patch.delenv('RAY_ADDRESS', raising=False)
        yield


@pytest.fixture(scope='module')
def cluster(environment: None) -> Iterator[str]:
    """The address of a Ray that runs before padseg comes and stays when it goes."""
    context = ray.init('local', num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level='ERROR')
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
    return Job(folder, tmp_path / 'ray', model=str(sd3_folder), device='cpu', batch=2, save_maps=True)


@pytest.fixture(scope='module')
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory, sd3_folder: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """What a run without Ray makes of the pictures: the digests of its files, and its records."""
    job = Job(folder, tmp_path_factory.mktemp('plain') / 'out', model=str(sd3_folder), device='cpu', save_maps=True)
    assert engine.run(job)[:4] == (PICTURES, PICTURES - 2, 0, 2)
    return digests(job.out), engine.all_entries(job.out)


def prepared(job: Job) -> tuple[Run, list[Found]]:
    return engine.from_model(job)[1], engine.choose(job)[1]


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of each result by name; a file that was left half written would be among them."""
    files = (path for path in out.rglob('*') if path.is_file() and path.parent != out)
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def timeless(entry: Entry) -> Entry:
    return entry.model_copy(update={'seconds': 0.0, 'stages': dict.fromkeys(entry.stages, 0.0)})


def test_the_same_bytes_and_records_though_every_worker_is_killed(job, plain, cluster):
    """The model's actor, and whatever reads and writes at that moment, die after the first record; each picture is recorded once."""
    record, pending = prepared(job)
    entries = []
    for entry in results_on_ray(job, record, pending, Stop()):
        if not entries:
            kill_workers()
        entries.append(entry)
    assert sorted(entry.input for entry in entries) == sorted(picture.name for picture in pending)
    engine.clean(job, pending, job.out)
    files, expected = plain
    assert digests(job.out) == files
    assert {entry.input: timeless(entry) for entry in entries} == {name: timeless(entry) for name, entry in expected.items()}
    assert ray.is_initialized()


def kill_workers() -> None:
    """Kill what works for this process now: the actor that holds the model, and tasks that read or write."""
    working = {pid: title for pid, title in titles().items() if 'Map' in title}
    assert any('Model' in title for title in working.values()), titles()
    for pid in working:
        os.kill(pid, signal.SIGKILL)


def titles() -> dict[int, str]:
    """The titles of Ray's workers below this process, by number."""
    parents, found = {}, {}
    for path in Path('/proc').glob('[0-9]*'):
        try:
            parents[int(path.name)] = int((path / 'stat').read_text().rpartition(')')[2].split()[1])
            found[int(path.name)] = (path / 'cmdline').read_bytes().rstrip(b'\0 ').decode(errors='replace')
        except OSError:
            continue  # it has ended
    return {pid: title for pid, title in found.items() if title.startswith('ray::') and os.getpid() in ancestors(pid, parents)}


def ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid := parents.get(pid, 0):
        yield pid


def driver(job: Job, address: str, then: signal.Signals) -> tuple[list[str], str, int]:
    """Start a run of its own and send its process group a signal after the first record: what it said, and its exit code."""
    command = [sys.executable, '-c', DRIVER, job.source, job.out, job.model, address]
    environment = {**os.environ, 'PADSEG_TEST': str(job.out)}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        assert process.stdout and process.stderr
        lines = [process.stdout.readline()]
        assert bool(address) == (len(started_by(job)) == 1)
        os.killpg(process.pid, then)
        lines += process.stdout.readlines()
        return lines, process.stderr.read(), process.wait()


def started_by(job: Job) -> list[Path]:
    """The processes that a driver of the job started, itself among them."""
    return [path.parent for path in Path('/proc').glob('[0-9]*/environ') if f'PADSEG_TEST={job.out}'.encode() in content(path)]


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b''


def test_sigterm_ends_a_run_on_a_cluster_and_leaves_the_cluster(job, cluster):
    lines, words, code = driver(job, cluster, signal.SIGTERM)
    assert (lines[-1], words, code) == ('signal 15\n', '', 0)
    assert 2 <= len(lines) < PICTURES
    assert ray.cluster_resources()['CPU'] == 2


def test_a_run_without_address_brings_its_own_ray_and_takes_it_away(job, environment):
    lines, words, code = driver(job, '', signal.SIGINT)
    assert (lines[-1], words, code) == ('signal 2\n', '', 0)
    assert 2 <= len(lines) < PICTURES
    assert started_by(job) == []


def test_other_weights_on_a_machine_are_refused(job, cluster):
    record, pending = prepared(job)
    other = record.model_copy(update={'settings': {**record.settings, 'weights': 'f' * 64}})
    with pytest.raises(OutputConflict, match=f'weights {"f" * 64} there, {record.settings["weights"]} now'):
        list(results_on_ray(job, other, pending, Stop()))
    assert not job.out.exists()


def test_a_full_disk_in_a_worker_is_one_in_the_run(job, cluster):
    job = job._replace(out=job.out / 'full' / 'out')
    with pytest.raises(OSError) as caught:
        list(results_on_ray(job, *prepared(job), Stop()))
    assert caught.value.errno == errno.ENOSPC
    assert type(caught.value) is OSError


def test_nothing_to_do_needs_no_ray(job, monkeypatch):
    record, pending = prepared(job)
    monkeypatch.setitem(sys.modules, 'ray', None)
    assert list(results_on_ray(job, record, [], Stop())) == []
    with pytest.raises(UsageError, match=r"needs Ray: pip install 'padseg\[ray\]'"):
        list(results_on_ray(job, record, pending, Stop()))


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
    assert share(job._replace(device=device), record, [*there, gone]) == expected


@pytest.mark.parametrize(
    ('device', 'cpus', 'words'),
    [('cuda:1', 2.0, 'the Ray cluster has no GPU for --device cuda:1'), (None, 1.0, 'fewer than two CPUs')],
)
def test_a_cluster_that_cannot_do_the_job_is_a_mistake(job, record, device, cpus, words):
    with pytest.raises(UsageError, match=words):
        share(job._replace(device=device), record, [{'Alive': True, 'Resources': {'CPU': cpus}}])


@pytest.fixture
def record(job: Job) -> Run:
    return engine.from_model(job)[1].model_copy(update={'threads': 4})


def test_a_models_folder_is_found_from_anywhere_and_names_stay(tmp_path, monkeypatch):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'tiny').mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_from_anywhere('mine') == str(tmp_path / 'mine')
    assert [model_from_anywhere(name) for name in ('tiny', 'org/name', 'org/name@main')] == ['tiny', 'org/name', 'org/name@main']


def test_maps_reach_other_processes_bit_by_bit():
    maps = torch.tensor([[[0.1, -0.0], [float('nan'), 1e-40]]])
    taken = Taken(Entry(input=SURROGATE, status='failed'), None, TokenMaps(maps, ('a',), Frame((2, 2), (0, 0, 2, 2))))
    again = pickle.loads(pickle.dumps(on_cpu(taken)))
    assert again.entry == taken.entry
    assert again.maps.maps.numpy().tobytes() == maps.numpy().tobytes()
    assert (again.maps.maps.dtype, again.maps.maps.device.type, again.maps[1:]) == (torch.float32, 'cpu', taken.maps[1:])
