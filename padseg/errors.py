"""What a user can put right, each with the exit code that the command line gives for it."""

from __future__ import annotations


class PadsegError(RuntimeError):
    """A mistake or a lack that the message tells the user how to mend."""

    exit_code = 1


class UsageError(PadsegError):
    """A value that is not allowed; the message says what is."""

    exit_code = 2


class ModelUnavailable(PadsegError):
    """The model's files cannot be had: unknown, gated, offline, incomplete."""

    exit_code = 4


class NoImages(PadsegError):
    """There is no picture where the user pointed, or a data set has another layout."""

    exit_code = 5


class OutputConflict(PadsegError):
    """The output folder belongs to a run with another configuration."""

    exit_code = 6
