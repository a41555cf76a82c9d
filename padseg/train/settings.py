"""What decides the result of a training, importing no torch: its stages, what they see, and at which rates they learn."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from padseg.train.scenes import CLASSES


class Mixture(NamedTuple):
    """What a batch is made of. synthetic: share of scenes, where there are photographs; named: share of the scenes whose masks are
    classes that the prompt names; others: most names in a prompt that the scene does not show; alone: share of the prompts without any.
    """

    synthetic: float
    named: float = 0.0
    others: int = 3
    alone: float = 0.0


@dataclasses.dataclass(frozen=True)
class Course:
    """How long and with what the transformer is trained, in one stage."""

    steps: int
    rate: float
    encoder_rate: float  # of the autoencoder, which goes on learning; 0 leaves it as it is
    mixtures: tuple[tuple[int, Mixture], ...]  # what examples are drawn from, each from a step on
    warmup: int = 60  # steps
    decay: float = 0.2  # share of the steps, at the end, over which the rate falls to nothing


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Everything that decides the result, apart from the data; every checkpoint notes it."""

    seed: int = 0
    vae_steps: int = 1800
    vae_batch: int = 4  # new pictures a step
    vae_crops: int = 4  # random crops of each
    vae_side: int = 64  # pixels of a crop
    vae_rate: float = 2e-3
    vae_kl: float = 1e-3
    vae_synthetic: float = 0.3  # share of scenes, when there are photographs
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
    size: int = 12  # new pictures a step
    weight_decay: float = 0.02
    layer: int = 4  # expert block
    supervised: tuple[int, ...] = (3, 4)  # blocks whose token maps get the mask losses; none: flow matching only
    noise: float = 0.15  # mask loss: sigma is uniform in 0..noise
    mask_weight: float = 1.0  # lambda
    affinity_weight: float = 1.0
    words_weight: float = 1.0
    flow_every: int = 10  # steps between two with the flow-matching loss
    caption_dropout: float = 0.5
    average: float = 0.998  # decay of the moving average of the weights that is kept

    def course(self, stage: str) -> Course:
        return {'together': self.together, 'transformer': self.transformer}[stage]


def without_masks(settings: TrainingSettings) -> TrainingSettings:
    """The same training by flow matching alone, at every step: a twin to compare with."""
    return dataclasses.replace(settings, supervised=(), flow_every=1)
