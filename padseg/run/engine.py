"""The main job: segment every picture in a folder to label maps and masks on disk, with records from which a later run continues."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from padseg.errors import ResourceExhausted
from padseg.exports.classes import write_classes
from padseg.images import Found, start_decoding
from padseg.run.cluster import results_on_ray
from padseg.run.convert import write_coco
from padseg.run.job import (
    Job,
    outputs,
    places,
    requested,
)
from padseg.run.locks import RUN, exclusive, first_decides, forget, forget_shards, home, shared
from padseg.run.picture import OutOfMemory, Stages, Taken, discard, labelled, mapped, save, take
from padseg.run.plan import choose, is_result, look, plan, refuse_collisions
from padseg.run.prepare import from_maps, from_model, now, settings_now, with_threads_of
from padseg.run.records import (
    SUFFIXES,
    Entry,
    Recorded,
    Run,
    RunTotals,
    as_recorded,
    entry_of,
)
from padseg.run.space import warn_if_short
from padseg.run.threads import as_before
from padseg.system.files import full_disk, inside, sweep
from padseg.system.ledger import continued, line, refuse_other_settings, write_header, write_lines
from padseg.system.progress import Progress, Silent
from padseg.system.signals import Stop
from padseg.system.threads import ahead, batches, threads

FOREIGN = 'scores.json'  # header of an evaluation, which needs its own folder
log = logging.getLogger(__name__)


class Counts(NamedTuple):
    """How a run went. skipped: those of `done` that earlier runs had finished; regions: mean per finished picture; signal: what stopped the
    run; unreadable: number of folders in the source that could not be listed."""

    images: int
    done: int
    skipped: int
    failed: int
    regions: float
    seconds: float
    signal: int | None = None
    unreadable: int = 0


def run(job: Job, progress: Progress = Silent()) -> Counts:
    """Segment all pictures of the job that its output lacks. A picture that fails is recorded, and the others continue.

    Raises NoImages, UsageError, ModelUnavailable, ResourceExhausted, and OutputConflict if the output was made with other settings or from
    other pictures, if another run is writing to it, or if it cannot be used.
    """
    began = time.perf_counter()
    found = look(job)
    frames, pictures = choose(job, found)
    shard = job.selection.shard
    own = home(job.out, shard)
    with full_disk(job.out), held(job), Stop() as stop:
        refuse_collisions(job.out, pictures)
        pending, records, earlier, past = plan(job, frames, pictures)
        skipped = len(pictures) - len(pending)
        alike = earlier and not pending and earlier.requested == requested(job)
        record = settings_now(job, earlier) if earlier and alike else None
        worked = record is None
        if record is None:
            clean(job, pending)
            with as_before(job, earlier), contextlib.ExitStack() as stack:
                record, made = start(job, pending, records.values(), earlier, stop)
                stack.enter_context(contextlib.closing(progress))
                progress.start(len(pending))
                for entry in work(job, made, pending, records.values(), stop, past):
                    records[entry.input] = as_recorded(entry)
                    progress.step(entry.model_dump())
        else:
            agree(job.out, earlier, record)
        present = [records[picture.name] for picture in pictures if picture.name in records]
        counts = count(len(pictures), present, skipped, time.perf_counter() - began, stop.signal)
        counts = counts._replace(unreadable=len(found.unreadable))
        record = record.model_copy(update={'left_out': found.left_out, 'unreadable': found.unreadable})
        finish_records(own, record, records, counts, worked)
        if not shard:
            forget_shards(job.out)
        if job.coco and counts.done and not counts.signal:
            for name, reason in write_coco(job.out).items():
                log.warning('not in the COCO files: %s: %s', name, reason)
    if counts.failed == counts.images and all(records[picture.name].error == OutOfMemory.__name__ for picture in pictures):
        raise ResourceExhausted('no picture fits in memory: try a smaller --side, or --dtype bfloat16')
    return counts


def held(job: Job) -> contextlib.AbstractContextManager[None]:
    """Hold the output folder, alone or together with other shards."""
    shard = job.selection.shard
    return shared(job.out, shard, FOREIGN) if shard else exclusive(job.out, FOREIGN)


def start(job: Job, pending: list[Found], kept: Iterable[Recorded], earlier: Run | None, stop: Stop) -> tuple[Run, Iterator[Entry]]:
    """Prepare the run: its record, and an iterator that makes the records of its pictures as they are consumed.

    Records of other settings are removed before the new settings are written to the header.
    """
    start_decoding()
    stages, record = prepare_job(job, earlier)
    job = seen_in_tiles(job, record)
    own = home(job.out, job.selection.shard)
    if job.selection.shard:
        write_lines((one.line for one in kept), own / 'manifest.jsonl')
    elif earlier is None:
        forget(job.out)
    if job.classes:
        write_classes(job.classes, job.out / 'classes.json')
    write_header(record, own / 'run.json')
    warn_if_short(job, pending, int(str(record.settings.get('side', 0))))
    if job.engine == 'ray':  # Ray's actors load the model themselves, so the one here is released
        return record, results_on_ray(job, record, pending, stop, job.address)
    return record, results(job, stages, pending, stop)


def seen_in_tiles(job: Job, record: Run) -> Job:
    """The job with pictures read at about the scale at which the model sees them, if it sees them in tiles."""
    tiles, side = (int(str(record.settings.get(name) or 0)) for name in ('tiles', 'side'))
    return job._replace(reading=job.reading._replace(reduce=max(1, tiles // side))) if tiles else job


def prepare_job(job: Job, earlier: Run | None) -> tuple[Stages, Run]:
    """The stages of the job, and the record of the run. Raises OutputConflict if existing results were made with other settings."""
    stages, record = from_maps(job) if job.maps else from_model(job, earlier)
    if job.selection.shard:
        own = partial(with_threads_of, job=job, record=record)
        return stages, first_decides(RUN, job.out, job.selection.shard, earlier, own, 'results')
    agree(job.out, earlier, record)
    return stages, record


def agree(out: Path, earlier: Run | None, record: Run) -> None:
    """Raise OutputConflict if results of an earlier run were made with other settings."""
    if earlier:
        refuse_other_settings(out, earlier.settings, record.settings)


def work(
    job: Job, made: Iterable[Entry], pending: list[Found], kept: Iterable[Recorded], stop: Stop, past: Mapping[str, Recorded] = {}
) -> Iterator[Entry]:
    """Process the pending pictures and yield their records. The manifest line of a picture is the last thing written for it.

    past: records of the same pictures by earlier runs with the same settings.
    """
    own = home(job.out, job.selection.shard)
    kinds = [kind for kind in SUFFIXES if (job.out / kind).is_dir()]
    failures = 0
    with continued((record.line for record in kept), own / 'manifest.jsonl') as add:
        if not job.selection.shard:
            forget_shards(job.out)  # their records are in the manifest now
        for entry in made:
            keep_or_discard(job, entry, past.get(entry.input), kinds)
            add(line(entry))
            yield entry
            failures += entry.status == 'failed'
            if job.max_failures is not None and failures > job.max_failures:
                stop.asked = True
    if job.engine == 'ray':  # a worker may have been killed and its work repeated by another
        clean(job, pending)


def keep_or_discard(job: Job, entry: Entry, before: Recorded | None, kinds: Iterable[str]) -> None:
    """For kinds of results that this run was not asked for: record those that still match the picture and the settings, and remove the
    others. Failed pictures are left alone."""
    if entry.status == 'failed':
        return
    earlier = entry_of(before) if before else None
    for kind, path in places(entry.input).items():
        if kind in entry.outputs or kind not in kinds:
            continue
        if earlier and earlier.sha256 == entry.sha256 and is_result(job.out, earlier, kind):
            entry.outputs[kind] = path
        else:
            discard(job, {kind: path})


def clean(job: Job, pending: list[Found]) -> None:
    """Remove what killed runs left half written; next to other shards, only what was to become results of these pictures.

    Raises OutputConflict if results would be written through a link.
    """
    names: dict[str, set[str]] = {}
    for picture in pending:
        for path in outputs(picture.name, job).values():
            folder, _, name = path.rpartition('/')
            names.setdefault(folder, set()).add(name)
    for folder, mine in names.items():
        sweep(inside(job.out, folder), mine if job.selection.shard else None)


def results(job: Job, stages: Stages, pending: list[Found], stop: Stop) -> Iterator[Entry]:
    """Read pictures ahead of the model, and make label maps and write results after it, in separate threads; yields records in order."""
    with threads(job.workers) as readers, threads(job.workers) as writers:
        depth = job.batch + job.workers
        taken = ahead(readers, partial(take, job, stopped=lambda: stop.asked), pending, depth)
        yield from ahead(writers, partial(complete, job, stages), map_all(job, stages, taken, stop), depth)


def map_all(job: Job, stages: Stages, taken: Iterable[Taken], stop: Stop) -> Iterator[Taken]:
    """Yield the pictures with their token maps. If a stop is requested before a batch's forward pass, the batch is dropped."""
    for some in batches(taken, job.batch):
        if stop.asked:
            return
        yield from mapped(stages, some)


def complete(job: Job, stages: Stages, taken: Taken) -> Entry:
    """Finish a picture after the model."""
    return save(job, labelled(stages, taken))


def count(images: int, records: Collection[Recorded], skipped: int, seconds: float, signal: int | None = None) -> Counts:
    """Summarise the records of pictures now in the folder, out of the `images` pictures of the run."""
    regions = [record.regions or 0 for record in records if record.status == 'done']
    mean = sum(regions) / len(regions) if regions else 0.0
    return Counts(images, len(regions), skipped, len(records) - len(regions), mean, seconds, signal)


def finish_records(out: Path, run: Run, records: dict[str, Recorded], counts: Counts, worked: bool) -> None:
    """Write the final records: one line per picture, sorted by name."""
    ordered = [records[name] for name in sorted(records)]
    write_lines((record.line for record in ordered), out / 'manifest.jsonl')
    write_lines((record.line for record in ordered if record.status == 'failed'), out / 'failures.jsonl')
    last = {
        'status': 'finished' if counts.done + counts.failed == counts.images else 'interrupted',
        'counts': RunTotals(**{name: getattr(counts, name) for name in RunTotals.model_fields}),
        'ended': now() if worked else run.ended,
        'seconds': round(counts.seconds, 3) if worked else run.seconds,
    }
    write_header(run.model_copy(update=last), out / 'run.json')
