"""What a job keeps in its output folder so that a later job can continue.

A header, such as run.json, holds settings and progress; a file of lines, such as manifest.jsonl, holds one line per finished item, always
written last; and a lock keeps other jobs out.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import filelock
from pydantic import BaseModel, SkipValidation

from padseg.errors import OutputConflict, UsageError
from padseg.system.files import FULL, atomic, full_disk, sweep

Name = SkipValidation[str]  # file names may contain bytes that are not UTF-8, which Python keeps as lone surrogates
Record = TypeVar('Record', bound=BaseModel)
Settings = Mapping[str, Any]

LOCK = '.lock'
REMEDY = 'choose another --out, or --overwrite'
UNREADABLE = (ValueError, RecursionError)  # not JSON, JSON of the wrong structure, or endlessly nested brackets


def write_header(record: BaseModel, path: Path) -> None:
    """Write a record to a JSON file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record.model_dump(), indent=1) + '\n', encoding='ascii')


def read_header(path: Path, of: type[Record], what: str) -> Record | None:
    """Read the record in a JSON file; None if there is no file. OutputConflict, naming `what` was expected, if it is not such a record."""
    try:
        return read_line(path.read_bytes(), of)
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        raise OutputConflict(f'{path} is not a record of {what}: {REMEDY}') from error


def line(record: BaseModel, exclude_defaults: bool = False) -> str:
    """Format a record as one line of ASCII, optionally without the fields that have their default value."""
    return json.dumps(record.model_dump(exclude_defaults=exclude_defaults)) + '\n'


def read_line(text: str | bytes, of: type[Record]) -> Record:
    """Parse a record from JSON text. Raises one of UNREADABLE if it is not one."""
    return of.model_validate(json.loads(text))  # pydantic's own parser rejects lone surrogates


def write_lines(lines: Iterable[str], path: Path) -> None:
    """Write a file of lines atomically."""
    with atomic(path) as temporary, temporary.open('w', encoding='ascii') as file:
        file.writelines(lines)


def read_lines(path: Path, of: type[Record], what: str = 'a picture') -> Iterator[Record]:
    """Yield the records in a file of lines; none if there is no file. A torn last line, left by a killed job, is ignored.

    OutputConflict if any other line is not a record.
    """
    fault = ''
    with path.open('rb') if path.exists() else contextlib.nullcontext(()) as lines:
        for number, text in enumerate(lines, start=1):
            if fault:
                raise OutputConflict(fault)
            try:
                record = read_line(text, of)
            except UNREADABLE:
                fault = f'{path}, line {number} is not a record of {what}: {REMEDY}'
                continue
            yield record


@contextlib.contextmanager
def continued(kept: Iterable[str], path: Path) -> Iterator[Callable[[str], None]]:
    """Rewrite the file with the lines to keep, which drops a torn one, and yield a function that appends a line and flushes it."""
    write_lines(kept, path)
    with path.open('a', encoding='ascii') as file:

        def add(text: str) -> None:
            file.write(text)
            file.flush()

        yield add


def refuse_other_settings(out: Path, earlier: Settings, now: Settings, what: str = 'results', remedy: str = REMEDY) -> None:
    """Raise OutputConflict if `what` is in the output folder was made with different settings."""
    different = differences(earlier, json.loads(json.dumps(now)))  # as read back from a header
    if different:
        raise OutputConflict(f'{out} holds {what} made with other settings ({"; ".join(different)}): {remedy}')


def differences(earlier: Settings, now: Settings) -> list[str]:
    """Describe the settings that differ."""
    old, new = flattened(earlier), flattened(now)
    return [f'{name} {old.get(name)} there, {new.get(name)} now' for name in sorted({**old, **new}) if old.get(name) != new.get(name)]


def flattened(settings: Settings, between: str = '.') -> dict[str, Any]:
    """Flatten nested settings to dotted names: rules.void, predictions.layer."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            plain |= {f'{name}{between}{key}': one for key, one in flattened(value, between).items()}
        else:
            plain[name] = value
    return plain


@contextlib.contextmanager
def owned(out: Path, *foreign: str) -> Iterator[None]:
    """Create the output folder, lock out all other jobs, and remove half-written files that killed jobs left next to the records.

    Raises OutputConflict if a job is using the folder or it holds a file in `foreign`, another command's header; ResourceExhausted if the
    disk is full.
    """
    with full_disk(out):
        make_output(out, *foreign)
        with locked(out, busy(out)):
            sweep(out)
            yield


def make_output(out: Path, *foreign: str) -> None:
    """Create the output folder. UsageError if that fails, OutputConflict if it holds a file in `foreign`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UsageError(f'cannot create the output folder {out}: {error.strerror}') from error
    for name in foreign:
        if (out / name).exists():
            raise OutputConflict(f'{out} holds {name}, results of another command: choose another --out')


@contextlib.contextmanager
def locked(folder: Path, otherwise: str, seconds: float = 0.0) -> Iterator[None]:
    """Hold a folder's lock. Raises OutputConflict with message `otherwise` if another process still holds it after `seconds`."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(folder / LOCK, timeout=seconds))
        except filelock.Timeout as error:
            raise OutputConflict(otherwise) from error
        yield


def busy(out: Path) -> str:
    return f'another run is writing to {out}'
