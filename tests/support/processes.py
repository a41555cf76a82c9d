"""Real processes at the price of a fork: the server that makes them has imported the libraries, which takes seconds, once.

Exit codes, signals, kills and what comes out of them are those of `python -m padseg`. Only what importing itself does goes unseen.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

from padseg.commands import main

SECONDS = 240  # that a process may take
IMPORTED = (
    'pytest',
    'padseg.backbones.loading',
    'padseg.backbones.sd3',
    'padseg.commands.export',
    'padseg.commands.run',
    'padseg.exports.coco',
    'padseg.methods.seg4diff',
    'padseg.run.engine',
    'padseg.run.collect',
)

FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(list(IMPORTED))
for library in ('TRANSFORMERS', 'DIFFUSERS'):  # what they say while they are imported by the server
    os.environ.setdefault(f'{library}_VERBOSITY', 'error')


class Ran(NamedTuple):
    """A process that has ended; returncode: minus the signal's number where one ended it."""

    returncode: int
    stdout: str
    stderr: str


class Started(NamedTuple):
    process: ForkServerProcess
    stdout: Path
    stderr: Path

    def wait(self) -> Ran:
        """How it ended; what it wrote, where that went to files."""
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
    """Start a function of an importable module in a process of its own, in a folder; what it returns is the exit code.

    stderr: a file, FIFO or terminal to write to. group: whether it leads a group of processes, as a command in a terminal does.
    environment: variables beside those of this process.
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
    if group:
        os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(streams, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.exit(target(*arguments))


def padseg(*arguments: object, folder: Path | None = None) -> Ran:
    """`padseg` with these arguments, in a process of its own."""
    return start(main, [str(argument) for argument in arguments], folder=folder).wait()
