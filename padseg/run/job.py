"""What a run is asked to do, and the names of the files it writes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import PIL.ImageColor
import pydantic

from padseg.errors import OutputConflict, UsageError
from padseg.exports import FORMATS
from padseg.images import Reading
from padseg.methods import DEFAULTS
from padseg.methods.options import MethodOptions, Setting, plain_settings
from padseg.methods.seg4diff import Options
from padseg.run.selection import Selection

ENGINES = ('local', 'ray')
Kind = TypeVar('Kind', bound=MethodOptions)


class Job(NamedTuple):
    """What `padseg run` or `padseg label` is asked to do. source: a folder or one picture; out: where results go; method: a key of METHODS.

    options: the method's; model … compile as for `load`; classes: names to look for, for methods that take class names. workers: threads
    that read pictures ahead, and as many that write results behind the model. checksum: compare pictures by content instead of size and
    modification time. retry_failed: whether to retry failed pictures that are unchanged. max_failures: how many pictures may fail before
    the run ends. reading: how files become pictures. maps: output of an earlier run whose token maps replace the model. engine: one of
    ENGINES; address: of a Ray cluster, by default $RAY_ADDRESS, else this machine.
    """

    source: Path
    out: Path
    options: MethodOptions = Options()
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
    method: str = DEFAULTS['regions']


def outputs(name: str, job: Job) -> dict[str, str]:
    """Paths of a picture's results by format, relative to the output folder."""
    places = {key: f'{key}/{name}{module.SUFFIX}' for key, module in FORMATS.items() if key != 'overlays' or job.overlay}
    return places | ({'maps': f'maps/{name}.npz'} if job.save_maps else {})


def requested(job: Job) -> dict[str, Setting]:
    """The settings as the user gave them."""
    return {
        **method_settings(job),
        'model': job.model,
        'revision': job.revision,
        'dtype': job.dtype,
        'vae': job.vae,
        'compile': job.compile,
        **plain_settings(job.options),
        **naming_settings(job),
        **reading_settings(job.reading),
    }


def method_settings(job: Job) -> dict[str, Setting]:
    """The method's name, unless it is a default."""
    return {} if job.method in DEFAULTS.values() else {'method': job.method}


def naming_settings(job: Job) -> dict[str, Setting]:
    return {'classes': json.dumps(job.classes, ensure_ascii=False)} if job.classes else {}


def reading_settings(reading: Reading) -> dict[str, Setting]:
    """Settings that determine the set of pictures and how they look, as JSON values."""
    return {
        'exif': reading.exif,
        'frames': reading.frames,
        'value_range': ' '.join(map(repr, reading.value_range)) if reading.value_range else None,
        'background': '#{:02x}{:02x}{:02x}'.format(*reading.background),
        'void': reading.void,
        'shrink': reading.shrink,
    }


def rgb(text: str) -> tuple[int, int, int]:
    """Parse a colour such as #ffffff or white. UsageError for anything else."""
    try:
        red, green, blue = PIL.ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise UsageError(f'{text} is not a colour: use a name or #rrggbb') from error
    return red, green, blue


class RunSettings(pydantic.BaseModel):
    """Settings read back from a record: the method, the class names, and how files became pictures."""

    method: str | None = None
    classes: pydantic.Json[tuple[str, ...]] = ()
    exif: Literal['apply', 'ignore'] = 'apply'
    frames: Literal['first', 'all'] = 'first'
    value_range: Annotated[tuple[float, float] | None, pydantic.BeforeValidator(lambda text: text.split() if text else None)] = None
    background: Annotated[tuple[int, int, int], pydantic.BeforeValidator(lambda text: rgb(str(text)))] = (255, 255, 255)
    void: bool = False
    shrink: int | None = None

    @property
    def method_name(self) -> str:
        return self.method or DEFAULTS['classes' if self.classes else 'regions']

    @property
    def reading(self) -> Reading:
        """How files became pictures; limits are not recorded."""
        return Reading(
            max_pixels=sys.maxsize,
            max_bytes=sys.maxsize,
            exif=self.exif,
            frames=self.frames,
            value_range=self.value_range,
            background=self.background,
            void=self.void,
            shrink=self.shrink,
        )


def settings_from(settings: Mapping[str, Setting]) -> RunSettings:
    """Parse a record's settings. OutputConflict for settings that no run would have recorded."""
    try:
        return RunSettings.model_validate(settings)
    except pydantic.ValidationError as error:
        raise OutputConflict(f'the recorded settings are not those of a run: {settings_complaint(error)}') from error


def options_from(kind: type[Kind], settings: Mapping[str, Setting]) -> Kind:
    """Parse a method's fully resolved options from a record. OutputConflict for settings that no run would have recorded."""
    names = [field.name for field in dataclasses.fields(kind)]
    try:
        return pydantic.TypeAdapter(kind).validate_python({name: settings[name] for name in names})
    except KeyError as error:
        raise OutputConflict(f'the recorded settings lack {error.args[0]}') from error
    except pydantic.ValidationError as error:
        raise OutputConflict(f'the recorded settings are not those of a run: {settings_complaint(error)}') from error


def settings_complaint(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    return f'{".".join(map(str, first["loc"]))}: {first["msg"]}; got {first["input"]!r}'
