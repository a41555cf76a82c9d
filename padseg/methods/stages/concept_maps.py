"""ConceptAttention: scores of concepts at image tokens, from the attention outputs of both before their projection.

Axes: B pictures, K concepts, N = h w image tokens, C = heads times their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from padseg.backbones import Backbone
from padseg.backbones.cpu_attention import by_rows
from padseg.backbones.recorder import Request, What, watch
from padseg.backbones.third_stream import Places, places_of, third_stream, with_concepts
from padseg.errors import NotFinite
from padseg.methods.stages.aggregation import quotient
from padseg.methods.stages.attention import token_attention
from padseg.types import Attention, Latent, Prompt


class Concepts(NamedTuple):
    """Encoded names. embeds: (1, n, D), the tokens of all names; shares: (K, n), by which tokens make up the vector of each name."""

    embeds: Tensor
    shares: Tensor


class Reading(NamedTuple):
    """What to read. layers: by number; read: outputs or attention; normalise: none, linear or length; softmax: over concepts.

    sees: what concepts attend to, one of SEES; pooled: (1, E), their own pooled vector, or None for the prompt's. guidance: as for
    `Backbone.denoise`. pads: a layer whose attention from image to the prompt's picked tokens is kept besides, or None.
    """

    layers: tuple[int, ...]
    read: str = 'outputs'
    normalise: str = 'none'
    softmax: bool = True
    sees: str = 'both'
    pooled: Tensor | None = None
    guidance: float | None = None
    pads: int | None = None


class ConceptMaps(NamedTuple):
    """maps: (B, K, h, w) float32, the mean over layers; pads: (B, T, h, w), or None."""

    maps: Tensor
    pads: Tensor | None


def linear_normalised(concepts: Tensor) -> Tensor:
    """Every channel's values as shares over the concepts, of what is above the smallest of them: (B, K, C) -> (B, K, C)."""
    above = concepts - concepts.amin(1, keepdim=True)
    return quotient(above, above.sum(1, keepdim=True))


def unit_length(concepts: Tensor) -> Tensor:
    """(B, K, C) -> (B, K, C)."""
    return torch.nn.functional.normalize(concepts, dim=2)


def concept_scores(image: Tensor, concepts: Tensor, normalise: str = 'none', softmax: bool = True) -> Tensor:
    """Inner products of concepts with image tokens, or their softmax over concepts: (B, N, C), (B, K, C) -> (B, K, N)."""
    scaled = {'none': lambda vectors: vectors, 'linear': linear_normalised, 'length': unit_length}[normalise](concepts)
    products = scaled @ image.transpose(1, 2)
    return products.softmax(1) if softmax else products


@torch.no_grad()
def concept_maps(latents: Sequence[Latent], backbone: Backbone, prompt: Prompt, concepts: Concepts, reading: Reading) -> ConceptMaps:
    """Maps of concepts for latents with the same shape and noise level, from one forward pass."""
    z, timestep = torch.cat([latent.z for latent in latents]), latents[0].timestep
    grid = backbone.grid(0, tuple(z.shape))
    together = with_concepts(prompt, concepts.embeds)
    places = places_of(backbone, together, concepts.embeds.shape[1], grid[0] * grid[1])
    requests: dict[str, Request[Tensor]] = {}
    for layer in reading.layers:
        what: tuple[What, ...] = ('queries', 'keys', 'output') if reading.read == 'outputs' else ('queries', 'keys')
        module = backbone.attention_module(layer, what)

        def read(seen: Attention) -> Tensor:
            return scores_of(seen, places, concepts.shares, reading)

        requests[f'concepts {layer}'] = Request(module, read, what)
    if reading.pads is not None:

        def read_pads(seen: Attention) -> Tensor:
            columns = backbone.text_columns(together, grid[0] * grid[1])
            return pad_attention(seen, places, columns)

        requests['pads'] = Request(backbone.attention_module(reading.pads), read_pads)
    with by_rows(), third_stream(backbone, places, reading.sees, reading.pooled), watch(requests) as kept:
        backbone.denoise(z, timestep, together, reading.guidance)
    maps = sum_of([kept[f'concepts {layer}'] for layer in reading.layers]) / len(reading.layers)  # (B, K, N)
    if not torch.isfinite(maps).all():
        layers = ', '.join(map(str, reading.layers))
        raise NotFinite(f'attention is not finite in layer {layers} with {backbone.dtype}: try another --dtype')
    pads = kept['pads'].transpose(1, 2).unflatten(2, grid) if 'pads' in kept else None
    return ConceptMaps(maps.unflatten(2, grid), pads)


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def scores_of(seen: Attention, places: Places, shares: Tensor, reading: Reading) -> Tensor:
    """The scores of concepts in one layer: (B, K, N), float32 or the dtype of a layer with more bits."""
    if reading.read == 'attention':
        products = seen.key.shape[-1] ** -0.5 * head_joined(seen.key, places.concepts) @ head_joined(seen.query, places.image).mT
        scores = shares.to(products) @ products / seen.key.shape[1]  # the mean over heads
        return scores.softmax(1) if reading.softmax else scores
    assert seen.output is not None
    tokens = head_joined(seen.output, places.concepts)  # (B, n, C)
    return concept_scores(head_joined(seen.output, places.image), shares.to(tokens) @ tokens, reading.normalise, reading.softmax)


def head_joined(tensor: Tensor, place: slice) -> Tensor:
    """Heads side by side: (B, heads, L, d) -> (B, n, C), at least float32."""
    joined = tensor[:, :, place].transpose(1, 2).flatten(2)
    return joined if joined.dtype == torch.float64 else joined.float()


def pad_attention(seen: Attention, places: Places, columns: Sequence[int]) -> Tensor:
    """The attention of image tokens to these columns, as without concepts: (B, N, T) float32."""
    mask = torch.zeros(places.total, dtype=seen.key.dtype, device=seen.key.device)
    mask[places.concepts] = -torch.inf
    rows = places.image
    return token_attention(seen._replace(mask=mask), rows.stop - rows.start, columns, first=rows.start)
