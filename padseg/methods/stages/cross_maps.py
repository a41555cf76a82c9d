"""Noised latents -> GoCA's aggregated map and mean self-attention: one forward pass, every layer reduced while it runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from padseg.backbones import Backbone
from padseg.backbones.cpu_attention import by_rows
from padseg.backbones.recorder import Request, What, watch
from padseg.backbones.weights import all_finite
from padseg.errors import NotFinite
from padseg.methods.stages.aggregation import (
    Grid,
    Heads,
    affinity,
    enlarged,
    layer_maps,
    quotient,
    resized,
    similarity,
    smaller_grid,
    source_pixels,
    token_shares,
)
from padseg.types import Attention, Latent, Prompt

MOST_PIXELS = 6144  # of the result: the paper's 64 x 64, with room for pictures of other shapes


class Plan(NamedTuple):
    """What to read, by layer numbers. cross: layers whose maps are aggregated; refine: whose self-attention is averaged.

    heads, spectral, text_only, single: how heads are weighted, see `Heads`; single: whether blocks without a projection of their own
    take their part of the one that they share. by: how layers are, a key of `similarity`, by the feature of the layer `dense`: its
    queries (cross-q, self-q) or its output (attn-out). half: keep self-attention in 16 bits. guidance: as for `Backbone.denoise`.
    every: of each layer read the queries of every n-th pixel along both sides, but those that refine as they are.
    """

    cross: tuple[int, ...]
    heads: str
    spectral: bool
    text_only: bool
    single: bool
    by: str
    dense: int
    feature: str
    channels: str
    renormalise: bool
    refine: tuple[int, ...]
    half: bool
    guidance: float | None = None
    every: int = 1


class Aggregated(NamedTuple):
    """maps: (B, n, h, w) shares over all n tokens; self_map: (B, N, N), of the same grid, empty if no layer refines; weights: (L, B) of the
    layers, as they ran."""

    maps: Tensor
    self_map: Tensor
    weights: Tensor


@dataclasses.dataclass
class Running:
    """What is kept of the layers that have run. grids: of all layers; to: of the result.

    cross, own: maps of layers that wait for the dense feature, by layer; dense: its affinity.
    """

    plan: Plan
    grids: dict[int, Grid]
    to: Grid
    cross: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    own: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    dense: Tensor | None = None
    maps: Tensor | None = None
    self_map: Tensor | None = None
    weights: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    def add(self, layer: int, cross: Tensor | None, own: Tensor | None) -> None:
        """Take in maps of a layer, (B, N, n) and (B, N, N); whatever is weighted already is added up."""
        plan = self.plan
        waits = layer in plan.cross and plan.by != 'uniform'
        given = smaller_grid(self.grids[layer], self.to)  # grid of `own` of a layer that refines
        if own is not None and layer in plan.refine and not (waits and self.same_grid()):
            self.refine(resized(own.float(), given, self.to))
        if own is not None and waits:
            self.own[layer] = own if layer not in plan.refine else reduced(own, given, self.read_grid(plan.dense))
        if cross is not None:
            grid = self.read_grid(layer)
            self.cross[layer] = enlarged(cross.transpose(1, 2).unflatten(2, grid), smaller_grid(grid, self.to))  # (B, n, h, w)
        ready = plan.by == 'uniform' or self.dense is not None
        for number in sorted(self.cross) if ready else ():
            if plan.by == 'uniform' or number in self.own:
                self.settle(number)

    def settle(self, layer: int) -> None:
        """Eq. 9 and 10 for one layer, whose maps are then forgotten."""
        plan, cross, own = self.plan, self.cross.pop(layer), self.own.pop(layer, None)
        if own is None or self.dense is None:
            weight = torch.ones(len(cross), dtype=torch.float64, device=cross.device)
        else:
            to = self.read_grid(plan.dense)
            given = smaller_grid(self.grids[layer], self.to) if layer in plan.refine else self.grids[layer]
            own = resized(own.to(self.dense.dtype), smaller_grid(given, to), to)
            scaled = quotient(own, own.sum(2, keepdim=True)) if plan.renormalise else own
            weight = similarity(self.dense, scaled, plan.by).clamp_min(0)  # (B,)
            if layer in plan.refine and self.same_grid():
                self.refine(own)
        self.weights[layer] = weight
        maps = weight.to(cross.dtype)[:, None, None, None] * enlarged(cross, self.to)
        self.maps = maps if self.maps is None else self.maps + maps

    def refine(self, own: Tensor) -> None:
        """Add a layer's share to the mean self-attention, (B, N, N)."""
        share = 1 / len(self.plan.refine)
        self.self_map = own * share if self.self_map is None else self.self_map.add_(own, alpha=share)

    def same_grid(self) -> bool:
        """Whether a layer that refines need not be kept apart while it waits: in the grid of the dense feature it is as it is wanted."""
        return self.to == self.read_grid(self.plan.dense)

    def read_grid(self, layer: int) -> Grid:
        """The grid of the queries that are read of a layer."""
        height, width = self.grids[layer]
        return -(-height // self.plan.every), -(-width // self.plan.every)


def reduced(own: Tensor, grid: Grid, to: Grid) -> Tensor:
    return resized(own, grid, smaller_grid(grid, to))


@torch.no_grad()
def aggregated(latents: Sequence[Latent], backbone: Backbone, prompt: Prompt, plan: Plan) -> Aggregated:
    """Aggregate latents with the same shape and noise level over heads and layers, from one forward pass (GoCA, Sec. 3.1 and 3.2).

    Maps have the grid of `result_grid`.
    """
    z, timestep = torch.cat([latent.z for latent in latents]), latents[0].timestep
    requests, running = reading(backbone, prompt, tuple(z.shape), plan)
    with by_rows(), watch(requests):
        backbone.denoise(z, timestep, prompt, plan.guidance)
    return finished(running, backbone.dtype)


Requests = dict[tuple[int, str], Request[None]]


def reading(
    backbone: Backbone, prompt: Prompt, latent_shape: Sequence[int], plan: Plan, rows: slice = slice(None)
) -> tuple[Requests, Running]:
    """What to record while the model runs on latents (..., H', W'), and what it adds up to; see `finished`. rows: of the batch."""
    grids = {layer: backbone.grid(layer, latent_shape) for layer in range(backbone.layers)}
    everything = prompt._replace(picked=tuple(range(prompt.embeds.shape[1])))
    running = Running(plan, grids, result_grid(grids.values()))
    requests: Requests = {}
    for layer in sorted({*plan.cross, *plan.refine, *([plan.dense] if plan.by != 'uniform' else [])}):
        requests |= requests_of_layer(layer, backbone, everything, running, rows)
    return requests, running


def finished(running: Running, dtype: torch.dtype) -> Aggregated:
    """The result, once the model has run. NotFinite if numbers overflowed; dtype: that it ran in."""
    assert running.maps is not None
    weights = torch.stack([running.weights[layer] for layer in sorted(running.weights)])  # (L, B)
    maps = token_shares(quotient(running.maps, weights.sum(0).to(running.maps.dtype)[:, None, None, None]))
    self_map = maps.new_empty(0) if running.self_map is None else running.self_map
    if not (all_finite(maps) and all_finite(self_map)):
        raise NotFinite(f'attention is not finite with {dtype}: try another --dtype')
    return Aggregated(maps, self_map, weights)


def result_grid(grids: Iterable[Grid]) -> Grid:
    """The finest of the layers' grids that has at most MOST_PIXELS, as the mean self-attention takes their square; or the coarsest."""
    by_size = sorted(grids, key=math.prod)
    return ([grid for grid in by_size if math.prod(grid) <= MOST_PIXELS] or by_size[:1])[-1]


def requests_of_layer(layer: int, backbone: Backbone, prompt: Prompt, running: Running, rows: slice) -> Requests:
    """What to record of a layer: one request if the same softmax gives both maps, else one of the cross- and one of the self-attention."""
    plan, grid = running.plan, running.grids[layer]
    cross, own = layer in plan.cross, layer in plan.refine or (layer in plan.cross and plan.by != 'uniform')
    dense = plan.by != 'uniform' and layer == plan.dense
    what: tuple[What, ...] = ('queries', 'keys')
    if cross and plan.heads != 'average':
        what += ('values', 'output')
    if dense and plan.feature == 'attn-out' and 'output' not in what:
        what += ('output',)
    text, image = backbone.attention_module(layer, what), backbone.self_attention_module(layer)
    columns = backbone.text_columns(prompt, math.prod(grid)) if cross else ()
    projection = backbone.output_projection(layer) if 'output' in what else None
    heads = heads_of(plan, projection) if cross else None
    wanted = running.to if layer in plan.refine else running.read_grid(plan.dense)
    among = (grid, wanted, torch.float16 if plan.half else torch.float32) if own else None
    joint = text is image

    def read(seen: Attention, text_part: bool, image_part: bool) -> None:
        seen, first = rows_of(seen, rows), backbone.first_image_token(prompt)
        kept = running.read_grid(layer)
        small, start = (seen, first) if kept == grid else (thinned(seen, first, grid, kept), 0)
        if dense and (image_part if plan.feature == 'self-q' else text_part):
            running.dense = affinity(feature_of(small, plan.feature, projection, start, kept), plan.channels)
        by, among_image = heads if text_part else None, among if image_part else None
        if not (by or among_image):
            running.add(layer, None, None)  # maps of other layers may have waited for the dense feature
            return
        if kept == grid:
            cross, image = layer_maps(seen, columns, by, first, math.prod(grid), among_image)
        elif by and among_image and wanted == kept:
            cross, image = layer_maps(small, columns, by, among=among_image, image_keys=first)
        else:
            cross = layer_maps(small, columns, by)[0]
            image = layer_maps(seen, (), None, first, math.prod(grid), among_image)[1]
        running.add(layer, cross if by else None, image if among_image else None)

    if joint:
        return {(layer, 'joint'): Request(text, partial(read, text_part=True, image_part=True), what)}
    requests: Requests = {}
    if own or (dense and plan.feature == 'self-q'):
        requests[layer, 'self'] = Request(image, partial(read, text_part=False, image_part=True))
    if cross or (dense and plan.feature != 'self-q'):
        requests[layer, 'cross'] = Request(text, partial(read, text_part=True, image_part=False), what)
    return requests


def rows_of(seen: Attention, rows: slice) -> Attention:
    """What attention is given for some rows of the batch."""
    count = len(seen.query)
    parts: list[Any] = [part[rows] if part is not None and part.ndim == 4 and len(part) == count else part for part in seen]
    return Attention(*parts)


def thinned(seen: Attention, first: int, grid: Grid, to: Grid) -> Attention:
    """Attention with the queries alone of the pixels that are nearest to those of a smaller grid. first: the first image token."""
    queries = first + source_pixels(grid, to).to(seen.query.device)
    return seen._replace(query=seen.query[:, :, queries], output=None if seen.output is None else seen.output[:, :, queries])


def heads_of(plan: Plan, projection: tuple[Tensor, Tensor | None] | None) -> Heads:
    """How a layer weighs its heads: by their mean where it has no projection of its own, unless the part of a shared one may do."""
    if projection is None or (projection[1] is None and not plan.single):
        return Heads('average')
    return Heads(plan.heads, projection[0].detach(), plan.spectral, plan.text_only)


def feature_of(seen: Attention, feature: str, projection: tuple[Tensor, Tensor | None] | None, first: int, grid: Grid) -> Tensor:
    """A dense feature of image tokens, heads side by side: (B, C, h, w) float32. An output is projected if the block does this at once."""
    source = seen.output if feature == 'attn-out' else seen.query
    assert source is not None
    pixels = source[:, :, first : first + math.prod(grid)].transpose(1, 2).flatten(2).float()  # (B, N, C)
    if feature == 'attn-out' and projection is not None and projection[1] is not None:
        pixels = torch.nn.functional.linear(pixels, projection[0].float(), projection[1].float())
    return pixels.transpose(1, 2).unflatten(2, grid)
