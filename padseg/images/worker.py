"""The decoding processes that padseg.images.apart starts and asks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import signal
import socket
from pathlib import Path
from typing import Any, NamedTuple

import PIL.AvifImagePlugin
import PIL.Image
import PIL.ImageCms  # imported here once, before the forks

from padseg.images.decode import ImageError, Opened, Reading, decode_frame, frames_to_read, opened_bytes, opened_file, reasons
from padseg.images.files import contents, opened
from padseg.images.messages import Gone, receive, send

FOREVER = 1e6  # seconds; a longer limit counts as none
STATUS = Path('/proc/self/statm')


class Kept(NamedTuple):
    """A file of several frames, kept for the next request. mark: identifies file and state; picture: as opened, at the frame last done."""

    mark: tuple[object, ...]
    data: bytes
    sha256: str
    picture: Opened | None


def serve() -> None:
    """Fork a worker for each connection received over the socket on standard input, until its other end is closed.

    This process leads its own process group.
    """
    server = socket.socket(fileno=0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that ended workers leave no zombies
    PIL.Image.MAX_IMAGE_PIXELS = None  # each request has its own limit, which is checked before anything is decoded
    PIL.AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the time limit counts all threads together
    while True:
        word, handles, _, _ = socket.recv_fds(server, 1, 1)
        if not word:
            os.killpg(0, signal.SIGKILL)  # workers too: nobody waits for what they are doing
        for handle in handles:
            if not os.fork():
                server.close()
                work(socket.socket(fileno=handle))
            os.close(handle)


def work(connection: socket.socket) -> None:
    """Answer requests until the connection is closed."""
    try:
        send(connection, {'process': os.getpid()})
        before = memory()
        kept: Kept | None = None
        while True:
            kept = answer(connection, receive(connection), before, kept)
    except (Gone, OSError):
        pass
    finally:
        os._exit(0)


def memory() -> int | None:
    """Size of this process's address space in bytes; None where the system does not tell."""
    try:
        return int(STATUS.read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def answer(connection: socket.socket, request: dict[str, Any], before: int | None, kept: Kept | None) -> Kept | None:
    """Answer one request within its limits. Returns what to keep for the next request."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in request['reading'].items()}
    reading = Reading(**fields)
    path = Path(request['path'])
    try:
        if request['what'] == 'picture':
            return picture(connection, path, reading, request['frame'], before, kept)
        limit_time(reading.max_seconds)
        limit_memory(before, reading.max_memory)
        with opened(path, reading) as file, reasons():
            if request['what'] == 'frames':
                send(connection, {'frames': frames_to_read(file, reading)})
            else:
                send(connection, {'size': opened_file(file, reading).size})
    except ImageError as error:
        send(connection, {'reason': str(error)})
    except OSError as error:
        send(connection, {'reason': error.strerror or str(error), 'errno': error.errno or 0, 'path': str(path)})
    except Gone:
        raise
    except Exception as error:  # whatever else a damaged file makes a decoder raise
        send(connection, {'reason': f'truncated or damaged: {type(error).__name__}: {error}'})
    finally:
        limit_time(0)
        limit_memory(None, 0)
    return None


def picture(connection: socket.socket, path: Path, reading: Reading, frame: int, before: int | None, kept: Kept | None) -> Kept | None:
    """Decode and send a picture. Returns the file if the next request may be for a later frame of it."""
    file = read(path, reading, kept)
    send(connection, {'bytes': len(file.data), 'sha256': file.sha256})
    if not file.data:
        raise ImageError('empty file')

    def step() -> None:
        limit_time(reading.max_seconds)
        send(connection, {'step': True})

    limit_time(reading.max_seconds)
    limit_memory(before, reading.max_memory + len(file.data))
    with reasons():
        source = file.picture
        if source is None or source.tell() >= frame:
            source = opened_bytes(file.data, reading)
        image, void, size, notes = decode_frame(source, file.data, reading, frame, step)
    limit_time(0)
    send(connection, {'shape': image.shape[:2], 'void': void is not None, 'size': size, 'notes': notes})
    for array in (image,) if void is None else (image, void):
        connection.sendall(array.data.cast('B'))
    return file._replace(picture=source) if reading.frames == 'all' and getattr(source, 'is_animated', False) else None


def read(path: Path, reading: Reading, kept: Kept | None) -> Kept:
    """Read a file, or return the kept one if it is the same and has not changed."""
    status = path.stat()
    mark = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if kept is not None and kept.mark == mark and status.st_size <= reading.max_bytes:
        return kept
    data = contents(path, reading)
    return Kept(mark, data, hashlib.sha256(data).hexdigest(), None)


def limit_time(seconds: float) -> None:
    """End this process once it has used this many more seconds of processor time; 0 removes the limit."""
    signal.setitimer(signal.ITIMER_PROF, 0 if seconds > FOREVER else seconds)


def limit_memory(before: int | None, more: int) -> None:
    """Let this process use `more` bytes of memory beyond `before`; no limit but the hard one if `before` is not known."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard if before is None else before + more
    with contextlib.suppress(ValueError, OSError, OverflowError):  # above the hard limit, which then holds
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
