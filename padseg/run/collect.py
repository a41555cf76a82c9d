"""Join the results of runs over parts of a folder of pictures, as if a single run had made them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from padseg.errors import NoImages, OutputConflict
from padseg.run.convert import write_coco
from padseg.run.engine import FOREIGN, Counts, agree, count, finish_records
from padseg.run.locks import all_records, exclusive, forget_shards, shard_homes, unfinished
from padseg.run.records import Entry, Recorded, Run, entry_of, read_run
from padseg.system.files import atomic, full_disk, sweep


class Collected(NamedTuple):
    """counts: over all recorded pictures. missing: shards, as i/N, without a finished run."""

    counts: Counts
    missing: list[str]


def collect(folders: Sequence[Path], out: Path, coco: bool = False) -> Collected:
    """Join the records of all shards in these output folders into those of `out`, and copy results from the other folders there.

    Raises NoImages if there are no results, OutputConflict if their settings differ, if two folders hold results of different pictures with
    the same name, or if a run is writing to one of them.
    """
    others = [folder for folder in folders if folder.resolve() != out.resolve()]
    made = {folder: read_run(folder / 'run.json') for folder in folders}
    known = [run for run in made.values() if run]
    if len(known) < len(made):
        raise NoImages(f'there are no results of `padseg run` in {next(folder for folder, run in made.items() if run is None)}')
    with contextlib.ExitStack() as stack:
        stack.enter_context(full_disk(out))
        for folder in (out, *others):
            stack.enter_context(exclusive(folder, FOREIGN))
        existing = read_run(out / 'run.json')
        for folder, run in zip(made, known, strict=True):
            agree(folder, existing or known[0], run)
        missing = unfinished([out, *others])
        records = all_records(out)
        for folder in others:
            for name, record in all_records(folder).items():
                if to_be_copied(record, records.get(name), folder, out):
                    bring(entry_of(record), folder, out)
                    records[name] = record
        seconds = sum(run.seconds or 0.0 for folder in {out, *others} for run in recorded_runs(folder))
        done = sum(record.status == 'done' for record in records.values())
        counts = count(len(records), records.values(), done, seconds)
        finish_records(out, existing or known[0], records, counts, worked=True)
        if not missing:
            forget_shards(out)
        if coco and counts.done:
            write_coco(out)
    return Collected(counts, missing)


def recorded_runs(folder: Path) -> list[Run]:
    """The runs with records in an output folder: those of its shards, or its own."""
    return [run for home in shard_homes(folder).values() or [folder] if (run := read_run(home / 'run.json'))]


def to_be_copied(record: Recorded, here: Recorded | None, folder: Path, out: Path) -> bool:
    """Return whether to copy a picture's results from `folder`. OutputConflict if the results here are of a different picture."""
    if here is None or here.status == 'failed':
        return True
    if record.status == 'failed':
        return False
    entry = entry_of(record)
    if entry.sha256 != entry_of(here).sha256:
        raise OutputConflict(f'{folder} and {out} hold results of different pictures named {entry.input}')
    return not all((out / path).exists() for path in entry.outputs.values())


def bring(entry: Entry, folder: Path, out: Path) -> None:
    """Copy a picture's results."""
    for path in entry.outputs.values():
        sweep((out / path).parent, {Path(path).name})
        with atomic(out / path) as temporary:
            if (folder / path).is_dir():
                shutil.copytree(folder / path, temporary, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(folder / path, temporary)
