"""What a run writes about itself, for other programs to read: run.json, manifest.jsonl, failures.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel

from padseg.methods.options import Setting
from padseg.system.ledger import Name, line, read_header, read_line, read_lines


class Entry(BaseModel):
    """One picture, a line of manifest.jsonl. input: POSIX path relative to the folder; outputs: relative to OUT; size: (height, width).

    modified: the file's modification time, in nanoseconds since 1970; reduced_from: original picture size, if it was reduced; notes:
    conversions beyond plain decoding.
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
    stages: dict[str, float] = {}  # seconds for decode, segment (share of the batch's forward pass), labels and write
    error: str | None = None  # the error's class; its message is in reason
    reason: Name | None = None
    outputs: dict[str, Name] = {}


class ModelRecord(BaseModel):
    """The model that made the results; weights: SHA-256 of its files."""

    model: str
    folder: Name
    revision: str | None
    weights: str


class RunTotals(BaseModel):
    """Pictures in the last run over OUT. skipped: those in `done` from earlier runs; regions: mean per finished picture."""

    images: int = 0
    done: int = 0
    skipped: int = 0
    failed: int = 0
    regions: float = 0.0


class Run(BaseModel):
    """run.json. requested: settings as given; settings: as used, all that affect the results; key: their SHA-256.

    model, dtype: None for a method that needs no model.
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
