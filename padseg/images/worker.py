"""The processes that decode files for others, as padseg.images.apart asks them to."""

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
import PIL.ImageCms  # before the forks, which then need not

from padseg.images.decode import ImageError, Opened, Reading, decode_frame, frames_to_read, opened_bytes, opened_file, reasons
from padseg.images.files import contents, opened
from padseg.images.messages import Gone, receive, send

FOREVER = 1e6  # seconds: more is no limit
STATUS = Path('/proc/self/statm')
NO_NAME = 'another fault: '  # before errors that no decoder is known to raise


class Kept(NamedTuple):
    """A file with several frames that was read. mark: tells it from others and from its later states; picture: at the frame done last."""

    mark: tuple[object, ...]
    data: bytes
    sha256: str
    picture: Opened | None


def serve() -> None:
    """Make a worker for each connection that comes over the socket that is standard input, until nobody holds its other end.

    This process leads a group of its own.
    """
    server = socket.socket(fileno=0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    PIL.AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the limit is on the time of all threads
    while True:
        word, handles, _, _ = socket.recv_fds(server, 1, 1)
        if not word:
            os.killpg(0, signal.SIGKILL)  # the workers too, which may be in the middle of something that nobody waits for
        for handle in handles:
            if not os.fork():
                server.close()
                work(socket.socket(fileno=handle))
            os.close(handle)


def work(connection: socket.socket) -> None:
    """Answer requests until nobody makes them."""
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
    """Bytes of memory that this process may touch; None where the system does not say."""
    try:
        return int(STATUS.read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def answer(connection: socket.socket, request: dict[str, Any], before: int | None, kept: Kept | None) -> Kept | None:
    """Do what is asked for, within limits; what is to be kept for the next request."""
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
    except Exception as error:  # whatever else a file leads a decoder to
        send(connection, {'reason': f'truncated or damaged: {type(error).__name__}: {error}'})
    finally:
        limit_time(0)
        limit_memory(None, 0)
    return None


def picture(connection: socket.socket, path: Path, reading: Reading, frame: int, before: int | None, kept: Kept | None) -> Kept | None:
    """Send a picture."""
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
    """A file's bytes; those that are kept if they are of this file and it has not changed."""
    status = path.stat()
    mark = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if kept is not None and kept.mark == mark and status.st_size <= reading.max_bytes:
        return kept
    data = contents(path, reading)
    return Kept(mark, data, hashlib.sha256(data).hexdigest(), None)


def limit_time(seconds: float) -> None:
    """Have this process ended after so many seconds of the processor's time from now; 0 for never."""
    signal.setitimer(signal.ITIMER_PROF, 0 if seconds > FOREVER else seconds)


def limit_memory(before: int | None, more: int) -> None:
    """Let this process have so many bytes more than before; as many as it may if that is not known."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = hard if before is None else before + more
    with contextlib.suppress(ValueError, OSError, OverflowError):  # more than it may: then that is the limit
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
