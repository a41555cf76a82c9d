"""Join the results of runs over parts of a folder of pictures, as if a single run had made them."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from padseg.errors import NoImages, OutputConflict
from padseg.run.convert import write_coco
from padseg.run.engine import FOREIGN, Counts, agree, count, finish_records
from padseg.run.locks import all_records, exclusive, forget, forget_shards, joinable, unfinished
from padseg.run.records import Entry, Recorded, Run, entry_of, read_run
from padseg.run.source import refuse_unlike, same_folder
from padseg.system.files import atomic, full_disk, inside, opened, sweep
from padseg.system.ledger import write_header

log = logging.getLogger(__name__)


class Collected(NamedTuple):
    """counts: over all recorded pictures. missing: shards, as i/N, without a finished run."""

    counts: Counts
    missing: list[str]


def collect(folders: Sequence[Path], out: Path, coco: bool = False) -> Collected:
    """Join the records of all shards in these output folders in `out`, and copy the results of the other folders there.

    Raises NoImages if a folder holds no results, and OutputConflict if settings differ, if two folders hold results of different pictures
    with the same name, if a run is writing to one of them, or if a record or a link leads out of its folder.
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
        first = existing or known[0]
        for folder, run in zip(made, known, strict=True):
            agree(folder, first, run)
        missing = unfinished([out, *others])
        records = all_records(out)
        theirs = {folder: all_records(folder) for folder in folders}  # read all of them before writing anything
        for folder, run in zip(made, known, strict=True):
            if not same_folder(Path(first.source), Path(run.source)):
                refuse_unlike(first, run, folder, theirs[folder].values())
        if existing is None:  # without a header, the settings of its records are unknown
            forget(out)
            write_header(first.model_copy(update={'status': 'interrupted'}), out / 'run.json')
        for folder in others:
            for name, record in theirs[folder].items():
                if to_be_copied(record, records.get(name), folder, out):
                    bring(entry_of(record), folder, out)
                    records[name] = record
        seconds = sum(run.seconds or 0.0 for folder in {out, *others} for run in recorded_runs(folder))
        done = sum(record.status == 'done' for record in records.values())
        counts = count(len(records), records.values(), done, seconds)
        finish_records(out, first, records, counts, worked=True)
        if not missing:
            forget_shards(out)
        if coco and counts.done:
            for name, reason in write_coco(out).items():
                log.warning('not in the COCO files: %s: %s', name, reason)
    return Collected(counts, missing)


def recorded_runs(folder: Path) -> list[Run]:
    """The runs with records in an output folder: those of its shards, or else the one run."""
    shards = [run for _, run in joinable(folder).values()]
    alone = read_run(folder / 'run.json')
    return shards or ([alone] if alone else [])


def to_be_copied(record: Recorded, here: Recorded | None, folder: Path, out: Path) -> bool:
    """Return whether to copy a picture's results from `folder`. Raises OutputConflict if `out` has results of a different picture."""
    if here is None or here.status == 'failed':
        return True
    if record.status == 'failed':
        return False
    entry = entry_of(record)
    if entry.sha256 != entry_of(here).sha256:
        raise OutputConflict(f'{folder} and {out} hold results of different pictures named {entry.input}')
    return not all(inside(out, path).exists() for path in entry.outputs.values())


def bring(entry: Entry, folder: Path, out: Path) -> None:
    """Copy a picture's results. Raises OutputConflict for anything but regular files, such as links, and for missing ones."""
    for path in entry.outputs.values():
        source, target = inside(folder, path), inside(out, path)
        sweep(target.parent, {target.name})
        with atomic(target) as temporary:
            if source.is_dir():
                temporary.mkdir()
                for file in sorted(source.iterdir()):
                    copy_file(file, temporary / file.name)
            else:
                copy_file(source, temporary)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content. Raises OutputConflict for anything else, such as a link, and OSError if `target` cannot be written."""
    try:
        file = opened(source)
    except OSError as error:
        raise OutputConflict(f'{source} cannot be copied: {error.strerror}') from error
    with file, target.open('wb') as copy:
        shutil.copyfileobj(file, copy)
