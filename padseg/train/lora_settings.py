"""Settings of mask-alignment fine-tuning, and presets: what the paper says, and what the released code does. This module imports no torch.

The presets differ because the released trainer does not do what the paper says, in ways that its settings do not show: its learning rate is
ten times the paper's, accumulation is never read, its focal loss takes logits for probabilities, and pictures are cut to a corner. Where
neither says anything, both presets have the same value.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from padseg.errors import UsageError
from padseg.methods.options import Range, check_options, option, require

TARGETS = ('attn.to_q', 'attn.to_k', 'attn.to_v', 'attn.to_out.0')
COUNT = Range('a number >= 0', 0)
SOME = Range('a number >= 1', 1)
SHARE = Range('a share in 0..1', 0, math.nextafter(1, 2))
WEIGHT = Range('a finite number >= 0', 0, float('inf'))


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Everything that determines the result, apart from model and data. Checkpoints record it. UsageError for values out of range."""

    steps: int = option(3000, 'steps of the optimiser; released-sa1b: 1000', range=SOME)
    batch: int = option(
        16, 'pictures per step over all processes, accumulated as needed; as released: 8 (COCO) or 4 (SA-1B), never accumulated', range=SOME
    )
    rate: float = option(1e-5, 'learning rate of the LoRA; as released: 1e-4, since its multiplier of 0.1 is never applied', range=WEIGHT)
    score_rate: float = option(1e-5, 'learning rate of the score layer; as released: 1e-4', range=WEIGHT)
    warmup: int = option(500, 'steps over which the rate rises from 1 % to its peak; it then falls to 0 by half a cosine', range=COUNT)
    weight_decay: float = option(1e-4, 'weight decay of AdamW', range=WEIGHT)
    clip: float = option(0.01, 'largest norm of the gradient of all that is trained', range=WEIGHT)
    rank: int = option(16, 'rank of the LoRA', range=SOME)
    alpha: int = option(16, 'scale of the LoRA times its rank', range=SOME)
    targets: tuple[str, ...] = option(TARGETS, 'linear layers that get a LoRA, in all blocks, by the end of their names')
    layer: int | None = option(None, 'expert block whose scores are trained, from 0', range=COUNT, default="the model's own")
    side: int | None = option(None, 'side in pixels of the square that the model sees', range=SOME, default="the model's own")
    crop: str = option(
        'random',
        'what is seen of a picture: a random square of its short side, the top-left 640 of 1024 pixels of that (released), or all',
        choices=('random', 'released', 'whole'),
    )
    flip: bool = option(True, 'mirror half of the pictures')
    least_area: float = option(0.005, 'masks that cover no more than this share of the view are left out', range=SHARE)
    most: int = option(32, 'masks of a picture, the largest first', range=COUNT)
    prompt: str = option(
        'captions',
        'text that goes with a picture: its caption, its class names in a row (released-coco), or none; without a caption its class names',
        choices=('captions', 'classes', 'none'),
    )
    caption_dropout: float = option(0.0, 'share of the pictures that get the empty prompt instead', range=SHARE)
    candidates: str = option(
        'heads', 'maps that may become a mask: of tokens, the mean over heads (released-coco), or of all heads', choices=('tokens', 'heads')
    )
    matching: str = option(
        'hungarian',
        'how candidates and masks are paired: by the class name in the prompt (released-coco), or by the cheapest assignment',
        choices=('names', 'hungarian'),
    )
    columns: str = option(
        'exact',
        'tokens of a class name: those at its place in the prompt, or any that the name has anywhere (released), shared with other names',
        choices=('exact', 'released'),
    )
    maps: str = option(
        'scores',
        "what candidates are made of: scores before the softmax, or after it a token's share of all text, which evaluation compares",
        choices=('scores', 'shares'),
    )
    score_layer: bool = option(True, 'add three convolutions to the candidates, which learn too and are left out afterwards')
    focal: str = option('correct', 'focal loss: as published, or with logits for probabilities (released)', choices=('correct', 'released'))
    count: str = option(
        'batch',
        'number of pairs that mask losses are divided by: of the whole batch, or of each forward pass for itself (released)',
        choices=('batch', 'released'),
    )
    focal_weight: float = option(0.1, 'weight of the focal loss', range=WEIGHT)
    dice_weight: float = option(0.2, 'weight of the Dice loss', range=WEIGHT)
    flow_weight: float = option(1.0, 'weight of the flow-matching loss', range=WEIGHT)
    flow_every: int = option(
        1, 'steps from one flow-matching loss to the next; steps between them stop after the expert block; 0: never', range=COUNT
    )
    noise_mean: float = option(0.0, 'mean of the normal distribution whose sigmoid picks the timestep; larger: less noise')
    noise_std: float = option(0.5, 'its standard deviation', range=WEIGHT)
    views: int = option(0, 'views of each picture that are kept, with their latents on disk; 0: a new view every time', range=COUNT)
    seed: int = option(0, 'seed of all random numbers', range=COUNT)

    def __post_init__(self) -> None:
        check_options(self)
        require(0 < self.batch and 0 < self.rank, f'batch and rank are numbers >= 1; got {self.batch} and {self.rank}')
        require(not (self.flow_every and not self.flow_weight), '--flow-weight 0 needs --flow-every 0')
        require(self.matching != 'names' or self.candidates == 'tokens', '--matching names needs --candidates tokens')
        require(self.matching != 'names' or self.prompt == 'classes', '--matching names needs --prompt classes, which has all names')

    @property
    def aligned(self) -> bool:
        """Whether mask losses are trained at all."""
        return self.focal_weight > 0 or self.dice_weight > 0


PAPER = LoraSettings()
RELEASED = dataclasses.replace(PAPER, rate=1e-4, score_rate=1e-4, crop='released', columns='released', focal='released', count='released')
PRESETS = {
    'paper': PAPER,
    'released-coco': dataclasses.replace(RELEASED, batch=8, prompt='classes', candidates='tokens', matching='names'),
    'released-sa1b': dataclasses.replace(RELEASED, steps=1000, batch=4),
}


def preset(name: str, **changed: Any) -> LoraSettings:
    """The settings of a preset, some of them changed. UsageError for an unknown one."""
    if name not in PRESETS:
        raise UsageError(f'preset is one of {", ".join(PRESETS)}; got {name}')
    return dataclasses.replace(PRESETS[name], **changed)


def rate_factor(step: int, settings: LoraSettings) -> float:
    """Learning rate at a step, from 0, over its peak: half a cosine, which a line from 1 % meets at the end of the warm-up."""

    def cosine(at: int) -> float:
        return (1 + math.cos(math.pi * at / settings.steps)) / 2

    if step >= settings.warmup:
        return cosine(step)
    return 0.01 + (cosine(min(settings.warmup, settings.steps)) - 0.01) * step / settings.warmup
