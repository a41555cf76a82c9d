"""Scores of pictures as records, and their totals over a data set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, field_validator

from padseg.evaluation.binary_maps import picture_precision, released_miou
from padseg.evaluation.boundaries import BoundaryCounts, boundary_counts, boundary_sweep, precision_recall_f, score_sweep, total_counts
from padseg.evaluation.metrics import ClassCounts, class_scores, count_ids, region_scores
from padseg.evaluation.protocols import OBJECT, Classes, Protocol, class_counts
from padseg.system.ledger import Name
from padseg.version import __version__

if TYPE_CHECKING:
    from padseg.types import Array


Count = Annotated[int, Field(ge=0, le=1 << 53)]  # more cannot be added up, and is no picture's
Share = Annotated[float, Field(allow_inf_nan=False)]


class Regions(BaseModel):
    """Scores of a partition: means over the picture's annotators, except for `boundary`, which has the counts of BoundaryCounts."""

    covering: Share
    pri: Share
    vi: Share
    boundary: BoundaryCounts

    @field_validator('boundary')
    @classmethod
    def counts(cls, counts: BoundaryCounts) -> BoundaryCounts:
        if min(counts) < 0 or max(counts) > 1 << 53:
            raise ValueError('counts of pixels are expected')
        return counts


class PictureScores(BaseModel):
    """One picture's scores. stamp: state of its files, so that a later run knows whether they changed.

    counts: true positives, false positives, false negatives and spilled pixels of each class that has any; regions: one per threshold,
    without classes. tried: counts of every threshold and every rule for unlabelled pixels, if there are several. precision: average
    precision of an object's map.
    """

    name: Name
    stamp: str = ''
    status: Literal['done', 'ignored', 'failed'] = 'done'
    reason: Name | None = None
    pixels: Count = 0
    found: Count = 0  # regions predicted
    counts: dict[int, tuple[Count, Count, Count, Count]] = {}
    accuracy: float | None = None
    miou: float | None = None
    regions: tuple[Regions, ...] = ()
    tried: tuple[dict[int, tuple[Count, Count, Count, Count]], ...] = ()
    precision: Annotated[float, Field(ge=0, le=1)] | None = None

    @field_validator('name', 'stamp', 'reason')
    @classmethod
    def is_text(cls, text: Any) -> Any:
        if not isinstance(text, (str, NoneType)):
            raise ValueError('text is expected')
        return text


class ScoresRecord(BaseModel):
    """scores.json. settings: all that affect the scores; counts: pictures scored, without a pixel that counts, failed, left out."""

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


class ClassResult(NamedTuple):
    """Scores of a data set with classes, shares in 0..1. pictures: those scored; ignored: those without a pixel that counts.

    iou: by class name, nan for classes that do not count.
    """

    pictures: int
    ignored: int
    failed: int
    accuracy: float
    mean_accuracy: float
    miou: float
    miou_order_free: float
    iou: dict[str, float]


class RegionResult(NamedTuple):
    """Scores of partitions: means over each picture's annotators, then over pictures; vi in bits; regions: predicted per picture.

    precision, recall, f: of boundaries, from counts summed over pictures.
    """

    pictures: int
    ignored: int
    failed: int
    covering: float
    pri: float
    vi: float
    precision: float
    recall: float
    f: float
    regions: float


class ObjectResult(NamedTuple):
    """Scores of one object in each picture, shares in 0..1. miou: the mean of the IoU of object and background.

    acc_by_2_minus_acc: accuracy / (2 - accuracy), which ConceptAttention's released code calls mean IoU. mean_average_precision: over
    pictures, nan without maps.
    """

    pictures: int
    ignored: int
    failed: int
    accuracy: float
    miou: float
    acc_by_2_minus_acc: float
    mean_average_precision: float
    iou: dict[str, float]


Result = ClassResult | RegionResult | ObjectResult


def score_classes(name: str, pred: Array, truth: Array, classes: Classes, rules: Protocol) -> PictureScores:
    """Score one picture with classes: prediction and ground truth (H, W) at the compared pixels."""
    counts = class_counts(pred, truth, classes, rules)
    if not counts.total:
        return PictureScores(name=name, status='ignored', found=count_ids(pred))
    scores = class_scores(counts, rules.absent)
    return PictureScores(
        name=name,
        pixels=counts.total,
        found=count_ids(pred),
        counts=rows_of(counts),
        accuracy=scores.accuracy,
        miou=scores.miou,
    )


def score_object(name: str, pred: Array, truth: Array, values: Array | None, rules: Protocol) -> PictureScores:
    """Score object and background of one picture: prediction, ground truth and the map of the object, if there is one, (h, w) each."""
    record = score_classes(name, pred, truth, OBJECT, rules)
    if record.status != 'done' or values is None:
        return record
    return record.model_copy(update={'precision': picture_precision(values, truth == OBJECT.names.index('object'))})


def rows_of(counts: ClassCounts) -> dict[int, tuple[int, int, int, int]]:
    """The counts of each class that has any."""
    rows = np.stack(counts[:4], 1)  # (classes, 4)
    some = np.flatnonzero(rows.any(1))
    return dict(zip(some.tolist(), map(tuple, rows[some].tolist()), strict=True))


def counts_from(rows: Mapping[int, tuple[int, int, int, int]], classes: int) -> ClassCounts:
    """Undo `rows_of`. The pixels are those of the true classes."""
    table = np.zeros((classes, 4), np.int64)
    table[list(rows)] = list(rows.values())
    return ClassCounts(table[:, 0], table[:, 1], table[:, 2], table[:, 3], int(table[:, [0, 2]].sum()))


def score_regions(name: str, preds: Sequence[Array], truths: Sequence[Array]) -> PictureScores:
    """Score one picture without classes: one prediction per threshold, and each annotator's ground truth, all (H, W)."""
    rows = []
    for pred in preds:
        covering, pri, vi, _ = np.mean([region_scores(truth, pred) for truth in truths], axis=0).tolist()
        rows.append(Regions(covering=covering, pri=pri, vi=vi, boundary=boundary_counts(pred, truths)))
    return PictureScores(name=name, pixels=preds[0].size, found=count_ids(preds[0]), regions=tuple(rows))


class ScoreTotals:
    """Totals over pictures; the pictures themselves are not kept."""

    def __init__(self, classes: Classes, rules: Protocol) -> None:
        self.classes = classes
        self.rules = rules
        self.counts = ClassCounts.none(len(classes.names))
        self.variants: list[ClassCounts] = []  # of `tried`, summed
        self.tried: list[list[Regions]] = []  # for each picture without classes, one per threshold
        self.precisions = 0.0
        self.rated = 0  # pictures with a precision
        self.found = 0
        self.number = {'done': 0, 'ignored': 0, 'failed': 0}

    def add(self, picture: PictureScores) -> None:
        self.number[picture.status] += 1
        if picture.status != 'done':
            return
        self.found += picture.found
        if picture.precision is not None:
            self.precisions += picture.precision
            self.rated += 1
        if picture.regions:
            self.tried.append(list(picture.regions))
        if picture.counts:
            rows = np.zeros((len(self.classes.names), 4), np.int64)
            rows[list(picture.counts)] = list(picture.counts.values())
            self.counts = self.counts.plus(ClassCounts(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3], picture.pixels))
        if picture.tried:
            counts = [counts_from(rows, len(self.classes.names)) for rows in picture.tried]
            self.variants = [one.plus(other) for one, other in zip(self.variants, counts, strict=True)] if self.variants else counts

    def result(self) -> Result:
        """Scores over all pictures so far, at the first threshold if there are several."""
        numbers = self.number['done'], self.number['ignored'], self.number['failed']
        if self.classes.names:
            scores = class_scores(self.counts, self.rules.absent)
            if self.rules.counted == 'object':
                mean = self.precisions / self.rated if self.rated else float('nan')
                iou = dict(zip(self.classes.names, scores.iou, strict=True))
                return ObjectResult(*numbers, scores.accuracy, scores.miou, released_miou(scores.accuracy), mean, iou)
            return ClassResult(*numbers, *scores[:4], dict(zip(self.classes.names, scores.iou, strict=True)))
        first = [rows[0] for rows in self.tried]
        covering, pri, vi = np.mean([(row.covering, row.pri, row.vi) for row in first], axis=0).tolist() if first else [float('nan')] * 3
        boundary = total_counts([row.boundary for row in first]) if first else BoundaryCounts(0, 0, 0, 0)
        return RegionResult(*numbers, covering, pri, vi, *precision_recall_f(boundary), self.found / max(1, numbers[0]))

    def variants_scored(self, thresholds: Sequence[float], voids: Sequence[str], named: int) -> dict[str, Any] | None:
        """Scores at each threshold by each rule for unlabelled pixels, and where mIoU is highest by each.

        thresholds: the method's own first. named: the number of the data set's own classes; only these count if unlabelled pixels do not.
        """
        if not self.variants:
            return None
        settings = [(void, threshold) for void in voids for threshold in thresholds]
        rows: list[dict[str, Any]] = []
        for (void, threshold), counts in zip(settings, self.variants, strict=True):
            count = named if void == 'ignored' else len(self.classes.names)
            scores = class_scores(counts.first(count), self.rules.absent)
            rows.append({'threshold': threshold, 'void': void, 'accuracy': scores.accuracy, 'miou': scores.miou})
        best = {void: max((row for row in rows if row['void'] == void), key=lambda row: row['miou']) for void in voids}
        return {'rows': rows, 'best': best}

    def sweep(self, thresholds: Sequence[float]) -> dict[str, Any]:
        """Scores at each threshold, at the best one for the data set (ODS), and at each picture's best one (OIS)."""
        boundary = [[row.boundary for row in rows] for rows in self.tried]  # pictures, thresholds
        means = np.array([[(row.covering, row.pri, -row.vi) for row in rows] for rows in self.tried])  # pictures, thresholds, 3
        if not boundary:
            return {}
        of_f = boundary_sweep(boundary)
        covering, pri, vi = (score_sweep(means[..., number]) for number in range(3))
        rows = []
        for number, threshold in enumerate(thresholds):
            scores = precision_recall_f(total_counts([picture[number] for picture in boundary]))
            mean = means[:, number].mean(0).tolist()
            rows.append({'threshold': threshold, 'covering': mean[0], 'pri': mean[1], 'vi': -mean[2], **scores._asdict()})
        return {
            'rows': rows,
            'ods': {'f': of_f.ods.f, 'covering': covering.ods, 'pri': pri.ods, 'vi': -vi.ods, 'threshold': thresholds[of_f.best]},
            'ois': {'f': of_f.ois.f, 'covering': covering.ois, 'pri': pri.ois, 'vi': -vi.ois},
        }


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Replace nan, which JSON does not have, by None."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}
