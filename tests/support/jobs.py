"""Runs in separate processes, for tests that kill them, hold them, or limit their disk."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from padseg.commands import main
from padseg.generation.pictures import GenerationJob, generate
from padseg.images import ImageError, contents, start_decoding
from padseg.run import engine
from padseg.run.cluster import connected
from padseg.run.job import Job
from padseg.run.prepare import from_model
from padseg.system.progress import Silent


class Kill(Silent):
    """Progress that kills this process after a number of pictures."""

    def __init__(self, pictures: int) -> None:
        self.left = pictures

    def step(self, record: Mapping[str, Any] | None = None) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


class Hold(Silent):
    """Progress that reports the start, then waits for a message before the first picture."""

    def __init__(self, line: Connection) -> None:
        self.line = line

    def start(self, total: int) -> None:
        self.line.send('ready')
        self.line.recv()


def killed(job: Job, pictures: int) -> None:
    engine.run(job, Kill(pictures))


def held(job: Job, line: Connection) -> None:
    engine.run(job, Hold(line))


def killed_often(job: Job, kills: int) -> None:
    """Start runs one after the other until `kills` of them were killed by a timer, each after a random amount of CPU time."""
    chance = random.Random(0)
    ended = 0
    while ended < kills:
        seconds = chance.uniform(0.01, 0.5)
        child = os.fork()
        if not child:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal kills a process that does not handle it
            engine.run(job._replace(overwrite=ended % 5 == 0))
            os._exit(0)
        ended += os.waitpid(child, 0)[1] == signal.SIGPROF


def with_full_disk(arguments: Sequence[str], place: str) -> int:
    """padseg, where the disk is full for files whose path has `place` in it."""

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event == 'open' and place in str(details[0]) and details[2] & os.O_WRONLY:
            raise OSError(errno.ENOSPC, 'No space left on device')

    sys.addaudithook(hook)
    return main(arguments)


def with_small_files(arguments: Sequence[str], limit: int) -> int:
    """Run padseg with a limit on the size of files, in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return main(arguments)


def as_nobody(arguments: Sequence[str]) -> int:
    """padseg without the rights of root, for which no folder is closed."""
    start_decoding()
    if os.geteuid() == 0:
        os.seteuid(65534)
    return main(arguments)


def read_while_swapped(path: str) -> None:
    """Read a file that becomes a pipe in the moment when it is opened, and print why not."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == 'open' and str(arguments[0]) == path:
            os.unlink(path)
            os.mkfifo(path)

    sys.addaudithook(hook)
    try:
        contents(Path(path))
    except ImageError as error:
        print(error)


def connect_to(job: Job, address: str) -> None:
    """Print how many processors the Ray cluster at the address has, used as a run would use it."""
    import ray

    with connected(job, from_model(job)[1], address):
        print(ray.cluster_resources()['CPU'])


def generation_killed(job: GenerationJob, pictures: int) -> None:
    generate(job, Kill(pictures))
