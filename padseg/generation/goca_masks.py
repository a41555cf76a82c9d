"""GoCA's masks for S-CFG: the tokens' maps from all heads and layers of the step's own forward pass, in place of S-CFG's segmentation.

As in GoCA's released code for generation with Stable Diffusion 1.5 and PixArt-Sigma. The maps are those of methods/goca.py, with its
settings for the model and all channels of the dense feature; they differ from those for segmentation in what is made of them:

- Pixels are rescaled by all tokens of the prompt but special ones and pads: articles and punctuation count.
- Every token up to the last of these competes, the start token too.
- The foreground is where the map of the empty prompt's first token is low. See `scfg.ground_of` for PixArt and SDXL.

SDXL is treated as Stable Diffusion 1.5. Of SD3 every second token along both sides is read, except for the refinement, as its softmax over
image and text costs more than all else; CLIP's tokens compete. Neither is in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padseg.backbones.recorder import watch
from padseg.generation.scfg import FAMILIES, Ground, Masks, ground_of, guided, highest
from padseg.methods.goca import GocaOptions, plan_of
from padseg.methods.goca_rows import row_of
from padseg.methods.options import require_family
from padseg.methods.stages.aggregation import refined, renormalised, rescaled
from padseg.methods.stages.cross_maps import Aggregated, finished, reading

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.backbones.spec import Spec
    from padseg.generation.sample import Call, Guide, Predict, Texts
    from padseg.methods.stages.cross_maps import Plan
    from padseg.types import Tokens

HALF = 0.5  # the map of what stands for the background is below it in the foreground


def content_of(tokens: Tokens) -> tuple[int, ...]:
    """The columns of all tokens that stand for a part of the text: no special ones, pads, or T5's that stand for a space alone."""
    room = len(tokens.spans) if len(tokens.spans) <= tokens.slots else tokens.slots - 1  # the last one is for the end token
    return tuple(tokens.first + place for place, (start, end) in enumerate(tokens.spans[:room]) if end > start)


def competing(maps: Tensor, self_map: Tensor, content: Sequence[int], order: int) -> Tensor:
    """The maps of which the highest takes a pixel, from a picture's aggregated ones: (n, h, w), (N, N) -> (n, h, w) in 0..1.

    They are rescaled by the content tokens, scaled, and refined `order` times; all after the last content token are 0.
    """
    length = max(content, default=0) + 1
    found = torch.zeros_like(maps)
    found[:length] = refined(renormalised(rescaled(maps[:length], maps, content)), self_map, order)
    return found


def background_map(background: Tensor, self_map: Tensor, order: int) -> Tensor:
    """The aggregated map of what stands for the background, refined by the text's self-attention: (h, w), (N, N) -> (h, w) in 0..1."""
    return renormalised(refined(background[None], self_map, order))[0]


def masks_of(text: Aggregated, empty: Aggregated | None, ground: Ground, contents: Sequence[Sequence[int]], order: int) -> Masks:
    """The masks of B pictures, from what the text's rows add up to, and those of the empty prompt if `ground` is there."""
    pictures = zip(text.maps, text.self_map, contents, strict=True)
    tokens = torch.stack([competing(maps, own, content, order) for maps, own, content in pictures])
    source = text.maps if empty is None else empty.maps
    grounds = [maps[column] for maps, column in zip(source, ground.columns, strict=True)]
    background = torch.stack([background_map(maps, own, order) for maps, own in zip(grounds, text.self_map, strict=True)])
    return Masks(highest(tokens), (~(background >= HALF)).to(background.dtype))


def goca_options(spec: Spec) -> GocaOptions:
    """GoCA's settings for a model. Of PixArt only the layers that refine are read, as released."""
    layers = row_of(spec).refine_layers if spec.family == 'pixart' else None
    return GocaOptions(layers=layers).resolve(spec) if layers else GocaOptions().resolve(spec)


def plan_for(backbone: Backbone) -> tuple[Plan, int]:
    """What is read of a model, and how often maps are refined."""
    options = goca_options(backbone.spec)
    return plan_of(backbone, options)._replace(every=2 if backbone.spec.family == 'sd3' else 1), options.order


def goca_s_cfg(backbone: Backbone, scale: float) -> Guide:
    """The guide of S-CFG with GoCA's masks. scale: that of classifier-free guidance. UsageError for a family that it is not defined for.

    It needs `Texts.tokens`.
    """
    require_family('goca-s-cfg', FAMILIES, backbone)
    plan, order = plan_for(backbone)

    def guide(predict: Predict, call: Call, texts: Texts) -> Tensor:
        shape, count = tuple(call.z.shape), len(call.z)
        ground = ground_of(texts, count)
        contents = [content_of(next(iter(tokens.values()))) for tokens in texts.tokens]
        requests, text_maps = reading(backbone, texts.text, shape, plan, slice(count, 2 * count))
        wanted, empty_maps = {('text', *key): request for key, request in requests.items()}, None
        if ground.half == 0:
            requests, empty_maps = reading(backbone, texts.empty, shape, plan._replace(refine=()), slice(count))
            wanted |= {('empty', *key): request for key, request in requests.items()}
        with torch.no_grad(), watch(wanted, stop=False):
            empty, text = predict([texts.empty, texts.text], call)
        found = finished(text_maps, backbone.dtype)
        masks = masks_of(found, finished(empty_maps, backbone.dtype) if empty_maps else None, ground, contents, order)
        return guided(empty, text, masks, scale)

    return guide
