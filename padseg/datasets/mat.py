"""Read MATLAB files in another process, `mat_child`, whose crash, time limit or memory limit does no harm to this one."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, cast

import numpy as np

from padseg.datasets import mat_child
from padseg.datasets.mat_child import MEMORY
from padseg.errors import UnreadableLabels

if TYPE_CHECKING:
    from padseg.types import Array

SECONDS = 20  # limit for reading a file
NUMBER = np.dtype(np.int32)
PIPE = 1 << 20  # bytes
LOCK = threading.Lock()
ONE_THREAD = {'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}  # more threads would only cost start-up time and memory for their stacks


class Answer(NamedTuple):
    """Answer of the other process: matrices, or the reason why there are none."""

    reason: str
    matrices: tuple[Array, ...]


def mat_matrices(path: Path, variable: str, field: str | None = None) -> tuple[Array, ...]:
    """The label map in a variable of a MATLAB file, or with `field` one from each structure in a cell array: (H, W) int32 each.

    Raises UnreadableLabels.
    """
    request = json.dumps([os.fspath(path.absolute()), variable, field]).encode() + b'\n'
    with LOCK:
        fresh = reader.cache_info().currsize == 0
        answer = asked(request)
        if not fresh and isinstance(answer, int) and answer != -signal.SIGALRM:
            answer = asked(request)  # an earlier file may have corrupted that process
    if isinstance(answer, int):
        raise UnreadableLabels(path, ending(answer))
    if answer.reason:
        raise UnreadableLabels(path, answer.reason)
    return answer.matrices


def asked(request: bytes) -> Answer | int:
    """Send a request and return the answer. If the process ended without one, return its exit code; the next request starts another."""
    child = reader(os.getpid())
    try:
        return answer_of(child, request)
    except BaseException as error:
        reader.cache_clear()
        code = end(child)
        if not isinstance(error, (EOFError, BrokenPipeError, ValueError)):
            raise  # such as an interruption, or no memory left in this process
        return code


@functools.lru_cache(maxsize=1)
def reader(owner: int) -> subprocess.Popen[bytes]:
    """The reading process of this one. owner: id of this process, so that a fork of it starts its own."""
    command = [sys.executable, '-S', mat_child.__file__, str(SECONDS), *map(str, sys.path)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **ONE_THREAD}
    )
    atexit.register(end, child)
    with contextlib.suppress(AttributeError, OSError):  # a larger pipe needs fewer turns between the two; not every system can do it
        fcntl.fcntl(cast(IO[bytes], child.stdout), fcntl.F_SETPIPE_SZ, PIPE)
    return child


def end(child: subprocess.Popen[bytes]) -> int:
    child.kill()
    return child.wait()


def answer_of(child: subprocess.Popen[bytes], request: bytes) -> Answer:
    """Receive the answer to a request. Raises EOFError or BrokenPipeError if the process has ended, ValueError for nonsense."""
    requests, answers = cast(IO[bytes], child.stdin), cast(BufferedReader, child.stdout)
    requests.write(request)
    requests.flush()
    reason, shapes = json.loads(exactly(answers, int(exactly(answers, 8))))
    return Answer(reason, tuple(matrix(answers, height, width) for height, width in shapes))


def matrix(answers: BufferedReader, height: int, width: int) -> Array:
    if not 0 < height * width <= MEMORY // NUMBER.itemsize:
        raise ValueError(f'{height} x {width}')
    numbers = np.empty((height, width), NUMBER)
    if answers.readinto(numbers.data) < numbers.nbytes:
        raise EOFError
    return numbers


def exactly(answers: BufferedReader, size: int) -> bytes:
    data = answers.read(size)
    if len(data) < size:
        raise EOFError
    return data


def ending(code: int) -> str:
    """Explain why the reading process ended, from its exit code."""
    if code == -signal.SIGALRM:
        return f'takes more than {SECONDS} s to read'
    return 'not a MATLAB file, or a damaged one: reading it crashed' + (f' ({signal.Signals(-code).name})' if code < 0 else '')
