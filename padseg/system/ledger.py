"""What a job keeps in its output folder so that a later job can continue.

A header, such as run.json, holds settings and progress; a file of lines, such as manifest.jsonl, holds one line per finished item, always
written last; and a lock keeps other jobs out.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Protocol, TypeVar

import filelock
from pydantic import BaseModel, PlainValidator

from padseg.errors import OutputConflict, UsageError
from padseg.system.files import BEGINS_ANEW, CONTINUES, FULL, atomic, full_disk, opened, sweep, try_to_write


def any_text(value: object) -> str:
    """Return the value if it is text. Unlike pydantic's check, allow lone surrogates, in which Python keeps bytes that are not UTF-8."""
    if not isinstance(value, str):
        raise ValueError('not a text')
    return value


Name = Annotated[str, PlainValidator(any_text)]
Record = TypeVar('Record', bound=BaseModel)
Settings = Mapping[str, Any]

LOCK = '.lock'
ADDED = ('scheduler', 'text_encoders', 'threads')  # settings that records of version 0.1 do not have
REMEDY = 'choose another --out, or --overwrite'
UNREADABLE = (ValueError, RecursionError)  # not JSON, JSON of another form, or brackets nested too deeply
LARGEST = 2**26  # bytes of a header; some list many failures
LONGEST_LINE = 2**24  # bytes of a line; in an evaluation, one can hold the scores of 65,536 classes


class Header(Protocol):
    """A record that says what a job's settings are."""

    @property
    def status(self) -> str: ...
    @property
    def settings(self) -> Settings: ...
    def model_dump(self) -> dict[str, Any]: ...


def write_header(record: BaseModel | Header, path: Path) -> None:
    """Write a record to a JSON file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record.model_dump(), indent=1) + '\n', encoding='ascii')


def read_header(path: Path, of: type[Record], what: str) -> Record | None:
    """Read the record in a JSON file; None if there is no file. Raises OutputConflict, with `what` it should be, if it is not a record."""
    file = opened_record(path)
    if file is None:
        return None
    with file:
        text = file.read(LARGEST + 1)
    try:
        if len(text) > LARGEST:
            raise ValueError('too large')
        return read_line(text, of)
    except UNREADABLE as error:
        raise OutputConflict(f'{path} is not a record of {what}: {REMEDY}') from error


def opened_record(path: Path) -> BinaryIO | None:
    """Open a file of records for reading; None if there is none. Raises OutputConflict if it cannot be read or is not a regular file."""
    try:
        return opened(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputConflict(f'{path} cannot be read: {error.strerror}') from error


def line(record: BaseModel, exclude_defaults: bool = False) -> str:
    """Format a record as one line of ASCII, optionally without the fields that have their default value."""
    return json.dumps(record.model_dump(exclude_defaults=exclude_defaults)) + '\n'


def read_line(text: str | bytes, of: type[Record]) -> Record:
    """Parse a record from JSON. Raises one of UNREADABLE if it is not a record."""
    # pydantic's own parser refuses lone surrogates
    return of.model_validate(json.loads(text, object_pairs_hook=without_repetition))


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises ValueError for a repeated key, because programs differ in which value they take."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError('a repeated key')
    return record


def write_lines(lines: Iterable[str], path: Path) -> None:
    """Write a file of lines atomically."""
    with atomic(path) as temporary, temporary.open('w', encoding='ascii') as file:
        file.writelines(lines)


def read_lines(path: Path, of: type[Record], what: str = 'a picture', remedy: str = REMEDY) -> Iterator[Record]:
    """Yield the records in a file of lines; none if there is no file. A torn last line, left by a killed job, is ignored.

    Raises OutputConflict if any other line is not a record, or if the file cannot be read.
    """
    file = opened_record(path)
    if file is None:
        return
    fault = ''
    with file:
        for number, text in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b''), start=1):
            if fault:
                raise OutputConflict(fault)
            try:
                if len(text) > LONGEST_LINE:
                    raise ValueError('too long')
                record = read_line(text, of)
            except UNREADABLE:
                fault = f'{path}, line {number} is not a record of {what}: {remedy}'
                continue
            yield record


@contextlib.contextmanager
def continued(kept: Iterable[str], path: Path) -> Iterator[Callable[[str], None]]:
    """Rewrite a file with the lines to keep, dropping a torn one, and yield a function that appends a line and flushes it."""
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
    """The settings that differ, in words. Those of ADDED are compared where both sides have them."""
    old, new = flattened(earlier), flattened(now)
    names = [name for name in sorted({**old, **new}) if (name in old and name in new) or name.rpartition('.')[2] not in ADDED]
    return [f'{name} {old.get(name)} there, {new.get(name)} now' for name in names if old.get(name) != new.get(name)]


def flattened(settings: Settings, between: str = '.') -> dict[str, Any]:
    """Flatten nested settings to dotted names: rules.void, predictions.layer."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            plain |= {f'{name}{between}{key}': one for key, one in flattened(value, between).items()}
        else:
            plain[name] = value
    return plain


def refuse_strange(folder: Path, names: Iterable[str]) -> None:
    """Raise OutputConflict if anything but a file has the name of a record; otherwise the job would fail only at its end."""
    for name in names:
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            what = 'a link, which is not followed' if path.is_symlink() else 'not a regular file'
            raise OutputConflict(f'{path} is {what}: remove it, or choose another --out')


def refuse_others(out: Path, command: str | None) -> None:
    """Raise OutputConflict if run.json is a readable record, but of another command: --overwrite is not meant for its results.

    command: what the record of this one says; None for a run, whose record says nothing.
    """
    file = opened_record(out / 'run.json')
    if file is None:
        return
    with file:
        text = file.read(LARGEST)
    with contextlib.suppress(*UNREADABLE):
        record = json.loads(text)
        if isinstance(record, dict) and 'settings' in record and record.get('command') != command:
            raise OutputConflict(f'{out} holds results of another command: choose another --out')


def check_output(out: Path, names: Iterable[str] = ()) -> None:
    """Create the output folder of a command that writes at its end, and make sure that files of these names can be written to it.

    Raises UsageError, OutputConflict or ResourceExhausted.
    """
    with full_disk(out, BEGINS_ANEW):
        make_output(out)
        refuse_strange(out, names)
        try_to_write(out)


@contextlib.contextmanager
def owned(out: Path, *foreign: str, then: str = CONTINUES) -> Iterator[None]:
    """Create the output folder, lock out all other jobs, and remove half-written files that killed jobs left next to the records.

    Raises OutputConflict if a job is using the folder or it holds a file in `foreign`, another command's header; ResourceExhausted if the
    disk is full.
    """
    with full_disk(out, then):
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
    """Hold a folder's lock. Raises OutputConflict with the message `otherwise` if another process still holds it after `seconds`, and also
    if no lock can be made, as in a folder that cannot be written to."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(folder / LOCK, timeout=seconds))
        except filelock.Timeout as error:
            raise OutputConflict(otherwise) from error
        except OSError as error:
            if error.errno in FULL:
                raise
            raise OutputConflict(f'cannot write to {folder / LOCK}: {error.strerror}') from error
        yield


def busy(out: Path) -> str:
    return f'another run is writing to {out}'
