"""Compare predictions with a data set's ground truth, one picture at a time; predictions are stored label maps or come from a model."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from padseg.datasets import VOID, Dataset, Sample, label_folder, picture_name
from padseg.datasets.base import some
from padseg.datasets.layouts import files_below
from padseg.errors import NoImages, ResourceExhausted, UnreadableLabels, UsageError
from padseg.evaluation.metrics import TooMany
from padseg.evaluation.protocols import (
    DEFAULT,
    Classes,
    Protocol,
    View,
    as_counted,
    class_counts,
    compared_view,
    nearest,
    protocol,
    scored_classes,
    seen,
    seen_prediction,
)
from padseg.evaluation.scores import PictureScores, Result, ScoreTotals, rows_of, score_classes, score_object, score_regions
from padseg.exports.png import read_label_map
from padseg.images import ImageError

if TYPE_CHECKING:
    from padseg.evaluation.predict import Predict
    from padseg.types import Array, Image

CHUNK = 8  # pictures sent to a worker at once


class Task(NamedTuple):
    """What is scored. preds: stored label maps by picture name; resize: bring those of another size to the ground truth's.

    lenient: a picture whose files do not fit together fails alone, instead of ending the evaluation. beside: rules for unlabelled pixels by
    which every prediction is scored, too.
    """

    dataset: Dataset
    rules: Protocol
    preds: Mapping[str, Path] = {}
    resize: bool = False
    lenient: bool = False
    beside: tuple[str, ...] = ()

    @property
    def classes(self) -> Classes:
        return scored_classes(self.dataset.classes, self.dataset.background, self.rules)


def evaluate(
    pred: str | Path,
    labels: str | Path,
    num_classes: int | None = None,
    ignore: int | None = 255,
    background: int | None = None,
    rules: Protocol | None = None,
    resize: bool = False,
    allow_missing: bool = False,
) -> Result:
    """Score the label maps below `pred` against those below `labels`; without `num_classes`, as partitions without classes.

    A label map a.jpg.png or a.png belongs to the truth a.png; for partitions also to a_0.png, a_1.png, … of several annotators.
    rules: a protocol of `padseg.evaluation.protocols`; by default the whole picture is compared and the rest is as in Seg4Diff's paper.
    background: the class that protocols treat as background. Pictures that cannot be read are counted as failed and left out.
    Raises NoImages if a picture has no partner, UsageError for a prediction of another size (unless `resize`) and for ground truth
    outside 0..num_classes-1 other than `ignore`; with `allow_missing` such pictures are left out, or count as failed.
    """
    rules = rules or protocol(DEFAULT, compare='native')
    preds = stored(Path(pred))
    dataset = label_folder(Path(labels), num_classes, ignore, background, pictures=preds)
    dataset, preds = paired(dataset, preds, allow_missing)
    task = Task(dataset, rules, preds, resize, lenient=allow_missing)
    totals = ScoreTotals(task.classes, rules)
    for picture in score_stored(task, dataset.samples):
        totals.add(picture)
    return totals.result()


def score_stored(task: Task, samples: Iterable[Sample], workers: int = 1) -> Iterator[PictureScores]:
    """Yield the records of pictures with stored label maps, in order, using one or several processes."""
    if workers == 1:
        yield from (score_sample(task, sample) for sample in samples)
        return
    # spawned processes stay small: they do not inherit torch from this one
    context = multiprocessing.get_context('spawn')
    light = task._replace(dataset=task.dataset._replace(samples=()), preds={})
    pairs = [(sample, {sample.name: task.preds[sample.name]}) for sample in samples]
    with ProcessPoolExecutor(workers, context) as pool:
        try:
            yield from pool.map(partial(score_pair, light), pairs, chunksize=CHUNK)
        except BrokenProcessPool as error:
            raise ResourceExhausted('a worker process was killed, most likely because memory ran out: try fewer --workers') from error


def score_pair(task: Task, pair: tuple[Sample, dict[str, Path]]) -> PictureScores:
    sample, preds = pair
    return score_sample(task._replace(preds=preds), sample)


def score_sample(task: Task, sample: Sample, predictor: Predict | None = None) -> PictureScores:
    """Score one picture, from its stored label map or the predictor; if a file cannot be read, the record says that it failed."""
    stamp = stamp_of(*sample.truths, sample.image if predictor else task.preds[sample.name])
    unfit = (UsageError,) if task.lenient else ()
    try:
        truths = task.dataset.read(sample)  # (H, W) each
        size = size_of(sample, truths)
        alone = shown_classes(task, sample, truths) if task.rules.pictures == 'one class' else None
        if alone is not None and len(alone) != 1:
            return PictureScores(name=sample.name, stamp=stamp, status='ignored')
        source = read_picture(task.dataset, sample, size) if predictor else stored_map(task, sample, size)
        shown = (alone or present(task, sample, truths)) if predictor else []
    except (ImageError, UnreadableLabels, OSError, MemoryError, *unfit) as error:
        return failed(sample, stamp, error)
    where = compared_view(size, task.rules.compare)
    try:
        preds = predictor(sample.name, source, where, shown) if predictor else [seen_prediction(source, where)]
    except (ImageError, MemoryError) as error:
        return failed(sample, stamp, error)
    try:
        record = scored(task, sample, preds, truths, where)
    except (TooMany, MemoryError, *unfit) as error:
        return failed(sample, stamp, error)
    return record.model_copy(update={'stamp': stamp})


def scored(task: Task, sample: Sample, preds: Sequence[Array], truths: Sequence[Array], where: View) -> PictureScores:
    """The scores of predictions (h, w) at the compared pixels against ground truths (H, W)."""
    if not task.dataset.classes:
        return score_regions(sample.name, preds, [seen(truth, where) for truth in truths])
    truth = seen(classes_of(task, sample, truths[0]), where)
    if task.rules.counted == 'object':
        truth, pred = (as_counted(labels, task.dataset.background, task.rules) for labels in (truth, preds[0]))
        return score_object(sample.name, pred, truth, preds[1] if len(preds) > 1 else None, task.rules)
    record = score_classes(sample.name, preds[0], truth, task.classes, task.rules)
    if not task.beside and len(preds) == 1:
        return record
    rules = [dataclasses.replace(task.rules, void=void) for void in task.beside or (task.rules.void,)]
    tried = tuple(rows_of(class_counts(pred, truth, task.classes, by)) for by in rules for pred in preds)
    return record.model_copy(update={'tried': tried})


def failed(sample: Sample, stamp: str, error: Exception) -> PictureScores:
    """The record of a picture that could not be scored."""
    reason = 'not enough memory' if isinstance(error, MemoryError) else str(error)
    return PictureScores(name=sample.name, stamp=stamp, status='failed', reason=reason)


def present(task: Task, sample: Sample, truths: Sequence[Array]) -> list[int]:
    """Classes left in the ground truth at a short edge of 640 pixels, which is how Seg4Diff's released code sees it."""
    if not task.dataset.classes:
        return []
    classes = classes_of(task, sample, truths[0])
    reduced = seen(classes, compared_view(classes.shape, 'short-640'))
    return [number for number in np.unique(reduced).tolist() if number >= 0]


def shown_classes(task: Task, sample: Sample, truths: Sequence[Array]) -> list[int]:
    """Classes in the ground truth beside background."""
    every = np.unique(classes_of(task, sample, truths[0])).tolist()
    return [number for number in every if number not in (VOID, task.dataset.background)]


def classes_of(task: Task, sample: Sample, raw: Array) -> Array:
    """Map raw values to classes and VOID. UsageError names the file if it has undeclared values."""
    try:
        return task.dataset.to_classes(raw)
    except UsageError as error:
        raise UsageError(f'{sample.truths[0]}: {error}') from error


def stamp_of(*paths: Path | None) -> str:
    """Sizes and modification times of files; a changed stamp means that they must be read again."""
    marks = []
    for path in paths:
        try:
            status = path.stat() if path else None
        except OSError:
            status = None
        marks.append(f'{status.st_size}:{status.st_mtime_ns}' if status else '-')
    return ' '.join(marks)


def read_picture(dataset: Dataset, sample: Sample, size: tuple[int, int]) -> Image:
    """Read the sample's picture (H, W, 3). UsageError if the ground truth has another size."""
    if sample.image is None:
        raise UsageError(f'there is no picture for {sample.name}: give label maps with --pred')
    image = dataset.picture(sample)
    if image.shape[:2] != size:
        raise UsageError(
            f'{sample.image} is {size_in_words(image.shape)}, but its ground truth {sample.truths[0]} is {size_in_words(size)}'
        )
    return image


def size_of(sample: Sample, truths: Sequence[Array]) -> tuple[int, int]:
    """Height and width of a picture's ground truths. UsageError if they differ."""
    first, *others = (truth.shape for truth in truths)
    for other in others:
        if other != first:
            raise UsageError(f'the ground truths of {sample.name} differ in size: {size_in_words(first)} and {size_in_words(other)}')
    return first


def stored_map(task: Task, sample: Sample, size: tuple[int, int]) -> Array:
    path = task.preds[sample.name]
    return fitting(read_label_map(path), size, path, task.resize)


def fitting(pred: Array, size: tuple[int, int], path: Path, resize: bool) -> Array:
    """Return a prediction at the ground truth's size (H, W). UsageError if it has another size and must not be resized."""
    if pred.shape == size:
        return pred
    if not resize:
        raise UsageError(f'{path} is {size_in_words(pred.shape)}, but its ground truth is {size_in_words(size)}: use --resize')
    return pred[nearest(pred.shape[0], size[0])[:, None], nearest(pred.shape[1], size[1])]


def size_in_words(size: tuple[int, ...]) -> str:
    return f'{size[1]} x {size[0]} (width x height)'


def stored(folder: Path) -> dict[str, Path]:
    """Label maps below a folder by picture name: b/a.jpg.png and b/a.png are b/a. NoImages if there are none, or two for one name."""
    preds: dict[str, Path] = {}
    for _, path in files_below(folder, ('.png',)) if folder.is_dir() else ():
        name = picture_name(path.relative_to(folder))
        if name in preds:
            raise NoImages(f'two label maps for {name}: {preds[name]} and {path}')
        preds[name] = path
    if not preds:
        raise NoImages(f'there are no PNG files in {folder}')
    return preds


def paired(dataset: Dataset, preds: dict[str, Path], allow_missing: bool) -> tuple[Dataset, dict[str, Path]]:
    """Keep the samples with a label map and the label maps with a sample. NoImages names the others unless they may be missing."""
    names = {sample.name for sample in dataset.samples}
    if not allow_missing:
        require_none('no label map for', names - preds.keys())
        require_none('no ground truth for', preds.keys() - names)
    samples = tuple(sample for sample in dataset.samples if sample.name in preds)
    if not samples:
        raise NoImages(
            f'no label map has the name of a ground truth in {dataset.root}: '
            f'label maps {some(sorted(preds))}, ground truths {some(sorted(names))}'
        )
    return dataset._replace(samples=samples), {sample.name: preds[sample.name] for sample in samples}


def require_none(what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        raise NoImages(f'{what} {some(names)}: --allow-missing scores the others')
