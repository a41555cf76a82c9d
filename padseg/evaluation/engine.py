"""An evaluation with its records on disk, from which a later one continues."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel

from padseg.datasets import Sample
from padseg.errors import OutputConflict
from padseg.evaluation.evaluate import Task, score_sample, score_stored, stamp_of
from padseg.evaluation.protocols import rules
from padseg.evaluation.scores import Name, PictureScores, Result, ScoreTotals, finite
from padseg.run.locks import exclusive
from padseg.run.records import differences
from padseg.system.files import atomic
from padseg.system.progress import Progress, Silent
from padseg.system.versions import versions
from padseg.version import __version__

if TYPE_CHECKING:
    from padseg.evaluation.predict import Predict

FAILED_SHOWN = 20


class Evaluation(NamedTuple):
    """What is evaluated. source: where predictions come from, in words; missing: listed pictures that are left out.

    out: folder for records and reports, or None; thresholds: those of the predictor, if it has several.
    """

    task: Task
    protocol: str
    source: dict[str, Any]
    predictor: Predict | None = None
    thresholds: tuple[float, ...] = ()
    missing: int = 0
    out: Path | None = None
    workers: int = 1
    overwrite: bool = False


class ScoresRecord(BaseModel):
    """scores.json. settings: all that decides the scores; counts: pictures scored, without a pixel that counts, failed, left out."""

    status: Literal['running', 'finished'] = 'running'
    padseg: str = __version__
    protocol: str
    settings: dict[str, Any]
    counts: dict[str, int] = {}
    scores: dict[str, float | None] = {}
    iou: dict[str, float | None] = {}
    sweep: dict[str, Any] | None = None
    failed: dict[Name, Name] = {}
    versions: dict[str, str]


class Outcome(NamedTuple):
    """How an evaluation went. report: as in scores.json; failed pictures in it are the first few."""

    result: Result
    report: ScoresRecord


def run_evaluation(job: Evaluation, progress: Progress = Silent()) -> Outcome:
    """Score all pictures of the job, those that its output holds already from there. OutputConflict if that is of other settings."""
    report = ScoresRecord(protocol=job.protocol, settings=settings(job), versions=versions())
    totals = ScoreTotals(job.task.classes, job.task.rules)
    failed: dict[str, str] = {}
    with exclusive(job.out, foreign='run.json') if job.out else contextlib.nullcontext(), contextlib.closing(progress):
        for picture in pictures(job, report, progress):
            totals.add(picture)
            if picture.status == 'failed' and len(failed) < FAILED_SHOWN:
                failed[picture.name] = picture.reason or ''
        report = finished(job, report, totals, failed)
        if job.out:
            from padseg.evaluation.reports import write_reports

            write_reports(job.out, report, job.task, partial(read_pictures, job.out / 'pictures.jsonl'))
            write(report, job.out / 'scores.json')
    return Outcome(totals.result(), report)


def settings(job: Evaluation) -> dict[str, Any]:
    """All that decides the scores, every rule in words."""
    dataset = job.task.dataset
    return {
        'dataset': dataset.name,
        'root': str(dataset.root.resolve()),
        'split': dataset.split,
        'layout': dataset.layout,
        'listed': len(dataset.samples) + job.missing,
        'classes': len(job.task.classes.names),
        'rules': rules(job.task.rules) if dataset.classes else PARTITIONS,
        'compare': job.task.rules.compare,
        'resize': job.task.resize,
        'predictions': job.source,
        'thresholds': list(job.thresholds),
    }


PARTITIONS = {
    'regions': 'partitions without classes: covering, PRI and VI are means over annotators, then over pictures',
    'boundaries': 'counts of boundary pixels are summed over annotators and pictures; tolerance 0.0075 of the diagonal',
}


def pictures(job: Evaluation, report: ScoresRecord, progress: Progress) -> Iterator[PictureScores]:
    """The records of all samples in their order: kept ones, and new ones, which are added to the output at once."""
    kept = earlier(job, report) if job.out else {}
    samples = job.task.dataset.samples
    pending = [sample for sample in samples if not holds(job, sample, kept.get(sample.name))]
    again = {sample.name for sample in pending}
    new = scored(job, pending)
    progress.start(len(pending))
    with contextlib.ExitStack() as stack:
        file = None
        if job.out:
            write(report, job.out / 'scores.json')
            write_pictures((kept[sample.name] for sample in samples if sample.name not in again), job.out / 'pictures.jsonl')
            file = stack.enter_context((job.out / 'pictures.jsonl').open('a', encoding='ascii'))
        for sample in samples:
            if sample.name not in again:
                yield kept[sample.name]
                continue
            picture = next(new)
            if file:
                file.write(line(picture))
                file.flush()
            progress.step()
            yield picture


def scored(job: Evaluation, samples: list[Sample]) -> Iterator[PictureScores]:
    if job.predictor:
        return (score_sample(job.task, sample, job.predictor) for sample in samples)
    return score_stored(job.task, samples, job.workers)


def holds(job: Evaluation, sample: Sample, record: PictureScores | None) -> bool:
    """Whether a record is of this very picture, ground truth and prediction."""
    if record is None or record.status == 'failed':
        return False
    return record.stamp == stamp_of(*sample.truths, sample.image if job.predictor else job.task.preds[sample.name])


def earlier(job: Evaluation, report: ScoresRecord) -> dict[str, PictureScores]:
    """The records of an earlier evaluation in the same folder."""
    assert job.out is not None
    path = job.out / 'scores.json'
    if job.overwrite or not path.exists():
        return {}
    try:
        there = ScoresRecord.model_validate(json.loads(path.read_bytes()))
    except ValueError as error:
        raise OutputConflict(f'{path} is no record of an evaluation: choose another --out, or --overwrite') from error
    different = differences(flattened(there.settings), flattened(json.loads(json.dumps(report.settings))))
    if different:
        raise OutputConflict(
            f'{job.out} holds an evaluation of other settings ({"; ".join(different)}): choose another --out, or --overwrite'
        )
    return {picture.name: picture for picture in read_pictures(job.out / 'pictures.jsonl')}


def flattened(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with those inside others among them: rules.void, predictions.layer."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        plain |= {f'{name}.{key}': one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return plain


def read_pictures(path: Path) -> Iterator[PictureScores]:
    """The records in pictures.jsonl; one that a killed run left torn does not count."""
    if path.exists():
        with path.open(encoding='ascii') as file:
            for text in file:
                with contextlib.suppress(ValueError):  # by way of json, which takes file names that are no UTF-8
                    yield PictureScores.model_validate(json.loads(text))


def write_pictures(records: Iterable[PictureScores], path: Path) -> None:
    with atomic(path) as temporary, temporary.open('w', encoding='ascii') as file:
        file.writelines(map(line, records))


def line(picture: PictureScores) -> str:
    """A picture's record as one line of ASCII."""
    return json.dumps(picture.model_dump(exclude_defaults=True)) + '\n'


def write(report: ScoresRecord, path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(report.model_dump(), indent=1) + '\n', encoding='ascii')


def finished(job: Evaluation, report: ScoresRecord, totals: ScoreTotals, failed: dict[str, str]) -> ScoresRecord:
    """The report with the scores of all pictures."""
    values = totals.result()._asdict()
    counts = {name: values.pop(name) for name in ('pictures', 'ignored', 'failed')}
    iou = values.pop('iou', {})
    return report.model_copy(
        update={
            'status': 'finished',
            'counts': {**counts, 'missing': job.missing},
            'scores': finite(values),
            'iou': finite(iou),
            'sweep': totals.sweep(job.thresholds) if len(job.thresholds) > 1 else None,
            'failed': failed,
        }
    )
