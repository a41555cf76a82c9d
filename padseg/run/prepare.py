"""The method of a job, ready to work, and the record that says how: by a loaded model, or by token maps that a run kept."""

from __future__ import annotations

import hashlib
import json
import platform
from datetime import datetime, timezone
from functools import partial

from padseg.errors import NoImages, UsageError
from padseg.methods.options import LATER
from padseg.run.job import (
    Job,
    classes_from,
    last_layer,
    naming_settings,
    plain_settings,
    reading_settings,
    requested,
    resolved_from,
)
from padseg.run.locks import all_records
from padseg.run.picture import Method, by_maps, method_of
from padseg.run.records import (
    ModelRecord,
    Run,
    Setting,
    entry_of,
    read_run,
)
from padseg.system.versions import versions
from padseg.version import __version__


def from_model(job: Job) -> tuple[Method, Run]:
    """The method by a loaded model."""
    # torch takes seconds to import: a run that has nothing to do, or nothing to do it with, need not wait.
    import torch

    from padseg.backbones import load

    layer = last_layer(job.options, job.model, job.revision)
    backbone = load(job.model, revision=job.revision, device=job.device, dtype=job.dtype, layer=layer, vae=job.vae, compile=job.compile)
    dtype = str(backbone.dtype).removeprefix('torch.')
    settings: dict[str, Setting] = {'weights': backbone.identity.weights, 'dtype': dtype, 'compile': job.compile}
    settings |= plain_settings(job.options.resolve(backbone.spec)) | naming_settings(job) | reading_settings(job.reading)
    record = Run(
        padseg=__version__,
        source=str(job.source.resolve()),
        requested=requested(job),
        settings=settings,
        key=settings_key(settings),
        model=ModelRecord(**backbone.identity._asdict()),
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
    from padseg.methods.seg4diff import regions

    assert job.maps is not None
    made = read_run(job.maps / 'run.json')
    if made is None or not (job.maps / 'maps').is_dir():
        raise NoImages(f'{job.maps} holds no token maps: make them by `padseg run --save-maps --out {job.maps}`')
    if classes_from(made.settings):
        raise UsageError(f'{job.maps} holds maps of classes: `padseg label` makes them into other label maps')
    settings = {
        **made.settings,
        **{name: value for name, value in plain_settings(job.options).items() if name in LATER and value is not None},
    }
    known = {name: entry_of(record).sha256 for name, record in all_records(job.maps).items()}
    resolved = resolved_from(settings)
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
    return Method(partial(by_maps, job.maps / 'maps', known), partial(regions, options=resolved)), record


def settings_key(settings: dict[str, Setting]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec='seconds')
