"""The records of `padseg generate`, which other programs can read: run.json, manifest.jsonl, failures.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from padseg.run.locks import Ledger
from padseg.run.records import Amount, Kept, Side, Whole, fits
from padseg.system.files import is_plain
from padseg.system.ledger import Name, read_header, read_lines


class Picture(BaseModel):
    """A picture, a line of manifest.jsonl. file, preview: relative to OUT; moments: on the preview, as asked for; sha256: of the file;
    size: (height, width); model: SHA-256 of its weights; lora: of the LoRA; cut: whether the text encoders did not take the whole
    prompt."""

    model_config = ConfigDict(protected_namespaces=())

    name: Name
    status: Literal['done', 'failed']
    prompt: Name
    seed: Whole
    guidance: Name
    model: str
    lora: str | None = None
    file: Name | None = None
    preview: Name | None = None
    moments: Whole | None = None
    sha256: str | None = None
    size: tuple[Side, Side] | None = None
    cut: bool = False
    seconds: Amount = 0.0
    error: str | None = None
    reason: Name | None = None

    @model_validator(mode='after')
    def has_own_files(self) -> Picture:
        own = is_plain(self.name) and '/' not in self.name
        own = own and self.file in (None, place('images', self.name)) and self.preview in (None, place('previews', self.name))
        return fits(self, own and (self.status == 'failed' or (self.file is not None and self.size is not None)))


class Made(BaseModel):
    """The model that made the pictures, as in `backbones.Identity`."""

    model: Name
    folder: Name
    revision: Name | None
    weights: str
    scheduler: str
    text_encoders: str
    lora: str | None = None
    lora_scale: float | None = None


class GenerationTotals(BaseModel):
    """Pictures in the last run over OUT. skipped: those in `done` from earlier runs."""

    images: Whole = 0
    done: Whole = 0
    skipped: Whole = 0
    failed: Whole = 0


class Generation(BaseModel):
    """run.json. requested: settings as given; settings: as used, all that affect the pictures; key: their SHA-256. prompts: how many."""

    command: Literal['generate']
    status: Literal['running', 'finished', 'interrupted'] = 'running'
    padseg: str
    requested: dict[str, Kept]
    settings: dict[str, Kept]
    key: str
    model: Made
    device: str
    dtype: str
    threads: Whole
    platform: str
    versions: dict[str, str]
    batch: Whole
    prompts: Whole
    seeds: Whole
    started: str
    ended: str | None = None
    seconds: Amount | None = None
    counts: GenerationTotals = GenerationTotals()


def read_generation(path: Path) -> Generation | None:
    """Read the record of the last run that wrote here; None if there is none. OutputConflict if it is of another command."""
    return read_header(path, Generation, 'padseg generate')


def read_pictures(path: Path) -> dict[str, Picture]:
    """The last record of every picture in a manifest, by name. OutputConflict if the manifest is unreadable."""
    return {picture.name: picture for picture in read_lines(path, Picture)}


LEDGER = Ledger(read_generation, read_pictures)


def place(kind: str, name: str) -> str:
    """Where a picture's file of this kind goes, relative to OUT."""
    return f'{kind}/{name}.png'
