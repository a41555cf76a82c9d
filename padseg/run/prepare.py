"""Prepare a job's method and the record of the run, with a loaded model or with token maps that an earlier run stored."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

from padseg.errors import ModelUnavailable, NoImages, OutputConflict, PadsegError, UsageError
from padseg.methods import METHODS, Method, check_settings, kept_method, method_named, open_backbone, seg4diff
from padseg.methods.options import Setting, plain_settings
from padseg.run.job import Job, method_settings, naming_settings, options_from, reading_settings, requested, settings_from
from padseg.run.locks import all_records
from padseg.run.picture import Stages, by_maps, by_method
from padseg.run.records import ModelRecord, Run, entry_of, read_run
from padseg.run.source import recorded_source
from padseg.run.threads import decides, threads_before, use
from padseg.system.files import inside
from padseg.system.ledger import ADDED
from padseg.system.versions import versions
from padseg.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from padseg.backbones import Backbone
    from padseg.backbones.lora_file import LoraFile
    from padseg.backbones.source import Source
    from padseg.backbones.spec import Spec

LORA = ('lora', 'lora_scale')  # settings of runs with a LoRA


def from_model(job: Job, earlier: Run | None = None) -> tuple[Stages, Run]:
    """Prepare the method, with its model if it needs one. Raises UsageError for settings that do not fit together.

    earlier: the run that this one continues.
    """
    method = method_named(job.method, 'classes' if job.classes else 'regions')
    refuse_with_tiles(job)
    if job.save_maps and not method.FAMILIES:
        raise UsageError(f'{job.method} has no maps to keep: omit --save-maps')
    stamp = None
    if method.FAMILIES:
        with contextlib.suppress(PadsegError):  # loading gives a better message
            found = located(job)
            stamp = files_stamp(*found) if found else None  # taken before the files are read, so that a later change is noticed
    prepared = prepared_for(job, method, device=job.device, dtype=job.dtype)
    return stages_of(method, prepared), record_of(job, method, prepared, earlier, stamp)


def refuse_with_tiles(job: Job) -> None:
    """Raise UsageError for settings that do not go with `--tiles`."""
    if getattr(job.options, 'tiles', None):
        if job.save_maps:
            raise UsageError('the maps of tiles are not kept: omit --save-maps')
        if job.reading.shrink:
            raise UsageError('--tiles is in place of --shrink: give one of them')


def prepared_for(job: Job, method: Method, revision: str | None = None, **how: Any) -> Any:
    """Prepare the method, loading its model with the job's settings."""
    how |= {'vae': job.vae, 'compile': job.compile, 'lora': job.lora, 'lora_scale': job.lora_scale, 'quantize': job.quantize}
    backbone = open_backbone(method, job.options, job.model, revision or job.revision, **how)
    return method.prepare(backbone, job.options, job.classes)


def stages_of(method: Method, prepared: Any) -> Stages:
    forward = partial(method.maps, prepared=prepared)
    sized = bool(getattr(prepared.options, 'tiles', 0))
    return Stages(partial(by_method, forward, sized=sized), partial(method.labels, prepared=prepared))


def record_of(job: Job, method: Method, prepared: Any, earlier: Run | None = None, stamp: str | None = None) -> Run:
    """The record of the run. earlier: the run that it continues."""
    backbone: Backbone | None = prepared.backbone
    of_model = settings_of_model(job, backbone) | settings_of_threads(job, backbone, earlier)
    settings = all_settings(job, method, backbone.spec if backbone else None, of_model)
    return Run(
        padseg=__version__,
        source=recorded_source(job.source),
        requested=requested(job),
        settings=settings,
        key=settings_key(settings),
        model=ModelRecord(**backbone.identity._asdict()) if backbone else None,
        device=str(backbone.device) if backbone else 'cpu',
        dtype=dtype_of(backbone) if backbone else None,
        threads=torch_threads() if backbone else 1,
        platform=platform.platform(),
        versions=versions(),
        batch=job.batch,
        started=now(),
        stamp=stamp,
    )


def all_settings(job: Job, method: Method, spec: Spec | None, of_model: dict[str, Setting]) -> dict[str, Setting]:
    """All settings that affect results, as recorded. of_model: those of the model's files and of how it is run."""
    return {
        **method_settings(job),
        **of_model,
        **method.recorded(job.options, spec),
        **naming_settings(job),
        **reading_settings(job.reading),
    }


def settings_of_model(job: Job, backbone: Backbone | None) -> dict[str, Setting]:
    """Model settings that affect the results."""
    if backbone is None:
        return {}
    model = backbone.identity
    return {
        'weights': model.weights,
        'scheduler': model.scheduler,
        'text_encoders': model.text_encoders,
        'dtype': dtype_of(backbone),
        'compile': job.compile,
        **({'lora': model.lora, 'lora_scale': model.lora_scale} if model.lora else {}),
        **settings_of_weights(job),
    }


def settings_of_weights(job: Job) -> dict[str, Setting]:
    return {'quantize': job.quantize} if job.quantize else {}


def settings_of_threads(job: Job, backbone: Backbone | None, earlier: Run | None) -> dict[str, Setting]:
    """The number of threads, if results depend on it. Once recorded, it stays."""
    before = earlier.settings.get('threads') if earlier else None
    if backbone is None or not (before or decides(job, str(backbone.device), dtype_of(backbone))):
        return {}
    return {'threads': torch_threads() if backbone.device.type == 'cpu' else before}


def with_threads_of(first: Run | None, job: Job, record: Run) -> Run:
    """Set the number of threads of a shard to that of the first shard, and return the shard's record with that number."""
    number = threads_before(job, first)
    if first is None or number is None or 'threads' not in record.settings:
        return record
    use(number)
    settings = {**record.settings, 'threads': number}
    return record.model_copy(update={'settings': settings, 'key': settings_key(settings), 'threads': number})


def settings_now(job: Job, earlier: Run) -> Run | None:
    """The record of a finished run with the job's present settings, without loading the model or asking for its device.

    None if the model's files were touched or changed, so that only loading can tell whether it is the same. A model that no longer exists
    counts as unchanged. Raises ModelUnavailable for a damaged one, and NoImages.
    """
    if job.maps:
        settings = settings_of_maps(job, run_of_maps(job))
        return earlier.model_copy(update={'settings': settings, 'key': settings_key(settings)})
    method = method_named(job.method, 'classes' if job.classes else 'regions')
    if not method.FAMILIES:
        return earlier.model_copy(update={'settings': all_settings(job, method, None, {})})
    if earlier.model is None:  # which no run with such a method records
        return None
    found = located(job)
    if found is None:
        return earlier
    if files_stamp(*found) != earlier.stamp:
        return None
    source = found[0]
    kept = {name: earlier.settings[name] for name in ('weights', *ADDED, *LORA) if name in earlier.settings}
    of_model = {**kept, 'dtype': job.dtype or earlier.dtype, 'compile': job.compile, **settings_of_weights(job)}
    return earlier.model_copy(update={'settings': all_settings(job, method, source.spec, of_model)})


def located(job: Job) -> tuple[Source, Source | None, LoraFile | None] | None:
    """Locate the files of the job's model, its `--vae` and its `--lora`; None if any of them is not on this machine."""
    from padseg.backbones.lora_file import locate_lora
    from padseg.backbones.source import locate, locate_vae

    try:
        source = locate(job.model, job.revision, fetch=False)
        vae = locate_vae(job.vae, source, fetch=False) if job.vae else None
        lora = locate_lora(job.lora) if job.lora else None
    except UsageError:  # no such folder
        return None
    except ModelUnavailable as error:
        if error.state == ModelUnavailable('').state:
            raise
        return None
    check_settings(source.spec)
    return source, vae, lora


def files_stamp(source: Source, vae: Source | None, lora: LoraFile | None = None) -> str:
    """A stamp that changes if any file of a model may have changed: SHA-256 over names, sizes, times and inodes. Reads no file."""
    digest = hashlib.sha256()
    for folder in (source.folder, *([vae.folder] if vae else [])):
        for path in sorted((*folder.glob('*'), *folder.glob('*/*'))):
            if path.is_file():
                digest.update(f'{path.relative_to(folder).as_posix()} {file_stamp(path)}\n'.encode('utf-8', 'surrogateescape'))
    for file in lora or ():
        if file:
            digest.update(f'{file.name} {file_stamp(file)}\n'.encode('utf-8', 'surrogateescape'))
    return digest.hexdigest()


def file_stamp(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()  # ctime is included because users cannot set it
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def dtype_of(backbone: Backbone) -> str:
    return str(backbone.dtype).removeprefix('torch.')


def torch_threads() -> int:
    """Number of threads that torch uses. Another number may round sums differently."""
    import torch

    return torch.get_num_threads()


def from_maps(job: Job) -> tuple[Stages, Run]:
    """Prepare a method with the maps that an earlier run of it stored. Raises NoImages if there are none."""
    method = kept_method(job.method)
    assert job.maps is not None and method
    made = run_of_maps(job)
    settings = settings_of_maps(job, made)
    entries = (entry_of(record) for record in all_records(job.maps).values())
    known = {entry.input: entry.sha256 for entry in entries if 'maps' in entry.outputs}
    prepared = method.without_model(options_from(method.Options, settings))
    shares = getattr(method, 'are_shares', lambda options: True)(prepared.options)
    record = made.model_copy(
        update={
            'status': 'running',
            'padseg': __version__,
            'source': recorded_source(job.source),
            'requested': requested(job),
            'settings': settings,
            'key': settings_key(settings),
            'versions': versions(),
            'started': now(),
            'ended': None,
            'stamp': None,
        }
    )
    read = partial(by_maps, job.maps, known, prepared.options, shares=shares, halved='unet' in method.FAMILIES)
    return Stages(read, partial(method.labels, prepared=prepared)), record


def run_of_maps(job: Job) -> Run:
    """The run that kept the token maps. Raises NoImages if there are none, UsageError if they are maps of classes."""
    assert job.maps is not None
    made = read_run(job.maps / 'run.json')
    if made is None or not inside(job.maps, 'maps').is_dir():
        raise NoImages(f'{job.maps} holds no token maps: make them with `padseg run --save-maps --out {job.maps}`')
    name = settings_from(made.settings).method_name
    if name != job.method:
        own = METHODS[name].Options.__dataclass_fields__.keys() - seg4diff.Options.__dataclass_fields__.keys()
        if own.isdisjoint(made.settings):  # which its maps would depend on
            raise OutputConflict(f'the recorded settings are not those of a run: none of them is one of {name}')
        raise UsageError(f'{job.maps} holds maps of classes: use `padseg label` to make other label maps')
    return made


def settings_of_maps(job: Job, made: Run) -> dict[str, Setting]:
    """The settings of the run that kept the maps, except that settings of later stages are the job's.

    The number of threads is left out where label maps do not depend on it, as with float32.
    """
    method = kept_method(job.method)
    later = method.LATER if method else ()
    changes = {name: value for name, value in plain_settings(job.options).items() if name in later and value is not None}
    settings = {**made.settings, **changes}
    if method and hasattr(method, 'merged_settings'):
        settings = method.merged_settings(settings, changes)
    if not decides(job, made.device, made.dtype):
        settings.pop('threads', None)
    return settings


def settings_key(settings: dict[str, Setting]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def now() -> str:
    """Current time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec='seconds')
