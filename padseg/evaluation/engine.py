"""Run an evaluation with records on disk, from which a later run continues."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from padseg.datasets import FOLDER, VOID, Dataset, Sample
from padseg.errors import OutputConflict
from padseg.evaluation.evaluate import score_sample, score_stored, stamp_of
from padseg.evaluation.job import Evaluation
from padseg.evaluation.protocols import rules
from padseg.evaluation.scores import PictureScores, Result, ScoresRecord, ScoreTotals, finite
from padseg.system.files import inside
from padseg.system.ledger import (
    continued,
    line,
    owned,
    read_header,
    read_line,
    read_lines,
    refuse_other_settings,
    write_header,
    write_lines,
)
from padseg.system.progress import Progress, Silent
from padseg.system.versions import versions

FAILED_SHOWN = 20


class Outcome(NamedTuple):
    """The result of an evaluation. report: as in scores.json; it lists only the first few failed pictures."""

    result: Result
    report: ScoresRecord


def run_evaluation(job: Evaluation, progress: Progress = Silent()) -> Outcome:
    """Score all pictures of the job, reusing scores already in its output. OutputConflict if those were made with other settings."""
    report = ScoresRecord(protocol=job.protocol, settings=settings(job), versions=versions())
    totals = ScoreTotals(job.task.classes, job.task.rules)
    failed: dict[str, str] = {}
    with (
        output(job.out, ('labels', 'maps') if job.predictor else ()) if job.out else contextlib.nullcontext(),
        contextlib.closing(progress),
    ):
        for picture in pictures(job, report, progress):
            totals.add(picture)
            if picture.status == 'failed' and len(failed) < FAILED_SHOWN:
                failed[picture.name] = picture.reason or ''
        report = finished(job, report, totals, failed)
        if job.out:
            from padseg.evaluation.reports import write_reports

            write_reports(job.out, report, job.task, partial(read_lines, job.out / 'pictures.jsonl', PictureScores))
            write_header(report, job.out / 'scores.json')
    return Outcome(totals.result(), report)


@contextlib.contextmanager
def output(out: Path, written: Sequence[str]) -> Iterator[None]:
    """Own the output folder. OutputConflict for what lies in its way there, or if it must not be written to; else as `owned`.

    written: folders below it to which the predictor writes.
    """
    try:
        with owned(out, 'run.json'):
            for name in ('scores.json', 'pictures.jsonl'):
                if (out / name).exists() and not (out / name).is_file():
                    raise OutputConflict(f'{out / name} is not a file: choose another --out')  # opening a pipe would block
            for name in written:
                inside(out, name)
            yield
    except OSError as error:
        raise OutputConflict(f'cannot write to {out}: {error}') from error


def settings(job: Evaluation) -> dict[str, Any]:
    """All settings that affect the scores, with every rule in words."""
    dataset = job.task.dataset
    own = values_of(dataset)
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
        **({} if own == USUAL else {'values': own}),
    }


USUAL = {'first': 0, 'ignored': [255], 'background': None}


def values_of(dataset: Dataset) -> dict[str, Any]:
    """What the values in the files of one's own folder mean: that of the first class, those that do not count; and the background."""
    if dataset.name != FOLDER or dataset.table is None:
        return USUAL
    ignored = [value for value, number in enumerate(dataset.table) if number == VOID]
    return {'first': dataset.table.index(0) if 0 in dataset.table else None, 'ignored': ignored, 'background': dataset.background}


PARTITIONS = {
    'regions': 'partitions without classes: covering, PRI and VI are means over annotators, then over pictures',
    'boundaries': 'counts of boundary pixels are summed over annotators and pictures; tolerance 0.0075 of the diagonal',
}


def pictures(job: Evaluation, report: ScoresRecord, progress: Progress) -> Iterator[PictureScores]:
    """Yield the records of all samples in order: stored ones, and new ones, which are written to the output at once."""
    kept = kept_lines(job, report) if job.out else {}
    pending = [sample for sample in job.task.dataset.samples if sample.name not in kept]
    new = scored(job, pending)
    progress.start(len(pending))
    with written(job, report, kept) as add:
        for sample in job.task.dataset.samples:
            if sample.name in kept:
                yield read_line(kept[sample.name], PictureScores)
                continue
            picture = next(new)
            add(line_of(picture))
            progress.step()
            yield picture


@contextlib.contextmanager
def written(job: Evaluation, report: ScoresRecord, kept: dict[str, str]) -> Iterator[Callable[[str], None]]:
    """Start the output's records, if there is an output, with the lines to keep; yields a function that adds lines."""
    if job.out is None:
        yield lambda text: None
        return
    if not kept:
        write_lines((), job.out / 'pictures.jsonl')  # before the settings: scores by other ones must never stand under these
    write_header(report, job.out / 'scores.json')
    lines = (kept[sample.name] for sample in job.task.dataset.samples if sample.name in kept)
    with continued(lines, job.out / 'pictures.jsonl') as add:
        yield add


def scored(job: Evaluation, samples: list[Sample]) -> Iterator[PictureScores]:
    if job.predictor:
        return (score_sample(job.task, sample, job.predictor) for sample in samples)
    return score_stored(job.task, samples, job.workers)


def kept_lines(job: Evaluation, report: ScoresRecord) -> dict[str, str]:
    """Lines of an earlier evaluation in the same folder that are still valid, by picture name. Lines take less memory than records.

    Raises OutputConflict if that evaluation used other settings.
    """
    assert job.out is not None
    earlier = None if job.overwrite else read_header(job.out / 'scores.json', ScoresRecord, 'an evaluation')
    if earlier is None:
        return {}
    now, then = report.settings, earlier.settings
    unsaid = {name: now[name] for name in ('values',) if name in now and name not in then}  # by padseg before it was recorded
    refuse_other_settings(job.out, {**unsaid, **then}, now, 'an evaluation')
    if unsaid:
        return {}
    samples = {sample.name: sample for sample in job.task.dataset.samples}
    kept: dict[str, str] = {}
    for picture in read_lines(job.out / 'pictures.jsonl', PictureScores):
        if picture.name in samples and holds(job, samples[picture.name], picture):
            kept[picture.name] = line_of(picture)
        else:
            kept.pop(picture.name, None)  # drop an older line of it, too
    return kept


def holds(job: Evaluation, sample: Sample, picture: PictureScores) -> bool:
    """Return whether a record still matches the picture's files, the number of classes and the number of thresholds."""
    classes = len(job.task.classes.names)
    thresholds = 0 if classes else max(1, len(job.thresholds))
    tried = (1 + len(job.thresholds)) * max(1, len(job.task.beside)) if classes and (job.thresholds or job.task.beside) else 0
    if picture.status == 'done' and len(picture.tried) != tried:
        return False
    if picture.status == 'failed' or any(not 0 <= number < classes for number in picture.counts) or len(picture.regions) != thresholds:
        return False
    return picture.stamp == stamp_of(*sample.truths, sample.image if job.predictor else job.task.preds[sample.name])


def line_of(picture: PictureScores) -> str:
    """Format a picture's record as a line of pictures.jsonl."""
    return line(picture, exclude_defaults=True)


def sweep_of(job: Evaluation, totals: ScoreTotals) -> dict[str, Any] | None:
    """Scores at several thresholds, and of GoCA by several rules."""
    if job.task.dataset.classes:
        own = job.source.get('tau', 0.0)
        voids = job.task.beside or (job.task.rules.void,)
        return totals.variants_scored((own, *job.thresholds), voids, len(job.task.dataset.classes))
    return totals.sweep(job.thresholds) if len(job.thresholds) > 1 else None


def finished(job: Evaluation, report: ScoresRecord, totals: ScoreTotals, failed: dict[str, str]) -> ScoresRecord:
    """Complete the report with the scores of all pictures."""
    values = totals.result()._asdict()
    counts = {name: values.pop(name) for name in ('pictures', 'ignored', 'failed')}
    iou = values.pop('iou', {})
    return report.model_copy(
        update={
            'status': 'finished',
            'counts': {**counts, 'missing': job.missing},
            'scores': finite(values),
            'iou': finite(iou),
            'sweep': sweep_of(job, totals),
            'failed': failed,
        }
    )
