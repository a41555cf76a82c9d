"""The records of a run, which other programs can read: run.json, manifest.jsonl, failures.jsonl."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, Field, PlainValidator, model_validator

from padseg.exports import FORMATS
from padseg.methods.options import Setting
from padseg.system.files import is_path, is_plain
from padseg.system.ledger import Name, line, read_header, read_line, read_lines

SUFFIXES = {**{name: module.SUFFIX for name, module in FORMATS.items()}, 'maps': '.npz'}  # suffixes of results, by folder
T = TypeVar('T')


def fits(value: T, good: bool) -> T:
    if not good:
        raise ValueError('not allowed')
    return value


def setting(value: Setting) -> Setting:
    """Check a recorded setting: text, a finite number, true, false or null."""
    if isinstance(value, (int, float)):
        return fits(value, math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63)
    return fits(value, value is None or isinstance(value, str))


Input = Annotated[Name, AfterValidator(lambda name: fits(name, is_plain(name)))]
Place = Annotated[Name, AfterValidator(lambda path: fits(path, is_path(path)))]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Side = Annotated[int, Field(ge=1, lt=2**31)]
Time = Annotated[int, Field(gt=-(2**100), lt=2**100)]
Amount = Annotated[float, Field(ge=0, lt=1e15)]
Sha256 = Annotated[str, Field(pattern='^[0-9a-f]{64}$')]
Kept = Annotated[Setting, PlainValidator(setting)]


class Entry(BaseModel):
    """One picture, a line of manifest.jsonl. input: POSIX path relative to the folder; outputs: relative to OUT; size: (height, width).

    modified: when the file last changed, in nanoseconds since 1970; reduced_from: the size of the file's picture if it was reduced;
    notes: what was done beyond plain decoding. Outputs must have the names that `input` gives them, so that no record leads to the results
    of another picture.
    """

    input: Input
    status: Literal['done', 'failed']
    bytes: Whole | None = None
    modified: Time | None = None
    sha256: Sha256 | None = None
    size: tuple[Side, Side] | None = None
    reduced_from: tuple[Side, Side] | None = None
    notes: list[Name] = []
    regions: Whole | None = None
    seconds: Amount = 0.0
    stages: dict[Name, Amount] = {}  # seconds for decode, segment (a share of the batch's forward pass), labels and write
    error: str | None = None  # class of the error, with reason
    reason: Name | None = None
    outputs: dict[str, Name] = {}

    @model_validator(mode='after')
    def has_own_results(self) -> Entry:
        own = {folder: f'{folder}/{self.input}{suffix}' for folder, suffix in SUFFIXES.items()}
        whole = self.status == 'failed' or (self.size is not None and 'labels' in self.outputs)
        return fits(self, whole and self.outputs.items() <= own.items())


class ModelRecord(BaseModel):
    """The model that made the results. weights, scheduler, text_encoders: SHA-256 of its files; version 0.1 did not record the last two."""

    model: Name
    folder: Name
    revision: Name | None
    weights: str
    scheduler: str | None = None
    text_encoders: str | None = None


class RunTotals(BaseModel):
    """Pictures in the last run over OUT. skipped: those in `done` from earlier runs; regions: mean per finished picture."""

    images: Whole = 0
    done: Whole = 0
    skipped: Whole = 0
    failed: Whole = 0
    regions: Amount = 0.0


class Run(BaseModel):
    """run.json. requested: settings as given; settings: as used, all that affect the results; key: their SHA-256.

    model, dtype: None for a method that needs no model. left_out: number of files in the source that were not read, by kind; unreadable:
    folders in it that could not be listed, with the reason. stamp: hash of the sizes and times of the model's files, taken when their
    content was hashed; while it is the same, the files need not be read again. None if there is nothing to compare.
    """

    status: Literal['running', 'finished', 'interrupted'] = 'running'
    padseg: str
    source: Place
    requested: dict[str, Kept]
    settings: dict[str, Kept]
    key: str
    model: ModelRecord | None
    device: str
    dtype: str | None
    threads: Whole
    platform: str
    versions: dict[str, str]
    batch: Whole
    started: str
    ended: str | None = None
    seconds: Amount | None = None
    counts: RunTotals = RunTotals()
    left_out: dict[Name, int] = {}
    unreadable: dict[Name, str] = {}
    stamp: str | None = None


def read_run(path: Path) -> Run | None:
    """Read the record of the last run that wrote here; None if there is none. OutputConflict if it is unreadable."""
    return read_header(path, Run, 'a padseg run')


class Recorded(NamedTuple):
    """A picture's manifest line with the fields that a run needs: there may be millions, and an Entry takes five times the memory."""

    line: str
    status: str
    regions: int | None
    error: str | None


def as_recorded(entry: Entry) -> Recorded:
    return Recorded(line(entry), entry.status, entry.regions, entry.error)


def entry_of(record: Recorded) -> Entry:
    """Parse the entry in a line."""
    return read_line(record.line, Entry)


def read_records(path: Path) -> dict[str, Recorded]:
    """Read the last record of every picture in a manifest, by name. OutputConflict if the manifest is unreadable."""
    return {entry.input: as_recorded(entry) for entry in read_lines(path, Entry)}
