"""Prepare a job's method and its record, either with a loaded model or with token maps stored by an earlier run."""

from __future__ import annotations

import hashlib
import json
import platform
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

from padseg.errors import NoImages, UsageError
from padseg.methods import Method, method_named, open_backbone, seg4diff
from padseg.methods.options import Setting, plain_settings
from padseg.run.job import Job, method_settings, naming_settings, options_from, reading_settings, requested, settings_from
from padseg.run.locks import all_records
from padseg.run.picture import Stages, by_maps, by_method
from padseg.run.records import ModelRecord, Run, entry_of, read_run
from padseg.system.versions import versions
from padseg.version import __version__

if TYPE_CHECKING:
    from padseg.backbones import Backbone


def from_model(job: Job) -> tuple[Stages, Run]:
    """Prepare the method with the model that it needs, if any. UsageError for options that do not go together."""
    method = method_named(job.method, 'classes' if job.classes else 'regions')
    if job.save_maps and not method.FAMILIES:
        raise UsageError(f'{job.method} has no maps to keep: omit --save-maps')
    prepared = prepared_for(job, method, device=job.device, dtype=job.dtype)
    return stages_of(method, prepared), record_of(job, method, prepared)


def prepared_for(job: Job, method: Method, revision: str | None = None, **how: Any) -> Any:
    """Prepare the method, loading its model with the job's settings."""
    backbone = open_backbone(method, job.options, job.model, revision or job.revision, vae=job.vae, compile=job.compile, **how)
    return method.prepare(backbone, job.options, job.classes)


def stages_of(method: Method, prepared: Any) -> Stages:
    forward = partial(method.maps, prepared=prepared)
    return Stages(partial(by_method, forward), partial(method.labels, prepared=prepared))


def record_of(job: Job, method: Method, prepared: Any) -> Run:
    """The record of the run."""
    backbone: Backbone | None = prepared.backbone
    settings = {
        **method_settings(job),
        **settings_of_model(job, backbone),
        **method.recorded(job.options, backbone.spec if backbone else None),
    }
    settings |= naming_settings(job) | reading_settings(job.reading)
    return Run(
        padseg=__version__,
        source=str(job.source.resolve()),
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
    )


def settings_of_model(job: Job, backbone: Backbone | None) -> dict[str, Setting]:
    """Model settings that affect the results."""
    if backbone is None:
        return {}
    return {'weights': backbone.identity.weights, 'dtype': dtype_of(backbone), 'compile': job.compile}


def dtype_of(backbone: Backbone) -> str:
    return str(backbone.dtype).removeprefix('torch.')


def torch_threads() -> int:
    """Number of threads that torch uses; another number may change the rounding of sums."""
    import torch

    return torch.get_num_threads()


def from_maps(job: Job) -> tuple[Stages, Run]:
    """Prepare Seg4Diff with token maps stored by an earlier run. NoImages if there are none."""
    assert job.maps is not None
    made = read_run(job.maps / 'run.json')
    if made is None or not (job.maps / 'maps').is_dir():
        raise NoImages(f'{job.maps} holds no token maps: make them with `padseg run --save-maps --out {job.maps}`')
    if settings_from(made.settings).method_name != job.method:
        raise UsageError(f'{job.maps} holds maps of classes: use `padseg label` to make other label maps')
    changes = {name: value for name, value in plain_settings(job.options).items() if name in seg4diff.LATER and value is not None}
    settings = {**made.settings, **changes}
    known = {name: entry_of(record).sha256 for name, record in all_records(job.maps).items()}
    prepared = seg4diff.Prepared(options_from(seg4diff.Options, settings), {}, None)
    record = made.model_copy(
        update={
            'status': 'running',
            'padseg': __version__,
            'source': str(job.source.resolve()),
            'requested': requested(job),
            'settings': settings,
            'key': settings_key(settings),
            'versions': versions(),
            'started': now(),
            'ended': None,
        }
    )
    return Stages(partial(by_maps, job.maps / 'maps', known), partial(seg4diff.labels, prepared=prepared)), record


def settings_key(settings: dict[str, Setting]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def now() -> str:
    """Current time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec='seconds')
