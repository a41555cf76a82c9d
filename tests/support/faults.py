"""Runs that are killed, or find the disk full, at chosen writes to their output folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from padseg.errors import ResourceExhausted
from padseg.run import engine
from padseg.run.collect import collect
from padseg.run.convert import convert
from padseg.run.job import Job
from padseg.run.selection import Selection

UNTOUCHED = 40  # exit code of a process that ended before its fault
ENDED_BY = {'kill': -signal.SIGKILL, 'full': ResourceExhausted.exit_code}


def at_every_write(source: Path, root: Path, model: str, action: str, fault: str, every: int) -> int:
    """Interrupt the action at every `every`-th write, resume it without a fault, and assert that the results are those of a clean run.

    Token maps are computed once and then replace the model. Prints the number of faults.
    """
    out, whole, begun = root / 'out', root / 'whole', root / 'begun'
    engine.run(Job(source, root / 'maps', model=model, device='cpu', save_maps=True))
    job = Job(source, out, maps=root / 'maps', overlay=True, save_maps=True, coco=action == 'run')
    act, first = actions(job)[action]

    def restart() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if begun.is_dir():
            shutil.copytree(begun, out)

    for one in first:
        engine.run(one)
    if first:
        out.rename(begun)
        restart()
    assert run_in_child(act) == 0
    out.rename(whole)
    expected, faults, number = tree(whole), 0, every
    restart()
    while (code := run_in_child(act, out, fault, number)) != UNTOUCHED:
        assert code == ENDED_BY[fault], (number, code)
        assert fault == 'kill' or not list(out.rglob('.padseg-*')), (number, list(out.rglob('.padseg-*')))
        assert run_in_child(act) == 0, number
        assert differences(tree(out), expected) == [], number
        faults += 1
        number += every
        restart()
    print(faults)
    return 0


def actions(job: Job) -> dict[str, tuple[Callable[[], object], list[Job]]]:
    """Return, by name, each action and the runs that it needs beforehand."""
    parts = [job._replace(selection=Selection(shard=(number, 2)), coco=False) for number in (1, 2)]
    return {
        'run': (lambda: engine.run(job), []),
        'shards': (lambda: [engine.run(part) for part in parts], []),
        'collect': (lambda: collect([job.out], job.out, coco=True), parts),
        'coco-panoptic': (lambda: convert(job.out, 'coco-panoptic'), [job]),
    }


def run_in_child(act: Callable[[], object], out: Path | None = None, fault: str = '', number: int = 0) -> int:
    """Act in a child process and return its exit code. With a folder `out`, the fault comes before write number `number` below it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = install_fault(out, fault, number) if out else [0]
    try:
        act()
    except ResourceExhausted:
        os._exit(ResourceExhausted.exit_code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0 if seen[0] >= number else UNTOUCHED)


def install_fault(out: Path, fault: str, number: int) -> list[int]:
    """Install a fault before write number `number` below `out` and return a list with the count of writes.

    A write is opening a file for writing, a rename, a removal or a new folder. A full disk stays full, but allows removals.
    """
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ('open', 'os.rename', 'os.mkdir', 'os.remove') or not str(arguments[0]).startswith(str(out)):
            return
        if (event == 'open' and not arguments[2] & (os.O_WRONLY | os.O_RDWR)) or (event == 'os.remove' and fault == 'full'):
            return
        seen[0] += 1
        if seen[0] == number and fault == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if seen[0] >= number:
            raise OSError(errno.ENOSPC, 'No space left on device')

    sys.addaudithook(hook)
    return seen


def tree(folder: Path) -> dict[str, object]:
    """Read the results by name: records without times, other JSON only as present, other files as bytes."""
    contents: dict[str, object] = {}
    for path in folder.rglob('*'):
        name = str(path.relative_to(folder))
        if path.name == 'manifest.jsonl':
            contents[name] = [{**json.loads(line), 'seconds': 0, 'stages': 0} for line in path.read_text().splitlines()]
        elif path.is_file() and path.name != '.lock':
            contents[name] = None if path.suffix in ('.json', '.jsonl') and 'coco' not in name else path.read_bytes()
    return contents


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if name not in one or name not in other or one[name] != other[name])
