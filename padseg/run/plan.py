"""Decide which pictures a run processes, and which of them are still pending."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from padseg.errors import NoImages, UsageError
from padseg.images import Found, collisions, find, frames_of, ignores_case
from padseg.run.job import Job, outputs
from padseg.run.locks import all_records
from padseg.run.records import (
    Recorded,
    Run,
    entry_of,
    read_run,
)
from padseg.run.selection import select


class Plan(NamedTuple):
    """What to do. kept: records of pictures that stay unchanged; earlier: the run that made the existing results."""

    pending: list[Found]
    kept: dict[str, Recorded]
    earlier: Run | None


def choose(job: Job) -> tuple[list[Found], list[Found]]:
    """Return all pictures of the source, and those that the run processes. Raises NoImages if there are none, and UsageError."""
    if job.source.resolve() == job.out.resolve():
        raise UsageError(f'the output folder cannot be the folder of pictures: {job.out}')
    frames = [frame for picture in find(job.source, skip=job.out) for frame in frames_of(picture, job.reading)]
    if not frames:
        raise NoImages(f'there are no pictures in {job.source}')
    pictures = select(frames, job.selection)
    if not pictures:
        raise NoImages(f'none of the {len(frames)} pictures in {job.source} is selected')
    return frames, pictures


def refuse_collisions(out: Path, pictures: list[Found]) -> None:
    """Raise UsageError if two pictures would have the same result files."""
    same = collisions(picture.name for picture in pictures)
    if same and ignores_case(out):
        raise UsageError(f'{same[0][0]} and {same[0][1]} are the same name on the file system of {out}: rename one, or --exclude it')


def plan(job: Job, frames: list[Found], pictures: list[Found]) -> Plan:
    """Compare the chosen pictures with the existing results. OutputConflict if these are unreadable."""
    shard = job.selection.shard
    earlier = None if job.overwrite and not shard else read_run(job.out / 'run.json')
    records = all_records(job.out) if earlier else {}
    past = {} if job.overwrite else records
    pending = [picture for picture in pictures if not settled(picture, past.get(picture.name), job)]
    again = {picture.name for picture in pending}
    # failed pictures outside this run keep their records, unless their files are gone
    unselected = {picture.name for picture in frames} - {picture.name for picture in pictures}
    kept = {name: record for name, record in records.items() if name not in again and (record.status == 'done' or name in unselected)}
    kept |= {picture.name: records[picture.name] for picture in pictures if picture.name not in again}
    if shard:  # pictures outside the shard are recorded elsewhere
        kept = {picture.name: kept[picture.name] for picture in pictures if picture.name in kept}
    done = any(record.status == 'done' for record in records.values())
    return Plan(pending, kept, earlier if done else None)


def settled(picture: Found, record: Recorded | None, job: Job) -> bool:
    """Return whether a picture needs no work: it has all its results, or it failed and must not be retried."""
    if record is None or (record.status == 'failed' and job.retry_failed):
        return False
    entry = entry_of(record)
    if entry.status == 'done' and not all((job.out / path).exists() for path in outputs(picture.name, job).values()):
        return False
    try:
        now = picture.path.stat()
        if not job.checksum and (now.st_size, now.st_mtime_ns) == (entry.bytes, entry.modified):
            return True
        return hashlib.sha256(picture.path.read_bytes()).hexdigest() == entry.sha256
    except OSError:
        return False  # reading it again will report the error
