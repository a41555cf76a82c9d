"""Standard streams that are closed, full, or read by nobody: a run does not end for a message, and no file takes their place."""

from __future__ import annotations

import errno
import io
import os
import sys

from padseg.errors import ResourceExhausted
from padseg.system.files import FULL

BROKEN_PIPE = 141  # as shells have it for a process that SIGPIPE ended


class Messages(io.TextIOWrapper):
    """stderr: from the first message that cannot be written on, messages are lost."""

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
    """stdout: ResourceExhausted where the disk that it goes to is full."""

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
    """What to raise where stdout cannot be written; what it still holds goes nowhere, or Python would try once more at its end."""
    to_nowhere(1)
    return ResourceExhausted(f'cannot write to stdout: {error.strerror}') if error.errno in FULL else error


def to_nowhere(number: int) -> None:
    """Let a file descriptor lead to the null device."""
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)
    os.set_inheritable(number, True)


def open_streams() -> None:
    """Open the standard streams that are closed, before a file or a socket gets their numbers, and make stdout and stderr the above."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            to_nowhere(number)
    sys.stdout = like(sys.stdout, Data, 1)
    sys.stderr = like(sys.stderr, Messages, 2)


def like(stream: object, kind: type[io.TextIOWrapper], number: int) -> io.TextIOWrapper:
    """A stream of another class for the same descriptor; the one that Python made is None where the descriptor was closed."""
    binary = open(number, 'wb', closefd=False)
    if not isinstance(stream, io.TextIOWrapper):
        return kind(binary, encoding='utf-8', errors='backslashreplace')
    return kind(
        binary, encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering, write_through=stream.write_through
    )


def close_stdout(code: int) -> int:
    """Write out what stdout still holds. The exit code: as it is, or 7 for a full disk, or that of a reader who is gone."""
    try:
        sys.stdout.flush()
    except ResourceExhausted as error:
        print(f'padseg: {error}', file=sys.stderr)
        return error.exit_code
    except OSError as error:
        return BROKEN_PIPE if error.errno == errno.EPIPE else 1
    return code
