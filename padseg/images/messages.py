"""Messages between decoding processes and those that ask them: JSON, preceded by its length."""

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
    """The process at the other end has ended or does not answer."""


def send(connection: socket.socket, record: Answer) -> None:
    data = json.dumps(record).encode('ascii')
    try:
        connection.sendall(LENGTH.pack(len(data)) + data)
    except ConnectionError as error:
        raise Gone from error


def receive(connection: socket.socket, stopped: Callable[[], bool] = lambda: False, seconds: float = math.inf) -> Answer:
    """Receive the next record. Raises the same errors as `fill`."""
    head = bytearray(LENGTH.size)
    fill(connection, memoryview(head), stopped, seconds)
    data = bytearray(LENGTH.unpack(head)[0])
    fill(connection, memoryview(data), stopped, seconds)
    record: Answer = json.loads(data)
    return record


def fill(connection: socket.socket, place: memoryview, stopped: Callable[[], bool] = lambda: False, seconds: float = math.inf) -> None:
    """Fill a buffer with received bytes. `stopped` is called whenever the connection's own timeout passes.

    Raises ImageError if `stopped` says that the bytes are no longer wanted, and Gone if the other end has ended or takes longer than
    `seconds`.
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
