"""Models as data: where each one's files are, and facts about it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

TINY = pathlib.Path(__file__).parent.parent / 'models' / 'tiny'


class Spec(NamedTuple):
    """Facts about one model; the defaults are SD3-medium's. A model's folder may override them in `padseg.json`.

    own: per-model settings of methods from `padseg.json`, keyed by method name; the methods define what they mean.
    """

    repo: str  # hub id, or a local folder in diffusers' layout
    family: str = 'sd3'  # key of DEPTHS
    layers: int = 24  # transformer blocks; Flux's single blocks follow its double ones
    layer: int = 9  # expert block, from 0: the one whose image-to-text attention groups the picture best
    steps: int = 28  # length of the noise schedule
    side: int = 1024  # pixels of the square picture the model was trained on
    sequence: int = 77  # slots of the text: of each half, CLIP's and T5's, of SD3; of T5's of Flux
    encoders: str = 'l+g'  # text encoders that names of classes go through, unless others are asked for
    words: tuple[str, ...] = ()  # all that names were made of in training; none where there is no such list
    own: Mapping[str, Mapping[str, Any]] = {}


DEPTHS = {'sd3': ('num_layers',), 'flux': ('num_layers', 'num_single_layers')}  # configuration keys that give the number of blocks


BACKBONES: dict[str, Spec] = {
    'tiny': Spec(repo=str(TINY)),
    'sd3': Spec(repo='stabilityai/stable-diffusion-3-medium-diffusers'),
    'sd3.5': Spec(repo='stabilityai/stable-diffusion-3.5-medium'),
    # Seg4Diff names blocks 12 and 17; the later one, because loading up to it covers both
    'flux': Spec(repo='black-forest-labs/FLUX.1-dev', family='flux', layers=57, layer=17, steps=50, encoders='t5'),
}


class Card(NamedTuple):
    """Licence terms from a named model's card."""

    licence: str
    gated: bool


CARDS: dict[str, Card] = {
    'tiny': Card('Apache-2.0', False),
    'sd3': Card('Stability AI Community License', True),
    'sd3.5': Card('Stability AI Community License', True),
    'flux': Card('FLUX.1 [dev] Non-Commercial License', True),
}
