"""Which latents share a forward."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from padseg.backbones import Backbone
from padseg.types import Latent

T = TypeVar('T')


def batched(latents: Sequence[Latent], backbone: Backbone, read: Callable[[list[Latent]], list[T]]) -> list[T]:
    """What `read` gives for every latent, in their order; on a GPU those of one shape share a forward.

    On a CPU a batch saves nothing and would let matrix products round otherwise; a result must not depend on its neighbours.
    """
    groups = [[number] for number in range(len(latents))] if backbone.device.type == 'cpu' else alike([each.z.shape for each in latents])
    results = {number: result for group in groups for number, result in zip(group, read([latents[i] for i in group]), strict=True)}
    return [results[number] for number in range(len(latents))]


def alike(shapes: Sequence[Hashable]) -> list[list[int]]:
    """The places of equal shapes, in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for number, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(number)
    return list(groups.values())
