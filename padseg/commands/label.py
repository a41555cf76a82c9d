"""`padseg label`: a folder of pictures to label maps of named classes."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import click

from padseg.commands.flags import job_flags, option_flags, reading_flags
from padseg.commands.run import as_events, start_run
from padseg.errors import UsageError
from padseg.methods.options import LabelOptions


@click.command('label')
@click.option('--classes', help='names of the classes, separated by commas: "cat, grass, sky"')
@click.option('--classes-file', type=click.Path(path_type=Path), help='a text file with one name a line, in place of --classes')
@job_flags
@reading_flags
@partial(option_flags, of=LabelOptions)
def command(classes: str | None, classes_file: Path | None, log_json: bool, **settings: Any) -> int:
    """Find named classes in every picture of a folder.

    As `padseg run`, with label maps whose values are classes, 1 the first name: OUT/classes.json is the legend. 0 is background, where
    options tell it from classes. With --save-maps OUT/maps has the scores of every class.
    """
    if not settings['source']:
        raise click.UsageError('which pictures? --dir FOLDER')
    with as_events() if log_json else contextlib.nullcontext():
        options = LabelOptions(**{field.name: settings.pop(field.name) for field in dataclasses.fields(LabelOptions)})
        return start_run(log_json, options=options, classes=names_of(classes, classes_file), **settings)


def names_of(classes: str | None, file: Path | None) -> tuple[str, ...]:
    """The names as given: empty ones between commas or lines do not count. UsageError if there is none."""
    if (classes is None) == (file is None):
        raise click.UsageError('which classes? Give either --classes or --classes-file.')
    try:
        parts = file.read_text(encoding='utf-8').splitlines() if file else (classes or '').split(',')
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'{file} cannot be read as text: {error}') from error
    names = tuple(part.strip() for part in parts if part.strip())
    if not names:
        raise UsageError('there are no names of classes: give at least one')
    return names
