"""Record queries, keys, values and outputs of chosen attention layers of an unmodified transformer, reduced while the layer runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from padseg.errors import PadsegError
from padseg.types import Attention

if TYPE_CHECKING:
    from padseg.backbones import Backbone

T = TypeVar('T')
What = Literal['queries', 'keys', 'values', 'output']
QUERIES_AND_KEYS: tuple[What, ...] = ('queries', 'keys')


@dataclasses.dataclass(frozen=True)
class Request(Generic[T]):
    """A request to record one attention module. reduce: computes the result to keep from the call's tensors, which are freed afterwards.

    what: the tensors that `reduce` reads. Queries and keys are always given; values, and the output before its projection, only on request.
    """

    module: nn.Module
    reduce: Callable[[Attention], T]
    what: tuple[What, ...] = QUERIES_AND_KEYS


def requests_of(
    backbone: Backbone, layers: Iterable[int], reduce: Callable[[Attention], T], what: tuple[What, ...] = QUERIES_AND_KEYS
) -> dict[int, Request[T]]:
    """Make the same request for several layers of a model. UsageError for a layer that was not fully loaded or is compiled."""
    return {layer: Request(backbone.attention_module(layer, what), reduce, what) for layer in layers}


class _Stop(Exception):
    """Leaves a forward pass whose remaining layers are not needed."""


class _Recorder(TorchFunctionMode):
    """Answers requests inside the running module's fused attention call."""

    def __init__(self, requests: Mapping[Any, Request[Any]], stop: bool) -> None:
        super().__init__()
        self.requests = requests
        self.stop = stop
        self.running: nn.Module | None = None
        self.kept: dict[Any, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention or self.running is None:
            return func(*args, **kwargs)
        wanted = {key: request for key, request in self.requests.items() if request.module is self.running}
        last = self.stop and self.requests.keys() <= self.kept.keys() | wanted.keys()
        needed = not last or any('output' in request.what for request in wanted.values())
        seen = inputs_of(*args, **kwargs)._replace(output=func(*args, **kwargs) if needed else None)
        for key, request in wanted.items():
            self.kept[key] = request.reduce(_only(seen, request.what))
        if last:
            raise _Stop
        return seen.output


def inputs_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attention:
    """The inputs of a call of fused attention, with the names of torch's arguments. PadsegError for a kind that padseg cannot read."""
    if is_causal or scale not in (None, query.shape[-1] ** -0.5) or enable_gqa:
        raise PadsegError('padseg cannot read attention that is causal, has its own scale or groups heads')
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return Attention(query, key, value, attn_mask)


def _only(seen: Attention, what: tuple[What, ...]) -> Attention:
    return seen._replace(value=seen.value if 'values' in what else None, output=seen.output if 'output' in what else None)


@contextmanager
def watch(requests: Mapping[Any, Request[T]], stop: bool = True) -> Iterator[dict[Any, T]]:
    """Fill a dict with the result of each request, under the request's key, while the block runs a forward pass.

    With `stop`, forward pass and block end inside the last requested module, before its attention is computed unless its output is
    requested. Reductions keep their graph. Raises PadsegError if a request stays unanswered (another attention backend is set).
    """
    recorder = _Recorder(requests, stop)
    modules = {request.module: None for request in requests.values()}
    handles = [module.register_forward_pre_hook(lambda module, _: setattr(recorder, 'running', module)) for module in modules]
    handles += [module.register_forward_hook(lambda *_: setattr(recorder, 'running', None)) for module in modules]
    try:
        with recorder:
            yield recorder.kept
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = [key for key in requests if key not in recorder.kept]
    if missing:
        raise PadsegError(f'no attention recorded in layer {missing}: padseg needs the default attention processors and native backend')
