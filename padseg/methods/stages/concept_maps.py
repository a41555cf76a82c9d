"""ConceptAttention: scores of concepts at image tokens, from the attention outputs of both before their projection.

Axes: B pictures, K concepts, N = h w image tokens, C = heads times their width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from padseg.backbones import Backbone
from padseg.backbones.cpu_attention import by_rows
from padseg.backbones.recorder import Request, What, requests_of, watch
from padseg.backbones.texts import Texts
from padseg.backbones.third_stream import Places, picked, places_of, third_stream, with_concepts
from padseg.errors import NotFinite
from padseg.methods.stages.aggregation import quotient
from padseg.methods.stages.attention import token_attention
from padseg.methods.stages.prompts import prompt_of, split
from padseg.methods.stages.refinement import mean_of, mean_self_attention, refined_by, self_requests
from padseg.types import Attention, Latent, Prompt


class Concepts(NamedTuple):
    """Encoded names. embeds: (1, n, D), the tokens of all names; shares: (K, n), by which tokens make up the vector of each name."""

    embeds: Tensor
    shares: Tensor


class Reading(NamedTuple):
    """What to read. layers: by number; read: outputs or attention; normalise: none, linear or length; softmax: over concepts.

    sees: what concepts attend to, one of SEES; pooled: (1, E), their own pooled vector, or None for the prompt's. guidance: as for
    `Backbone.denoise`. refine: layers whose mean self-attention refines the maps, `order` times. pads: a layer whose attention from
    image to the prompt's picked tokens is kept besides, or None.
    """

    layers: tuple[int, ...]
    read: str = 'outputs'
    normalise: str = 'none'
    softmax: bool = True
    sees: str = 'both'
    pooled: Tensor | None = None
    guidance: float | None = None
    refine: tuple[int, ...] = ()
    order: int = 0
    pads: int | None = None


class ConceptMaps(NamedTuple):
    """maps: (B, K, h, w), the mean over layers; pads: (B, T, h, w) float32, or None."""

    maps: Tensor
    pads: Tensor | None


class Wanted(NamedTuple):
    """How names become prompts, see `PromptOptions`."""

    prompt: str
    encoders: str
    unused: str
    columns: str
    blanks: bool


def concepts_of(names: Sequence[str], texts: Texts, encoders: str, columns: str, tokens: str, wording: str) -> Concepts:
    """Encode names with the encoders whose columns are read. tokens: mean or first; wording: alone or joined.

    UsageError for a name that is too long or has no tokens.
    """
    wanted = Wanted('joined', encoders, 'zeros', columns, tokens == 'first')  # the released code takes whatever comes first, a blank too
    texts_of_names = [split([name], texts, wanted) for name in names] if wording == 'alone' else [split(names, texts, wanted)]
    embeds: list[Tensor] = []
    owners: list[int] = []
    weights: list[float] = []
    for prompt in [prompt_of(own, texts, wanted) for several in texts_of_names for own in several]:
        seen = set()
        for column, name, weight in zip(prompt.picked, prompt.names, prompt.weights, strict=True):
            if tokens == 'first' and name in seen:
                continue
            seen.add(name)
            embeds.append(prompt.embeds[:, column])
            owners.append(names.index(name))
            weights.append(1.0 if tokens == 'first' else weight)
    shares = torch.zeros(len(names), len(owners), dtype=torch.float64)
    shares[owners, range(len(owners))] = torch.tensor(weights, dtype=torch.float64)
    return Concepts(torch.stack(embeds, 1), shares)


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
    count, first = math.prod(grid), backbone.first_image_token(prompt)
    together = with_concepts(prompt, concepts.embeds)
    places = places_of(backbone, together, count)
    what: tuple[What, ...] = ('queries', 'keys', 'output') if reading.read == 'outputs' else ('queries', 'keys')
    read = partial(scores_of, places=places, shares=concepts.shares, reading=reading)
    requests: dict[Any, Request[Tensor]] = {**requests_of(backbone, reading.layers, read, what)}
    if reading.order:
        requests |= self_requests(backbone, reading.refine, grid, first, partial(without_concepts, places=places))
    if reading.pads is not None:
        columns = backbone.text_columns(prompt, count)

        def read_pads(seen: Attention) -> Tensor:
            return token_attention(without_concepts(seen, places), count, columns, first=first)

        requests['pads'] = requests_of(backbone, [reading.pads], read_pads)[reading.pads]
    with by_rows(), third_stream(backbone, places, reading.sees, reading.pooled), watch(requests) as kept:
        backbone.denoise(z, timestep, together, reading.guidance)
    maps = mean_of([kept[layer] for layer in reading.layers]).unflatten(2, grid)  # (B, K, h, w)
    if reading.order:
        maps = refined_by(maps, mean_self_attention(kept, reading.refine), reading.order)
    if not torch.isfinite(maps).all():
        layers = ', '.join(map(str, reading.layers))
        raise NotFinite(f'attention is not finite in layer {layers} with {backbone.dtype}: try another --dtype')
    return ConceptMaps(maps, kept['pads'].transpose(1, 2).unflatten(2, grid) if 'pads' in kept else None)


def without_concepts(seen: Attention, places: Places) -> Attention:
    """Queries and keys of image and prompt alone, which meet no others."""
    return Attention(picked(seen.query, places.others), picked(seen.key, places.others))


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
