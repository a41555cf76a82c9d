"""Standard streams that are closed, full, or no longer read: no message ends a run, and no file gets the number of a closed stream."""

from __future__ import annotations

import errno
import io
import os
import sys

from padseg.errors import ResourceExhausted
from padseg.system.files import FULL

BROKEN_PIPE = 141  # the shell's exit code for a process that SIGPIPE ended


class Messages(io.TextIOWrapper):
    """stderr. Once a message cannot be written, it and all later ones are dropped."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            to_nowhere(2)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            to_nowhere(2)


class Data(io.TextIOWrapper):
    """stdout. Raises ResourceExhausted if the disk it is written to is full."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise unwritten(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise unwritten(error) from error


def unwritten(error: OSError) -> Exception:
    """The error to raise when stdout cannot be written. Drops what is buffered, or Python would try to write it again at exit."""
    to_nowhere(1)
    return ResourceExhausted(f'cannot write to stdout: {error.strerror}') if error.errno in FULL else error


def to_nowhere(number: int) -> None:
    """Redirect a file descriptor to the null device."""
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)
    os.set_inheritable(number, True)


def open_streams() -> None:
    """Open closed standard streams, before a file or a socket gets their numbers, and make stdout a `Data` and stderr a `Messages`."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            to_nowhere(number)
    sys.stdout = like(sys.stdout, Data, 1)
    sys.stderr = like(sys.stderr, Messages, 2)


def like(stream: object, kind: type[io.TextIOWrapper], number: int) -> io.TextIOWrapper:
    """A stream of another class on the same descriptor. `stream` is None if the descriptor was closed when Python started."""
    binary = open(number, 'wb', closefd=False)
    if not isinstance(stream, io.TextIOWrapper):
        return kind(binary, encoding='utf-8', errors='backslashreplace')
    return kind(
        binary, encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering, write_through=stream.write_through
    )


def close_stdout(code: int) -> int:
    """Flush stdout and return the exit code: `code`, or 7 for a full disk, 141 if the reader is gone, 1 for another error."""
    try:
        sys.stdout.flush()
    except ResourceExhausted as error:
        print(f'padseg: {error}', file=sys.stderr)
        return error.exit_code
    except OSError as error:
        return BROKEN_PIPE if error.errno == errno.EPIPE else 1
    return code
