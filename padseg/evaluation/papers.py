"""Published figures, for the tables of `padseg compare`: papers.json, one a line, with what was measured with what."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Figure(BaseModel):
    """A published score, as a share. splits: names in padseg of the split it was measured on; names: as for `padseg eval --names`.

    source: paper and table, or where else the figure was read; measured_with: settings, as far as they are stated.
    """

    model_config = ConfigDict(extra='forbid', strict=True)

    dataset: str
    splits: list[str]
    protocol: str
    names: str | None
    method: str
    model: str
    metric: str
    value: float
    source: str
    measured_with: str


@cache
def figures() -> tuple[Figure, ...]:
    rows = json.loads((Path(__file__).parent / 'papers.json').read_text(encoding='utf-8'))
    return tuple(map(Figure.model_validate, rows))


def published(dataset: str, split: str, protocol: str, names: str | None) -> list[Figure]:
    """The figures for a data set and a protocol, and for methods that are given the same names."""
    return [
        figure
        for figure in figures()
        if (figure.dataset, figure.protocol, figure.names) == (dataset, protocol, names) and split in figure.splits
    ]
