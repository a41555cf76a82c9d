"""What a run is asked to do, and the names of what it writes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

from padseg.exports import FORMATS
from padseg.images import MAX_PIXELS
from padseg.options import Options
from padseg.options import Resolved
from padseg.records import Setting
from padseg.selection import Selection


class Job(NamedTuple):
    """What `padseg run` is asked to do: source, a folder or one picture; out, where results go; model … dtype as for `load`.

    workers: threads that read pictures ahead, and as many that write results behind the model. checksum: a picture is unchanged if its
    content is, not if size and time of change are. retry_failed: whether pictures that failed are tried again though they are unchanged.
    max_failures: how many pictures may fail before the run ends. max_pixels: of a picture. maps: output of an earlier run whose token
    maps take the model's place.
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
    retry_failed: bool = True
    max_failures: int | None = None
    max_pixels: int = MAX_PIXELS
    selection: Selection = Selection()
    maps: Path | None = None


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


def resolved_from(settings: dict[str, Setting]) -> Resolved:
    """Options as a record holds them. UsageError for a value that is not allowed."""
    values = {field.name: settings[field.name] for field in dataclasses.fields(Resolved)}
    values['threshold'] = float(str(values['threshold']))  # inf is a word there
    Options(**values)  # type: ignore[arg-type]
    return Resolved(**values)  # type: ignore[arg-type]
