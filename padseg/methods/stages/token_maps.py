"""Noised latent -> token maps: one forward pass, one layer, the attention from image tokens to the picked text tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from padseg.backbones import Backbone
from padseg.backbones.cpu_attention import by_rows
from padseg.backbones.recorder import Request, requests_of, watch
from padseg.errors import NotFinite
from padseg.methods.options import TOKENS, MapOptions, require
from padseg.methods.stages.attention import token_attention
from padseg.methods.stages.refinement import mean_self_attention, refined_by, self_requests
from padseg.types import Latent, Prompt, TokenMaps


def latent_token_maps(latents: Sequence[Latent], backbone: Backbone, options: MapOptions) -> list[TokenMaps]:
    """Token maps of latents with the same shape and noise level, from one forward pass."""
    return maps_of_layers(latents, backbone, read_prompt(backbone, options.tokens), (options.layer,))


def read_prompt(backbone: Backbone, tokens: str) -> Prompt:
    """The empty prompt with its tokens of one kind picked, or all. tokens: a key of TOKENS; UsageError if there are none of this kind."""
    prompt, kind = backbone.null_prompt, TOKENS[tokens]
    if kind is None:
        return prompt
    kept = [number for number, other in enumerate(prompt.kinds) if other == kind]
    known = ', '.join(name for name, other in TOKENS.items() if other is None or other in prompt.kinds)
    require(bool(kept), f'the empty prompt of {backbone.identity.model} has no tokens of this kind: tokens is one of {known}; got {tokens}')
    picked, names, kinds = zip(*((prompt.picked[number], prompt.names[number], kind) for number in kept), strict=True)
    return prompt._replace(picked=picked, names=names, kinds=kinds)


def maps_of_layers(
    latents: Sequence[Latent],
    backbone: Backbone,
    prompt: Prompt,
    layers: Sequence[int],
    head: int | None = None,
    softmax: bool = True,
    refine: Sequence[int] = (),
    order: int = 0,
) -> list[TokenMaps]:
    """Token maps for any prompt, averaged over several layers, from one forward pass. head, softmax: as for `token_attention`.

    order: how often they are refined by the mean self-attention of the layers `refine`, from the same forward pass.
    """
    z, timestep = torch.cat([latent.z for latent in latents]), latents[0].timestep
    maps = attention_maps(z, timestep, backbone, prompt, *layers, head=head, softmax=softmax, refine=refine, order=order)
    if not torch.isfinite(maps).all():
        raise NotFinite(f'attention is not finite in layer {", ".join(map(str, layers))} with {backbone.dtype}: try another --dtype')
    return [TokenMaps(each, prompt.names, latent.frame) for each, latent in zip(maps, latents, strict=True)]


@torch.no_grad()
def attention_maps(
    z: Tensor,
    timestep: float,
    backbone: Backbone,
    prompt: Prompt,
    *layers: int,
    head: int | None = None,
    softmax: bool = True,
    refine: Sequence[int] = (),
    order: int = 0,
) -> Tensor:
    """Image-to-text part of the softmax over all keys, averaged over heads and layers: (B, C, H', W') -> (B, T, h, w) float32.

    refine, order: as for `maps_of_layers`.
    """
    h, w = (length // backbone.patch for length in z.shape[2:])
    picked, first = backbone.text_columns(prompt, h * w), backbone.first_image_token(prompt)
    picture_to_text = partial(token_attention, queries=h * w, picked=picked, first=first, head=head, softmax=softmax)
    requests: dict[Any, Request[Tensor]] = {**requests_of(backbone, layers, picture_to_text)}
    if order:
        requests |= self_requests(backbone, refine, (h, w), first)
    with by_rows(), watch(requests) as kept:
        backbone.denoise(z, timestep, prompt)
    parts = [kept[layer] for layer in layers]  # (B, h w, T) each
    attention = parts[0] if len(parts) == 1 else torch.stack(parts).mean(0)
    maps = attention.transpose(1, 2).unflatten(2, (h, w))  # (B, T, h, w)
    return refined_by(maps, mean_self_attention(kept, refine), order) if order else maps
