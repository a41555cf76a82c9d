"""Refinement of any maps by the attention among image tokens, as GoCA and iSeg do: each pixel becomes the mean over what it attends to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from padseg.methods.stages.aggregation import quotient


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
