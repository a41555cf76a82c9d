"""What a run is asked to do, and the names of the files it writes."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import PIL.ImageColor
import pydantic

from padseg.errors import OutputConflict, UsageError
from padseg.images import Reading
from padseg.methods import DEFAULTS, METHODS, seg4diff
from padseg.methods.options import MethodOptions, Setting, kind_of, plain_settings
from padseg.methods.seg4diff import Options
from padseg.run.records import SUFFIXES
from padseg.run.selection import Selection

ENGINES = ('local', 'ray')
Kind = TypeVar('Kind', bound=MethodOptions)


class Job(NamedTuple):
    """What `padseg run` or `padseg label` is asked to do. source: a folder or one picture; out: where results go; method: a key of METHODS.

    options: the method's; model … quantize as for `load`; classes: names to look for, for methods that take class names. workers: threads
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
    lora: str | None = None
    lora_scale: float = 1.0
    quantize: str | None = None
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
    """Where the results of a picture go, relative to the output folder, by format."""
    asked = {'overlays': job.overlay, 'maps': job.save_maps, 'levels': bool(getattr(job.options, 'levels', ()))}  # the others always
    return {key: place for key, place in places(name).items() if asked.get(key, True)}


def places(name: str) -> dict[str, str]:
    """Where any results of a picture go, asked for or not."""
    return {key: f'{key}/{name}{suffix}' for key, suffix in SUFFIXES.items()}


def requested(job: Job) -> dict[str, Setting]:
    """The settings as the user gave them."""
    return {
        **method_settings(job),
        'model': job.model,
        'revision': job.revision,
        'dtype': job.dtype,
        'vae': job.vae,
        'compile': job.compile,
        **({'lora': job.lora, 'lora_scale': job.lora_scale} if job.lora else {}),
        **({'quantize': job.quantize} if job.quantize else {}),
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


def recorded_rgb(text: str) -> tuple[int, int, int]:
    try:
        return rgb(text)
    except UsageError as error:
        raise ValueError('not a colour') from error


class RunSettings(pydantic.BaseModel):
    """Settings read back from a record: the method, the class names, and how files became pictures."""

    method: str | None = None
    classes: pydantic.Json[tuple[str, ...]] = ()
    exif: Literal['apply', 'ignore'] = 'apply'
    frames: Literal['first', 'all'] = 'first'
    value_range: Annotated[tuple[float, float] | None, pydantic.BeforeValidator(lambda text: str(text).split() if text else None)] = None
    background: Annotated[tuple[int, int, int], pydantic.BeforeValidator(lambda text: recorded_rgb(str(text)))] = (255, 255, 255)
    void: pydantic.StrictBool = False
    shrink: Annotated[int, pydantic.Field(gt=0, strict=True)] | None = None

    @pydantic.field_validator('method')
    @classmethod
    def is_known(cls, method: str | None) -> str | None:
        if method is not None and method not in METHODS:
            raise ValueError('not a method')
        return method

    @pydantic.field_validator('classes')
    @classmethod
    def are_names(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) < len(classes) or not all(name.strip() for name in classes):
            raise ValueError('not the names of classes')
        return classes

    @pydantic.model_validator(mode='after')
    def fit_together(self) -> RunSettings:
        if (METHODS[self.method_name].TASK == 'classes') != bool(self.classes):
            raise ValueError('its classes are not those of its method')
        return self

    @pydantic.field_validator('value_range')
    @classmethod
    def is_range(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds and not -math.inf < bounds[0] < bounds[1] < math.inf:
            raise ValueError('not a range of numbers')
        return bounds

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
    """A method's fully resolved options from a record. OutputConflict for settings that no run would have recorded."""
    names = [field.name for field in dataclasses.fields(kind) if field.name in settings or field.name not in seg4diff.IF_USED]
    lacking = [name for name in names if settings.get(name) is None]
    if lacking:
        raise OutputConflict(f'the recorded settings lack {lacking[0]}')
    infinite = {name: math.inf for name in names if settings[name] == str(math.inf) and kind_of(kind, name)[0] is float}
    try:
        several = {name: parsed(kind, name, settings[name]) for name in names if kind_of(kind, name)[1]}
        return kind(**{**{name: settings[name] for name in names}, **infinite, **several})
    except (UsageError, ValueError) as error:
        raise OutputConflict(f'the recorded settings are not those of a run: {str(error)[:200]}') from error


def parsed(kind: type[MethodOptions], name: str, text: Setting) -> tuple[Any, ...]:
    """The values of a field that holds several, as `plain_settings` writes them. ValueError for others."""
    return tuple(kind_of(kind, name)[0](part) for part in str(text).split(', ') if part)


def settings_complaint(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    return f'{".".join(map(str, first["loc"]))}: {first["msg"]}; got {reprlib.repr(first["input"])}'
