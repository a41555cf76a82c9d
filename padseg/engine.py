"""The main job: every picture of a folder to label maps and masks on disk, with records from which a later run continues."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import platform
import time
from collections.abc import Iterable
from collections.abc import Iterator
from datetime import datetime
from datetime import timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from typing import NamedTuple
from typing import Protocol

from padseg import __version__
from padseg.convert import write_coco
from padseg.errors import NoImages
from padseg.errors import OutputConflict
from padseg.errors import ResourceExhausted
from padseg.errors import UsageError
from padseg.exports import FORMATS
from padseg.exports.files import NAME_FAULTS
from padseg.exports.files import exclusive
from padseg.exports.files import sweep
from padseg.images import MAX_PIXELS
from padseg.images import Found
from padseg.images import ImageError
from padseg.images import decode
from padseg.images import find
from padseg.options import LATER
from padseg.options import Options
from padseg.options import Resolved
from padseg.pipeline import ahead
from padseg.pipeline import batches
from padseg.pipeline import threads
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
from padseg.selection import Selection
from padseg.selection import select
from padseg.signals import Stop
from padseg.versions import versions

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.types import Image
    from padseg.types import LabelMap
    from padseg.types import TokenMaps

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
log = logging.getLogger(__name__)


class Job(NamedTuple):
    """What `padseg run` is asked to do: source, a folder or one picture; out, where results go; model … dtype as for `load`.

    workers: threads that read pictures ahead, and as many that write results behind the model. checksum: a picture is unchanged if its
    content is, not if size and time of change are. max_failures: how many pictures may fail before the run ends. max_pixels: of a
    picture. maps: output of an earlier run whose token maps take the model's place.
    """

    source: Path
    out: Path
    options: Options = Options()
    model: str = 'tiny'
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    batch: int = 1
    overlay: bool = False
    save_maps: bool = False
    coco: bool = False
    overwrite: bool = False
    workers: int = 1
    checksum: bool = False
    max_failures: int | None = None
    max_pixels: int = MAX_PIXELS
    selection: Selection = Selection()
    maps: Path | None = None


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
    """A picture that was read, with what is known of it so far; image is None if it failed; maps, labels: what was found in it."""

    entry: Entry
    image: Image | None
    maps: TokenMaps | None = None
    labels: LabelMap | None = None


class Segmenter(Protocol):
    """Finds token maps and label maps of pictures that were read, none of which has failed; a picture that fails now is marked so."""

    def __call__(self, taken: list[Taken]) -> list[Taken]: ...


class Plan(NamedTuple):
    """What there is to do. kept: records of pictures that stay as they are; earlier: the run that made results which are there."""

    pending: list[Found]
    kept: dict[str, Entry]
    earlier: Run | None


def run(job: Job, progress: Progress = Silent()) -> Counts:
    """Segment all pictures of the job that its output does not hold yet; a picture that fails is recorded and the rest go on.

    Raises NoImages, UsageError, ModelUnavailable, and OutputConflict if the output was made with other settings or is being written.
    """
    began = time.perf_counter()
    found, pictures = choose(job)
    with exclusive(job.out, foreign='scores.json'), full_disk(job.out), Stop() as stop:
        pending, entries, earlier = plan(job, found, pictures)
        skipped = len(pictures) - len(pending)
        if pending or earlier is None or earlier.requested != requested(job):
            segmenter, record = prepare(job, earlier)
            write_run(record, job.out / 'run.json')
            with contextlib.closing(progress):
                progress.start(len(pending))
                for entry in work(job, segmenter, pending, entries, stop):
                    entries[entry.input] = entry
                    progress.step()
        else:
            record = earlier
        counts = count(pictures, entries, skipped, time.perf_counter() - began, stop.signal)
        finish(job.out, record, entries, counts)
        if job.coco and counts.done and not counts.signal:
            for name, reason in write_coco(job.out).items():
                log.warning('not in the COCO files: %s: %s', name, reason)
    return counts


def choose(job: Job) -> tuple[list[Found], list[Found]]:
    """All pictures of the source, and those that the run is about. Raises NoImages if there are none, and UsageError."""
    if job.source.resolve() == job.out.resolve():
        raise UsageError(f'the output cannot be the folder of the pictures itself: {job.out}')
    found = find(job.source, skip=job.out)
    if not found:
        raise NoImages(f'there are no pictures in {job.source}')
    pictures = select(found, job.selection)
    if not pictures:
        raise NoImages(f'none of the {len(found)} pictures in {job.source} is selected')
    return found, pictures


def plan(job: Job, found: list[Found], pictures: list[Found]) -> Plan:
    """Compare the chosen pictures with the results that are there. OutputConflict if these cannot be understood."""
    earlier = None if job.overwrite else read_run(job.out / 'run.json')
    entries = read_entries(job.out / 'manifest.jsonl') if earlier else {}
    done = {name: entry for name, entry in entries.items() if entry.status == 'done'}
    pending = [picture for picture in pictures if not is_done(picture, done.get(picture.name), job)]
    again = {picture.name for picture in pending}
    there = {picture.name for picture in found} - {picture.name for picture in pictures}
    # failed pictures that this run is not about keep their records, unless they are gone
    kept = {name: entry for name, entry in entries.items() if name not in again and (entry.status == 'done' or name in there)}
    return Plan(pending, kept, earlier if done else None)


@contextlib.contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """A full disk or quota, at whichever write, as ResourceExhausted."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ResourceExhausted(f'{out}: {error.strerror}; what is finished stays, and the same command continues') from error


def is_done(picture: Found, entry: Entry | None, job: Job) -> bool:
    """Whether this very picture has all its results."""
    if entry is None or not all((job.out / path).exists() for path in outputs(picture.name, job).values()):
        return False
    try:
        now = picture.path.stat()
        if not job.checksum and (now.st_size, now.st_mtime_ns) == (entry.bytes, entry.modified):
            return True
        return hashlib.sha256(picture.path.read_bytes()).hexdigest() == entry.sha256
    except OSError:
        return False  # reading it again will tell what is wrong


def outputs(name: str, job: Job) -> dict[str, str]:
    """Where the results of a picture go, relative to the output folder, by format."""
    places = {key: f'{key}/{name}{module.SUFFIX}' for key, module in FORMATS.items() if key != 'overlays' or job.overlay}
    return places | ({'maps': f'maps/{name}.npz'} if job.save_maps else {})


def requested(job: Job) -> dict[str, Setting]:
    """The settings as the user gave them."""
    return {'model': job.model, 'revision': job.revision, 'dtype': job.dtype, **plain(job.options)}


def plain(options: Options | Resolved) -> dict[str, Setting]:
    """The options as JSON can hold them: inf as a word."""
    fields = dataclasses.asdict(options)
    return {name: str(value) if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()}


def prepare(job: Job, earlier: Run | None) -> tuple[Segmenter, Run]:
    """What segments, and the run in words. OutputConflict if the earlier results in the same place came from other settings."""
    segmenter, record = from_maps(job) if job.maps else from_model(job)
    if earlier and earlier.settings != record.settings:
        raise OutputConflict(
            f'{job.out} holds results of other settings ({"; ".join(differences(earlier.settings, record.settings))}): '
            'choose another --out, or --overwrite'
        )
    return segmenter, record


def from_model(job: Job) -> tuple[Segmenter, Run]:
    """The loaded model as a segmenter."""
    # torch takes seconds to import: a run that has nothing to do, or nothing to do it with, need not wait.
    import torch

    from padseg.backbones import load

    backbone = load(job.model, revision=job.revision, device=job.device, dtype=job.dtype)
    dtype = str(backbone.dtype).removeprefix('torch.')
    settings: dict[str, Setting] = {'weights': backbone.identity.weights, 'dtype': dtype, **plain(job.options.resolve(backbone.spec))}
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
    return partial(by_model, backbone, job.options), record


def from_maps(job: Job) -> tuple[Segmenter, Run]:
    """The token maps that an earlier run kept as a segmenter. NoImages if there are none."""
    assert job.maps is not None
    made = read_run(job.maps / 'run.json')
    if made is None or not (job.maps / 'maps').is_dir():
        raise NoImages(f'{job.maps} holds no token maps: make them by `padseg run --save-maps --out {job.maps}`')
    settings = {**made.settings, **{name: value for name, value in plain(job.options).items() if name in LATER and value is not None}}
    known = {name: entry.sha256 for name, entry in read_entries(job.maps / 'manifest.jsonl').items()}
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
    return partial(by_maps, job.maps / 'maps', known, resolved), record


def resolved_from(settings: dict[str, Setting]) -> Resolved:
    """Options as a record holds them. UsageError for a value that is not allowed."""
    values = {field.name: settings[field.name] for field in dataclasses.fields(Resolved)}
    values['threshold'] = float(str(values['threshold']))  # inf is a word there
    Options(**values)  # type: ignore[arg-type]
    return Resolved(**values)  # type: ignore[arg-type]


def key_of(settings: dict[str, Setting]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def work(job: Job, segmenter: Segmenter, pending: list[Found], entries: dict[str, Entry], stop: Stop) -> Iterator[Entry]:
    """Do the pending pictures, each with its manifest line as the last thing written. Ends early when asked to stop."""
    places = [job.out / path for picture in pending for path in outputs(picture.name, job).values()]
    for folder in {job.out, *(path.parent for path in places)}:
        sweep(folder)
    write_entries(entries.values(), job.out / 'manifest.jsonl')  # drops a torn last line before more are added
    failures = 0
    with (job.out / 'manifest.jsonl').open('a', encoding='ascii') as manifest:
        for entry in results(job, segmenter, pending, stop):
            manifest.write(line(entry))
            manifest.flush()
            yield entry
            failures += entry.status == 'failed'
            if job.max_failures is not None and failures > job.max_failures:
                stop.asked = True


def results(job: Job, segmenter: Segmenter, pending: list[Found], stop: Stop) -> Iterator[Entry]:
    """Read pictures ahead of the model and write results behind it, each in threads of its own; their records, in order."""
    with threads(job.workers) as readers, threads(job.workers) as writers:
        depth = job.batch + job.workers
        taken = ahead(readers, partial(take, max_pixels=job.max_pixels), pending, depth)
        yield from ahead(writers, partial(save, job), segment_all(job, segmenter, taken, stop), depth)


def segment_all(job: Job, segmenter: Segmenter, taken: Iterable[Taken], stop: Stop) -> Iterator[Taken]:
    """The pictures with their label maps. A batch that was asked to stop before its forward is dropped."""
    for some in batches(taken, job.batch):
        if stop.asked:
            return
        yield from segmented(some, segmenter)


def segmented(taken: list[Taken], segmenter: Segmenter) -> Iterator[Taken]:
    """A batch with its label maps."""
    good = [each for each in taken if each.image is not None]
    began = time.perf_counter()
    found = iter(segmenter(good) if good else ())
    share = round((time.perf_counter() - began) / max(1, len(good)), 4)
    for each in taken:
        if each.image is not None:
            each.entry.stages['segment'] = share
        yield each if each.image is None else next(found)


def by_model(backbone: Backbone, options: Options, taken: list[Taken]) -> list[Taken]:
    """A batch by a forward; where memory runs out, by halves of the batch. A picture that is too much by itself has failed."""
    import torch

    from padseg.segment import regions
    from padseg.segment import token_maps_batch

    resolved = options.resolve(backbone.spec)
    images = [each.image for each in taken if each.image is not None]
    try:
        maps = token_maps_batch(images, backbone, resolved)
    except torch.OutOfMemoryError:
        log.warning('out of memory with %d pictures at once', len(taken))
        if len(taken) == 1:
            fail(taken[0].entry, ImageError('out of memory, alone in its batch: try a smaller --side'))
            return taken
        half = len(taken) // 2
        return by_model(backbone, options, taken[:half]) + by_model(backbone, options, taken[half:])
    labels = [regions(image, each, resolved) for image, each in zip(images, maps, strict=True)]
    return [each._replace(maps=own, labels=label) for each, own, label in zip(taken, maps, labels, strict=True)]


def by_maps(folder: Path, known: dict[str, str | None], options: Resolved, taken: list[Taken]) -> list[Taken]:
    """A batch from kept token maps. A picture without them, or another one than they were made from, has failed."""
    from padseg.saved_maps import read_maps
    from padseg.segment import regions

    found = []
    for each in taken:
        assert each.image is not None
        maps = read_maps(folder / f'{each.entry.input}.npz')
        if maps is None or known.get(each.entry.input) != each.entry.sha256:
            fail(each.entry, ImageError('there are no token maps of this picture: run the model with --save-maps'))
            found.append(each)
        else:
            found.append(each._replace(maps=maps, labels=regions(each.image, maps, options)))
    return found


def take(picture: Found, max_pixels: int = MAX_PIXELS) -> Taken:
    """Read a picture and start its record."""
    began = time.perf_counter()
    entry = Entry(input=picture.name, status='failed')
    image = None
    try:
        entry.modified = picture.path.stat().st_mtime_ns
        data = picture.path.read_bytes()
        entry.bytes = len(data)
        entry.sha256 = hashlib.sha256(data).hexdigest()
        image = decode(data, max_pixels)
        entry.size = (image.shape[0], image.shape[1])
    except (ImageError, OSError) as error:
        fail(entry, error)
    entry.stages['decode'] = round(time.perf_counter() - began, 4)
    return Taken(entry, image)


def save(job: Job, taken: Taken) -> Entry:
    """Write a picture's results; its complete record."""
    entry, image, maps, labels = taken
    if image is not None and labels is not None and maps is not None:
        began = time.perf_counter()
        try:
            write_results(job, entry, image, maps, labels)
        except (ImageError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NAME_FAULTS:
                raise
            fail(entry, error)
        entry.stages['write'] = round(time.perf_counter() - began, 4)
    entry.seconds = round(sum(entry.stages.values()), 4)
    return entry


def write_results(job: Job, entry: Entry, image: Image, maps: TokenMaps, labels: LabelMap) -> None:
    from padseg.saved_maps import write_maps

    places = outputs(entry.input, job)
    for name, path in places.items():
        if name == 'maps':
            write_maps(maps, job.out / path)
        else:
            FORMATS[name].write(image, labels, job.out / path)
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
