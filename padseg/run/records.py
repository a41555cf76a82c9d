"""What a run writes about itself: run.json, manifest.jsonl, failures.jsonl; other programs read them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, SkipValidation, ValidationError

from padseg.errors import OutputConflict
from padseg.system.files import atomic

# Not checked as text: file names may hold bytes that are no UTF-8, which Python keeps as lone surrogates.
Name = SkipValidation[str]
Setting = str | int | float | bool | None


class Entry(BaseModel):
    """One picture, a line of manifest.jsonl. input is a POSIX path relative to the folder, outputs are to OUT; size is (height, width).

    modified: when the file last changed, in nanoseconds since 1970; reduced_from: the size of the file's picture if it was reduced;
    notes: what was done to it that is not plain decoding.
    """

    input: Name
    status: Literal['done', 'failed']
    bytes: int | None = None
    modified: int | None = None
    sha256: str | None = None
    size: tuple[int, int] | None = None
    reduced_from: tuple[int, int] | None = None
    notes: list[str] = []
    regions: int | None = None
    seconds: float = 0.0
    stages: dict[str, float] = {}  # seconds of decode, segment (a batch's share of the forward), labels and write
    error: str | None = None  # class of the error, with reason
    reason: Name | None = None
    outputs: dict[str, Name] = {}


class ModelRecord(BaseModel):
    """The model that made the results; weights: sha256 of its files."""

    model: str
    folder: Name
    revision: str | None
    weights: str


class RunTotals(BaseModel):
    """Pictures of the last run over OUT. skipped: those of `done` that earlier runs had done; regions: mean of a done picture."""

    images: int = 0
    done: int = 0
    skipped: int = 0
    failed: int = 0
    regions: float = 0.0


class Run(BaseModel):
    """run.json. model, dtype: None for a method that needs no model. requested: settings as asked for; settings: as used, all that decides the results; key: their sha256."""

    status: Literal['running', 'finished', 'interrupted'] = 'running'
    padseg: str
    source: Name
    requested: dict[str, Setting]
    settings: dict[str, Setting]
    key: str
    model: ModelRecord | None
    device: str
    dtype: str | None
    threads: int
    platform: str
    versions: dict[str, str]
    batch: int
    started: str
    ended: str | None = None
    seconds: float | None = None
    counts: RunTotals = RunTotals()


def write_run(run: Run, path: Path) -> None:
    """Write run.json, all of it or nothing."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(run.model_dump(), indent=1) + '\n', encoding='ascii')


def read_run(path: Path) -> Run | None:
    """The record of the run that last wrote here; None if there is none. OutputConflict if it cannot be understood."""
    try:
        return Run.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except ValueError as error:  # neither JSON nor a record of this form
        raise OutputConflict(f'{path} is no record of a padseg run: choose another --out, or --overwrite') from error


def line(entry: Entry) -> str:
    """A picture's record as one line of ASCII."""
    return json.dumps(entry.model_dump()) + '\n'


class Recorded(NamedTuple):
    """A picture's line of the manifest with what a run needs of it: an Entry takes five times the memory, and there may be millions."""

    line: str
    status: str
    regions: int | None
    error: str | None


def recorded(entry: Entry) -> Recorded:
    return Recorded(line(entry), entry.status, entry.regions, entry.error)


def entry_of(record: Recorded) -> Entry:
    """The entry that a line holds."""
    return Entry.model_validate(json.loads(record.line))


def write_records(records: Iterable[Recorded], path: Path) -> None:
    """Write one line a picture, all lines or nothing."""
    with atomic(path) as temporary, temporary.open('w', encoding='ascii') as file:
        file.writelines(record.line for record in records)


def read_records(path: Path) -> dict[str, Recorded]:
    """The last record of every picture in a manifest, by name. A last line that a killed run left torn does not count.

    OutputConflict if it cannot be understood.
    """
    records: dict[str, Recorded] = {}
    fault = ''
    with path.open('rb') if path.exists() else contextlib.nullcontext(()) as lines:
        for number, text in enumerate(lines, start=1):
            if fault:
                raise OutputConflict(fault)
            try:
                entry = Entry.model_validate(json.loads(text))
            except (ValueError, ValidationError):
                fault = f'{path}, line {number} is no record of a picture: choose another --out, or --overwrite'
                continue
            records[entry.input] = recorded(entry)
    return records


def differences(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ, in words."""
    names = sorted(there.keys() | now.keys())
    return [f'{name} {there.get(name)} there, {now.get(name)} now' for name in names if there.get(name) != now.get(name)]
