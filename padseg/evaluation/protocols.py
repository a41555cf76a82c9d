"""Evaluation protocols as data: which pixels are compared, how regions become classes, and which classes enter the mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from padseg.datasets import VOID
from padseg.errors import UsageError
from padseg.evaluation.metrics import ClassCounts, class_table, counts_of, match_regions, merge_background, widened
from padseg.methods.stages.geometry import centre_square, detectron_size, diffcut_square

if TYPE_CHECKING:
    from padseg.types import Array


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Rules of an evaluation. WORDS describes every value of a field."""

    source: str
    geometry: str  # of Options: what a model sees
    compare: str
    matching: str = 'picture'
    background: str = 'class'
    void: str = 'ignored'
    absent: str = 'unless-predicted'
    raw_labels: bool = False  # use ADE20K's file values as classes, unlabelled included
    ids: str = 'compact'
    counted: str = 'classes'
    decision: str = 'strongest'
    pictures: str = 'all'


class Naming(NamedTuple):
    """What a method is told in a protocol. background: names for it; called: other names of classes; caption: a prompt, of each class."""

    background: tuple[str, ...]
    called: Mapping[str, str]
    caption: str


RELEASED_CUT = 'short-640-cut'
WHOLE_64, WHOLE_224 = 'whole-64', 'whole-224'
CONTEXT = 'for PASCAL Context with background it passes 59 classes, not 60: score context59'
PROTOCOLS: dict[str, Protocol] = {
    'diffseg': Protocol('DiffSeg (Tian et al., CVPR 2024), google/diffseg', 'diffseg', '512', ids='as they are'),
    'diffcut': Protocol(
        'DiffCut (Couairon et al., NeurIPS 2024), PaulCouairon/DiffCut',
        'diffcut',
        '128',
        background='many-to-one',
        void='background',
        raw_labels=True,
        ids='as they are',
    ),
    'diffcut-fixed': Protocol(
        'DiffCut, with void ignored and ADE20K labels reduced', 'diffcut', '128', background='many-to-one', ids='as they are'
    ),
    'seg4diff-paper': Protocol('Seg4Diff (Kim et al., 2025), as its paper describes it', 'seg4diff-paper', 'crop'),
    'seg4diff-release': Protocol(
        f'Seg4Diff, as its released code computes it; {CONTEXT}',
        'seg4diff-release',
        RELEASED_CUT,
        matching='row',
        ids='as they are',
    ),
    'seg4diff-ovss': Protocol(
        'Seg4Diff, open vocabulary (detectron2 SemSegEvaluator)',
        'seg4diff-ovss',
        'native',
        matching='none',
        background='ignored',
        absent='left-out',
        ids='as they are',
    ),
    'goca': Protocol('GoCA, Darkbblue/goca', 'stretch', 'native', matching='none', void='class', absent='zero', ids='as they are'),
    'conceptattention': Protocol(
        'ConceptAttention, VOC with several classes (helblazer811/ConceptAttention)',
        'stretch',
        WHOLE_64,
        matching='none',
        void='wrong',
        ids='as they are',
    ),
    'conceptattention-single': Protocol(
        'ConceptAttention, VOC with one class in a picture (helblazer811/ConceptAttention)',
        'stretch',
        WHOLE_224,
        matching='none',
        void='wrong',
        ids='as they are',
        counted='object',
        pictures='one class',
    ),
    'conceptattention-imagenet': Protocol(
        'ConceptAttention, ImageNet-Segmentation (helblazer811/ConceptAttention)',
        'stretch',
        WHOLE_224,
        matching='none',
        ids='as they are',
        counted='object',
        decision='above mean',
        pictures='one class',
    ),
}
OF_VOC = Naming(
    ('background', 'floor', 'grass', 'tree', 'sky'),
    {
        'aeroplane': 'plane',
        'bicycle': 'bike',
        'motorbike': 'motorcycle',
        'dining table': 'table',
        'potted plant': 'pot',
        'tv monitor': 'monitor',
    },
    'a {}',
)
NAMINGS = {
    'conceptattention': OF_VOC,
    'conceptattention-single': OF_VOC,
    'conceptattention-imagenet': Naming(('background', 'floor', 'tree', 'person', 'grass', 'face'), {}, 'a {}'),
}
DEFAULT = 'seg4diff-paper'

WORDS: dict[str, dict[str | bool, str]] = {
    'compare': {
        'native': "the whole picture at the ground truth's size",
        'crop': 'the square cut from the centre, side = the shorter edge, not resized',
        '512': 'the square cut from the centre, ground truth to 512 x 512 by nearest neighbour',
        '128': 'the square cut from the centre, side = shorter edge - 1, ground truth by nearest neighbour to 1024, every 8th pixel of it',
        WHOLE_64: 'the whole picture, squashed to 64 x 64 by nearest neighbour',
        WHOLE_224: 'the whole picture, squashed to 224 x 224 by nearest neighbour',
        'short-640': 'the whole picture, shorter edge 640 pixels (the longer at most 2560), ground truth by nearest neighbour',
        RELEASED_CUT: (
            'the ground truth of the whole picture as for short-640, but of the prediction at the size of the picture only the upper left '
            'corner of that size: pictures that are larger than that meet the WRONG ground truth, as in the released code'
        ),
    },
    'matching': {
        'picture': 'regions are matched to classes one to one, picture by picture, for the most pixels',
        'row': 'regions are matched to classes one to one, anew in EVERY ROW OF PIXELS: inflated, for reproduction only',
        'none': 'a predicted value is a class',
    },
    'background': {
        'class': 'background, where the data set has it, is a class like others',
        'many-to-one': 'regions that a first matching gives to no class are merged into background; ground truth takes part in this',
        'ignored': 'pixels of background, where the data set has it, do not count',
    },
    'void': {
        'ignored': 'unlabelled pixels do not count',
        'background': 'unlabelled pixels are background where the data set has one, otherwise they do not count',
        'class': 'unlabelled pixels are background, which becomes a class if the data set has none',
        'wrong': 'unlabelled pixels count as false positives of whatever is predicted there',
    },
    'absent': {
        'unless-predicted': 'a class without true and without false positive pixels is left out of the mean, one with false positives is 0',
        'left-out': 'a class without true pixels is left out of the means',
        'zero': 'every class is in the means, an absent one as 0; denominators carry 1e-8',
    },
    'raw_labels': {
        False: 'ADE20K: label 0 is void, 1..150 are classes',
        True: 'ADE20K: labels 0..149 are taken as classes as they are, 150 does not count',
    },
    'ids': {
        'compact': 'ids of a prediction are renumbered 0..K-1 in order of first appearance before matching',
        'as they are': 'ids of a prediction are taken as they are, gaps included',
    },
    'counted': {
        'classes': 'every class is counted',
        'object': 'all classes but background are counted as one, the object',
    },
    'decision': {
        'strongest': 'a pixel has the class of the strongest map',
        'above mean': 'the object is where the map of its name is above its own mean',
    },
    'pictures': {
        'all': 'all pictures are scored',
        'one class': 'only pictures with one class beside background are scored',
    },
}
LATER = ('counted', 'decision', 'pictures')  # rules that are told only where they are not as usual
SUMS = 'true positives, false positives and false negatives are summed over all pictures before any ratio'
WARNINGS = {'row': 'regions are matched in every row of pixels, which inflates the score: use it for reproduction only'}


def protocol(name: str, **changes: Any) -> Protocol:
    """Return a preset, with the fields that are not None replaced. UsageError for an unknown name or value."""
    if name not in PROTOCOLS:
        raise UsageError(f'protocol is one of {", ".join(PROTOCOLS)}; got {name}')
    given = {field: value for field, value in changes.items() if value is not None}
    for field, value in given.items():
        if field in WORDS and value not in WORDS[field]:
            raise UsageError(f'{field} is one of {", ".join(map(str, WORDS[field]))}; got {value}')
    return dataclasses.replace(PROTOCOLS[name], **given)


def rules(chosen: Protocol) -> dict[str, str]:
    """Describe every rule in words."""
    told = [field for field in WORDS if field not in LATER or getattr(chosen, field) != getattr(Protocol, field)]
    return {
        'source': chosen.source,
        'geometry': chosen.geometry,
        **{field: f'{getattr(chosen, field)}: {WORDS[field][getattr(chosen, field)]}' for field in told},
        'sums': SUMS,
    }


class Classes(NamedTuple):
    """The classes that a protocol scores on a data set. background: number of that class, or None."""

    names: tuple[str, ...]
    background: int | None


OBJECT = Classes(('object', 'background'), 1)


def as_counted(labels: Array, background: int | None, rules: Protocol) -> Array:
    """Object and background in place of a data set's classes if the protocol counts only these: (H, W) -> (H, W). VOID stays."""
    if rules.counted != 'object':
        return labels
    return np.where(labels == VOID, VOID, labels == background)


def scored_classes(names: tuple[str, ...], background: int | None, rules: Protocol) -> Classes:
    """Return a data set's classes, adding background if the protocol needs it and it is missing."""
    if rules.counted == 'object':
        if background is None:
            raise UsageError('the protocol counts object and background: score a data set with background as a class, such as voc21')
        return OBJECT
    if rules.void == 'class' and background is None:
        return Classes((*names, 'background'), len(names))
    return Classes(names, background)


def class_map(truth: Array, classes: Classes, rules: Protocol) -> Array:
    """Apply the protocol's rules for void and background to ground truth with classes and VOID: (H, W) -> (H, W)."""
    if rules.void in ('background', 'class') and classes.background is not None:
        return np.where(truth == VOID, classes.background, truth)
    if rules.background == 'ignored' and classes.background is not None:
        return np.where(truth == classes.background, VOID, truth)
    return truth


def class_counts(pred: Array, truth: Array, classes: Classes, rules: Protocol) -> ClassCounts:
    """Counts of one picture: prediction (H, W) and ground truth (H, W) with classes and VOID."""
    truth = class_map(truth, classes, rules)
    if rules.matching == 'row':
        total = ClassCounts.none(len(classes.names))
        for row in range(len(truth)):
            total = total.plus(block_counts(pred[row : row + 1], truth[row : row + 1], classes, rules))
        return total
    counts = block_counts(pred, truth, classes, rules)
    return counts.plus(wrong_counts(pred[truth == VOID], classes)) if rules.void == 'wrong' else counts


def wrong_counts(pred: Array, classes: Classes) -> ClassCounts:
    """Counts of classes predicted where there is none to be right about: (n,)."""
    zero = np.zeros(len(classes.names), np.int64)
    return ClassCounts(zero, np.bincount(pred, minlength=len(zero)), zero, zero, len(pred))


def block_counts(pred: Array, truth: Array, classes: Classes, rules: Protocol) -> ClassCounts:
    """Counts of a picture, or of one row of it, from a single table."""
    table = table_of(pred, truth, classes, rules)
    return counts_of(table, assignment(table, classes, rules))


def table_of(pred: Array, truth: Array, classes: Classes, rules: Protocol) -> Array:
    """Count the pixels of each class in each region, with at least as many columns as rows: (classes, regions)."""
    if rules.matching == 'none' and pred.max() >= len(classes.names):
        raise UsageError(f'a prediction of classes holds {pred.max()}; allowed: 0..{len(classes.names) - 1}')
    table = class_table(truth, pred, len(classes.names), rules.ids == 'compact')
    if rules.background == 'many-to-one' and classes.background is not None:
        table = merge_background(table, classes.background)
    return widened(table)


def assignment(table: Array, classes: Classes, rules: Protocol) -> Array:
    """The region of each class: (classes, regions) -> (classes,)."""
    column = np.arange(len(table))
    if rules.matching == 'none':
        return column
    if rules.background == 'many-to-one' and classes.background is not None:
        # DiffCut numbers background last, and ties depend on the order
        order = np.argsort(column == classes.background, kind='stable')
        column[order] = match_regions(table[order])
        return column
    return match_regions(table)


class View(NamedTuple):
    """The compared pixels. rows, columns: of the picture, for the ground truth; box: (top, left, height, width) in the picture.

    A prediction made for this view covers the box; size: its (height, width).
    """

    rows: Array
    columns: Array
    box: tuple[int, int, int, int]
    size: tuple[int, int]


def compared_view(size: tuple[int, int], compare: str) -> View:
    """Return the compared pixels of a picture of size (height, width)."""
    everything = (0, 0, *size)
    if compare == 'native':
        return View(np.arange(size[0]), np.arange(size[1]), everything, size)
    if compare in (WHOLE_64, WHOLE_224):
        side = 64 if compare == WHOLE_64 else 224
        return View(nearest(size[0], side), nearest(size[1], side), everything, (side, side))
    if compare in ('short-640', RELEASED_CUT):
        height, width = detectron_size(size)
        cut = (0, 0, min(size[0], height), min(size[1], width))
        return View(nearest(size[0], height), nearest(size[1], width), cut if compare == RELEASED_CUT else everything, (height, width))
    if compare == '128':
        top, left, short, _ = box = diffcut_square(size)
        # resizing to 1024 by nearest-exact takes pixel centres, and reducing that to 128 takes the first of every 8 pixels
        steps = ((np.arange(128) * 8 + 0.5) * short / 1024).astype(np.int64)
        return View(top + steps, left + steps, box, (128, 128))
    top, left, short, _ = box = centre_square(size)
    side = short if compare == 'crop' else int(compare)
    return View(top + nearest(short, side), left + nearest(short, side), box, (side, side))


def nearest(length: int, wanted: int) -> Array:
    """Indices of the pixels that contain the centres of `wanted` equal cells: (wanted,) in 0..length-1."""
    return ((np.arange(wanted) + 0.5) * length / wanted).astype(np.int64)


def seen(truth: Array, where: View) -> Array:
    """Select the compared pixels of a ground truth (H, W)."""
    if where.box == (0, 0, *truth.shape) and where.size == truth.shape:
        return truth
    return truth[where.rows[:, None], where.columns]


def seen_prediction(pred: Array, where: View) -> Array:
    """Select the compared pixels of a whole picture's label map (H, W), by nearest neighbour."""
    top, left, height, width = where.box
    if (height, width) == where.size:
        return pred[top : top + height, left : left + width]
    return pred[(top + nearest(height, where.size[0]))[:, None], left + nearest(width, where.size[1])]
