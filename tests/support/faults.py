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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from padseg.errors import OutputConflict, ResourceExhausted
from padseg.methods.classical import GridOptions
from padseg.methods.seg4diff import Options
from padseg.run import engine
from padseg.run.collect import collect
from padseg.run.convert import convert
from padseg.run.job import Job
from padseg.run.selection import Selection

BEGINNING = 14  # changes of a run before its first result: old records go, and the header says what the settings are now
FROM_NOTHING = ('run', 'join', 'collect')  # stories without results of other settings, for which the beginning is like the rest
UNTOUCHED = 40  # exit code of a process that ended before its fault
REFUSED = 41  # of one that found results of other settings
ENDED_BY = {'kill': -signal.SIGKILL, 'full': ResourceExhausted.exit_code}


def at_every_write(source: Path, root: Path, model: str, action: str, fault: str, every: int) -> int:
    """Interrupt the action at every `every`-th write, resume it without a fault, and assert that the results are those of a clean run.

    Token maps are computed once and then replace the model. Prints the number of faults.
    """
    out, whole, begun = root / 'out', root / 'whole', root / 'begun'
    succeed(lambda: engine.run(Job(source, root / 'maps', model=model, device='cpu', save_maps=True)))
    job = Job(source, out, maps=root / 'maps', overlay=True, save_maps=True, coco=action == 'run')
    act, first = actions(job)[action]

    def restart() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if begun.is_dir():
            shutil.copytree(begun, out)

    for one in first:
        succeed(partial(engine.run, one))
    if first:
        out.rename(begun)
        restart()
    succeed(act)
    out.rename(whole)
    expected, faults, number = tree(whole), 0, every
    restart()
    while (code := run_in_child(act, out, fault, number)) != UNTOUCHED:
        assert code == ENDED_BY[fault], (number, code)
        assert fault == 'kill' or not list(out.rglob('.padseg-*')), (number, list(out.rglob('.padseg-*')))
        succeed(act)
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


class Story(NamedTuple):
    """A command that is killed. begun: what there was before; act: the command; without: the same without --overwrite; before: the command
    of the old settings, which may find that its results are gone, but never others in their place."""

    begun: Callable[[], object]
    act: Callable[[], object]
    without: Callable[[], object]
    before: Callable[[], object]


def at_every_event(source: Path, root: Path, maps: Path | None, action: str, every: int) -> int:
    """Kill a command before changes that it makes below its output folder: before every second at its beginning, if old results are at
    stake, then before every so many; with `every` 1, before each.

    Whatever is done then, with --overwrite or without, or with the old settings, gives what it gives undisturbed, or OutputConflict, and
    after that the old settings give the old results. Prints how often it was killed.
    """
    out, kept = root / 'out', root / 'kept'
    story = stories(source, out, maps)[action]

    def restart(state: Path | None) -> None:
        shutil.rmtree(out, ignore_errors=True)
        if state and state.is_dir():
            shutil.copytree(state, out)

    succeed(story.begun)
    shutil.copytree(out, root / 'begun') if out.is_dir() else None
    restart(None)
    succeed(story.before)
    old = tree(out)
    restart(root / 'begun')
    succeed(story.act)
    new = tree(out)
    number, kills = 1, 0
    restart(root / 'begun')
    while (code := run_in_child(story.act, out, 'kill', number)) != UNTOUCHED:
        assert code == ENDED_BY['kill'], (number, code)
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(out, kept) if out.is_dir() else kept.mkdir()
        succeed(story.act)
        assert differences(tree(out), new) == [], (number, 'again')
        restart(kept)
        if refused(story.without):
            succeed(story.before)
            assert differences(tree(out), old) == [], (number, 'after a refusal')
        else:
            assert differences(tree(out), new) == [], (number, 'without --overwrite')
        restart(kept)
        if not refused(story.before):
            assert differences(tree(out), old) == [], (number, 'old settings')
        restart(root / 'begun')
        kills += 1
        number += min(every, 2) if number < BEGINNING and action not in FROM_NOTHING else every
    print(kills)
    return 0


def succeed(act: Callable[[], object]) -> None:
    assert run_in_child(act) == 0


def refused(act: Callable[[], object]) -> bool:
    code = run_in_child(act)
    assert code in (0, REFUSED), code
    return code == REFUSED


def stories(source: Path, out: Path, maps: Path | None) -> dict[str, Story]:
    """By name. The settings of old results are a grid of one cell, or a threshold, and those of new ones others."""
    old = Job(source, out, GridOptions(1), method='grid', overlay=True)
    new = Job(source, out, GridOptions(2), method='grid')
    parts = [old._replace(selection=Selection(shard=(number, 2))) for number in (1, 2)]
    merged, again = (Job(source, out, Options(threshold=value), maps=maps) for value in (0.5, float('inf')))
    whole = [*parts, old]

    def run(*jobs: Job, **changes: Any) -> Callable[[], object]:
        return lambda: [engine.run(job._replace(**changes)) for job in jobs]

    return {
        'run': Story(run(), run(new), run(new), run(new)),
        'overwrite': Story(run(old), run(new, overwrite=True), run(new), run(old)),
        'overwrite shards': Story(run(*parts), run(new, overwrite=True), run(new), run(old)),
        'shards overwrite shards': Story(run(*parts), run(*parts, old, overwrite=True), run(*whole), run(old)),
        'join': Story(run(*parts), run(old), run(old), run(old)),
        'collect': Story(run(*parts), lambda: collect([out], out), run(old), run(old)),
        'merge': Story(run(merged), run(again, overwrite=True), run(again), run(merged)),
    }


def run_in_child(act: Callable[[], object], out: Path | None = None, fault: str = '', number: int = 0) -> int:
    """Exit code of a child that acts, with a fault before the so-manieth write below a folder if there is one.

    Whatever computes is run so: a child of a process that has computed may search MKL's lists of buffers forever.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = install_fault(out, fault, number) if out else [0]
    try:
        act()
    except ResourceExhausted:
        os._exit(ResourceExhausted.exit_code)
    except OutputConflict:
        os._exit(REFUSED)
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
        if event not in ('open', 'os.rename', 'os.mkdir', 'os.remove', 'os.rmdir') or not place(event, arguments).startswith(str(out)):
            return
        if (event == 'open' and not arguments[2] & (os.O_WRONLY | os.O_RDWR)) or (event in ('os.remove', 'os.rmdir') and fault == 'full'):
            return
        seen[0] += 1
        if seen[0] == number and fault == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if seen[0] >= number:
            raise OSError(errno.ENOSPC, 'No space left on device')

    sys.addaudithook(hook)
    return seen


def place(event: str, arguments: tuple[Any, ...]) -> str:
    """The path that an event is about; where it is one in an open folder, as when a tree is removed, that folder."""
    folder = -1 if event == 'open' else arguments[-1]
    return str(arguments[0]) if folder < 0 or not os.path.isdir('/proc/self/fd') else os.readlink(f'/proc/self/fd/{folder}')


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
