"""Norms of values: how much a token brings along where it is attended to, by block and head (Seg4Diff, Fig. 4 and 28)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from padseg.analysis.recording import Sight, Source, over_pictures, sizes
from padseg.types import Array, Attention


class Norms(NamedTuple):
    """Norms of values. steps: S; sets: names of G sets of tokens; tokens: (G,), mean number in each.

    mean, std: (S, layers, 1 + heads, G) over pictures; the first is of all heads together, the others of single ones.
    """

    pictures: int
    steps: list[int]
    sets: list[str]
    tokens: Array
    mean: Array
    std: Array


def set_norms(values: Tensor, sets: Mapping[str, Sequence[int]]) -> Array:
    """Mean Euclidean norm of values (heads, L, d) in each set of tokens: (1 + heads, G), NaN for sets without tokens.

    First of all heads side by side, then of each head.
    """
    squares = values.double().square().sum(2)  # (heads, L)
    norms = np.concatenate((squares.sum(0, keepdim=True).sqrt().cpu().numpy(), squares.sqrt().cpu().numpy()))  # (1 + heads, L)
    none = np.full(len(norms), np.nan)
    return np.stack([norms[:, list(tokens)].mean(1) if tokens else none for tokens in sets.values()], axis=1)


def filled_sets(sets: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """As `sets`, but `text` without the slots that no text encoder fills: their values are a constant of the model."""
    empty = set(sets['empty'])
    return {name: [token for token in tokens if name != 'text' or token not in empty] for name, tokens in sets.items()}


def measure(source: Source) -> Norms:
    """Measure the norms of every block over pictures. Sets that are empty for all pictures are left out."""

    def read(seen: Attention, sight: Sight) -> Array:
        assert seen.value is not None  # requested below
        return set_norms(seen.value[0], filled_sets(sight.sets))

    readings = [(sight, np.stack(norms)) for sight, norms in source(read, ('values',))]
    mean, std = over_pictures(readings)
    tokens = over_pictures([(sight, sizes(filled_sets(sight.sets))) for sight, _ in readings])[0][0]
    there = ~np.isnan(tokens)
    return Norms(
        pictures=len({sight.name for sight, _ in readings}),
        steps=list(dict.fromkeys(sight.step for sight, _ in readings)),
        sets=[name for name, tokens_there in zip(readings[0][0].sets, there, strict=True) if tokens_there],
        tokens=tokens[there],
        mean=mean[..., there],
        std=std[..., there],
    )


def rows(norms: Norms) -> list[dict[str, Any]]:
    """A row for every step, layer, head (None: all together) and set."""
    return [
        {
            'step': step,
            'layer': layer,
            'head': place - 1 if place else None,
            'set': name,
            'tokens': float(norms.tokens[number]),
            'norm': float(norms.mean[s, layer, place, number]),
            'std': float(norms.std[s, layer, place, number]),
        }
        for s, step in enumerate(norms.steps)
        for layer in range(norms.mean.shape[1])
        for place in range(norms.mean.shape[2])
        for number, name in enumerate(norms.sets)
    ]


def summary(norms: Norms) -> list[dict[str, Any]]:
    """A row for every step and layer, of all heads together."""
    return [
        {'step': step, 'layer': layer, **{name: float(norms.mean[s, layer, 0, number]) for number, name in enumerate(norms.sets)}}
        for s, step in enumerate(norms.steps)
        for layer in range(norms.mean.shape[1])
    ]
