"""Measure the blocks of a model on a folder of labelled pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from padseg.analysis.blocks import Cell, anatomy, best, grouping, mean_iou, word_counts
from padseg.analysis.recording import subjects
from padseg.backbones import Backbone
from padseg.evaluation.metrics import region_scores
from padseg.methods.open_vocabulary import LabelOptions
from padseg.methods.seg4diff import Options
from padseg.methods.stages.latents import encode
from padseg.system.progress import Progress
from padseg.types import Array, Image

STEPS = (1, 2, 4, 7, 10, 14, 18, 22, 25, 28)  # steps to measure, counted from the end of the schedule


class Analysis(NamedTuple):
    """Measurements of a model, averaged over pictures.

    step: where single heads are measured; steps: where the mean of heads is; one_region: covering by a single region for the whole picture;
    coverings: of each cell, in 0..1, at the threshold that is best over all pictures; words: mIoU of each cell with the words of a prompt,
    in 0..1, empty without classes; groups: kinds of tokens; shares: attention (layers, G, G); norms: of values (layers, G).
    lora, lora_scale: as in `Identity`.
    """

    model: str
    weights: str
    pictures: int
    normalisation: str
    step: int
    steps: list[int]
    one_region: float
    coverings: dict[Cell, float]
    words: dict[Cell, float]
    groups: list[str]
    shares: Array
    norms: Array
    lora: str | None = None
    lora_scale: float | None = None


def labelled_pictures(images: Path, labels: Path, count: int) -> list[tuple[Image, Array]]:
    """Load the first `count` pictures (H, W, 3) by name, with their regions (H, W) from the first annotator.

    Raises NoImages if no picture has labels, ImageError for one that cannot be read.
    """
    found = subjects(images, labels, (), '', count)
    return [(subject.image, subject.truth) for subject in found if subject.truth is not None]


def analyze(
    pairs: Sequence[tuple[Image, Array]], backbone: Backbone, options: Options, classes: Sequence[str], progress: Progress
) -> Analysis:
    """Measure every block of a model on pictures (H, W, 3) with regions (H, W).

    classes: names of the label values, from 0; without names, words are not measured. Raises UsageError if the model was not loaded whole.
    """
    resolved = options.resolve(backbone.spec)
    steps = [step for step in STEPS if step <= backbone.spec.steps]
    scores, anatomies, one_region, counts = [], [], [], []
    progress.start(len(pairs))
    for image, truth in pairs:
        scores.append(grouping(image, truth, backbone, options, steps))
        anatomies.append(anatomy(encode(image, backbone, resolved), backbone))
        one_region.append(region_scores(truth, np.ones_like(truth)).covering)
        if classes:
            counts.append(word_counts(image, truth, backbone, classes, LabelOptions()))
        progress.step()
    progress.close()
    return Analysis(
        model=backbone.identity.model,
        weights=backbone.identity.weights,
        pictures=len(pairs),
        normalisation=resolved.normalisation,
        step=resolved.step,
        steps=steps,
        one_region=float(np.mean(one_region)),
        coverings=best(scores),
        words=mean_iou(counts),
        groups=anatomies[0]['groups'],
        shares=np.mean([measured['shares'] for measured in anatomies], axis=0),
        norms=np.mean([measured['norms'] for measured in anatomies], axis=0),
        lora=backbone.identity.lora,
        lora_scale=backbone.identity.lora_scale,
    )


def as_object(analysis: Analysis) -> dict[str, Any]:
    """Return the analysis as the contents of OUT/analysis.json."""
    return {
        'model': analysis.model,
        'weights': analysis.weights,
        **({'lora': analysis.lora, 'lora_scale': analysis.lora_scale} if analysis.lora else {}),
        'pictures': analysis.pictures,
        'normalisation': analysis.normalisation,
        'one_region': analysis.one_region,
        'covering': [{**cell._asdict(), 'covering': value} for cell, value in analysis.coverings.items()],
        'words_miou': [{**cell._asdict(), 'miou': value} for cell, value in analysis.words.items()],
        'groups': analysis.groups,
        'shares': analysis.shares.tolist(),
        'norms': analysis.norms.tolist(),
    }
