"""Which noise level, block and text encoders find classes best: chosen on some labelled pictures, reported on others.

Yamaguchi and Yanai: one forward pass of SD3 gives the maps of every block, whose image-to-text attention at the class names is the score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from padseg.analysis.blocks import counted, every_block, grid_of, mean_iou, shown_classes
from padseg.analysis.recording import Subject
from padseg.backbones import Backbone
from padseg.errors import UsageError
from padseg.evaluation.metrics import ClassCounts
from padseg.methods.open_vocabulary import LabelOptions, prepare
from padseg.methods.stages.attention import token_attention
from padseg.methods.stages.latents import encode_steps
from padseg.methods.stages.scores import means, scale_scores
from padseg.system.progress import Progress
from padseg.types import Array, Attention, Prompt


class Choice(NamedTuple):
    """A cell of the grid. encoders: as of LabelOptions; step: counted from the end of the schedule, from 1; layer: from 0."""

    encoders: str
    step: int
    layer: int


class Grid(NamedTuple):
    """train: mIoU of each cell in 0..1 on the pictures to choose by; best: the cell with the highest; own: the model's own cell.

    val: mIoU of `best` and `own` on the other pictures; names: whether a prompt names the classes that are present, or all.
    """

    pictures: tuple[int, int]
    names: str
    train: dict[Choice, float]
    best: Choice
    own: Choice
    val: dict[Choice, float]


def halves(subjects: Sequence[Subject], share: float) -> tuple[list[Subject], list[Subject]]:
    """Part pictures, spread over their order, into those to choose by, of this share, and the others."""
    numbers = [int((place + 1) * share) > int(place * share) for place in range(len(subjects))]
    chosen = [subject for subject, taken in zip(subjects, numbers, strict=True) if taken]
    return chosen, [subject for subject, taken in zip(subjects, numbers, strict=True) if not taken]


def cell_counts(
    subject: Subject, backbone: Backbone, classes: Sequence[str], options: LabelOptions, cells: Sequence[Choice], names: str = 'present'
) -> dict[Choice, ClassCounts]:
    """Count how well each cell finds the classes of a picture, without refinement; nothing for a picture without classes.

    names: whether prompts name the classes that the picture shows, or all. There is one forward pass for each step, encoders and prompt.
    """
    assert subject.truth is not None
    present = shown_classes(subject.truth, classes)
    if not present:
        return {}
    numbers = present if names == 'present' else list(range(len(classes)))
    counts: dict[Choice, ClassCounts] = {}
    steps = list(dict.fromkeys(cell.step for cell in cells))
    for encoders in dict.fromkeys(cell.encoders for cell in cells):
        naming = prepare(backbone, dataclasses.replace(options, encoders=encoders), [classes[number] for number in numbers])
        for step, latent in zip(steps, encode_steps(subject.image, backbone, naming.options, steps), strict=True):
            layers = [cell.layer for cell in cells if (cell.encoders, cell.step) == (encoders, step)]
            if not layers:
                continue
            found = [
                every_block(latent, backbone, prompt, partial(name_maps, backbone=backbone, prompt=prompt, grid=grid_of(latent, backbone)))
                for prompt in naming.prompts
            ]
            for layer in layers:
                maps = [means(blocks[layer], prompt, naming.options.scores) for blocks, prompt in zip(found, naming.prompts, strict=True)]
                scores = scaled(maps, len(numbers), naming.options.scores)
                counts[Choice(encoders, step, layer)] = counted(subject.truth, scores, numbers, len(classes))
    return counts


def name_maps(seen: Attention, backbone: Backbone, prompt: Prompt, grid: tuple[int, int]) -> Tensor:
    """Attention from the image to a prompt's picked tokens, averaged over heads: (T, h, w) float32."""
    queries, first = grid[0] * grid[1], backbone.first_image_token(prompt)
    return token_attention(seen, queries, backbone.text_columns(prompt, queries), first=first)[0].T.unflatten(1, grid)


def scaled(maps: Sequence[Tensor], classes: int, scores: str) -> Array:
    """Join the maps of names of several prompts (C', h, w) and scale them: (C, h, w)."""
    return scale_scores(torch.cat(list(maps)), classes, scores).cpu().numpy()


def best_cell(scores: dict[Choice, float]) -> Choice:
    """The cell with the highest score, of equal ones the first."""
    return max(scores, key=lambda cell: scores[cell])


def own_cell(backbone: Backbone, options: LabelOptions) -> Choice:
    """The cell that `padseg label` reads by default."""
    resolved = options.resolve(backbone.spec)
    return Choice(resolved.encoders, resolved.steps[0], resolved.layers[0])


def measure(
    train: Sequence[Subject],
    val: Sequence[Subject],
    backbone: Backbone,
    classes: Sequence[str],
    options: LabelOptions,
    encoders: Sequence[str],
    steps: Sequence[int],
    names: str,
    progress: Progress,
) -> Grid:
    """Measure every cell on the pictures to choose by, and the best cell and the model's own on the others.

    Raises UsageError if either part has no picture with a class.
    """
    cells = [Choice(arm, step, layer) for arm in encoders for step in steps for layer in range(backbone.layers)]
    own = own_cell(backbone, options)
    progress.start(len(train) + len(val))

    def miou(pictures: Sequence[Subject], wanted: Sequence[Choice], part: str) -> dict[Choice, float]:
        counts = []
        for subject in pictures:
            counts.append(cell_counts(subject, backbone, classes, options, wanted, names))
            progress.step()
        if not any(counts):
            raise UsageError(f'no picture to {part} shows a class: check labels and names of classes')
        return mean_iou(counts)

    found = miou(train, cells, 'choose by')
    best = best_cell(found)
    val_scores = miou(val, list(dict.fromkeys((best, own))), 'report on')
    progress.close()
    return Grid((len(train), len(val)), names, found, best, own, val_scores)


def rows(grid: Grid) -> list[dict[str, Any]]:
    """A row for every cell, with its mIoU on the pictures to choose by and, where it was measured, on the others."""
    return [{**cell._asdict(), 'train_miou': score, 'val_miou': grid.val.get(cell)} for cell, score in cells_with_own(grid).items()]


def summary(grid: Grid) -> list[dict[str, Any]]:
    """The best cell, the best of every other choice of text encoders, and the model's own."""
    arms = list(dict.fromkeys(cell.encoders for cell in grid.train))
    bests = [best_cell({cell: score for cell, score in grid.train.items() if cell.encoders == arm}) for arm in arms]
    named = [('best', grid.best), *(('best of its encoders', cell) for cell in bests if cell != grid.best), ("the model's own", grid.own)]
    return [{'cell': name, **cell._asdict(), 'train_miou': grid.train.get(cell), 'val_miou': grid.val.get(cell)} for name, cell in named]


def cells_with_own(grid: Grid) -> dict[Choice, float | None]:
    """mIoU of all cells; None for the model's own, if it is none of the grid."""
    return {**grid.train, **({} if grid.own in grid.train else {grid.own: None})}
