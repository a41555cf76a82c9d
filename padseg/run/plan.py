"""Decide which pictures a run processes, and which of them are still pending."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import NamedTuple

from padseg.errors import NoImages, UsageError
from padseg.images import HEIC, LINKED, Found, Listing, collisions, frames_of, ignores_case, in_words, listing
from padseg.run.job import Job, outputs
from padseg.run.locks import all_records
from padseg.run.records import (
    Entry,
    Recorded,
    Run,
    entry_of,
    read_run,
)
from padseg.run.selection import select
from padseg.run.source import refuse_other_source, refuse_results, unchanged
from padseg.system.ledger import refuse_others
from padseg.system.text import printable

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """What a run has to do. kept: records of pictures that stay as they are; earlier: the run that made the existing results; past: its
    records of pictures that are done again with the same settings."""

    pending: list[Found]
    kept: dict[str, Recorded]
    earlier: Run | None
    past: dict[str, Recorded] = {}


def look(job: Job) -> Listing:
    """List the source. Logs a warning for files and folders that are left out but may hold wanted pictures."""
    found = listing(job.source, skip=job.out)
    if found.pictures and found.like_pictures:
        log.warning('not read, though they may be pictures: %s (see left_out in run.json)', in_words(found.like_pictures))
    if found.runs:
        log.warning('left out because they hold results of a run: %s', ', '.join(map(printable, found.runs)))
    for folder, reason in found.unreadable.items():
        log.warning('left out because it cannot be listed: %s: %s', printable(folder), reason)
    return found


def choose(job: Job, found: Listing | None = None) -> tuple[list[Found], list[Found]]:
    """All pictures of the source, and those that the run processes. found: listing of the source, if there is one already.

    Raises NoImages if there are none, and UsageError if the source is a place for results.
    """
    refuse_results(job.source, job.out)
    found = found or look(job)
    frames = [frame for picture in found.pictures for frame in frames_of(picture, job.reading)]
    if not frames:
        others = f' that padseg reads, but {in_words(found.like_pictures)}: {remedy(found.like_pictures)}' if found.like_pictures else ''
        raise NoImages(f'there are no pictures in {job.source}{others}')
    pictures = select(frames, job.selection)
    if not pictures:
        raise NoImages(f'none of the {len(frames)} pictures in {job.source} is selected')
    return frames, pictures


def remedy(kinds: dict[str, int]) -> str:
    """What a user can do about a folder that holds only such files."""
    if LINKED in kinds and len(kinds) == 1:
        return 'name the folder itself, as links to folders are not followed'
    if HEIC in kinds:
        return 'convert them to JPEG or PNG, or install pillow-heif to read HEIC'
    return 'convert them to JPEG or PNG'


def refuse_collisions(out: Path, pictures: list[Found]) -> None:
    """Raise UsageError if two pictures would share result files, or if the results of one would lie in those of another."""
    names = {picture.name for picture in pictures}
    for picture in pictures:
        above = next((folder for folder in folders_above(picture.name) if folder in names), None)
        if above:  # can only be a frame, since no file has the name of a folder
            raise UsageError(f'{above} is both a frame of a file and the folder of {picture.name}: rename one, or --exclude it')
    same = collisions(picture.name for picture in pictures)
    if same and ignores_case(out):
        raise UsageError(f'{same[0][0]} and {same[0][1]} are the same name on the file system of {out}: rename one, or --exclude it')


def plan(job: Job, frames: list[Found], pictures: list[Found]) -> Plan:
    """Compare the chosen pictures with the existing results. Raises OutputConflict if these are unreadable or belong to another source."""
    shard = job.selection.shard
    if job.overwrite:
        refuse_others(job.out, None)
    earlier = None if job.overwrite and not shard else read_run(job.out / 'run.json')
    records = all_records(job.out) if earlier else {}
    done = any(record.status == 'done' for record in records.values())
    if earlier and done:
        refuse_other_source(job.source, job.out, earlier, records, frames)
    past = {} if job.overwrite else records
    pending = [picture for picture in pictures if not settled(picture, past.get(picture.name), job)]
    again = {picture.name for picture in pending}
    # failed pictures outside this run keep their records, unless their files are gone
    unselected = {picture.name for picture in frames} - {picture.name for picture in pictures}
    kept = {name: record for name, record in records.items() if name not in again and (record.status == 'done' or name in unselected)}
    kept |= {picture.name: records[picture.name] for picture in pictures if picture.name not in again}
    if shard:  # pictures outside the shard are recorded elsewhere
        kept = {picture.name: kept[picture.name] for picture in pictures if picture.name in kept}
    return Plan(pending, kept, earlier if done else None, {name: past[name] for name in again if name in past})


def settled(picture: Found, record: Recorded | None, job: Job) -> bool:
    """Return whether a picture needs no work: it has all its results, or it failed and must not be retried."""
    if record is None or (record.status == 'failed' and job.retry_failed):
        return False
    entry = entry_of(record)
    if entry.status == 'done' and not all(is_result(job.out, entry, key) for key in outputs(picture.name, job)):
        return False
    return unchanged(picture, entry, job.checksum)


def is_result(out: Path, entry: Entry, key: str) -> bool:
    """Whether a picture has a result of this kind: in its record, because others may be of other settings, and as a file or folder."""
    if key not in entry.outputs:
        return False
    try:
        mode = os.lstat(out / entry.outputs[key]).st_mode
    except OSError:
        return False
    return stat.S_ISDIR(mode) if key == 'masks' else stat.S_ISREG(mode)


def folders_above(name: str) -> list[str]:
    """The folders in a name: a and a/b for a/b/c.png."""
    parts = name.split('/')
    return ['/'.join(parts[:number]) for number in range(1, len(parts))]
