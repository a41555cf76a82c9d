"""Which block and noise level group a picture best, for a model of which nobody knows: with labels by score, without by how regions are.

Regions of a block that follows the picture are the same whatever the noise is, differ from those of another picture, and are whole areas
rather than speckles. None of these is enough: maps that only follow places are whole and stay the same, and those of the first blocks
follow the colour of every single token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch import Tensor

from padseg.analysis.blocks import ENLARGED, covered, every_block, grid_of, regions_at
from padseg.analysis.grid import name_maps
from padseg.analysis.recording import Subject
from padseg.backbones import Backbone
from padseg.evaluation.metrics import contingency, entropy
from padseg.methods.options import require
from padseg.methods.seg4diff import Options
from padseg.methods.stages.latents import encode_steps
from padseg.methods.stages.token_maps import read_prompt
from padseg.system.progress import Progress
from padseg.types import Array, Attention, Latent, Prompt

THRESHOLDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # for merging; distances between maps differ from block to block
LARGEST = 100.0  # no distance is as large, so that it stands for inf
SEEDS = 2  # of the noise, for pictures without labels
NEAR = 1e-3  # between scores that are as good as the same
MEASURES = ('score', 'covering', 'agreement', 'chance', 'coherence', 'groups')


class Cell(NamedTuple):
    """Where maps come from. step: counted from the end of the schedule, from 1; layer: block, from 0; normalisation: of the maps."""

    step: int
    layer: int
    normalisation: str


class Expert(NamedTuple):
    """What was measured. figures: (len(MEASURES), thresholds) for each cell, means over pictures, NaN for what was not measured.

    labelled: whether `score` is the covering of labels; best, threshold: where it is highest; own: the model's own cell and threshold, of
    which the figures are there too; shown: the first picture (H, W, 3), and its regions (h, w) at the best step in each block.
    """

    pictures: int
    labelled: bool
    thresholds: tuple[float, ...]
    figures: dict[Cell, Array]
    best: Cell
    threshold: float
    own: tuple[Cell, float]
    shown: tuple[Array, list[Array]]


Regions = Mapping[Cell, Sequence[Array]]  # label maps (h, w) at each threshold


def measure(
    subjects: Sequence[Subject],
    backbone: Backbone,
    steps: Sequence[int],
    normalisations: Sequence[str],
    progress: Progress,
    options: Options = Options(),
) -> Expert:
    """Measure every block at these noise levels, without refinement. Labels are used if the pictures have them.

    options: how the picture is seen, and which tokens are read; and what `own` is.

    There is one forward pass for each picture and noise level, or SEEDS of them without labels. The model's own settings are measured too.
    Raises UsageError for a single picture without labels, and if the model was not loaded whole.
    """
    options = options.resolve(backbone.spec)
    prompt = read_prompt(backbone, options.tokens)
    labelled = all(subject.truth is not None for subject in subjects)
    require(labelled or len(subjects) > 1, 'without labels, regions are compared with those of another picture: give more than one')
    own = Cell(options.step, options.layer, options.normalisation)
    steps = tuple(dict.fromkeys((*steps, own.step)))
    normalisations = tuple(dict.fromkeys((*normalisations, own.normalisation)))
    own_threshold = min(options.threshold, LARGEST)
    thresholds = tuple(sorted({*THRESHOLDS, own_threshold}))
    progress.start(len(subjects))
    readings: list[dict[Cell, Array]] = []
    first: Regions = {}
    before: Regions = {}
    for subject in subjects:
        seen = [
            dict(regions_of(latents, steps, backbone, prompt, normalisations, thresholds, ENLARGED if labelled else 1))
            for latents in seeded_latents(subject, backbone, options, steps, 1 if labelled else SEEDS)
        ]
        readings.append({cell: figures_of(subject, [one[cell] for one in seen], before.get(cell)) for cell in seen[0]})
        first, before = first or seen[0], seen[0]
        progress.step()
    progress.close()
    figures = {cell: scored(mean_of([reading[cell] for reading in readings]), labelled) for cell in readings[0]}
    best, place = best_of(figures)
    shown = [first[Cell(best.step, layer, best.normalisation)][place] for layer in range(backbone.layers)]
    return Expert(len(subjects), labelled, thresholds, figures, best, thresholds[place], (own, own_threshold), (subjects[0].image, shown))


def seeded_latents(subject: Subject, backbone: Backbone, options: Options, steps: Sequence[int], seeds: int) -> Iterator[list[Latent]]:
    """The latents of a picture at each step, for each of so many seeds of the noise."""
    latents = encode_steps(subject.image, backbone, options, steps, [options.seed + number for number in range(seeds)])
    for number in range(seeds):
        yield latents[number * len(steps) : (number + 1) * len(steps)]


def regions_of(
    latents: Sequence[Latent],
    steps: Sequence[int],
    backbone: Backbone,
    prompt: Prompt,
    normalisations: Sequence[str],
    thresholds: Sequence[float],
    scale: int,
) -> Iterator[tuple[Cell, list[Array]]]:
    """The regions of every block, for each step and normalisation: label maps (scale h, scale w) at each threshold."""
    for step, latent in zip(steps, latents, strict=True):

        def reduce(seen: Attention, grid: tuple[int, int]) -> list[list[Array]]:
            maps: Tensor = name_maps(seen, backbone, prompt, grid)  # (T, h, w)
            return [
                [labels.astype(np.int16) for labels in regions_at(maps, normalisation, thresholds, scale)]
                for normalisation in normalisations
            ]

        for layer, found in enumerate(every_block(latent, backbone, prompt, partial(reduce, grid=grid_of(latent, backbone)))):
            for normalisation, regions in zip(normalisations, found, strict=True):
                yield Cell(step, layer, normalisation), regions


def figures_of(subject: Subject, found: Sequence[Sequence[Array]], other: Sequence[Array] | None) -> Array:
    """The measures of a picture in a cell, but for the score: (len(MEASURES), thresholds).

    found: its regions at each threshold, for each seed; other: those of another picture.
    """
    first = found[0]
    nothing = np.full(len(first), np.nan)
    rows = {
        'covering': nothing if subject.truth is None else covered(first, subject.truth),
        'agreement': np.array([shared(*pair) for pair in zip(*found, strict=True)]) if len(found) > 1 else nothing,
        'chance': nothing
        if other is None
        else np.array([shared(labels, as_large(rest, labels)) for labels, rest in zip(first, other, strict=True)]),
        'coherence': np.array([coherence(labels) for labels in first]),
        'groups': np.array([len(np.unique(labels)) for labels in first], float),
    }
    return np.stack([rows.get(name, nothing) for name in MEASURES])


def as_large(labels: Array, like: Array) -> Array:
    """A label map at the size of another one."""
    return cv2.resize(labels, like.shape[::-1], interpolation=cv2.INTER_NEAREST) if labels.shape != like.shape else labels


def shared(one: Array, other: Array) -> float:
    """Information in bits that two label maps (h, w) share, >= 0: what one tells of the other's region at a pixel."""
    table = contingency(one, other) / one.size
    return entropy(table.sum(1)) + entropy(table.sum(0)) - entropy(table)


def coherence(labels: Array) -> float:
    """How much more often neighbours (4 of each) of a label map (h, w) share a region than any two pixels: 1 at most, 0 if all do."""
    equal = np.concatenate([(labels[1:] == labels[:-1]).ravel(), (labels[:, 1:] == labels[:, :-1]).ravel()])
    by_chance = float(((np.unique(labels, return_counts=True)[1] / labels.size) ** 2).sum())
    return (float(equal.mean()) - by_chance) / (1 - by_chance) if by_chance < 1 and len(equal) else 0.0


def mean_of(readings: Sequence[Array]) -> Array:
    """Mean over pictures of measures (len(MEASURES), thresholds), of those that have them."""
    stacked = np.stack(readings)
    there = ~np.isnan(stacked)
    return np.where(there, stacked, 0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)


def scored(means: Array, labelled: bool) -> Array:
    """Fill in the score: the covering; or the agreement beyond chance, in bits, times the square of the coherence."""
    row = dict(zip(MEASURES, means, strict=True))
    score = row['covering'] if labelled else (row['agreement'] - row['chance']) * np.maximum(row['coherence'], 0) ** 2
    return np.stack([score, *means[1:]])


def best_of(figures: Mapping[Cell, Array]) -> tuple[Cell, int]:
    """The cell with the highest score, of equal ones the first, and the place of its threshold."""
    best = max(figures, key=lambda cell: float(figures[cell][0].max()))
    return best, best_threshold(figures[best])


def best_threshold(values: Array) -> int:
    """The place of the highest score; where its neighbours have nearly the same, the middle of them, which is the safest."""
    good = values[0] >= values[0].max() - NEAR
    first = last = int(values[0].argmax())
    while first > 0 and good[first - 1]:
        first -= 1
    while last + 1 < len(good) and good[last + 1]:
        last += 1
    return (first + last) // 2


def settings(expert: Expert, **more: Any) -> dict[str, Any]:
    """What was found, as the contents of a `padseg.json`. more: settings of Seg4Diff that it was found with."""
    best = expert.best
    return {
        'layer': best.layer,
        'seg4diff': {'step': best.step, 'normalisation': best.normalisation, 'threshold': expert.threshold, **more},
        'open-vocabulary': {'layers': [best.layer], 'steps': [best.step]},
    }


def rows(expert: Expert) -> list[dict[str, Any]]:
    """A row for every cell, with the measures at its best threshold; None for what was not measured."""
    return [row_of(expert, cell, best_threshold(expert.figures[cell])) for cell in expert.figures]


def summary(expert: Expert) -> list[dict[str, Any]]:
    """The best cell, that of every other block, and the model's own at its own threshold."""
    cells = list(expert.figures)
    tops = [
        best_of({cell: expert.figures[cell] for cell in cells if cell.layer == layer}) for layer in sorted({cell.layer for cell in cells})
    ]
    own, threshold = expert.own
    named = [
        ('best', best_of(expert.figures)),
        *(('best of its block', top) for top in tops if top[0] != expert.best),
        ("the model's own", (own, expert.thresholds.index(threshold))),
    ]
    return [{'cell': name, **row_of(expert, *found)} for name, found in named]


def row_of(expert: Expert, cell: Cell, place: int) -> dict[str, Any]:
    values = [None if np.isnan(value) else float(value) for value in expert.figures[cell][:, place]]
    return {**cell._asdict(), 'threshold': expert.thresholds[place], **dict(zip(MEASURES, values, strict=True))}
