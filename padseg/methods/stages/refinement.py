"""Refinement of any maps by the attention among image tokens, as GoCA and iSeg do: each pixel becomes the mean over what it attends to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from padseg.backbones import Backbone
from padseg.backbones.recorder import Request, requests_of
from padseg.methods.stages.aggregation import Grid, image_map, quotient
from padseg.types import Attention


def self_requests(
    backbone: Backbone, layers: Sequence[int], grid: Grid, first: int, alone: Callable[[Attention], Attention] = lambda seen: seen
) -> dict[Any, Request[Tensor]]:
    """What to record for `mean_self_attention`. first: of the image tokens; alone: takes out tokens that the image does not attend to."""

    def read(seen: Attention) -> Tensor:
        return image_map(alone(seen), first, grid, grid, torch.float32)

    return {f'self {layer}': request for layer, request in requests_of(backbone, layers, read).items()}


def mean_self_attention(kept: Mapping[Any, Tensor], layers: Sequence[int]) -> Tensor:
    """The attention of image tokens to one another, the mean over heads and layers: (B, N, N) float32."""
    return mean_of([kept[f'self {layer}'] for layer in layers])


def refined_by(maps: Tensor, self_map: Tensor, order: int) -> Tensor:
    """Maps multiplied `order` times by the self-attention, whose rows are scaled to sum to 1: (B, K, h, w), (B, N, N) -> (B, K, h, w).

    So what is the same everywhere stays, and what sums to 1 over maps still does.
    """
    weights = quotient(self_map, self_map.sum(2, keepdim=True)).transpose(1, 2).to(maps)
    values = maps.flatten(2)
    for _ in range(order):
        values = values @ weights
    return values.unflatten(2, maps.shape[2:])


def mean_of(parts: Sequence[Tensor]) -> Tensor:
    """The mean of what several layers give, one added after another."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / len(parts)
