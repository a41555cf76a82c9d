"""Which runs may write to an output folder at the same time, and where each keeps its records.

A run without shards has the folder to itself. Runs of different shards share it: each keeps its records in OUT/shards/i-of-N until a run
without shards, or `padseg run --collect`, joins them. Commands with records of another kind use the same folders, see `Ledger`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from padseg.run.records import Recorded, Run, read_records, read_run
from padseg.system.files import inside, remove, sweep
from padseg.system.ledger import (
    Header,
    busy,
    differences,
    locked,
    make_output,
    refuse_other_settings,
    refuse_strange,
    write_header,
)

Shard = tuple[int, int]  # (i, N), i from 1


OfRun = TypeVar('OfRun', bound=Header)
OfPicture = TypeVar('OfPicture')


class Ledger(NamedTuple, Generic[OfRun, OfPicture]):
    """How a command's records are read. header: of its run.json, None if there is none; lines: of its manifest.jsonl, by picture."""

    header: Callable[[Path], OfRun | None]
    lines: Callable[[Path], dict[str, OfPicture]]


RUN = Ledger(read_run, read_records)

SHARDS = 'shards'
MOST_SHARDS = 1_000_000
RECORDS = ('run.json', 'manifest.jsonl', 'failures.jsonl', 'classes.json')
SECONDS = 10.0  # how long a shard waits while another one starts


def home(out: Path, shard: Shard | None) -> Path:
    """Where a run keeps run.json, manifest.jsonl and failures.jsonl."""
    return inside(out, f'{SHARDS}/{shard[0]}-of-{shard[1]}') if shard else out


def shard_homes(out: Path) -> dict[Shard, Path]:
    """The shards that have records in an output folder."""
    folders = [path for path in inside(out, SHARDS).glob('*-of-*') if path.is_dir() and not path.is_symlink()]
    names = {path: re.fullmatch(r'([1-9]\d{0,6})-of-([1-9]\d{0,6})', path.name, re.ASCII) for path in sorted(folders)}
    shards = {(int(match[1]), int(match[2])): path for path, match in names.items() if match}
    return {(i, n): path for (i, n), path in shards.items() if i <= n <= MOST_SHARDS}


def joinable(out: Path) -> dict[Shard, tuple[Path, Run]]:
    """`joinable_by` for records of `padseg run`."""
    return joinable_by(RUN, out)


def joinable_by(ledger: Ledger[OfRun, Any], out: Path) -> dict[Shard, tuple[Path, OfRun]]:
    """The shards whose settings are those of the output folder, with their folders and runs.

    Other shards are left over from a run with --overwrite that was killed.
    """
    made = ledger.header(out / 'run.json')
    runs = {shard: (folder, ledger.header(folder / 'run.json')) for shard, folder in shard_homes(out).items()} if made else {}
    return {shard: (folder, run) for shard, (folder, run) in runs.items() if made and run and not differences(made.settings, run.settings)}


@contextlib.contextmanager
def exclusive(out: Path, *foreign: str) -> Iterator[None]:
    """Create the output folder, lock out all other runs, including shards, and remove half-written files left by killed runs.

    Raises OutputConflict if a run is using the folder, or if it holds a file in `foreign`, another command's header.
    """
    make_output(out, *foreign)
    with locked(out, busy(out)), contextlib.ExitStack() as stack:
        for (i, n), folder in shard_homes(out).items():
            stack.enter_context(locked(folder, f'the run of shard {i}/{n} is writing to {out}'))
        refuse_strange(out, RECORDS)
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
            for folder in (out, home(out, shard)):
                refuse_strange(folder, RECORDS)
        sweep(home(out, shard))
        yield


def briefly(out: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the output folder alone for a moment, among runs that share it."""
    return locked(out, busy(out), SECONDS)


def first_decides(
    ledger: Ledger[OfRun, Any], out: Path, shard: Shard, earlier: OfRun | None, record_of: Callable[[OfRun | None], OfRun], what: str
) -> OfRun:
    """The record of a shard's run. The first of several shards that start together writes it to OUT and so decides the settings of all.

    earlier: the run that this one continues; record_of: makes the record, given that of the first shard, if there is one; what: the output
    holds. Raises OutputConflict if that was made with other settings.
    """
    with briefly(out):
        others = shard_homes(out).keys() - {shard}
        existing = ledger.header(out / 'run.json') if earlier or others else None
        record = record_of(existing)
        if existing:
            refuse_other_settings(out, existing.settings, record.settings, what, 'choose another --out')
        else:
            forget_records(out)
            write_header(record, out / 'run.json')
    return record


def all_records(out: Path) -> dict[str, Recorded]:
    """`records_by` for records of `padseg run`."""
    return records_by(RUN, out)


def records_by(ledger: Ledger[Any, OfPicture], out: Path) -> dict[str, OfPicture]:
    """The last record of every picture in an output folder, including those of shards; none without a run.json, which has the settings."""
    if ledger.header(out / 'run.json') is None:
        return {}
    # a run that writes the folder's own manifest has joined the shards before it, so shards that exist now are newer
    manifests = [folder / 'manifest.jsonl' for folder, _ in joinable_by(ledger, out).values()]
    newest_last = sorted((path for path in manifests if path.exists()), key=lambda path: path.stat().st_mtime_ns)
    records: dict[str, OfPicture] = {}
    for path in (out / 'manifest.jsonl', *newest_last):
        records |= ledger.lines(path)
    return records


def unfinished(folders: Sequence[Path]) -> list[str]:
    """Shards, as i/N, without a finished run in these folders, for the N with the fewest missing; often none."""
    states: dict[int, dict[int, bool]] = {}
    for (i, n), (_, run) in [item for out in folders for item in joinable(out).items()]:
        states.setdefault(n, {})[i] = run.status == 'finished'
    missing = [[f'{i}/{n}' for i in range(1, n + 1) if not finished.get(i)] for n, finished in states.items()]
    return min(missing, key=len, default=[])


def forget(out: Path) -> None:
    """Remove the records of an output folder and of its shards, except the header.

    Call this before writing a header with other settings. Then no result counts as made with settings that did not make it, wherever a run
    is killed.
    """
    forget_records(out)
    forget_shards(out)


def forget_records(out: Path) -> None:
    for name in ('manifest.jsonl', 'failures.jsonl'):
        (out / name).unlink(missing_ok=True)


def forget_shards(out: Path) -> None:
    """Remove the shards' records once they are joined."""
    if (out / SHARDS).is_dir():
        remove(out / SHARDS)
