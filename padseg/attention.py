"""Attention of one layer of an unchanged transformer: record its queries and keys, then form only the part that is read."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.overrides import TorchFunctionMode

from padseg.errors import PadsegError
from padseg.types import QueryKey

CHUNK = 256  # queries scored at once: 24 heads x 256 x 4250 keys in float32 are 104 MB


class _Stop(Exception):
    """Leaves a forward whose remaining layers are not needed."""


class _Recorder(TorchFunctionMode):
    """Notes query and key of each fused attention call while a watched module runs."""

    def __init__(self, last: int | None) -> None:
        super().__init__()
        self.last = last
        self.running: int | None = None
        self.seen: dict[int, QueryKey] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention and self.running is not None:
            self.seen[self.running] = _query_key(*args, **(kwargs or {}))
            if self.running == self.last:
                raise _Stop
        return func(*args, **(kwargs or {}))


def _query_key(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> QueryKey:
    return QueryKey(query, key, attn_mask)


@contextmanager
def watch(modules: Mapping[int, nn.Module], stop: bool = True) -> Iterator[dict[int, QueryKey]]:
    """Fill a dict {layer: QueryKey} while the block runs a forward through the attention modules given as {layer: module}.

    With stop, the forward ends inside the highest of the layers, before its attention is computed, and so does the block.
    Recorded tensors keep their graph. Raises PadsegError if a layer was never seen (another attention backend is set).
    """
    recorder = _Recorder(max(modules) if stop else None)

    def enter(layer: int) -> Any:
        return lambda *_: setattr(recorder, 'running', layer)

    handles = [module.register_forward_pre_hook(enter(layer)) for layer, module in modules.items()]
    handles += [module.register_forward_hook(lambda *_: setattr(recorder, 'running', None)) for module in modules.values()]
    try:
        with recorder:
            yield recorder.seen
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(set(modules) - set(recorder.seen))
    if missing:
        raise PadsegError(f'no attention recorded in layer {missing}: padseg needs the default attention processors and native backend')


def token_attention(
    seen: QueryKey,
    queries: int,
    picked: Sequence[int],
    chunk: int = CHUNK,
    first: int = 0,
    head: int | None = None,
    softmax: bool = True,
) -> Tensor:
    """Mean over heads of the softmax over all keys, for `queries` queries from `first` on and the picked keys: (B, queries, T) float32.

    head: one head instead of the mean; softmax: False leaves the scores as they are. Only the (B, chunk, L) scores of one head exist at
    any moment; all is float32 whatever the inputs are.
    """
    query, key, mask = seen
    if not 0 < queries <= query.shape[2] - first:
        raise ValueError(f'queries must be in 1..{query.shape[2] - first}; got {queries}')
    heads, scale = range(query.shape[1]) if head is None else [head], query.shape[-1] ** -0.5
    columns = torch.as_tensor(picked, device=key.device)
    total: list[Tensor] = []
    for number in heads:  # one by one, so that the scores of a chunk stay in the processor's cache
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
    """The part of an additive mask, of any shape that is broadcast to (B, heads, N, L), for one head and some queries."""
    full = mask[(None,) * (4 - mask.ndim)]
    return full[:, head if full.shape[1] > 1 else 0, rows if full.shape[2] > 1 else slice(None)]


class _ByRows(TorchFunctionMode):
    """Computes fused attention of 16-bit tensors on a CPU head by head and some rows at a time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention and _plain(*args, **(kwargs or {})):
            compute = _as_one_step if torch.compiler.is_compiling() else attention_by_rows
            return compute(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _plain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *others: Any, **named: Any) -> bool:
    """Whether this is attention of 16-bit tensors on a CPU without mask, dropout, order or scale of its own."""
    unusual = attn_mask is not None or any(others) or any(named.values())
    return not unusual and query.device.type == 'cpu' and query.dtype in (torch.bfloat16, torch.float16)


def by_rows() -> TorchFunctionMode:
    """Inside this context 16-bit attention on CPUs takes half the time of torch's own; scores are rounded to 16 bits, unlike torch's."""
    return _ByRows()


def attention_by_rows(query: Tensor, key: Tensor, value: Tensor, *_: Any, rows: int = CHUNK, **__: Any) -> Tensor:
    """softmax(q k / sqrt(d)) v: (B, heads, N, d) and twice (B, heads, L, d) -> (B, heads, N, d)."""
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
    """The same for torch.compile, which would write out every head and chunk of rows."""
    return _step(query, key, value)
