"""A folder of label maps against a folder of ground truth, one picture at a time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Iterator
from pathlib import Path
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from typing import NamedTuple

import numpy as np

from padseg.errors import NoImages
from padseg.errors import UsageError
from padseg.exports.png import read_label_map
from padseg.images import SUFFIXES
from padseg.metrics import RegionScores
from padseg.metrics import hungarian_counts
from padseg.metrics import region_scores

if TYPE_CHECKING:
    from padseg.types import Array

NAMES_SHOWN = 5


class ClassScores(NamedTuple):
    """Matching per picture, counts summed over the set. iou: one a class, nan where the class is neither true nor predicted."""

    images: int
    accuracy: float
    mean_accuracy: float
    miou: float
    iou: tuple[float, ...]


class RegionMeans(NamedTuple):
    """Means over a picture's annotators, then over pictures. vi is in bits; regions: predicted ones a picture."""

    images: int
    covering: float
    pri: float
    vi: float
    regions: float


Scores = ClassScores | RegionMeans


class Pair(NamedTuple):
    """A predicted label map and the ground truth of its annotators."""

    pred: Path
    truths: tuple[Path, ...]


def evaluate(pred: str | Path, labels: str | Path, num_classes: int | None = None, ignore: int | None = 255) -> Scores:
    """Score the label maps below `pred` against those below `labels`; without `num_classes`, as partitions without classes.

    A label map a.jpg.png or a.png belongs to the truth a.png; for partitions also to a_0.png, a_1.png, … of several annotators.
    Raises NoImages if a picture has no partner or another size, UsageError for a class outside 0..num_classes-1 other than `ignore`.
    """
    if num_classes is not None and num_classes < 1:
        raise UsageError(f'the number of classes is at least 1; got {num_classes}')
    matched = pairs(Path(pred), Path(labels), annotators=num_classes is None)
    if num_classes is None:
        return mean_region_scores(matched)
    return class_scores(matched, num_classes, ignore)


def class_scores(matched: list[Pair], num_classes: int, ignore: int | None) -> ClassScores:
    """Pixel accuracy and IoU after matching each picture's regions to classes."""
    true_positive, false_positive, false_negative = np.zeros((3, num_classes), np.int64)
    for pair in matched:
        [(truth, pred)] = label_maps(pair)
        if ignore is not None:
            truth = np.where(truth == ignore, -1, truth)
        if truth.max() >= num_classes:
            raise UsageError(f'{pair.truths[0]} holds class {truth.max()}; allowed: 0..{num_classes - 1}, and {ignore} to ignore')
        counts = hungarian_counts(pred, truth, num_classes)
        true_positive += counts.true_positive
        false_positive += counts.false_positive
        false_negative += counts.false_negative
    iou = ratio(true_positive, true_positive + false_positive + false_negative)
    recall = ratio(true_positive, true_positive + false_negative)
    accuracy = ratio(true_positive.sum(), (true_positive + false_negative).sum())
    return ClassScores(len(matched), float(accuracy), mean(recall), mean(iou), tuple(iou.tolist()))


def mean_region_scores(matched: list[Pair]) -> RegionMeans:
    """Covering, probabilistic Rand index and variation of information, each annotator of a picture weighing the same."""
    scores = [np.mean([region_scores(truth, pred) for truth, pred in label_maps(pair)], axis=0) for pair in matched]
    means = RegionScores(*np.mean(scores, axis=0).tolist())
    return RegionMeans(len(matched), *means)


def ratio(part: Array, whole: Array) -> Array:
    """part / whole, nan where both are 0."""
    with np.errstate(invalid='ignore'):
        return np.true_divide(part, whole)


def mean(values: Array) -> float:
    """The mean of those that are not nan; nan if there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float('nan')


def label_maps(pair: Pair) -> Iterator[tuple[Array, Array]]:
    """(truth, prediction) for every annotator, both (H, W) int32; NoImages if their sizes differ."""
    pred = read_label_map(pair.pred)
    for path in pair.truths:
        truth = read_label_map(path)
        if truth.shape != pred.shape:
            raise NoImages(f'{path} and {pair.pred} differ in size: {truth.shape} and {pred.shape} (height, width)')
        yield truth, pred


def pairs(pred: Path, labels: Path, annotators: bool) -> list[Pair]:
    """Predictions with their ground truth, sorted by name; NoImages names those without a partner."""
    preds: dict[str, Path] = {}
    for path in png_files(pred):
        name = picture_name(path.relative_to(pred))
        if name in preds:
            raise NoImages(f'two label maps for {name}: {preds[name]} and {path}')
        preds[name] = path
    truths = defaultdict(list)
    for path in png_files(labels):
        name = path.relative_to(labels).with_suffix('').as_posix()
        truths[re.sub(r'_\d+$', '', name) if annotators and name not in preds else name].append(path)
    require_none('no label map for', truths.keys() - preds.keys(), pred)
    require_none('no ground truth for', preds.keys() - truths.keys(), labels)
    return [Pair(preds[name], tuple(truths[name])) for name in sorted(preds)]


def png_files(folder: Path) -> list[Path]:
    """The PNG files in a folder and below, sorted; NoImages if there is none."""
    paths = sorted(path for path in folder.rglob('*.png') if path.is_file() and path.name[0] != '.')
    if not paths:
        raise NoImages(f'there are no PNG files in {folder}')
    return paths


def picture_name(path: PurePosixPath | Path) -> str:
    """The name without `.png` and, if that leaves one, without the picture's own suffix: a/b.jpg.png is a/b."""
    path = path.with_suffix('')
    return (path.with_suffix('') if path.suffix.lower() in SUFFIXES else path).as_posix()


def require_none(words: str, names: Iterable[str], folder: Path) -> None:
    listed = sorted(names)
    if listed:
        more = f' and {len(listed) - NAMES_SHOWN} more' if len(listed) > NAMES_SHOWN else ''
        raise NoImages(f'{words} {", ".join(listed[:NAMES_SHOWN])}{more} in {folder}')
