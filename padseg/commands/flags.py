"""Flags that several commands share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from padseg.backbones import QUANTIZED
from padseg.commands.config import METHOD, config_flag
from padseg.images import EXIF, FRAMES, MAX_BYTES, MAX_MEMORY, MAX_PIXELS, MAX_SECONDS, Reading
from padseg.methods import DEFAULTS, METHODS, Method, usual_model
from padseg.methods.options import MethodOptions, kind_of
from padseg.run.job import ENGINES
from padseg.system.progress import bars_hidden

POSITIVE = click.IntRange(min=1)


def hide_bars(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    """With the flag, the command shows no bars for downloads and long loads either."""
    if value:
        ctx.with_resource(bars_hidden())
    return value


compile_flag = click.option(
    '--compile', is_flag=True, help='compile the transformer at the first picture; pays off for many pictures and needs a C++ compiler'
)
quantize_flag = click.option(
    '--quantize',
    type=click.Choice(QUANTIZED),
    help="keep the weights of the transformer's linear layers in 8 bits, which halves their memory; needs padseg[quantize]",
)
LORA = (
    click.option('--lora', metavar='PATH', help="a LoRA for the model in diffusers' layout: a safetensors file, or a folder with one"),
    click.option('--lora-scale', type=float, default=1.0, show_default=True, help='strength of the LoRA; 1 is as it was trained'),
)
JOB = (
    click.option('--dir', 'source', type=click.Path(path_type=Path), help='folder of pictures, or one picture'),
    click.option('--out', type=click.Path(path_type=Path), default='out', show_default=True, help='folder for the results'),
    click.option('--model', default='tiny', show_default=True, help='a model of `padseg models`, a hub id, or a folder'),
    click.option('--revision', help='branch, tag or commit on the hub'),
    click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best available)'),
    click.option('--dtype', help='float32, bfloat16 or float16 (default: depends on the device)'),
    click.option(
        '--vae', help="a faster VAE: tiny (TAESD3, or the one for the model's family), a hub id, or a folder with an AutoencoderTiny"
    ),
    compile_flag,
    quantize_flag,
    *LORA,
    config_flag,
    click.option(
        '--batch', type=click.IntRange(min=1), default=1, show_default=True, help='pictures per forward pass; does not change results'
    ),
    click.option(
        '--workers', type=click.IntRange(min=1), default=1, show_default=True, help='threads for reading, and as many for writing'
    ),
    click.option(
        '--engine', type=click.Choice(ENGINES), default='local', show_default=True, help='what runs the job; ray needs padseg[ray]'
    ),
    click.option('--address', help='HOST:PORT of a Ray cluster (default: $RAY_ADDRESS, or a new cluster on this machine)'),
    click.option('--include', multiple=True, metavar='PATTERN', help='only pictures whose names match (*.jpg, cats/*); may be repeated'),
    click.option('--exclude', multiple=True, metavar='PATTERN', help='skip pictures whose names match; may be repeated'),
    click.option('--shard', metavar='I/N', help='only the I-th of N parts, from 1; runs of different parts may share OUT'),
    click.option('--limit', type=click.IntRange(min=1), help='only the first N pictures'),
    click.option(
        '--retry-failed/--no-retry-failed', default=True, show_default=True, help='retry pictures that failed before, even if unchanged'
    ),
    click.option('--max-failures', type=click.IntRange(min=0), help='stop when more pictures than this have failed'),
    click.option('--checksum', is_flag=True, help='detect changed pictures by content, not size and modification time'),
    click.option('--dry-run', is_flag=True, help='only print the pictures that would be processed'),
    click.option('--overlay', is_flag=True, help='also write the picture with its regions in colour'),
    click.option('--open', 'open_first', is_flag=True, help='when done, show the first overlay; implies --overlay'),
    click.option('--coco', is_flag=True, help='also write OUT/coco: instances.json, and panoptic.json with its PNGs'),
    click.option(
        '--save-maps',
        is_flag=True,
        help='also keep the maps behind the label maps: token maps, for `padseg merge`, or class scores',
    ),
    click.option('--overwrite', is_flag=True, help='redo everything, even over results made with other settings'),
    click.option('--json', 'as_json', is_flag=True, help='print the counts as one JSON object on stdout'),
    click.option('--log-json', is_flag=True, callback=hide_bars, help='write JSON to stderr, one line per picture and event'),
    click.option('--no-progress', is_flag=True, callback=hide_bars, help='no progress on stderr'),
    click.option('-q', '--quiet', is_flag=True, callback=hide_bars, help='only errors on stderr'),
)
READING = (
    click.option('--max-pixels', type=POSITIVE, default=MAX_PIXELS, show_default=True, help='larger pictures fail without being decoded'),
    click.option(
        '--max-file-size', type=POSITIVE, default=MAX_BYTES, show_default=True, help='larger files (in bytes) fail without being read'
    ),
    click.option(
        '--max-seconds',
        type=click.FloatRange(min=0, min_open=True),
        default=MAX_SECONDS,
        show_default=True,
        help='pictures that take more processor time to decode (in seconds) fail',
    ),
    click.option(
        '--max-memory',
        type=POSITIVE,
        default=MAX_MEMORY,
        show_default=True,
        help='pictures that need more memory to decode (in bytes, beyond the file itself) fail',
    ),
    click.option(
        '--shrink',
        type=POSITIVE,
        metavar='PIXELS',
        help='shrink larger pictures to at most this many pixels; also shrinks their label maps',
    ),
    click.option('--exif', type=click.Choice(EXIF), default='apply', show_default=True, help='how to treat the EXIF orientation'),
    click.option(
        '--frames',
        type=click.Choice(FRAMES),
        default='first',
        show_default=True,
        help='frames to take from animations and multi-page files',
    ),
    click.option('--value-range', type=(float, float), metavar='LOW HIGH', help='values of black and white in float and 32-bit files'),
    click.option('--background', default='white', show_default=True, help='colour behind transparent pixels: a name or #rrggbb'),
    click.option('--void-transparent', is_flag=True, help='leave fully transparent pixels unassigned'),
)


def reading_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags for reading image files; `reading` turns their values into a Reading."""
    for flag in reversed(READING):
        function = flag(function)
    return function


def reading(settings: dict[str, Any]) -> Reading:
    """Pop the values of `reading_flags` from a command's settings. Raises UsageError for invalid values."""
    from padseg.run.job import rgb

    bounds = settings.pop('value_range')
    if bounds and not bounds[0] < bounds[1]:
        raise click.UsageError(f'--value-range needs LOW < HIGH; got {bounds[0]} {bounds[1]}')
    return Reading(
        max_pixels=settings.pop('max_pixels'),
        max_bytes=settings.pop('max_file_size'),
        max_seconds=settings.pop('max_seconds'),
        max_memory=settings.pop('max_memory'),
        exif=settings.pop('exif'),
        frames=settings.pop('frames'),
        value_range=bounds,
        background=rgb(settings.pop('background')),
        void=settings.pop('void_transparent'),
        shrink=settings.pop('shrink'),
    )


class Several(click.ParamType[tuple[Any, ...]]):
    """A tuple of values of one type, separated by commas."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.name = 'names' if kind is str else 'numbers'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            return tuple(self.kind(part.strip()) for part in value.split(',') if part.strip())
        except ValueError:
            self.fail(f'{value!r} is not a list such as 8,9', param, ctx)


def option_flags(options: type[MethodOptions], only: Collection[str] | None = None) -> list[click.Option]:
    """Make a flag for each field of a method's options, or only for those named."""
    return [option_flag(options, field) for field in dataclasses.fields(options) if only is None or field.name in only]


def option_flag(options: type[MethodOptions], field: dataclasses.Field[Any]) -> click.Option:
    kind, several = kind_of(options, field.name)
    name, choices = field.name.replace('_', '-'), field.metadata.get('choices')
    accepted = Several(kind) if several else click.Choice(choices) if choices else kind
    flag = f'--{name}/--no-{name}' if kind is bool else f'--{name}'
    text = f'{field.metadata["help"]} (default: {shown_default(field)})'
    return click.Option([flag], type=accepted, default=field.default, help=text)


def shown_default(field: dataclasses.Field[Any]) -> str:
    """Return the default for help texts: a value, or words for it."""
    own = "the model's own" if field.default is None else str(field.default)
    return str(field.metadata.get('default', own))


class MethodCommand(click.Command):
    """A command that takes --method and the options of that method."""

    task: str  # key of DEFAULTS

    @property
    def shown_default(self) -> str:
        return DEFAULTS[self.task]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[METHOD] = self.method_of(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            owners = [
                name for name in self.methods() if error.option_name[2:].replace('-', '_') in METHODS[name].Options.__dataclass_fields__
            ]
            if owners:
                *others, last = owners
                named = f'{", ".join(others)} and {last}' if others else last
                raise click.UsageError(f'{error.option_name} is an option of --method {named}.', ctx) from error
            raise

    def methods(self) -> list[str]:
        return [name for name, method in METHODS.items() if method.TASK == self.task]

    def method_of(self, args: Sequence[str]) -> str:
        """The method that the arguments name; the default if they name none, or one that click will reject."""
        name = named_in(args, '--method')
        return name if name in self.methods() else self.default(args)

    def default(self, args: Sequence[str]) -> str:
        return DEFAULTS[self.task]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help_flag = super().get_params(ctx)
        name = ctx.meta.get(METHOD) or self.default(())
        choice = click.Option(
            ['--method'],
            type=click.Choice(self.methods()),
            default=name,
            show_default=self.shown_default,
            help='how to segment pictures; its options are below, those of another with --method NAME --help',
        )
        own = [with_usual_model(param, METHODS[name]) for param in own]
        return [*own, choice, *option_flags(METHODS[name].Options), help_flag]


def with_usual_model(param: click.Parameter, method: Method) -> click.Parameter:
    """A parameter of a command as it is for a method: --model has the method's default."""
    if param.name != 'model':
        return param
    own = copy.copy(param)
    own.default = usual_model(method)
    return own


def named_in(args: Sequence[str], flag: str) -> str | None:
    """Return the last value of a flag among the arguments, if any."""
    values = [value for name, value in zip(['', *args], args, strict=False) if name == flag]
    equal = [arg.removeprefix(f'{flag}=') for arg in args if arg.startswith(f'{flag}=')]
    return (values + equal)[-1] if values or equal else None


def options_given(method: str, settings: dict[str, Any]) -> MethodOptions:
    """Pop the method's options from a command's settings."""
    kind = METHODS[method].Options
    return kind(**{field.name: settings.pop(field.name) for field in dataclasses.fields(kind)})


def lora_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of a LoRA, for commands without `job_flags`."""
    for flag in reversed(LORA):
        function = flag(function)
    return function


def refuse_lone_scale(settings: Mapping[str, Any]) -> None:
    """Raise click.UsageError for a LoRA's strength without a LoRA."""
    if settings['lora'] is None and settings['lora_scale'] != 1:
        raise click.UsageError('--lora-scale is the strength of a LoRA: name one with --lora PATH.')


def job_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of a job over a folder, shared by `run` and `label`."""
    for flag in reversed(JOB):
        function = flag(function)
    return function
