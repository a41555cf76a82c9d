"""Run the stages on Ray, on one machine or many: tasks read pictures, actors holding the model segment them, tasks write results."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
import re
import signal
import socket
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from padseg.backbones.source import SMALL_VAE
from padseg.backbones.spec import BACKBONES
from padseg.errors import OutputConflict, ResourceExhausted, UsageError
from padseg.images import Found
from padseg.methods import method_named
from padseg.run.job import Job
from padseg.run.picture import Stages, Taken, labelled, mapped, save, take
from padseg.run.prepare import prepared_for, settings_of_model, stages_of
from padseg.run.records import Entry, Run
from padseg.system.ledger import differences, line
from padseg.system.signals import Stop

if TYPE_CHECKING:
    import pyarrow
    import ray.data

# Ray moves blocks of rows. Each row is a pickled picture: Arrow strings cannot hold all file names, nor Arrow tensors all shapes.
RayRow = dict[str, bytes]
BLOCK_PICTURES = 64  # read by one task
BLOCK_BYTES = 1 << 20  # between stages, per picture in a batch; small, so that records come early and little is repeated after a failure


class Share(NamedTuple):
    """How to use a cluster: the number of copies of the model, and the device, cpus and gpus of each."""

    copies: int
    device: str
    cpus: int
    gpus: int


def results_on_ray(job: Job, record: Run, pending: list[Found], stop: Stop, address: str | None = None) -> Iterator[Entry]:
    """Process pictures on the Ray cluster at `address`, else $RAY_ADDRESS, else on this machine; yields records as pictures are finished.

    All machines need padseg, the pictures and the output folder at the same paths. Raises OutputConflict if a machine loads other weights
    than `record` names, UsageError if Ray or the cluster is missing, ResourceExhausted if memory or disk space ran out; errors in a stage
    are raised unchanged.
    """
    if not pending:
        return
    with connected(job, record, address):
        import ray

        job = job_from_anywhere(job)
        try:
            for row in dataset(job, record, pending, cluster_share(job, record, ray.nodes())).iter_rows():
                yield Entry.model_validate(json.loads(row['entry']))
                if stop.asked:
                    return
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except (ray.exceptions.OutOfMemoryError, ray.exceptions.OutOfDiskError) as error:
            raise ResourceExhausted('a machine of the Ray cluster ran out of memory or disk space; finished pictures are kept') from error


@contextlib.contextmanager
def connected(job: Job, record: Run, address: str | None) -> Iterator[None]:
    """Use Ray if it is already running, else start it for this run and shut it down afterwards."""
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    os.environ.setdefault('RAY_BACKEND_LOG_LEVEL', 'fatal')  # its C++ part would print warnings caused by Ray Data itself
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError("--engine ray needs Ray: pip install 'padseg[ray]'") from error
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get('RAY_ADDRESS') or 'local'
    # one model takes all cores that torch uses; other cores feed it
    own: dict[str, Any] = {'num_cpus': record.threads + job.workers, 'include_dashboard': False} if address == 'local' else {}
    asked = signal.getsignal(signal.SIGTERM)
    knock(address)
    try:
        with hushed():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except ConnectionError as error:
        raise UsageError(f'no Ray cluster answers at {address}') from error
    except ray.exceptions.AuthenticationError as error:
        raise UsageError(f'the Ray cluster at {address} needs a token in RAY_AUTH_TOKEN or ~/.ray/auth_token') from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, asked)  # Ray installs its own handler, which would end the process at once
    try:
        yield
    finally:
        ray.shutdown()


def knock(address: str) -> None:
    """Raise UsageError if nothing listens at host:port; Ray itself would keep trying for many minutes."""
    if match := re.fullmatch(r'([^/]+):(\d+)', address):
        try:
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except OSError as error:
            raise UsageError(f'no Ray cluster answers at {address}') from error


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Silence stderr briefly: Ray's C++ part prints there that it was told to be quiet."""
    with open(os.devnull, 'wb') as nothing:
        kept = os.dup(2)
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def job_from_anywhere(job: Job) -> Job:
    """Return a job that means the same in any working directory."""
    return job._replace(
        out=job.out.absolute(),
        model=model_from_anywhere(job.model),
        vae=job.vae and (job.vae if job.vae == SMALL_VAE else model_from_anywhere(job.vae)),
        lora=job.lora and str(Path(job.lora).absolute()),
    )


def model_from_anywhere(model: str) -> str:
    """Return a model name that means the same in any working directory."""
    return str(Path(model).absolute()) if model not in BACKBONES and Path(model).is_dir() else model


def cluster_share(job: Job, record: Run, nodes: list[dict[str, Any]]) -> Share:
    """One GPU per copy of the model if the cluster has any and the job may use them, else the cores that torch uses."""
    machines = [node['Resources'] for node in nodes if node['Alive']]
    gpus = sum(int(resources.get('GPU', 0)) for resources in machines)
    wanted = (job.device or 'cuda').startswith('cuda')
    if wanted and gpus:
        return Share(gpus, 'cuda', 0, 1)
    if wanted and job.device:
        raise UsageError(f'the Ray cluster has no GPU for --device {job.device}')
    cores = [int(resources.get('CPU', 0)) for resources in machines]
    if sum(cores) < 2:
        raise UsageError('the Ray cluster has fewer than two CPUs: it needs one for the model and one for reading and writing')
    cpus = max(1, min(record.threads, max(cores) - 1))
    device = 'cpu' if record.device.startswith('cuda') else record.device
    return Share(max(1, sum(count // (cpus + 1) for count in cores)), device, cpus, 0)


def dataset(job: Job, record: Run, pending: list[Found], share: Share) -> ray.data.Dataset:
    """The Ray dataset of the pictures' records, computed lazily."""
    import ray.data

    for handler in logging.getLogger('ray.data').handlers:
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith('ray.'):  # its log files stay unchanged
            handler.setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.target_max_block_size = BLOCK_BYTES * job.batch
    rows = [{'found': pickle.dumps(picture._replace(path=picture.path.absolute()))} for picture in pending]
    # the pool may grow with a cluster that adds machines with GPUs
    pool = ray.data.ActorPoolStrategy(min_size=share.copies, max_size=None if share.gpus else share.copies)
    with ray.data.DataContext.current(context):
        rows_on_ray = ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / BLOCK_PICTURES))
        taken = rows_on_ray.flat_map(
            read_pictures, fn_args=(job,), num_cpus=1
        )  # flat_map, because Ray would fuse a map into the actors, where the model would wait for it
        labelled = taken.map_batches(
            Actor,
            fn_constructor_args=(job, record, share.device),
            batch_size=job.batch,
            batch_format='pyarrow',
            compute=pool,
            num_cpus=share.cpus,
            num_gpus=share.gpus,
        )
        return labelled.map(write_row, fn_args=(job,), num_cpus=1)


def read_pictures(row: RayRow, job: Job) -> list[RayRow]:
    return [{'taken': pickle.dumps(take(job, pickle.loads(row['found'])))}]


def write_row(row: RayRow, job: Job) -> dict[str, str]:
    return {'entry': line(save(job, pickle.loads(row['taken'])))}


class Actor:
    """An actor with its own copy of the model."""

    def __init__(self, job: Job, record: Run, device: str) -> None:
        self.job = job
        self.record = record
        self.device = device

    @cached_property
    def stages(self) -> Stages:
        """Load the model at the first batch. OutputConflict if its weights differ from the record's.

        Not in the constructor, because Ray keeps only the text of errors raised there.
        """
        job, record = self.job, self.record
        method = method_named(job.method)
        if method.FAMILIES:
            import torch  # not for methods without a model: it takes seconds

            torch.set_num_threads(record.threads)  # another number of threads may change the rounding of sums
        revision = record.model.revision if record.model else None
        prepared = prepared_for(job, method, revision, device=self.device, dtype=record.dtype)
        here = {**record.settings, **settings_of_model(job, prepared.backbone)}
        if here != record.settings:
            raise OutputConflict(f'{os.uname().nodename} has another {job.model} ({"; ".join(differences(record.settings, here))})')
        return stages_of(method, prepared)

    def __call__(self, rows: pyarrow.Table) -> pyarrow.Table:
        import pyarrow

        batch = [pickle.loads(row) for row in rows['taken'].to_pylist()]
        done = [pickle.dumps(without_torch(labelled(self.stages, taken))) for taken in mapped(self.stages, batch)]
        return pyarrow.table({'taken': pyarrow.array(done, pyarrow.large_binary())})  # large_binary, because large pictures may exceed 2 GB


def without_torch(taken: Taken) -> Taken:
    """Turn token maps into arrays, so that the processes that write them need not import torch."""
    if taken.maps is None:
        return taken
    values: Any = taken.maps.maps.cpu().numpy()
    return taken._replace(maps=taken.maps._replace(maps=values))
