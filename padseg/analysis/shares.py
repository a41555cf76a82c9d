"""Where attention goes: shares between sets of tokens, by block and noise level (Seg4Diff, Sec. 3).

Shares are read from log-sum-exps, so that no attention matrix is kept: the share that goes to a set of keys is
exp(log-sum-exp over the set - log-sum-exp over all keys).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from padseg.analysis.recording import Sight, Source, over_pictures, sizes
from padseg.methods.stages.attention import CHUNK, of_head
from padseg.types import Array, Attention


class Shares(NamedTuple):
    """Shares of attention. steps: S; sets: names of G sets of tokens; tokens: (G,), mean number in each; pictures: their number.

    mean, std: (S, layers, G, G), from rows (queries) to columns (keys), over pictures; uniform: (G,), what attention without preference
    would give each set; enrichment: (S, layers, G, G), mean of share / uniform.
    """

    pictures: int
    steps: list[int]
    sets: list[str]
    tokens: Array
    uniform: Array
    mean: Array
    std: Array
    enrichment: Array


def set_masses(seen: Attention, sets: Mapping[str, Sequence[int]], chunk: int = CHUNK) -> Tensor:
    """Share of the attention of every token that goes to each set of keys: (heads, N, G) float32, of the first picture of the batch.

    Only the (chunk, L) scores of one head exist at any time.
    """
    query, key, mask = seen.query, seen.key, seen.mask
    heads, scale = query.shape[1], query.shape[-1] ** -0.5
    columns = [torch.as_tensor(tokens, dtype=torch.long, device=key.device) for tokens in sets.values()]
    masses = torch.empty(heads, query.shape[2], len(columns), device=key.device)
    for head in range(heads):
        keys = key[0, head].float().T  # (d, L)
        for start in range(0, query.shape[2], chunk):
            rows = slice(start, start + chunk)
            scores = (query[0, head, rows].float() * scale) @ keys  # (chunk, L)
            if mask is not None:
                scores = scores + of_head(mask, head, rows)[0]
            whole = scores.logsumexp(1)
            for number, tokens in enumerate(columns):
                masses[head, rows, number] = (scores[:, tokens].logsumexp(1) - whole).exp()
    return masses


def set_shares(seen: Attention, sets: Mapping[str, Sequence[int]]) -> Array:
    """Attention from each set of tokens to each, averaged over heads and over the queries of a set: (G, G), NaN for sets without tokens."""
    masses = set_masses(seen, sets).mean(0).double()  # (N, G)
    none = np.full(len(sets), np.nan)
    shares = np.stack([masses[list(tokens)].mean(0).cpu().numpy() if tokens else none for tokens in sets.values()])
    shares[:, [not tokens for tokens in sets.values()]] = np.nan
    return shares


def measure(source: Source) -> Shares:
    """Measure the shares of every block over pictures. Sets that are empty for all pictures are left out."""
    readings: list[tuple[Sight, Array]] = []
    relative: list[tuple[Sight, Array]] = []
    for sight, shares in source(lambda seen, sight: set_shares(seen, sight.sets)):
        readings.append((sight, np.stack(shares)))
        relative.append((sight, readings[-1][1] / uniform_of(sight)))
    (mean, std), (enrichment, _) = over_pictures(readings), over_pictures(relative)
    tokens = over_pictures([(sight, sizes(sight.sets)) for sight, _ in readings])[0][0]
    uniform = over_pictures([(sight, uniform_of(sight)) for sight, _ in readings])[0][0]
    there = ~np.isnan(tokens)
    kept = np.ix_(range(len(mean)), range(mean.shape[1]), there, there)
    return Shares(
        pictures=len({sight.name for sight, _ in readings}),
        steps=list(dict.fromkeys(sight.step for sight, _ in readings)),
        sets=[name for name, tokens_there in zip(readings[0][0].sets, there, strict=True) if tokens_there],
        tokens=tokens[there],
        uniform=uniform[there],
        mean=mean[kept],
        std=std[kept],
        enrichment=enrichment[kept],
    )


def uniform_of(sight: Sight) -> Array:
    """Part of the keys that is in each set: (G,)."""
    return sizes(sight.sets) / sum(len(sight.sets.get(name, ())) for name in ('image', 'text', 'others'))


def rows(shares: Shares) -> list[dict[str, Any]]:
    """A row for every step, layer, set of queries and set of keys."""
    return [
        {
            'step': step,
            'layer': layer,
            'queries': queries,
            'keys': keys,
            'query_tokens': float(shares.tokens[i]),
            'key_tokens': float(shares.tokens[j]),
            'share': float(shares.mean[s, layer, i, j]),
            'std': float(shares.std[s, layer, i, j]),
            'uniform': float(shares.uniform[j]),
            'enrichment': float(shares.enrichment[s, layer, i, j]),
        }
        for s, step in enumerate(shares.steps)
        for layer in range(shares.mean.shape[1])
        for i, queries in enumerate(shares.sets)
        for j, keys in enumerate(shares.sets)
    ]


def summary(shares: Shares) -> list[dict[str, Any]]:
    """A row for every step and layer: from the image to each set of text tokens, and from each of them to the image."""
    image, others = shares.sets.index('image'), [name for name in shares.sets if name != 'image']
    return [
        {
            'step': step,
            'layer': layer,
            **{f'image→{name}': float(shares.mean[s, layer, image, shares.sets.index(name)]) for name in others},
            **{f'{name}→image': float(shares.mean[s, layer, shares.sets.index(name), image]) for name in others},
        }
        for s, step in enumerate(shares.steps)
        for layer in range(shares.mean.shape[1])
    ]
