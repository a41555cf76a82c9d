"""The main job: every picture of a folder to label maps and masks on disk, with records from which a later run continues."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
import time
from collections.abc import Iterable
from collections.abc import Iterator
from datetime import datetime
from datetime import timezone
from functools import partial
from pathlib import Path
from typing import NamedTuple

from padseg import __version__
from padseg.cluster import results_on_ray
from padseg.convert import write_coco
from padseg.errors import NoImages
from padseg.errors import OutputConflict
from padseg.errors import ResourceExhausted
from padseg.errors import UsageError
from padseg.exports.classes import write_classes
from padseg.exports.files import full_disk
from padseg.exports.files import sweep
from padseg.images import Found
from padseg.images import collisions
from padseg.images import find
from padseg.images import frames_of
from padseg.images import ignores_case
from padseg.job import Job
from padseg.job import classes_from
from padseg.job import last_layer
from padseg.job import naming_settings
from padseg.job import outputs
from padseg.job import plain
from padseg.job import reading_settings
from padseg.job import requested
from padseg.job import resolved_from
from padseg.options import LATER
from padseg.pipeline import ahead
from padseg.pipeline import batches
from padseg.pipeline import threads
from padseg.progress import Progress
from padseg.progress import Silent
from padseg.records import Entry
from padseg.records import Model
from padseg.records import Recorded
from padseg.records import Run
from padseg.records import Setting
from padseg.records import Totals
from padseg.records import differences
from padseg.records import entry_of
from padseg.records import line
from padseg.records import read_run
from padseg.records import recorded
from padseg.records import write_records
from padseg.records import write_run
from padseg.selection import select
from padseg.sharing import all_records
from padseg.sharing import briefly
from padseg.sharing import exclusive
from padseg.sharing import forget_shards
from padseg.sharing import home
from padseg.sharing import shard_homes
from padseg.sharing import shared
from padseg.signals import Stop
from padseg.space import warn_if_short
from padseg.stages import OutOfMemory
from padseg.stages import Method
from padseg.stages import Taken
from padseg.stages import by_maps
from padseg.stages import method_of
from padseg.stages import labelled
from padseg.stages import mapped
from padseg.stages import save
from padseg.stages import take
from padseg.versions import versions

log = logging.getLogger(__name__)


class Counts(NamedTuple):
    """How a run went. skipped: those of `done` that earlier runs had done; regions: mean of a done picture; signal: what stopped it."""

    images: int
    done: int
    skipped: int
    failed: int
    regions: float
    seconds: float
    signal: int | None = None


class Plan(NamedTuple):
    """What there is to do. kept: records of pictures that stay as they are; earlier: the run that made results which are there."""

    pending: list[Found]
    kept: dict[str, Recorded]
    earlier: Run | None


def run(job: Job, progress: Progress = Silent()) -> Counts:
    """Segment all pictures of the job that its output does not hold yet; a picture that fails is recorded and the rest go on.

    Raises NoImages, UsageError, ModelUnavailable, ResourceExhausted, and OutputConflict if the output was made with other settings or
    is being written.
    """
    began = time.perf_counter()
    found, pictures = choose(job)
    shard = job.selection.shard
    own = home(job.out, shard)
    with full_disk(job.out), held(job), Stop() as stop:
        refuse_collisions(job.out, pictures)
        pending, records, earlier = plan(job, found, pictures)
        skipped = len(pictures) - len(pending)
        worked = bool(pending) or earlier is None or earlier.requested != requested(job)
        if worked:
            record, made = start(job, pending, earlier, stop)
            with contextlib.closing(progress):
                progress.start(len(pending))
                for entry in work(job, made, pending, records.values(), stop):
                    records[entry.input] = recorded(entry)
                    progress.step(entry.model_dump())
        else:
            assert earlier is not None
            record = earlier
        counts = count(pictures, records, skipped, time.perf_counter() - began, stop.signal)
        finish(own, record, records, counts, worked)
        if not shard:
            forget_shards(job.out)
        if job.coco and counts.done and not counts.signal:
            for name, reason in write_coco(job.out).items():
                log.warning('not in the COCO files: %s: %s', name, reason)
    if counts.failed == counts.images and all(records[picture.name].error == OutOfMemory.__name__ for picture in pictures):
        raise ResourceExhausted('no picture fits into memory: try a smaller --side, or --dtype bfloat16')
    return counts


def held(job: Job) -> contextlib.AbstractContextManager[None]:
    """The output folder, alone or with other shards."""
    shard = job.selection.shard
    return shared(job.out, shard, foreign='scores.json') if shard else exclusive(job.out, foreign='scores.json')


def choose(job: Job) -> tuple[list[Found], list[Found]]:
    """All pictures of the source, and those that the run is about. Raises NoImages if there are none, and UsageError."""
    if job.source.resolve() == job.out.resolve():
        raise UsageError(f'the output cannot be the folder of the pictures itself: {job.out}')
    found = [frame for picture in find(job.source, skip=job.out) for frame in frames_of(picture, job.reading)]
    if not found:
        raise NoImages(f'there are no pictures in {job.source}')
    pictures = select(found, job.selection)
    if not pictures:
        raise NoImages(f'none of the {len(found)} pictures in {job.source} is selected')
    return found, pictures


def refuse_collisions(out: Path, pictures: list[Found]) -> None:
    """UsageError if two pictures' results would be one file."""
    same = collisions(picture.name for picture in pictures)
    if same and ignores_case(out):
        raise UsageError(f'{same[0][0]} and {same[0][1]} are one name on the file system of {out}: rename one, or --exclude it')


def plan(job: Job, found: list[Found], pictures: list[Found]) -> Plan:
    """Compare the chosen pictures with the results that are there. OutputConflict if these cannot be understood."""
    shard = job.selection.shard
    earlier = None if job.overwrite and not shard else read_run(job.out / 'run.json')
    records = all_records(job.out) if earlier else {}
    past = {} if job.overwrite else records
    pending = [picture for picture in pictures if not settled(picture, past.get(picture.name), job)]
    again = {picture.name for picture in pending}
    # failed pictures that this run is not about keep their records, unless they are gone
    there = {picture.name for picture in found} - {picture.name for picture in pictures}
    kept = {name: record for name, record in records.items() if name not in again and (record.status == 'done' or name in there)}
    kept |= {picture.name: records[picture.name] for picture in pictures if picture.name not in again}
    if shard:  # what is not of the shard is recorded elsewhere
        kept = {picture.name: kept[picture.name] for picture in pictures if picture.name in kept}
    done = any(record.status == 'done' for record in records.values())
    return Plan(pending, kept, earlier if done else None)


def settled(picture: Found, record: Recorded | None, job: Job) -> bool:
    """Whether nothing is to be done for this very picture: it has all its results, or it failed and is not to be tried again."""
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
        return False  # reading it again will tell what is wrong


def start(job: Job, pending: list[Found], earlier: Run | None, stop: Stop) -> tuple[Run, Iterator[Entry]]:
    """The run in words, and the records of its pictures, which are made when they are asked for."""
    method, record = prepare(job, earlier)
    write_run(record, home(job.out, job.selection.shard) / 'run.json')
    if job.classes:
        write_classes(job.classes, job.out / 'classes.json')
    warn_if_short(job, pending, int(str(record.settings['side'])))
    if job.engine == 'ray':  # whose actors load the model: the one here is let go
        return record, results_on_ray(job, record, pending, stop, job.address)
    return record, results(job, method, pending, stop)


def prepare(job: Job, earlier: Run | None) -> tuple[Method, Run]:
    """The method, and the run in words. OutputConflict if the earlier results in the same place came from other settings."""
    method, record = from_maps(job) if job.maps else from_model(job)
    if not job.selection.shard:
        agree(job.out, earlier, record, ', or --overwrite')
        return method, record
    with briefly(job.out):  # the first of several shards that begin at a time says what the settings are
        others = shard_homes(job.out).keys() - {job.selection.shard}
        there = read_run(job.out / 'run.json') if earlier or others else None
        agree(job.out, there, record, '')
        if there is None:
            write_run(record, job.out / 'run.json')
    return method, record


def agree(out: Path, earlier: Run | None, record: Run, remedy: str) -> None:
    if earlier and earlier.settings != record.settings:
        raise OutputConflict(
            f'{out} holds results of other settings ({"; ".join(differences(earlier.settings, record.settings))}): '
            f'choose another --out{remedy}'
        )


def from_model(job: Job) -> tuple[Method, Run]:
    """The method by a loaded model."""
    # torch takes seconds to import: a run that has nothing to do, or nothing to do it with, need not wait.
    import torch

    from padseg.backbones import load

    layer = last_layer(job.options, job.model, job.revision)
    backbone = load(job.model, revision=job.revision, device=job.device, dtype=job.dtype, layer=layer, vae=job.vae, compile=job.compile)
    dtype = str(backbone.dtype).removeprefix('torch.')
    settings: dict[str, Setting] = {'weights': backbone.identity.weights, 'dtype': dtype, 'compile': job.compile}
    settings |= plain(job.options.resolve(backbone.spec)) | naming_settings(job) | reading_settings(job.reading)
    record = Run(
        padseg=__version__,
        source=str(job.source.resolve()),
        requested=requested(job),
        settings=settings,
        key=key_of(settings),
        model=Model(**backbone.identity._asdict()),
        device=str(backbone.device),
        dtype=dtype,
        threads=torch.get_num_threads(),
        platform=platform.platform(),
        versions=versions(),
        batch=job.batch,
        started=now(),
    )
    return method_of(backbone, job), record


def from_maps(job: Job) -> tuple[Method, Run]:
    """The method by token maps that an earlier run kept. NoImages if there are none."""
    from padseg.segment import regions

    assert job.maps is not None
    made = read_run(job.maps / 'run.json')
    if made is None or not (job.maps / 'maps').is_dir():
        raise NoImages(f'{job.maps} holds no token maps: make them by `padseg run --save-maps --out {job.maps}`')
    if classes_from(made.settings):
        raise UsageError(f'{job.maps} holds maps of classes: `padseg label` makes them into other label maps')
    settings = {**made.settings, **{name: value for name, value in plain(job.options).items() if name in LATER and value is not None}}
    known = {name: entry_of(record).sha256 for name, record in all_records(job.maps).items()}
    resolved = resolved_from(settings)
    record = made.model_copy(
        update={
            'status': 'running',
            'padseg': __version__,
            'source': str(job.source.resolve()),
            'requested': requested(job),
            'settings': settings,
            'key': key_of(settings),
            'versions': versions(),
            'started': now(),
            'ended': None,
        }
    )
    return Method(partial(by_maps, job.maps / 'maps', known), partial(regions, options=resolved)), record


def key_of(settings: dict[str, Setting]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def work(job: Job, made: Iterable[Entry], pending: list[Found], kept: Iterable[Recorded], stop: Stop) -> Iterator[Entry]:
    """Do the pending pictures, as their records are made, each with its manifest line as the last thing written."""
    own = home(job.out, job.selection.shard)
    clean(job, pending)
    write_records(kept, own / 'manifest.jsonl')  # drops a torn last line before more are added
    failures = 0
    with (own / 'manifest.jsonl').open('a', encoding='ascii') as manifest:
        for entry in made:
            manifest.write(line(entry))
            manifest.flush()
            yield entry
            failures += entry.status == 'failed'
            if job.max_failures is not None and failures > job.max_failures:
                stop.asked = True
    if job.engine == 'ray':  # a worker may have been killed and its work done again by another
        clean(job, pending)


def clean(job: Job, pending: list[Found]) -> None:
    """Remove what killed runs left half written; beside other shards, only where it was to become results of these pictures."""
    names: dict[Path, set[str]] = {}
    for picture in pending:
        for path in outputs(picture.name, job).values():
            names.setdefault((job.out / path).parent, set()).add(Path(path).name)
    for folder, mine in names.items():
        sweep(folder, mine if job.selection.shard else None)


def results(job: Job, method: Method, pending: list[Found], stop: Stop) -> Iterator[Entry]:
    """Read pictures ahead of the model, make label maps and write results behind it, each in threads of its own; records, in order."""
    with threads(job.workers) as readers, threads(job.workers) as writers:
        depth = job.batch + job.workers
        taken = ahead(readers, partial(take, job), pending, depth)
        yield from ahead(writers, partial(complete, job, method), map_all(job, method, taken, stop), depth)


def map_all(job: Job, method: Method, taken: Iterable[Taken], stop: Stop) -> Iterator[Taken]:
    """The pictures with their token maps. A batch that was asked to stop before its forward is dropped."""
    for some in batches(taken, job.batch):
        if stop.asked:
            return
        yield from mapped(method, some)


def complete(job: Job, method: Method, taken: Taken) -> Entry:
    """What is left to do for a picture when the model is done with it."""
    return save(job, labelled(method, taken))


def count(pictures: list[Found], records: dict[str, Recorded], skipped: int, seconds: float, signal: int | None) -> Counts:
    """Sum up the records of the pictures that are in the folder now."""
    present = [records[picture.name] for picture in pictures if picture.name in records]
    regions = [record.regions or 0 for record in present if record.status == 'done']
    mean = sum(regions) / len(regions) if regions else 0.0
    return Counts(len(pictures), len(regions), skipped, len(present) - len(regions), mean, seconds, signal)


def finish(out: Path, run: Run, records: dict[str, Recorded], counts: Counts, worked: bool) -> None:
    """Bring the records into their last form: one line a picture, sorted by name."""
    ordered = [records[name] for name in sorted(records)]
    write_records(ordered, out / 'manifest.jsonl')
    write_records([record for record in ordered if record.status == 'failed'], out / 'failures.jsonl')
    last = {
        'status': 'finished' if counts.done + counts.failed == counts.images else 'interrupted',
        'counts': Totals(**{name: getattr(counts, name) for name in Totals.model_fields}),
        'ended': now() if worked else run.ended,
        'seconds': round(counts.seconds, 3) if worked else run.seconds,
    }
    write_run(run.model_copy(update=last), out / 'run.json')


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec='seconds')
