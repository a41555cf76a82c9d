"""The main job: every picture of a folder to label maps and masks on disk, with records from which a later run continues."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from datetime import datetime
from datetime import timezone
from pathlib import Path
from typing import TYPE_CHECKING
from typing import NamedTuple

from padseg import __version__
from padseg.errors import NoImages
from padseg.errors import OutputConflict
from padseg.errors import UsageError
from padseg.exports import FORMATS
from padseg.exports.files import exclusive
from padseg.exports.files import sweep
from padseg.images import Found
from padseg.images import ImageError
from padseg.images import decode
from padseg.images import find
from padseg.options import Options
from padseg.options import Resolved
from padseg.progress import Progress
from padseg.progress import Silent
from padseg.records import Entry
from padseg.records import Model
from padseg.records import Run
from padseg.records import Setting
from padseg.records import Totals
from padseg.records import differences
from padseg.records import line
from padseg.records import read_entries
from padseg.records import read_run
from padseg.records import write_entries
from padseg.records import write_run
from padseg.signals import Stop
from padseg.versions import versions

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.types import Image
    from padseg.types import LabelMap

# A picture's own fault when its results cannot be written; any other error of the file system concerns the whole run.
NAME_FAULTS = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


class Job(NamedTuple):
    """What `padseg run` is asked to do: source, a folder or one picture; out, where results go; model … dtype as for `load`."""

    source: Path
    out: Path
    options: Options = Options()
    model: str = 'tiny'
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    batch: int = 1
    overlay: bool = False
    overwrite: bool = False


class Counts(NamedTuple):
    """How a run went. skipped: those of `done` that earlier runs had done; regions: mean of a done picture; signal: what stopped it."""

    images: int
    done: int
    skipped: int
    failed: int
    regions: float
    seconds: float
    signal: int | None = None


class Taken(NamedTuple):
    """A picture that was read, with what is known of it so far; image is None if it failed."""

    entry: Entry
    image: Image | None


def run(job: Job, progress: Progress = Silent()) -> Counts:
    """Segment all pictures of the job that its output does not hold yet; a picture that fails is recorded and the rest go on.

    Raises NoImages, UsageError, ModelUnavailable, and OutputConflict if the output was made with other settings or is being written.
    """
    began = time.perf_counter()
    if job.source.resolve() == job.out.resolve():
        raise UsageError(f'the output cannot be the folder of the pictures itself: {job.out}')
    pictures = find(job.source, skip=job.out)
    if not pictures:
        raise NoImages(f'there are no pictures in {job.source}')
    with exclusive(job.out), Stop() as stop:
        earlier = None if job.overwrite else read_run(job.out / 'run.json')
        kept = read_entries(job.out / 'manifest.jsonl') if earlier else {}
        kept = {name: entry for name, entry in kept.items() if entry.status == 'done'}
        pending = [picture for picture in pictures if not is_done(picture, kept.get(picture.name), job)]
        again = {picture.name for picture in pending}
        entries = {name: entry for name, entry in kept.items() if name not in again}
        skipped = len(pictures) - len(pending)
        if pending or earlier is None or earlier.requested != requested(job):
            backbone, record = prepare(job, earlier if kept else None)
            write_run(record, job.out / 'run.json')
            with contextlib.closing(progress):
                progress.start(len(pending))
                for entry in work(job, backbone, pending, entries, stop):
                    entries[entry.input] = entry
                    progress.step()
        else:
            record = earlier
        counts = count(pictures, entries, skipped, time.perf_counter() - began, stop.signal)
        finish(job.out, record, entries, counts)
    return counts


def is_done(picture: Found, entry: Entry | None, job: Job) -> bool:
    """Whether this very picture has all its results."""
    if entry is None or not all((job.out / path).exists() for path in outputs(picture.name, job).values()):
        return False
    try:
        return hashlib.sha256(picture.path.read_bytes()).hexdigest() == entry.sha256
    except OSError:
        return False  # reading it again will tell what is wrong


def outputs(name: str, job: Job) -> dict[str, str]:
    """Where the results of a picture go, relative to the output folder, by format."""
    return {key: f'{key}/{name}{module.SUFFIX}' for key, module in FORMATS.items() if key != 'overlays' or job.overlay}


def requested(job: Job) -> dict[str, Setting]:
    """The settings as the user gave them."""
    return {'model': job.model, 'revision': job.revision, 'dtype': job.dtype, **plain(job.options)}


def plain(options: Options | Resolved) -> dict[str, Setting]:
    """The options as JSON can hold them: inf as a word."""
    fields = dataclasses.asdict(options)
    return {name: str(value) if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()}


def prepare(job: Job, earlier: Run | None) -> tuple[Backbone, Run]:
    """Load the model and describe the run. OutputConflict if the earlier results in the same place came from other settings."""
    # torch takes seconds to import: a run that has nothing to do, or nothing to do it with, need not wait.
    import torch

    from padseg.backbones import load

    backbone = load(job.model, revision=job.revision, device=job.device, dtype=job.dtype)
    dtype = str(backbone.dtype).removeprefix('torch.')
    settings: dict[str, Setting] = {'weights': backbone.identity.weights, 'dtype': dtype, **plain(job.options.resolve(backbone.spec))}
    if earlier and earlier.settings != settings:
        raise OutputConflict(
            f'{job.out} holds results of other settings ({"; ".join(differences(earlier.settings, settings))}): '
            'choose another --out, or --overwrite'
        )
    record = Run(
        padseg=__version__,
        source=str(job.source.resolve()),
        requested=requested(job),
        settings=settings,
        key=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        model=Model(**backbone.identity._asdict()),
        device=str(backbone.device),
        dtype=dtype,
        threads=torch.get_num_threads(),
        platform=platform.platform(),
        versions=versions(),
        batch=job.batch,
        started=now(),
    )
    return backbone, record


def work(job: Job, backbone: Backbone, pending: list[Found], entries: dict[str, Entry], stop: Stop) -> Iterator[Entry]:
    """Do the pending pictures, each with its manifest line as the last thing written. Ends early when asked to stop."""
    places = [job.out / path for picture in pending for path in outputs(picture.name, job).values()]
    for folder in {job.out, *(path.parent for path in places)}:
        sweep(folder)
    write_entries(entries.values(), job.out / 'manifest.jsonl')  # drops a torn last line before more are added
    with (job.out / 'manifest.jsonl').open('a', encoding='ascii') as manifest:
        for start in range(0, len(pending), job.batch):
            for entry in segment_pictures(job, backbone, pending[start : start + job.batch], stop):
                manifest.write(line(entry))
                manifest.flush()
                yield entry
            if stop.signal:
                return


def segment_pictures(job: Job, backbone: Backbone, pictures: list[Found], stop: Stop) -> Iterator[Entry]:
    """Read, segment and save a batch; the records of its pictures. A batch that was asked to stop before its forward is dropped."""
    from padseg.segment import segment_batch

    taken = [take(picture) for picture in pictures]
    if stop.signal:
        return
    images = [image for _, image in taken if image is not None]
    began = time.perf_counter()
    results = iter(segment_batch(images, backbone, job.options) if images else ())
    share = (time.perf_counter() - began) / max(1, len(images))
    for entry, image in taken:
        if image is not None:
            entry.stages['segment'] = round(share, 4)
            save(job, entry, image, next(results))
        entry.seconds = round(sum(entry.stages.values()), 4)
        yield entry


def take(picture: Found) -> Taken:
    """Read a picture and start its record."""
    began = time.perf_counter()
    entry = Entry(input=picture.name, status='failed')
    image = None
    try:
        data = picture.path.read_bytes()
        entry.bytes = len(data)
        entry.sha256 = hashlib.sha256(data).hexdigest()
        image = decode(data)
        entry.size = (image.shape[0], image.shape[1])
    except (ImageError, OSError) as error:
        fail(entry, error)
    entry.stages['decode'] = round(time.perf_counter() - began, 4)
    return Taken(entry, image)


def save(job: Job, entry: Entry, image: Image, labels: LabelMap) -> None:
    """Write a picture's results and complete its record."""
    began = time.perf_counter()
    places = outputs(entry.input, job)
    try:
        for name, path in places.items():
            FORMATS[name].write(image, labels, job.out / path)
    except ImageError as error:
        return fail(entry, error)
    except OSError as error:
        if error.errno not in NAME_FAULTS:
            raise
        return fail(entry, error)
    entry.stages['write'] = round(time.perf_counter() - began, 4)
    entry.regions = int(labels.labels.max())
    entry.outputs = places
    entry.status = 'done'


def fail(entry: Entry, error: ImageError | OSError) -> None:
    entry.error = type(error).__name__
    entry.reason = (error.strerror if isinstance(error, OSError) else None) or str(error)


def count(pictures: list[Found], entries: dict[str, Entry], skipped: int, seconds: float, signal: int | None) -> Counts:
    """Sum up the records of the pictures that are in the folder now."""
    present = [entries[picture.name] for picture in pictures if picture.name in entries]
    regions = [entry.regions or 0 for entry in present if entry.status == 'done']
    mean = sum(regions) / len(regions) if regions else 0.0
    return Counts(len(pictures), len(regions), skipped, len(present) - len(regions), mean, seconds, signal)


def finish(out: Path, record: Run, entries: dict[str, Entry], counts: Counts) -> None:
    """Bring the records into their last form: one line a picture, sorted by name."""
    ordered = [entries[name] for name in sorted(entries)]
    write_entries(ordered, out / 'manifest.jsonl')
    write_entries([entry for entry in ordered if entry.status == 'failed'], out / 'failures.jsonl')
    worked = record.status == 'running'
    last = {
        'status': 'interrupted' if counts.signal else 'finished',
        'counts': Totals(**{name: getattr(counts, name) for name in Totals.model_fields}),
        'ended': now() if worked else record.ended,
        'seconds': round(counts.seconds, 3) if worked else record.seconds,
    }
    write_run(record.model_copy(update=last), out / 'run.json')


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec='seconds')
