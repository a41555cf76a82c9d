"""Real processes at the cost of a fork: a fork server has the libraries, see forks.py.

Exit codes, signals, kills and output are those of `python -m padseg`. Only the effects of the imports themselves go untested.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants

from padseg.commands import main

ROOT = Path(__file__).parents[2]
SECONDS = 240  # time limit of a process
FORKS = multiprocessing.get_context('forkserver')


class Ran(NamedTuple):
    """A process that has ended. returncode: negative signal number if a signal ended it."""

    returncode: int
    stdout: str
    stderr: str


class Started(NamedTuple):
    process: ForkServerProcess
    stdout: Path
    stderr: Path

    def wait(self) -> Ran:
        """Wait for the process and return its exit code and output, where that went to files. Raises TimeoutError after SECONDS."""
        self.process.join(SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f'{self.process} ran for more than {SECONDS} s')
        out, err = (path.read_text(encoding='utf-8') if path.is_file() else '' for path in (self.stdout, self.stderr))
        return Ran(self.process.exitcode, out, err)


def start(
    target: Callable[..., int | None],
    *arguments: Any,
    folder: Path | None = None,
    stderr: Path | None = None,
    group: bool = False,
    **environment: str,
) -> Started:
    """Start a function of an importable module in a new process; its return value is the exit code.

    folder: working directory; stderr: a file, FIFO or terminal to write to; group: whether the process leads its own process group, like a
    command in a terminal; environment: additional variables.
    """
    place = Path(tempfile.mkdtemp(prefix='padseg-test-'))
    streams = place / 'stdout', stderr or place / 'stderr'
    process = FORKS.Process(target=begin, args=(target, arguments, folder or Path.cwd(), {**os.environ, **environment}, streams, group))
    process.start()
    return Started(process, *streams)


def begin(
    target: Callable[..., int | None],
    arguments: tuple[Any, ...],
    folder: Path,
    environment: Mapping[str, str],
    streams: tuple[Path, Path],
    group: bool,
) -> None:
    gc.freeze()  # what the fork server has imported stays shared with it, and is not searched for garbage
    multiprocessing.set_start_method(None, force=True)  # its own processes start as they would without the fork server
    if group:
        os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)  # where the cache and the hub are, which it looks up once
    for descriptor, path in enumerate(streams, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.exit(target(*arguments))


def padseg(*arguments: object, folder: Path | None = None) -> Ran:
    """Run `padseg` with these arguments in a new process."""
    return start(main, [str(argument) for argument in arguments], folder=folder).wait()


def program(name: str, *arguments: object) -> Ran:
    """Run a Python program of the checkout with these arguments in a new process."""
    return start(run_program, str(ROOT / name), [str(argument) for argument in arguments]).wait()


def run_program(path: str, arguments: list[str]) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name='__main__')
