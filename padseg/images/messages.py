"""What the processes that decode and those that ask them send each other: JSON, with its length before it."""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from padseg.images.decode import ImageError

LENGTH = struct.Struct('!I')
Answer = dict[str, Any]


class Gone(Exception):
    """The process at the other end has ended, or does not answer."""


def send(connection: socket.socket, record: Answer) -> None:
    data = json.dumps(record).encode('ascii')
    try:
        connection.sendall(LENGTH.pack(len(data)) + data)
    except ConnectionError as error:
        raise Gone from error


def receive(connection: socket.socket, stopped: Callable[[], bool] = lambda: False, seconds: float = math.inf) -> Answer:
    """What the other end sends next. Raises as `fill`."""
    head = bytearray(LENGTH.size)
    fill(connection, memoryview(head), stopped, seconds)
    data = bytearray(LENGTH.unpack(head)[0])
    fill(connection, memoryview(data), stopped, seconds)
    record: Answer = json.loads(data)
    return record


def fill(connection: socket.socket, place: memoryview, stopped: Callable[[], bool] = lambda: False, seconds: float = math.inf) -> None:
    """Receive as many bytes as there is place for; the connection's own limit of time is how often `stopped` is asked.

    Raises ImageError if it says that the bytes are not wanted any more, and Gone if the other end has ended or takes more seconds.
    """
    began = time.monotonic()
    done = 0
    while done < len(place):
        try:
            count = connection.recv_into(place[done:])
        except TimeoutError as error:
            if stopped():
                raise ImageError('not decoded: the run was stopped') from error
            if time.monotonic() - began > seconds:
                raise Gone from error
            continue
        except ConnectionError as error:
            raise Gone from error
        if not count:
            raise Gone
        done += count
