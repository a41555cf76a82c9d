"""What a run is asked to do, and the names of what it writes."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import PIL.ImageColor

from padseg.errors import UsageError
from padseg.exports import FORMATS
from padseg.images import Reading
from padseg.methods.options import LabelOptions, Options, Resolved, ResolvedLabels
from padseg.run.records import Setting
from padseg.run.selection import Selection

ENGINES = ('local', 'ray')


class Job(NamedTuple):
    """What `padseg run` or `padseg label` is asked to do: source, a folder or one picture; out, where results go; model … compile as for
    `load`. classes: names that are looked for, with LabelOptions; none for regions without names.

    workers: threads that read pictures ahead, and as many that write results behind the model. checksum: a picture is unchanged if its
    content is, not if size and time of change are. retry_failed: whether pictures that failed are tried again though they are unchanged.
    max_failures: how many pictures may fail before the run ends. reading: how files become pictures. maps: output of an earlier run
    whose token maps take the model's place. engine: one of ENGINES; address: of a Ray cluster, otherwise $RAY_ADDRESS or this machine.
    """

    source: Path
    out: Path
    options: Options | LabelOptions = Options()
    classes: tuple[str, ...] = ()
    model: str = 'tiny'
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    vae: str | None = None
    compile: bool = False
    batch: int = 1
    overlay: bool = False
    save_maps: bool = False
    coco: bool = False
    overwrite: bool = False
    workers: int = 1
    checksum: bool = False
    retry_failed: bool = True
    max_failures: int | None = None
    reading: Reading = Reading()
    selection: Selection = Selection()
    maps: Path | None = None
    engine: str = 'local'
    address: str | None = None


def outputs(name: str, job: Job) -> dict[str, str]:
    """Where the results of a picture go, relative to the output folder, by format."""
    places = {key: f'{key}/{name}{module.SUFFIX}' for key, module in FORMATS.items() if key != 'overlays' or job.overlay}
    return places | ({'maps': f'maps/{name}.npz'} if job.save_maps else {})


def requested(job: Job) -> dict[str, Setting]:
    """The settings as the user gave them."""
    return {
        'model': job.model,
        'revision': job.revision,
        'dtype': job.dtype,
        'vae': job.vae,
        'compile': job.compile,
        **plain_settings(job.options),
        **naming_settings(job),
        **reading_settings(job.reading),
    }


def naming_settings(job: Job) -> dict[str, Setting]:
    return {'classes': json.dumps(job.classes, ensure_ascii=False)} if job.classes else {}


def classes_from(settings: dict[str, Setting]) -> tuple[str, ...]:
    """The names that a run looked for, back from its record; none if it found regions without names."""
    return tuple(json.loads(str(settings.get('classes', '[]'))))


def last_layer(options: Options | LabelOptions, model: str, revision: str | None) -> int | None:
    """The deepest block that is read, None for the model's own."""
    if not (isinstance(options, LabelOptions) and options.on == 'proposals' and options.layers):
        return options.layer
    from padseg.backbones.source import locate

    return max(*options.layers, locate(model, revision).spec.layer)


def reading_settings(reading: Reading) -> dict[str, Setting]:
    """What decides which pictures there are and how they look, as JSON can hold it."""
    return {
        'exif': reading.exif,
        'frames': reading.frames,
        'value_range': ' '.join(map(repr, reading.value_range)) if reading.value_range else None,
        'background': '#{:02x}{:02x}{:02x}'.format(*reading.background),
        'void': reading.void,
        'shrink': reading.shrink,
    }


def reading_from(settings: dict[str, Setting]) -> Reading:
    """The same back from a record; limits are not in it."""
    settings = {**reading_settings(Reading()), **settings}
    bounds = settings['value_range']
    low, high = map(float, str(bounds).split()) if bounds else (0.0, 0.0)
    return Reading(
        max_pixels=sys.maxsize,
        max_bytes=sys.maxsize,
        exif=str(settings['exif']),
        frames=str(settings['frames']),
        value_range=(low, high) if bounds else None,
        background=rgb(str(settings['background'])),
        void=bool(settings['void']),
        shrink=int(str(settings['shrink'])) if settings['shrink'] else None,
    )


def rgb(text: str) -> tuple[int, int, int]:
    """A colour such as #ffffff or white. UsageError for what is none."""
    try:
        red, green, blue = PIL.ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise UsageError(f'{text} is no colour: use a name, or #rrggbb') from error
    return red, green, blue


def plain_settings(options: Options | Resolved | LabelOptions | ResolvedLabels) -> dict[str, Setting]:
    """The options as JSON can hold them: inf as a word, several values as one text, options inside others with both names."""
    fields: dict[str, Setting] = {}
    for name, value in dataclasses.asdict(options).items():
        if isinstance(value, dict):
            fields |= {f'{name}_{key}': scalar(each) for key, each in value.items()}
        else:
            fields[name] = ', '.join(map(str, value)) if isinstance(value, tuple) else scalar(value)
    return fields


def scalar(value: Setting) -> Setting:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def resolved_from(settings: dict[str, Setting]) -> Resolved:
    """Options as a record holds them. UsageError for a value that is not allowed."""
    values = {field.name: settings[field.name] for field in dataclasses.fields(Resolved)}
    values['threshold'] = float(str(values['threshold']))  # inf is a word there
    Options(**values)  # type: ignore[arg-type]
    return Resolved(**values)  # type: ignore[arg-type]
