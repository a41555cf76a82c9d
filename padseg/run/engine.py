"""The main job: segment every picture in a folder to label maps and masks on disk, with records from which a later run continues."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from padseg.errors import ResourceExhausted
from padseg.exports.classes import write_classes
from padseg.images import Found
from padseg.run.cluster import results_on_ray
from padseg.run.convert import write_coco
from padseg.run.job import (
    Job,
    outputs,
    requested,
)
from padseg.run.locks import briefly, exclusive, forget_shards, home, shard_homes, shared
from padseg.run.picture import OutOfMemory, Stages, Taken, labelled, mapped, save, take
from padseg.run.plan import choose, plan, refuse_collisions
from padseg.run.prepare import from_maps, from_model, now
from padseg.run.records import (
    Entry,
    Recorded,
    Run,
    RunTotals,
    as_recorded,
    read_run,
)
from padseg.run.space import warn_if_short
from padseg.system.files import full_disk, sweep
from padseg.system.ledger import REMEDY, continued, line, refuse_other_settings, write_header, write_lines
from padseg.system.progress import Progress, Silent
from padseg.system.signals import Stop
from padseg.system.threads import ahead, batches, threads

FOREIGN = 'scores.json'  # header of an evaluation, which needs its own folder
log = logging.getLogger(__name__)


class Counts(NamedTuple):
    """The result of a run. skipped: those in `done` from earlier runs; regions: mean per finished picture; signal: what stopped it."""

    images: int
    done: int
    skipped: int
    failed: int
    regions: float
    seconds: float
    signal: int | None = None


def run(job: Job, progress: Progress = Silent()) -> Counts:
    """Segment all pictures of the job that its output lacks; a picture that fails is recorded and the others continue.

    Raises NoImages, UsageError, ModelUnavailable, ResourceExhausted, and OutputConflict if the output was made with other settings or
    another run is writing to it.
    """
    began = time.perf_counter()
    frames, pictures = choose(job)
    shard = job.selection.shard
    own = home(job.out, shard)
    with full_disk(job.out), held(job), Stop() as stop:
        refuse_collisions(job.out, pictures)
        pending, records, earlier = plan(job, frames, pictures)
        skipped = len(pictures) - len(pending)
        worked = bool(pending) or earlier is None or earlier.requested != requested(job)
        if worked:
            record, made = start(job, pending, earlier, stop)
            with contextlib.closing(progress):
                progress.start(len(pending))
                for entry in work(job, made, pending, records.values(), stop):
                    records[entry.input] = as_recorded(entry)
                    progress.step(entry.model_dump())
        else:
            assert earlier is not None
            record = earlier
        present = [records[picture.name] for picture in pictures if picture.name in records]
        counts = count(len(pictures), present, skipped, time.perf_counter() - began, stop.signal)
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


def start(job: Job, pending: list[Found], earlier: Run | None, stop: Stop) -> tuple[Run, Iterator[Entry]]:
    """Prepare the run: its record, and an iterator that computes the pictures' records lazily."""
    stages, record = prepare_job(job, earlier)
    write_header(record, home(job.out, job.selection.shard) / 'run.json')
    if job.classes:
        write_classes(job.classes, job.out / 'classes.json')
    warn_if_short(job, pending, int(str(record.settings.get('side', 0))))
    if job.engine == 'ray':  # Ray's actors load the model themselves, so the one here is released
        return record, results_on_ray(job, record, pending, stop, job.address)
    return record, results(job, stages, pending, stop)


def prepare_job(job: Job, earlier: Run | None) -> tuple[Stages, Run]:
    """Prepare the stages and the run's record. OutputConflict if results in the same place were made with other settings."""
    stages, record = from_maps(job) if job.maps else from_model(job)
    if not job.selection.shard:
        agree(job.out, earlier, record, REMEDY)
        return stages, record
    with briefly(job.out):  # the first of several shards that start together determines the settings
        others = shard_homes(job.out).keys() - {job.selection.shard}
        existing = read_run(job.out / 'run.json') if earlier or others else None
        agree(job.out, existing, record)
        if existing is None:
            write_header(record, job.out / 'run.json')
    return stages, record


def agree(out: Path, earlier: Run | None, record: Run, remedy: str = 'choose another --out') -> None:
    """Raise OutputConflict if results of an earlier run were made with other settings."""
    if earlier:
        refuse_other_settings(out, earlier.settings, record.settings, remedy=remedy)


def work(job: Job, made: Iterable[Entry], pending: list[Found], kept: Iterable[Recorded], stop: Stop) -> Iterator[Entry]:
    """Process the pending pictures, yielding each record after its manifest line, which is the last thing written for a picture."""
    own = home(job.out, job.selection.shard)
    clean(job, pending)
    failures = 0
    with continued((record.line for record in kept), own / 'manifest.jsonl') as add:
        for entry in made:
            add(line(entry))
            yield entry
            failures += entry.status == 'failed'
            if job.max_failures is not None and failures > job.max_failures:
                stop.asked = True
    if job.engine == 'ray':  # a worker may have been killed and its work repeated by another
        clean(job, pending)


def clean(job: Job, pending: list[Found]) -> None:
    """Remove half-written files left by killed runs; next to other shards, only those meant to become results of these pictures."""
    names: dict[Path, set[str]] = {}
    for picture in pending:
        for path in outputs(picture.name, job).values():
            names.setdefault((job.out / path).parent, set()).add(Path(path).name)
    for folder, mine in names.items():
        sweep(folder, mine if job.selection.shard else None)


def results(job: Job, stages: Stages, pending: list[Found], stop: Stop) -> Iterator[Entry]:
    """Read pictures ahead of the model, and make label maps and write results after it, in separate threads; yields records in order."""
    with threads(job.workers) as readers, threads(job.workers) as writers:
        depth = job.batch + job.workers
        taken = ahead(readers, partial(take, job), pending, depth)
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
