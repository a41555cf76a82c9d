"""What a run writes about itself: run.json, manifest.jsonl, failures.jsonl; other programs read them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel

from padseg.methods.options import Setting
from padseg.system.ledger import Name, line, read_header, read_line, read_lines


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
    """run.json. requested: settings as asked for; settings: as used, all that decides the results; key: their sha256.

    model, dtype: None for a method that needs no model. left_out: files of the source that were not taken for pictures, by kind, their
    number; unreadable: folders in it that could not be listed, with the reason.
    """

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
    left_out: dict[Name, int] = {}
    unreadable: dict[Name, str] = {}


def read_run(path: Path) -> Run | None:
    """The record of the run that last wrote here; None if there is none. OutputConflict if it cannot be understood."""
    return read_header(path, Run, 'a padseg run')


class Recorded(NamedTuple):
    """A picture's line of the manifest with what a run needs of it: an Entry takes five times the memory, and there may be millions."""

    line: str
    status: str
    regions: int | None
    error: str | None


def as_recorded(entry: Entry) -> Recorded:
    return Recorded(line(entry), entry.status, entry.regions, entry.error)


def entry_of(record: Recorded) -> Entry:
    """The entry that a line holds."""
    return read_line(record.line, Entry)


def read_records(path: Path) -> dict[str, Recorded]:
    """The last record of every picture in a manifest, by name. OutputConflict if it cannot be understood."""
    return {entry.input: as_recorded(entry) for entry in read_lines(path, Entry)}
