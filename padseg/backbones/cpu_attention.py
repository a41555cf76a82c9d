"""16-bit attention on CPUs that takes half the time of torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ROWS = 256  # queries per step; their scores fit in the processor's cache


class _ByRows(TorchFunctionMode):
    """A mode that computes fused attention of 16-bit CPU tensors head by head, a few rows at a time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention and _plain(*args, **(kwargs or {})):
            compute = _as_one_step if torch.compiler.is_compiling() else attention_by_rows
            return compute(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _plain(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *others: Any, scale: float | None = None, **named: Any
) -> bool:
    """Return whether this is 16-bit attention on a CPU without a mask, dropout, causality or a scale other than the usual."""
    unusual = attn_mask is not None or any(others) or any(named.values()) or scale not in (None, query.shape[-1] ** -0.5)
    return not unusual and query.device.type == 'cpu' and query.dtype in (torch.bfloat16, torch.float16)


def by_rows() -> TorchFunctionMode:
    """Context in which 16-bit attention on CPUs takes half the time of torch's own. Unlike in torch's, scores are rounded to 16 bits."""
    return _ByRows()


def attention_by_rows(query: Tensor, key: Tensor, value: Tensor, *_: Any, rows: int = ROWS, **__: Any) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v: query (B, heads, N, d), key and value (B, heads, L, d) -> (B, heads, N, d)."""
    out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=value.dtype)
    scale = query.shape[-1] ** -0.5
    for batch in range(query.shape[0]):
        for head in range(query.shape[1]):
            keys, values = key[batch, head].T, value[batch, head]
            for start in range(0, query.shape[2], rows):
                part = slice(start, start + rows)
                scores = (query[batch, head, part] * scale) @ keys  # (rows, L)
                torch.matmul(scores.softmax(-1), values, out=out[batch, head, part])
    return out


@torch.library.custom_op('padseg::attention_by_rows', mutates_args=())
def _step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention_by_rows(query, key, value)


@_step.register_fake
def _shape(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _as_one_step(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Wrap `attention_by_rows` as one operator for torch.compile, which would otherwise unroll every head and chunk of rows."""
    return _step(query, key, value)
