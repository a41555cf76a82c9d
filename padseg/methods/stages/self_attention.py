"""Noised latents -> what self-attention holds of image tokens: its maps by grid (DiffSeg), or features of one layer (DiffCut)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from padseg.backbones import Backbone
from padseg.backbones.cpu_attention import by_rows
from padseg.backbones.recorder import Request, What, watch
from padseg.errors import NotFinite
from padseg.methods.stages.aggregation import Grid, self_map, smaller_grid
from padseg.methods.stages.attention import token_attention
from padseg.methods.stages.cross_maps import result_grid
from padseg.types import Attention, Latent, Prompt, TokenMaps

READ: dict[str, tuple[What, ...]] = {'output': ('queries', 'keys', 'output'), 'keys': ('queries', 'keys'), 'maps': ('queries', 'keys')}


class MapsByGrid(NamedTuple):
    """Means over heads and layers of each grid. own: self-attention, (B, N, N) float32; words: attention to the prompt's tokens, (B, N, T).

    to: the grid for the result, the finest with at most 6144 pixels; self-attention of layers of finer grids is reduced to it.
    """

    own: dict[Grid, Tensor]
    words: dict[Grid, Tensor]
    to: Grid


@torch.no_grad()
def maps_by_grid(latents: Sequence[Latent], backbone: Backbone, prompt: Prompt | None = None) -> MapsByGrid:
    """The attention of a U-Net by grid, from one forward pass. Without a prompt, it runs with the empty one, whose words are left out."""
    z, timestep = torch.cat([latent.z for latent in latents]), latents[0].timestep
    grids = {layer: backbone.grid(layer, tuple(z.shape)) for layer in range(backbone.layers)}
    to = result_grid(grids.values())
    counts = Counter(smaller_grid(grid, to) for grid in grids.values())
    first = backbone.first_image_token(backbone.null_prompt)
    means: dict[Grid, Tensor] = {}
    words: dict[Grid, Tensor] = {}
    layers = Counter(grids.values())

    def add_words(seen: Attention, grid: Grid) -> None:
        assert prompt is not None
        columns = backbone.text_columns(prompt._replace(picked=tuple(range(prompt.embeds.shape[1]))), math.prod(grid))
        own = token_attention(seen, math.prod(grid), columns) / layers[grid]
        words[grid] = words[grid].add_(own) if grid in words else own

    def add(seen: Attention, grid: Grid) -> None:
        kept = smaller_grid(grid, to)
        own = self_map(seen, grid, kept, first)
        means[kept] = means[kept].add_(own, alpha=1 / counts[kept]) if kept in means else own.mul_(1 / counts[kept])

    requests: dict[tuple[int, bool], Request[None]] = {}
    for layer, grid in grids.items():
        requests[layer, False] = Request(backbone.self_attention_module(layer), partial(add, grid=grid))
        if prompt:
            requests[layer, True] = Request(backbone.attention_module(layer), partial(add_words, grid=grid))
    with by_rows(), watch(requests):
        backbone.denoise(z, timestep, prompt or backbone.null_prompt)
    if not all(torch.isfinite(maps).all() for maps in (*means.values(), *words.values())):
        raise NotFinite(f'attention is not finite with {backbone.dtype}: try another --dtype')
    return MapsByGrid(means, words, to)


@torch.no_grad()
def features_of_layer(latents: Sequence[Latent], backbone: Backbone, layer: int, of: str) -> list[TokenMaps]:
    """Features of the image tokens of a layer, (C, h, w) float32 for each picture, from one forward pass that ends there.

    of: output of the self-attention, projected as in the block, before the residual; its keys, heads side by side; or maps, the shares of
    attention that go to each token of the empty prompt.
    """
    z, timestep, prompt = torch.cat([latent.z for latent in latents]), latents[0].timestep, backbone.null_prompt
    grid, first = backbone.grid(layer, tuple(z.shape)), backbone.first_image_token(prompt)
    count = math.prod(grid)
    projection = backbone.self_output_projection(layer) if of == 'output' else None
    columns = backbone.text_columns(prompt, count)

    def read(seen: Attention) -> Tensor:
        if of == 'maps':
            return token_attention(seen, count, columns, first=first)
        tensor = seen.output if of == 'output' else seen.key
        assert tensor is not None
        pixels = tensor[:, :, first : first + count].transpose(1, 2).flatten(2).float()  # (B, N, C)
        if projection is None:
            return pixels
        weight, bias = projection
        return linear(pixels, weight.float(), bias if bias is None else bias.float())

    module = backbone.attention_module(layer) if of == 'maps' else backbone.self_attention_module(layer, READ[of])
    with by_rows(), watch({layer: Request(module, read, READ[of])}) as kept:
        backbone.denoise(z, timestep, prompt)
    features = kept[layer].transpose(1, 2).unflatten(2, grid)  # (B, C, h, w)
    if not torch.isfinite(features).all():
        raise NotFinite(f'features of layer {layer} are not finite with {backbone.dtype}: try another --dtype')
    names = prompt.names if of == 'maps' else tuple(map(str, range(features.shape[1])))
    return [TokenMaps(own, names, latent.frame) for own, latent in zip(features, latents, strict=True)]
