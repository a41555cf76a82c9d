"""Settings that determine a training result: stages, data mixtures and learning rates. This module does not import torch."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from padseg.train.scenes import CLASSES


class Mixture(NamedTuple):
    """Composition of a batch.

    synthetic: share of scenes, if there are photographs too; named: share of the scenes whose masks are the classes named in the prompt;
    others: maximum number of absent classes in a prompt; alone: share of the named prompts that get no absent classes; varied: whether
    photographs are also turned, stretched, blurred and compressed, and get several regions of others; surfaces: share of the scenes
    without objects.
    """

    synthetic: float
    named: float = 0.0
    others: int = 3
    alone: float = 0.0
    varied: bool = False
    surfaces: float = 0.0


class FlowMatching(NamedTuple):
    """How a stage learns to denoise. every: interval in steps; part: share of the batch; dropout: share of the captions left out."""

    every: int = 10
    part: float = 1.0
    weight: float = 1.0
    dropout: float = 0.5


@dataclasses.dataclass(frozen=True)
class Course:
    """Duration, learning rates and data of one stage that trains the transformer."""

    steps: int
    rate: float
    encoder_rate: float  # of the autoencoder; 0 freezes it
    mixtures: tuple[tuple[int, Mixture], ...]  # each with the step from which it is used
    warmup: int = 60  # steps
    decay: float = 0.2  # share of the steps, at the end, over which the rate falls to 0
    encoder_share: float = 1.0  # of the steps: after them the autoencoder stays as it is
    rebuilt: int = 4  # pictures of which the autoencoder rebuilds a crop
    flow: FlowMatching = FlowMatching()
    average: float = 0.998  # decay of the moving average of the weights, which is what is saved


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Everything that determines the result, apart from the data. Checkpoints record it."""

    seed: int = 0
    vae_steps: int = 1800
    vae_batch: int = 4  # new images per step
    vae_crops: int = 4  # random crops of each
    vae_side: int = 64  # pixels of a crop
    vae_rate: float = 2e-3
    vae_kl: float = 1e-3
    vae_synthetic: float = 0.3  # share of scenes, if there are photographs too
    together: Course = Course(
        steps=5200,
        rate=6e-4,
        encoder_rate=4e-4,
        mixtures=((0, Mixture(synthetic=0.35, named=0.5, others=3)), (2500, Mixture(synthetic=0.55, named=0.65, others=len(CLASSES)))),
    )
    transformer: Course = Course(
        steps=1600,
        rate=4e-4,
        encoder_rate=0.0,
        mixtures=((0, Mixture(synthetic=0.6, named=0.75, others=len(CLASSES), alone=0.6)),),
        decay=0.5,
    )
    further: Course = Course(
        steps=0,
        rate=1e-3,
        encoder_rate=4e-4,
        mixtures=((0, Mixture(synthetic=0.45, named=0.7, others=len(CLASSES), alone=0.4, varied=True)),),
        decay=0.6,
        encoder_share=0.5,
        rebuilt=32,
        flow=FlowMatching(every=1, part=0.3, weight=0.5, dropout=0.3),
    )
    painter: Course = Course(
        steps=0,
        rate=4e-4,
        encoder_rate=0.0,
        mixtures=((0, Mixture(synthetic=1.0, surfaces=0.6)),),
        decay=0.6,
        flow=FlowMatching(every=1, dropout=0.1),
        average=0.985,
    )
    painting: Course = Course(
        steps=0,
        rate=2e-4,
        encoder_rate=0.0,
        mixtures=((0, Mixture(synthetic=0.7, named=0.6, others=len(CLASSES), alone=0.4, surfaces=0.4)),),
        decay=0.95,
        flow=FlowMatching(every=1, dropout=0.1),
        average=0.98,
    )
    size: int = 12  # new images per step
    weight_decay: float = 0.02
    layer: int = 4  # expert block
    supervised: tuple[int, ...] = (3, 4)  # blocks whose token maps get the mask losses; empty: flow matching only
    noise: float = 0.15  # sigma is uniform in 0..noise for the mask losses
    mask_weight: float = 1.0  # lambda
    affinity_weight: float = 1.0
    words_weight: float = 1.0
    maps_weight: float = 60.0  # of the change of the token maps, while the model learns to paint

    def course(self, stage: str) -> Course:
        courses: dict[str, Course] = {
            'together': self.together,
            'transformer': self.transformer,
            'further': self.further,
            'painter': self.painter,
            'painting': self.painting,
        }
        return courses[stage]


def without_masks(settings: TrainingSettings) -> TrainingSettings:
    """Return the same settings for flow matching alone, at every step: a baseline for comparison."""
    names = ('together', 'transformer', 'further', 'painter', 'painting')
    courses: dict[str, Any] = {
        name: dataclasses.replace(settings.course(name), flow=settings.course(name).flow._replace(every=1)) for name in names
    }
    return dataclasses.replace(settings, supervised=(), **courses)
