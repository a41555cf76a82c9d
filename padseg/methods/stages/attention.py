"""Attention of one layer, computed only for the part that is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padseg.types import Attention

CHUNK = 256  # queries per step; 24 heads x 256 x 4250 keys in float32 are 104 MB


def token_attention(
    seen: Attention,
    queries: int,
    picked: Sequence[int],
    chunk: int = CHUNK,
    first: int = 0,
    head: int | None = None,
    softmax: bool = True,
) -> Tensor:
    """Softmax over all keys at the picked keys, averaged over heads, for `queries` queries from `first` on: (B, queries, T) float32.

    head: use one head instead of the mean; softmax: False returns the raw scores. Only the (B, chunk, L) scores of one head exist at any
    time; everything is computed in float32, whatever the inputs' dtype.
    """
    query, key, mask = seen.query, seen.key, seen.mask
    if not 0 < queries <= query.shape[2] - first:
        raise ValueError(f'queries must be in 1..{query.shape[2] - first}; got {queries}')
    heads, scale = range(query.shape[1]) if head is None else [head], query.shape[-1] ** -0.5
    columns = torch.as_tensor(picked, device=key.device)
    total: list[Tensor] = []
    for number in heads:  # one at a time, so that a chunk's scores stay in the processor's cache
        keys = key[:, number].float().transpose(1, 2)  # (B, d, L)
        parts = []
        for start in range(first, first + queries, chunk):
            rows = slice(start, min(start + chunk, first + queries))
            scores = (query[:, number, rows].float() * scale) @ keys  # (B, chunk, L)
            if mask is not None:
                scores = scores + of_head(mask, number, rows)
            parts.append((scores.softmax(-1) if softmax else scores)[..., columns])  # (B, chunk, T)
        total = [torch.cat(parts, 1) if not total else total[0] + torch.cat(parts, 1)]
    return total[0] / len(heads)  # (B, queries, T)


def of_head(mask: Tensor, head: int, rows: slice) -> Tensor:
    """Part of an additive mask, of any shape that broadcasts to (B, heads, N, L), for one head and a range of queries."""
    full = mask[(None,) * (4 - mask.ndim)]
    return full[:, head if full.shape[1] > 1 else 0, rows if full.shape[2] > 1 else slice(None)]
