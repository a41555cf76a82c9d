"""Rows of a comparison: what was measured, what could not be, and published figures. Rows of one table are scored by the same rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from padseg.errors import UsageError
from padseg.evaluation.contenders import costs_of, mark_of

if TYPE_CHECKING:
    from padseg.evaluation.job import Ground
    from padseg.evaluation.papers import Figure
    from padseg.evaluation.scores import ScoresRecord

State = Literal['measured', 'published', 'not possible', 'failed']
PUBLISHED = 'published, not measured here'
SHARED = ('dataset', 'split', 'listed', 'rules', 'compare', 'resize', 'values')  # settings that all rows of a table have in common


class Shown(NamedTuple):
    """What a row is about. model: '' without one; stated: options that were given; classical: whether the method has no model."""

    protocol: str
    method: str
    model: str = ''
    stated: Mapping[str, Any] = {}
    classical: bool = False


class Row(NamedTuple):
    """A row. settings: options that differ from the defaults; mark: a hash of all settings; scores: shares, but VI in bits.

    seconds, processor, memory, gpu: what a picture takes, memory in bytes; None where not measured. folder: of the evaluation, in the
    output. reason: why there are no scores. source, measured_with: of a published figure. rules: what the rows of a table share.
    """

    shown: Shown
    state: State
    counts: Mapping[str, int] = {}
    scores: Mapping[str, float | None] = {}
    settings: Mapping[str, Any] = {}
    mark: str = ''
    device: str = ''
    seconds: float | None = None
    processor: float | None = None
    memory: int | None = None
    gpu: int | None = None
    folder: str = ''
    reason: str = ''
    source: str = ''
    measured_with: str = ''
    rules: Mapping[str, Any] = {}


def measured_row(shown: Shown, report: ScoresRecord, unusual: Mapping[str, Any], out: Path, names: Sequence[str]) -> Row:
    """The row of an evaluation in `out`. names: of its pictures."""
    made_by = report.settings['predictions']
    mark = mark_of(report.settings)
    costs = costs_of(out, mark, set(names))
    return Row(
        shown,
        'measured',
        report.counts,
        report.scores,
        unusual,
        mark,
        ' '.join(str(made_by[name]) for name in ('device', 'dtype') if name in made_by),
        *costs,
        folder=out.name,
        rules={name: report.settings.get(name) for name in SHARED} | {'names': made_by.get('names')},
    )


def missing_row(shown: Shown, state: State, reason: str) -> Row:
    """The row of what has no scores."""
    return Row(shown, state, settings=shown.stated, reason=reason)


def published_row(figure: Figure, ground: Ground) -> Row:
    """The row of a published figure. UsageError if it is for another data set or protocol than the ground truth."""
    if (figure.dataset, figure.protocol) != (ground.dataset.name, ground.protocol) or ground.dataset.split not in figure.splits:
        raise UsageError(
            f'a figure for {figure.dataset} by {figure.protocol} cannot stand beside those for {ground.dataset.name} by {ground.protocol}'
        )
    shown = Shown(figure.protocol, figure.method, figure.model)
    return Row(shown, 'published', scores={figure.metric: figure.value}, source=figure.source, measured_with=figure.measured_with)


def tables(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each protocol. UsageError if two rows of one protocol were not scored by the same rules on the same pictures."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        part = parts.setdefault(row.shown.protocol, [])
        first = next((other for other in part if other.state == 'measured'), row)
        different = [name for name in row.rules if row.state == 'measured' and row.rules[name] != first.rules[name]]
        if different:
            raise UsageError(
                f'{row.folder} and {first.folder} differ in {", ".join(different)}: figures of two protocols cannot stand in one column'
            )
        part.append(row)
    return parts


def measures(rows: Sequence[Row]) -> list[str]:
    """Names of the scores of a table's rows; published ones last."""
    return list(dict.fromkeys(name for state in ('measured', 'published') for row in rows if row.state == state for name in row.scores))
