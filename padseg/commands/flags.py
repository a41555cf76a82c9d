"""Flags that several commands share."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from collections.abc import Collection
from typing import Any

import click

from padseg.images import EXIF
from padseg.images import FRAMES
from padseg.images import MAX_BYTES
from padseg.images import MAX_PIXELS
from padseg.images import Reading
from padseg.options import Options

POSITIVE = click.IntRange(min=1)
READING = (
    click.option('--max-pixels', type=POSITIVE, default=MAX_PIXELS, show_default=True, help='larger pictures fail undecoded'),
    click.option('--max-file-size', type=POSITIVE, default=MAX_BYTES, show_default=True, help='larger files, in bytes, fail unread'),
    click.option('--shrink', type=POSITIVE, metavar='PIXELS', help='reduce larger pictures to at most so many pixels, label maps too'),
    click.option(
        '--exif', type=click.Choice(EXIF), default='apply', show_default=True, help='turn pictures upright as their EXIF data say'
    ),
    click.option('--frames', type=click.Choice(FRAMES), default='first', show_default=True, help='of animations and files of many pages'),
    click.option('--value-range', type=(float, float), metavar='LOW HIGH', help='black and white of float or 32-bit samples'),
    click.option('--background', default='white', show_default=True, help='colour behind what is transparent: a name or #rrggbb'),
    click.option('--void-transparent', is_flag=True, help='leave fully transparent pixels unassigned'),
)


def reading_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Flags for how files become pictures; `reading` makes them one."""
    for flag in reversed(READING):
        function = flag(function)
    return function


def reading(settings: dict[str, Any]) -> Reading:
    """Takes the values of `reading_flags` out of a command's settings. UsageError for what makes no sense."""
    from padseg.job import rgb

    bounds = settings.pop('value_range')
    if bounds and not bounds[0] < bounds[1]:
        raise click.UsageError(f'--value-range is LOW HIGH with LOW < HIGH; got {bounds[0]} {bounds[1]}')
    return Reading(
        max_pixels=settings.pop('max_pixels'),
        max_bytes=settings.pop('max_file_size'),
        exif=settings.pop('exif'),
        frames=settings.pop('frames'),
        value_range=bounds,
        background=rgb(settings.pop('background')),
        void=settings.pop('void_transparent'),
        shrink=settings.pop('shrink'),
    )


def option_flags(function: Callable[..., Any], only: Collection[str] | None = None) -> Callable[..., Any]:
    """A flag for each field of Options, or for some."""
    types = typing.get_type_hints(Options)
    for field in reversed([field for field in dataclasses.fields(Options) if only is None or field.name in only]):
        kind = next(kind for kind in (bool, int, float, str) if kind in (types[field.name], *typing.get_args(types[field.name])))
        name = field.name.replace('_', '-')
        flag = f'--{name}/--no-{name}' if kind is bool else f'--{name}'
        choices = field.metadata.get('choices')
        shown = "the model's own" if field.default is None else field.default
        text = f'{field.metadata["help"]} (default: {shown})'
        function = click.option(flag, type=click.Choice(choices) if choices else kind, default=field.default, help=text)(function)
    return function
