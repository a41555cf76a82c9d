"""`padseg eval`: score label maps against ground truth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import click

if TYPE_CHECKING:
    from padseg.evaluate import Scores


@click.command('eval')
@click.option('--pred', type=click.Path(path_type=Path), required=True, help='folder of label maps, such as OUT/labels of `padseg run`')
@click.option('--labels', type=click.Path(path_type=Path), required=True, help='folder of ground truth with the same names')
@click.option('--num-classes', type=click.IntRange(min=1), help='classes of the ground truth; regions are matched to them per picture')
@click.option('--ignore', type=int, default=255, show_default=True, help='class of pixels that do not count')
@click.option('--regions', is_flag=True, help='the ground truth has no classes: compare partitions')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object')
def command(pred: Path, labels: Path, num_classes: int | None, ignore: int, regions: bool, as_json: bool) -> int:
    """Score a folder of label maps against ground truth.

    A label map a.jpg.png or a.png belongs to the ground truth a.png; with --regions also to a_0.png, a_1.png, … of several
    annotators, whose scores are averaged.
    """
    if regions == (num_classes is not None):
        raise click.UsageError('Give either --num-classes or --regions.')

    from padseg.evaluate import evaluate

    scores = evaluate(pred, labels, num_classes, ignore)
    print(json.dumps(finite(scores)) if as_json else table(scores))
    return 0


def finite(scores: Scores) -> dict[str, Any]:
    """The scores with None in place of nan, which JSON does not have."""

    def value(number: float) -> float | None:
        return None if math.isnan(number) else number

    return {name: [value(one) for one in score] if isinstance(score, tuple) else value(score) for name, score in scores._asdict().items()}


def table(scores: Scores) -> str:
    """One measure a line; a list with one line a class."""
    rows: list[tuple[str, float]] = []
    for name, score in scores._asdict().items():
        rows += [(f'{name} {number}', one) for number, one in enumerate(score)] if isinstance(score, tuple) else [(name, score)]
    return '\n'.join(f'{name:14} {score:{"d" if isinstance(score, int) else ".4f"}}' for name, score in rows)
