"""Which runs may write to an output folder at the same time, and where each keeps its records.

A run without shards has the folder to itself. Runs of different shards share it: each keeps its records in OUT/shards/i-of-N until a run
without shards, or `padseg run --collect`, joins them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from padseg.run.records import Recorded, read_records, read_run
from padseg.system.files import remove, sweep
from padseg.system.ledger import busy, locked, make_output

Shard = tuple[int, int]  # (i, N), i from 1

SHARDS = 'shards'
SECONDS = 10.0  # time that a shard waits while another one starts


def home(out: Path, shard: Shard | None) -> Path:
    """Folder where a run keeps run.json, manifest.jsonl and failures.jsonl."""
    return out / SHARDS / f'{shard[0]}-of-{shard[1]}' if shard else out


def shard_homes(out: Path) -> dict[Shard, Path]:
    """The shards with records in an output folder."""
    folders = [path for path in (out / SHARDS).glob('*-of-*') if path.is_dir()]
    names = {path: path.name.split('-of-') for path in folders}
    return {(int(i), int(n)): path for path, (i, n) in sorted(names.items()) if i.isdecimal() and n.isdecimal()}


@contextlib.contextmanager
def exclusive(out: Path, *foreign: str) -> Iterator[None]:
    """Create the output folder, lock out all other runs, including shards, and remove half-written files left by killed runs.

    Raises OutputConflict if a run is using the folder, or if it holds a file in `foreign`, another command's header.
    """
    make_output(out, *foreign)
    with locked(out, busy(out)), contextlib.ExitStack() as stack:
        for (i, n), folder in shard_homes(out).items():
            stack.enter_context(locked(folder, f'the run of shard {i}/{n} is writing to {out}'))
        sweep(out)
        yield


@contextlib.contextmanager
def shared(out: Path, shard: Shard, *foreign: str) -> Iterator[None]:
    """Create the output folder and lock out all runs except the other shards of N. OutputConflict as for `exclusive`."""
    make_output(out, *foreign)
    with contextlib.ExitStack() as stack:
        with briefly(out):
            sweep(out, {'run.json'})  # the only file that a shard writes there, and only while it holds the folder
            for (i, n), folder in shard_homes(out).items():
                if n != shard[1]:
                    with locked(folder, f'a run of shard {i}/{n} is writing to {out}: only shards of the same N can share it'):
                        pass
            home(out, shard).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(home(out, shard), f'another run of shard {shard[0]}/{shard[1]} is writing to {out}'))
        sweep(home(out, shard))
        yield


def briefly(out: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the output folder for a moment, among runs that share it."""
    return locked(out, busy(out), SECONDS)


def all_records(out: Path) -> dict[str, Recorded]:
    """Last record of every picture in an output folder, including those of shards."""
    # shards' manifests are newer than the folder's own, which a run writes after joining all earlier shards
    manifests = [folder / 'manifest.jsonl' for folder in shard_homes(out).values()]
    newest_last = sorted((path for path in manifests if path.exists()), key=lambda path: path.stat().st_mtime_ns)
    records: dict[str, Recorded] = {}
    for path in (out / 'manifest.jsonl', *newest_last):
        records |= read_records(path)
    return records


def unfinished(folders: Sequence[Path]) -> list[str]:
    """Shards, as i/N, without a finished run in these folders, for the N with the fewest missing; often none."""
    states: dict[int, dict[int, bool]] = {}
    for (i, n), folder in [item for out in folders for item in shard_homes(out).items()]:
        run = read_run(folder / 'run.json')
        states.setdefault(n, {})[i] = run is not None and run.status == 'finished'
    missing = [[f'{i}/{n}' for i in range(1, n + 1) if not finished.get(i)] for n, finished in states.items()]
    return min(missing, key=len, default=[])


def forget_shards(out: Path) -> None:
    """Remove the shards' records once they are joined."""
    if (out / SHARDS).is_dir():
        remove(out / SHARDS)
