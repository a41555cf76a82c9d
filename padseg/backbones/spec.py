"""A backbone as data: where its files are and which settings its maps are best read with."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

TINY = pathlib.Path(__file__).parent.parent / 'models' / 'tiny'


class Spec(NamedTuple):
    """One row. The defaults are those of Seg4Diff's released code for SD3-medium; a model folder may carry its own in `padseg.json`."""

    repo: str  # hub id, or a local folder in diffusers' layout
    family: str = 'sd3'  # key of FAMILIES
    layers: int = 24  # transformer blocks
    layer: int = 9  # expert block, from 0
    steps: int = 28  # length of the noise schedule
    step: int = 8  # steps from its end
    side: int = 1024  # pixels of the square picture the model was trained on
    normalisation: str = 'minmax-softmax'
    threshold: float = 0.1
    refine: str = 'none'
    superpixels: float = 0.0
    components: bool = False
    min_area: float = 0.0
    sequence: int = 77  # slots of each half of the text, CLIP's and T5's


BACKBONES: dict[str, Spec] = {
    'tiny': Spec(repo=str(TINY)),
    'sd3': Spec(repo='stabilityai/stable-diffusion-3-medium-diffusers'),
    'sd3.5': Spec(repo='stabilityai/stable-diffusion-3.5-medium'),
}


class Card(NamedTuple):
    """What a named model's card says of its terms."""

    licence: str
    gated: bool


CARDS: dict[str, Card] = {
    'tiny': Card('Apache-2.0', False),
    'sd3': Card('Stability AI Community License', True),
    'sd3.5': Card('Stability AI Community License', True),
}
