"""The job of `padseg generate`: a picture for every prompt and seed, with records from which a later run continues.

Records, locks and shards are those of `padseg run`, with records of another kind: see run/locks.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from padseg.backbones import identity
from padseg.backbones.configuration import read_json
from padseg.errors import ModelUnavailable, OutputConflict, PadsegError, ResourceExhausted, UsageError
from padseg.generation.prompts import Item, items
from padseg.generation.records import LEDGER, Generation, GenerationTotals, Made, Picture, place, read_generation
from padseg.generation.settings import WITH_TOKENS, SamplingSettings
from padseg.generation.sheet import COLUMNS, ROWS, Row, strip, write_sheet
from padseg.methods.options import Setting, plain_settings
from padseg.run.locks import exclusive, first_decides, forget, forget_shards, home, records_by, shared
from padseg.run.selection import Selection, select
from padseg.run.threads import MOST as MOST_THREADS, use
from padseg.system.disk import free_space, human
from padseg.system.files import atomic, full_disk, inside, sweep
from padseg.system.ledger import (
    continued,
    line,
    refuse_other_settings,
    refuse_others,
    refuse_strange,
    write_header,
    write_lines,
)
from padseg.system.progress import Progress, Silent
from padseg.system.signals import Stop
from padseg.system.versions import versions
from padseg.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from padseg.backbones import Backbone
    from padseg.backbones.spec import Spec
    from padseg.generation.guidance import Blurring
    from padseg.generation.sample import Around, Call, Guide, Sampler
    from padseg.types import Image

FOREIGN = 'scores.json'  # header of an evaluation
FOLDERS = ('images', 'previews')
SHEET = 'sheet.png'
PERTURBED = 'perturb_'  # settings of perturbed guidance begin so
PER_PIXEL = 2.0  # bytes of a PNG, of photographs
LONGEST = 500  # characters of a reason
log = logging.getLogger(__name__)


class GenerationJob(NamedTuple):
    """What `padseg generate` is asked to do. model … lora_scale, keep_texts: as for `open_sampler`; batch: pictures per forward pass on a
    GPU; preview: moments on the strip that shows how a picture came about, 0 for none; selection: of pictures, by their names; blurring:
    attention that is blurred meanwhile."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    out: Path
    settings: SamplingSettings = SamplingSettings()
    model: str = 'tiny'
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    vae: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    keep_texts: bool = False
    batch: int = 1
    preview: int = 0
    overwrite: bool = False
    retry_failed: bool = True
    max_failures: int | None = None
    selection: Selection = Selection()
    blurring: Blurring | None = None


class GenerationCounts(NamedTuple):
    """How a run went. skipped: those of `done` that earlier runs had made; signal: what stopped the run."""

    images: int
    done: int
    skipped: int
    failed: int
    seconds: float
    signal: int | None = None


class _Stopped(Exception):
    """Leaves a picture that is not wanted any more."""


# planning


class Plan(NamedTuple):
    """chosen: pictures of this run; pending: those that have to be made; records: of all others; earlier: the run that made them."""

    chosen: list[Item]
    pending: list[Item]
    records: dict[str, Picture]
    earlier: Generation | None


def plan(job: GenerationJob) -> Plan:
    """Compare the pictures asked for with those that are there. UsageError if none is selected."""
    everything = items(job.prompts, job.seeds)
    chosen = select(everything, job.selection)
    if not chosen:
        raise UsageError(f'none of the {len(everything)} pictures is selected')
    shard = job.selection.shard
    if job.overwrite:
        refuse_others(job.out, 'generate')
    earlier = None if job.overwrite and not shard else read_generation(job.out / 'run.json')
    records = records_by(LEDGER, job.out) if earlier else {}
    pending = [item for item in chosen if job.overwrite or not settled(item, records.get(item.name), job)]
    again, own = {item.name for item in pending}, {item.name for item in chosen}
    kept = {name: record for name, record in records.items() if name not in again and (not shard or name in own)}
    return Plan(chosen, pending, kept, earlier if any(record.status == 'done' for record in records.values()) else None)


def settled(item: Item, record: Picture | None, job: GenerationJob) -> bool:
    """Whether a picture needs no work: it is there, or it failed and must not be tried again."""
    if record is None or (record.prompt, record.seed) != (item.prompt, item.seed) or (record.status == 'failed' and job.retry_failed):
        return False
    if record.status == 'failed':
        return True
    files = [record.file, *([record.preview] if job.preview else [])]
    return job.preview in (0, record.moments) and all(file is not None and is_file(job.out / file) for file in files)


def is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


# settings


def requested(job: GenerationJob) -> dict[str, Setting]:
    names = ('model', 'revision', 'dtype', 'vae', *(('lora', 'lora_scale') if job.lora else ()))
    return {**{name: getattr(job, name) for name in names}, **relevant(job.settings), **blur_settings(job)}


def relevant(settings: SamplingSettings) -> dict[str, Setting]:
    """The settings that affect pictures, as JSON values."""
    plain = plain_settings(settings)
    return {name: value for name, value in plain.items() if settings.guidance == 'perturbed' or not name.startswith(PERTURBED)}


def blur_settings(job: GenerationJob) -> dict[str, Setting]:
    if job.blurring is None:
        return {}
    blur = job.blurring.blur
    known = {**blur._asdict(), 'layers': ','.join(map(str, blur.layers)), 'both_branches': job.blurring.both}
    return {f'blur_{name}': value for name, value in known.items()}


def settings_now(job: GenerationJob, earlier: Generation) -> dict[str, Setting]:
    """The settings that this job would have, from the model's files, which are not loaded; what only loading tells is as before."""
    from padseg.backbones.source import locate
    from padseg.backbones.texts import identity_with

    source = locate(job.model, job.revision, fetch=False)
    settings = job.settings.resolve(source.spec)
    made = identity(job.model, revision=job.revision, vae=job.vae, lora=job.lora, lora_scale=job.lora_scale)
    made = identity_with(made, source, str(settings.encoders))
    before = {name: earlier.settings[name] for name in ('threads',) if name in earlier.settings}
    return {**settings_of(made._asdict(), job.dtype or earlier.dtype, settings, source.spec), **blur_settings(job), **before}


def settings_of(made: dict[str, Any], dtype: str, settings: SamplingSettings, spec: Spec) -> dict[str, Setting]:
    """All that affects pictures, but for prompt, seed and the number of threads."""
    more: dict[str, Setting] = {}
    if settings.guidance == 'goca-s-cfg':  # padseg.json can change them
        from padseg.generation.goca_masks import goca_options

        more = {f'goca_{name}': value for name, value in plain_settings(goca_options(spec)).items()}
    index = Path(made['folder']) / 'model_index.json'
    if spec.family == 'unet' and index.is_file():
        more['zeros'] = read_json(index).get('force_zeros_for_empty_prompt', True) is True  # which counts for SDXL
    hashes = {name: made[name] for name in ('weights', 'scheduler', 'text_encoders')}
    lora = {name: made[name] for name in ('lora', 'lora_scale')} if made['lora'] else {}
    return {**hashes, **lora, 'dtype': dtype, **relevant(settings), **more}


def record_of(job: GenerationJob, sampler: Sampler, settings: SamplingSettings, own: int, first: Generation | None) -> Generation:
    """The record of the run that begins, which then has the threads of the one that it continues or joins, and `own` without it.

    On a CPU they are a setting, as another number rounds differently.
    """
    from padseg.backbones.texts import with_encoders
    from padseg.run.prepare import dtype_of, now, settings_key

    backbone, threads = with_encoders(sampler.backbone, str(settings.encoders)), threads_like(first, own)
    made = backbone.identity._asdict()
    values = settings_of(made, dtype_of(backbone), settings, backbone.spec) | blur_settings(job)
    if backbone.device.type == 'cpu':
        values['threads'] = threads
    return Generation(
        command='generate',
        padseg=__version__,
        requested=requested(job),
        settings=values,
        key=settings_key(values),
        model=Made(**made),
        device=str(backbone.device),
        dtype=dtype_of(backbone),
        threads=threads,
        platform=platform.platform(),
        versions=versions(),
        batch=job.batch,
        prompts=len(dict.fromkeys(job.prompts)),
        seeds=len(job.seeds),
        started=now(),
    )


# the run


def generate(job: GenerationJob, progress: Progress = Silent(), sampler: Sampler | None = None) -> GenerationCounts:
    """Make all pictures of the job that its output lacks. A picture that fails is recorded, and the others continue.

    sampler: the job's model, if it is loaded already.
    Raises UsageError, ModelUnavailable, ResourceExhausted, and OutputConflict if the output was made with other settings, if another run is
    writing to it, or if it cannot be used.
    """
    began = time.perf_counter()
    shard = job.selection.shard
    with full_disk(job.out), held(job), Stop() as stop:
        for kind in FOLDERS:
            inside(job.out, kind)
        refuse_strange(job.out, [SHEET])
        chosen, pending, records, earlier = plan(job)
        skipped = len(chosen) - len(pending)
        if earlier and not pending:
            refuse_other_settings(job.out, earlier.settings, settings_now(job, earlier), 'pictures')
            record, own_threads = earlier, None
        else:
            record, sampler, guide, own_threads = start(job, pending, records.values(), earlier, sampler)
            try:
                with contextlib.closing(progress):
                    progress.start(len(pending))
                    for picture in work(job, sampler, guide, record, pending, records.values(), stop):
                        records[picture.name] = picture
                        progress.step(picture.model_dump())
            finally:
                restore(own_threads)
        present = [records[item.name] for item in chosen if item.name in records]
        done = sum(picture.status == 'done' for picture in present)
        counts = GenerationCounts(len(chosen), done, skipped, len(present) - done, time.perf_counter() - began, stop.signal)
        finish(job, record, records, counts, chosen, bool(pending))
        if not shard:
            forget_shards(job.out)
    return counts


def held(job: GenerationJob) -> contextlib.AbstractContextManager[None]:
    """Hold the output folder, alone or together with other shards."""
    shard = job.selection.shard
    return shared(job.out, shard, FOREIGN) if shard else exclusive(job.out, FOREIGN)


def start(
    job: GenerationJob, pending: Sequence[Item], kept: Iterable[Picture], earlier: Generation | None, sampler: Sampler | None = None
) -> tuple[Generation, Sampler, Guide, int]:
    """Load the model and write the header; also returns the number of threads before. Records of other settings are removed before that."""
    import torch

    from padseg.generation.guidance import guide_of
    from padseg.generation.sample import check_size, open_sampler

    shard, own = job.selection.shard, home(job.out, job.selection.shard)
    sampler = sampler or open_sampler(
        job.model,
        revision=job.revision,
        device=job.device,
        dtype=job.dtype,
        vae=job.vae,
        lora=job.lora,
        lora_scale=job.lora_scale,
        keep_texts=job.keep_texts,
    )
    settings = job.settings.resolve(sampler.backbone.spec)
    check_size(sampler.backbone, settings.size)
    guide, threads = guide_of(sampler.backbone, settings), torch.get_num_threads()
    if not shard:
        record = record_of(job, sampler, settings, threads, earlier)
        if earlier:
            refuse_other_settings(job.out, earlier.settings, record.settings, 'pictures')
        else:
            forget(job.out)
    else:
        record = first_decides(LEDGER, job.out, shard, earlier, partial(record_of, job, sampler, settings, threads), 'pictures')
        write_lines((line(one) for one in kept), own / 'manifest.jsonl')
    write_header(record, own / 'run.json')
    for kind in FOLDERS:
        if (job.out / kind).is_dir():
            sweep(job.out / kind, {f'{item.name}.png' for item in pending} if shard else None)
    side, free = settings.size, free_space(job.out)
    needed = round(len(pending) * PER_PIXEL * side * side * (1 + job.preview))
    if needed > free:
        log.warning('%s has %s free; %d pictures take up to %s', job.out, human(free), len(pending), human(needed))
    return record, sampler, guide, threads


def threads_like(earlier: Generation | None, own: int) -> int:
    """Use as many threads as an earlier run on a CPU did, with a warning; the number."""
    before = earlier.settings.get('threads') if earlier else None
    number = before if isinstance(before, int) and 1 <= before <= MOST_THREADS else own
    use(number)
    return number


def restore(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def work(
    job: GenerationJob, sampler: Sampler, guide: Guide, record: Generation, pending: list[Item], kept: Iterable[Picture], stop: Stop
) -> Iterator[Picture]:
    """Make the pending pictures and yield their records. The manifest line of a picture is the last thing written for it."""
    failures = 0
    with continued((line(one) for one in kept), home(job.out, job.selection.shard) / 'manifest.jsonl') as add:
        if not job.selection.shard:
            forget_shards(job.out)  # their records are in the manifest now
        for some in together(pending, sampler.backbone, job.batch):
            for picture in made(job, sampler, guide, record, some, stop):
                add(line(picture))
                yield picture
                failures += picture.status == 'failed'
            if job.max_failures is not None and failures > job.max_failures:
                stop.asked = True
            if stop.asked:
                return


def together(pending: list[Item], backbone: Backbone, batch: int) -> list[list[Item]]:
    """The pictures that share forward passes. On a CPU none do: it would save no time, and matrices of another size round differently."""
    size = 1 if backbone.device.type == 'cpu' else batch
    return [pending[start : start + size] for start in range(0, len(pending), size)]


def made(job: GenerationJob, sampler: Sampler, guide: Guide, record: Generation, some: list[Item], stop: Stop) -> list[Picture]:
    """Make the pictures of a batch; those that fail in it are tried alone. None if the run was stopped meanwhile."""
    from padseg.run.picture import of_memory

    began = time.perf_counter()
    try:
        images, strips = sampled(job, sampler, guide, some, stop)
    except _Stopped:
        return []
    except (UsageError, ModelUnavailable, OutputConflict, ResourceExhausted) as error:
        if not isinstance(error, UsageError):
            raise
        failure: Exception = error
    except Exception as error:
        if not (isinstance(error, PadsegError) or of_memory(error)):
            raise
        failure = PadsegError('out of memory: try a smaller --size, --batch or --dtype') if of_memory(error) else error
    else:
        share = (time.perf_counter() - began) / len(some)
        return [save(job, sampler, record, *parts, share) for parts in zip(some, images, strips, strict=True)]
    if len(some) > 1:
        log.warning('%s, with %d pictures at once: trying each alone', failure, len(some))
        return [picture for item in some for picture in made(job, sampler, guide, record, [item], stop)]
    share = time.perf_counter() - began
    return [started(record, some[0], 'failed', share, error=type(failure).__name__, reason=str(failure)[:LONGEST])]


def sampled(job: GenerationJob, sampler: Sampler, guide: Guide, some: list[Item], stop: Stop) -> tuple[list[Image], list[Image | None]]:
    """Pictures of a batch, with their strips, if they were asked for."""
    from padseg.generation.guidance import with_blur
    from padseg.generation.sample import decode, encode, nothing, sample

    settings = job.settings.resolve(sampler.backbone.spec)
    moments: list[list[Image]] = []

    def seen(call: Call, z: Tensor) -> None:
        if stop.asked:
            raise _Stopped
        if job.preview and call.number in moments_of(call.of, job.preview):
            moments.append(decode(sampler.backbone, z))

    with_tokens = settings.guidance in WITH_TOKENS
    prompts, seeds = [item.prompt for item in some], [item.seed for item in some]
    around: Around = nothing
    if job.blurring:
        around = with_blur(sampler.backbone, job.blurring, encode(sampler, prompts, settings, with_tokens=False).text)
    images = sample(sampler, prompts, seeds, settings, guide, around, with_tokens, seen)
    strips: list[Image | None] = [strip(parts) for parts in zip(*moments, strict=True)] if moments else [None] * len(some)
    return images, strips


def moments_of(steps: int, count: int) -> set[int]:
    """Numbers of `count` steps, evenly spread, the last one included."""
    count = min(count, steps)
    return {round(steps * (number + 1) / count) - 1 for number in range(count)}


def save(
    job: GenerationJob, sampler: Sampler, record: Generation, item: Item, image: Image, shown: Image | None, seconds: float
) -> Picture:
    """Write a picture, with its strip, and return its record."""
    from padseg.exports.png import encoded

    values: dict[str, Any] = {'size': image.shape[:2], 'cut': is_cut(sampler, item.prompt, str(record.settings['encoders']))}
    for kind, field, pixels in (('images', 'file', image), ('previews', 'preview', shown)):
        if pixels is not None:
            values[field] = place(kind, item.name)
            data = encoded('.png', pixels[..., ::-1])
            with atomic(inside(job.out, values[field])) as temporary:
                temporary.write_bytes(data)
            values |= {'sha256': hashlib.sha256(data).hexdigest()} if kind == 'images' else {'moments': job.preview}
    return started(record, item, 'done', seconds, **values)


def started(record: Generation, item: Item, status: Literal['done', 'failed'], seconds: float, **values: Any) -> Picture:
    """A picture's record with what is known of it before it is made."""
    return Picture(
        name=item.name,
        status=status,
        prompt=item.prompt,
        seed=item.seed,
        guidance=str(record.settings['guidance']),
        model=record.model.weights,
        lora=record.model.lora,
        seconds=round(seconds, 3),
        **values,
    )


def is_cut(sampler: Sampler, prompt: str, encoders: str) -> bool:
    """Whether a prompt is too long for one of its tokenizers; False where they do not tell."""
    try:
        return any(len(tokens.spans) > tokens.slots for tokens in sampler.encoders.tokens(prompt, encoders).values())
    except PadsegError:
        return False


def finish(
    job: GenerationJob, record: Generation, records: dict[str, Picture], counts: GenerationCounts, chosen: Sequence[Item], worked: bool
) -> None:
    """Write the final records, a line per picture, sorted by name, and the contact sheet of the first prompts."""
    from padseg.run.prepare import now

    own, shard = home(job.out, job.selection.shard), job.selection.shard
    ordered = [records[name] for name in sorted(records)]
    write_lines(map(line, ordered), own / 'manifest.jsonl')
    write_lines((line(picture) for picture in ordered if picture.status == 'failed'), own / 'failures.jsonl')
    cut = sum(records[item.name].cut for item in chosen if item.name in records)
    if cut and worked:
        log.warning('%d pictures have prompts that are too long for the text encoders: their ends do not count', cut)
    if not shard:
        write_sheet(rows_of(job.out, chosen, records), job.out / SHEET)
    last = {
        'status': 'finished' if counts.done + counts.failed == counts.images else 'interrupted',
        'counts': GenerationTotals(**{name: getattr(counts, name) for name in GenerationTotals.model_fields}),
        'ended': now() if worked else record.ended,
        'seconds': round(counts.seconds, 3) if worked else record.seconds,
    }
    write_header(record.model_copy(update=last), own / 'run.json')


def rows_of(out: Path, chosen: Sequence[Item], records: dict[str, Picture]) -> list[Row]:
    """The first prompts with their pictures."""
    rows: dict[str, list[Path | None]] = {}
    for item in chosen:
        if item.prompt not in rows and len(rows) == ROWS:
            break
        cells = rows.setdefault(item.prompt, [])
        record = records.get(item.name)
        if len(cells) < COLUMNS:
            cells.append(out / record.file if record and record.file else None)
    return [Row(prompt or '(the empty prompt)', cells) for prompt, cells in rows.items()]
