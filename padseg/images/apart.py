"""Decode pictures in separate processes, which are killed if a file takes too much time or memory or is no longer wanted.

A server (padseg.images.worker) has the decoders loaded and runs a single thread, so that it can be forked at any time. Its forks, the
workers, decode one file at a time. Requests and answers are JSON, followed by raw pixels. Nothing is unpickled, so a decoder that was taken
over cannot run code in this process.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from padseg.errors import PadsegError
from padseg.images.decode import Decoded, ImageError, Reading
from padseg.images.messages import Answer, Gone, fill, receive, send

POLL = 0.1  # seconds between checks whether a waiting thread should give up
PATIENCE = 10  # a worker may take this many times its limit of processor time to answer, because other processes share the processor
LATE = 0.1  # seconds that this process may notice an answer late, where it waits for a processor
ENDED = 'the process that decoded it ended: its decoder crashed, or memory ran out'
TRIALS = 3
BEGIN = 120.0  # seconds in which the server must have started
START = 'import sys; sys.path[:] = sys.argv[1:]; from padseg.images.worker import serve; serve()'
ONE_THREAD = {'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}  # or NumPy would start more in the server

Stopped = Callable[[], bool]


def never() -> bool:
    return False


def untold(size: int, digest: str) -> None:
    pass


class Worker:
    """A decoding process. busy: whether it still owes an answer."""

    def __init__(self, connection: socket.socket, stopped: Stopped) -> None:
        connection.settimeout(POLL)
        self.connection = connection
        self.busy = True
        self.process = int(receive(connection, stopped, BEGIN)['process'])
        self.busy = False

    def ask(self, what: str, path: Path, reading: Reading, frame: int = 0) -> None:
        self.busy = True
        # absolute, because this process may have changed its working directory since the server started
        send(self.connection, {'what': what, 'path': str(path.absolute()), 'frame': frame, 'reading': reading._asdict()})

    def answer(self, stopped: Stopped, seconds: float = math.inf) -> Answer:
        """Receive the worker's next answer. If it reports an error, raise that as ImageError or OSError."""
        answer = receive(self.connection, stopped, seconds)
        if 'reason' in answer:
            self.busy = False
            if 'errno' in answer:
                raise OSError(answer['errno'], answer['reason'], answer['path'])
            raise ImageError(answer['reason'])
        return answer

    def last_answer(self, reading: Reading, stopped: Stopped) -> Answer:
        """Wait for the final answer, past those that report an intermediate frame. The time limit applies to each answer."""
        while True:
            began = time.monotonic()
            try:
                answer = self.answer(stopped, reading.max_seconds * PATIENCE)
            except Gone as error:
                if time.monotonic() - began < reading.max_seconds - LATE:
                    raise ImageError(ENDED) from error
                raise ImageError(f'takes more than {reading.max_seconds:g} s to decode: see --max-seconds') from error
            if 'step' not in answer:
                return answer

    def end(self) -> None:
        if self.is_there():  # otherwise another process may have its id by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)
        self.connection.close()

    def is_there(self) -> bool:
        self.connection.settimeout(0)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) != b''
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            self.connection.settimeout(POLL)


def started(connection: socket.socket) -> subprocess.Popen[bytes]:
    """Start the server at the other end of a connection. Raises PadsegError if it cannot be started."""
    try:
        return subprocess.Popen(
            (sys.executable, '-I', '-c', START, *sys.path),
            stdin=connection.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # where libtiff writes
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,  # so that Ctrl-C reaches only the process that asks
        )
    except OSError as error:
        raise PadsegError(f'cannot start the process that decodes pictures, {sys.executable}: {error.strerror}') from error


class Workers:
    """The processes that decode for this one: the server and its idle workers."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.server: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.idle: list[Worker] = []

    def serve(self, broken: socket.socket | None = None) -> socket.socket:
        """Return the connection to the server. Starts a server if none runs, or if `broken` is the present connection."""
        with self.lock:
            if self.server is None or self.server is broken:
                ours, theirs = socket.socketpair()
                with theirs:
                    self.process = started(theirs)
                self.server = ours
            return self.server

    @contextlib.contextmanager
    def one(self, stopped: Stopped) -> Iterator[Worker]:
        """Yield a worker for the block. It is killed afterwards if it still owes an answer."""
        worker = self.idle_or_new(stopped)
        try:
            yield worker
        except Gone as error:
            raise ImageError(ENDED) from error
        finally:
            if worker.busy:
                worker.end()
            else:
                self.idle.append(worker)

    def idle_or_new(self, stopped: Stopped) -> Worker:
        with contextlib.suppress(IndexError):
            while True:
                worker = self.idle.pop()
                if worker.is_there():
                    return worker
                worker.end()
        server = None
        for _ in range(TRIALS):  # the server may have been killed
            server = self.serve(server)
            ours, theirs = socket.socketpair()
            try:
                with theirs:
                    socket.send_fds(server, [b'+'], [theirs.fileno()])
                return Worker(ours, stopped)
            except (ConnectionError, Gone):
                ours.close()
            except BaseException:
                ours.close()
                raise
        raise PadsegError(f'the process that decodes pictures did not start: try {sys.executable} -c "import padseg.images.worker"')

    def forget(self) -> None:
        """In a fork of this process: forget the workers, which belong to its parent. Both use the server."""
        self.lock = threading.Lock()
        while self.idle:
            self.idle.pop().connection.close()


WORKERS = Workers()
os.register_at_fork(after_in_child=WORKERS.forget)


def start_decoding() -> None:
    """Start the server early, because it needs a moment until it is ready."""
    WORKERS.serve()


def decode_apart(
    path: Path, reading: Reading, frame: int = 0, known: Callable[[int, str], None] = untold, stopped: Stopped = never
) -> Decoded:
    """Decode the picture in a file within limits of time and memory; the result is that of `decode_with_notes`.

    known: called with the file's size in bytes and its SHA-256 before decoding. stopped: returns True once the picture is no longer wanted,
    which fails it. Raises ImageError with the reason, or OSError if the file cannot be read.
    """
    with WORKERS.one(stopped) as worker:
        worker.ask('picture', path, reading, frame)
        read = worker.answer(stopped)
        known(read['bytes'], read['sha256'])
        answer = worker.last_answer(reading, stopped)
        height, width = answer['shape']
        image = np.empty((height, width, 3), np.uint8)
        void = np.empty((height, width), np.uint8) if answer['void'] else None
        for array in (image,) if void is None else (image, void):
            fill(worker.connection, array.reshape(-1).data, stopped)
        worker.busy = False
    return Decoded(image, None if void is None else void.view(bool), tuple(answer['size']), tuple(answer['notes']))


def count_apart(path: Path, reading: Reading) -> int:
    """Number of frames in a file, up to MAX_FRAMES + 1. Raises ImageError, OSError."""
    return int(looked_up(path, reading, 'frames'))


def size_apart(path: Path, reading: Reading) -> tuple[int, int]:
    """(width, height) of a file's picture, from its header. Raises ImageError, OSError."""
    width, height = looked_up(path, reading, 'size')
    return width, height


def looked_up(path: Path, reading: Reading, what: str) -> Any:
    with WORKERS.one(never) as worker:
        worker.ask(what, path, reading)
        answer = worker.last_answer(reading, never)
        worker.busy = False
    return answer[what]
