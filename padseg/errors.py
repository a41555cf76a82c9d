"""Errors that users can fix, with the command line's exit codes."""

from __future__ import annotations

from pathlib import Path


class PadsegError(RuntimeError):
    """An error whose message tells the user how to fix it. several_lines: whether it has lines, and what it quotes is printable."""

    exit_code = 1
    several_lines = False


class UsageError(PadsegError):
    """A value that is not allowed; the message lists the allowed ones."""

    exit_code = 2


class ModelUnavailable(PadsegError):
    """A model whose files cannot be used. state: the reason in a word or two, such as `damaged`, `incomplete` or `no token`."""

    exit_code = 4

    def __init__(self, message: str, state: str = 'damaged') -> None:
        super().__init__(message)
        self.state = state


class NoImages(PadsegError):
    """No pictures where the user pointed, or a data set in an unknown layout."""

    exit_code = 5


class OutputConflict(PadsegError):
    """The output folder belongs to a run with another configuration."""

    exit_code = 6


class ResourceExhausted(PadsegError):
    """The disk or quota is full, or memory ran out. Finished work is kept, and the same command continues from there."""

    exit_code = 7


class NotFinite(PadsegError):
    """Numbers that overflowed; the message says which, and names the dtype if another one may help."""


class UnreadableLabels(PadsegError):
    """A file that holds no labels, or damaged ones; the message names the file and the reason."""

    exit_code = 3

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both, so that a worker process can pickle the error
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f'{self.path}: {self.reason}'
