"""Which latents share a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from padseg.backbones import Backbone
from padseg.types import Latent

T = TypeVar('T')


def batched(latents: Sequence[Latent], backbone: Backbone, read: Callable[[list[Latent]], list[T]]) -> list[T]:
    """Apply `read` to all latents and return its results in order; on a GPU, latents of the same shape share a forward pass.

    On a CPU, batching saves no time and would change the rounding of matrix products; a result must not depend on its neighbours.
    """
    groups = [[number] for number in range(len(latents))] if backbone.device.type == 'cpu' else alike([each.z.shape for each in latents])
    results = {number: result for group in groups for number, result in zip(group, read([latents[i] for i in group]), strict=True)}
    return [results[number] for number in range(len(latents))]


def alike(shapes: Sequence[Hashable]) -> list[list[int]]:
    """Group the positions of equal shapes, in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for number, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(number)
    return list(groups.values())
