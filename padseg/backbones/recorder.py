"""Queries and keys of chosen layers of an unchanged transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from padseg.errors import PadsegError
from padseg.types import QueryKey


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
