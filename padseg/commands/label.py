"""`padseg label`: turn a folder of pictures into label maps of named classes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from padseg.commands.flags import MethodCommand, job_flags, options_given, reading_flags
from padseg.commands.run import as_events, start_run
from padseg.errors import UsageError
from padseg.images import ImageError, Reading, contents
from padseg.methods import METHODS

MOST_BYTES = 2**24  # of a file of names


class ClassesCommand(MethodCommand):
    task = 'classes'


@click.command('label', cls=ClassesCommand)
@click.option('--classes', help='names of the classes, separated by commas: "cat, grass, sky"')
@click.option('--classes-file', type=click.Path(path_type=Path), help='text file with one class name per line, instead of --classes')
@job_flags
@reading_flags
def command(classes: str | None, classes_file: Path | None, log_json: bool, method: str, **settings: Any) -> int:
    """Find named classes in every picture of a folder.

    Works like `padseg run`, but the values of label maps are classes: 1 is the first name, and OUT/classes.json is the legend. 0 is
    background, if the options separate it from the classes. With --save-maps, OUT/maps has the scores of every class.
    """
    if not settings['source']:
        raise click.UsageError('name the folder of pictures with --dir FOLDER')
    with as_events() if log_json else contextlib.nullcontext():
        names = names_of(classes, classes_file)
        if METHODS[method].BACKGROUND_BY_RULE:
            settings |= words_behind(settings)
        return start_run(log_json, method=method, options=options_given(method, settings), classes=names, **settings)


def words_behind(settings: Mapping[str, Any]) -> dict[str, Any]:
    """--background as --background-words, where it lists names and is no colour."""
    given = settings['background']
    if not settings['background_words'] and not is_colour(given):
        return {'background_words': tuple(part.strip() for part in given.split(',') if part.strip()), 'background': 'white'}
    return {}


def is_colour(text: str) -> bool:
    from padseg.run.job import rgb

    try:
        return bool(rgb(text))
    except UsageError:
        return False


def names_of(classes: str | None, file: Path | None) -> tuple[str, ...]:
    """Parse the class names, skipping empty ones. Raises UsageError if there are none, or unless exactly one source is given."""
    if (classes is None) == (file is None):
        raise click.UsageError('Give either --classes or --classes-file.')
    try:
        parts = contents(file, Reading(max_bytes=MOST_BYTES)).decode('utf-8-sig').splitlines() if file else (classes or '').split(',')
    except (OSError, ImageError, UnicodeDecodeError) as error:
        raise UsageError(f'{file} cannot be read as text: {error}') from error
    names = tuple(part.strip() for part in parts if part.strip())
    if not names:
        raise UsageError('there are no class names: give at least one')
    if any('\ud800' <= letter <= '\udfff' for name in names for letter in name):
        raise UsageError('the names of classes are not UTF-8')
    return names
