"""Muon (Jordan et al. 2024) in the precision that suits the device.

torch.optim.Muon orthogonalises in bfloat16 everywhere. A CPU that emulates bfloat16 takes half a minute for one step of the embedded model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from padseg.backbones.parts import has_bfloat16


class Muon(torch.optim.Muon):
    """torch.optim.Muon with `match_rms_adamw`, whose update is worked out in float32 on devices without bfloat16."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            rate, momentum = group['lr'], group['momentum']
            for weights in alike([weight for weight in group['params'] if weight.grad is not None]):
                gradients: list[Any] = [weight.grad for weight in weights]
                averages = [self.state[weight].setdefault('momentum_buffer', torch.zeros_like(weight)) for weight in weights]
                torch._foreach_lerp_(averages, gradients, 1 - momentum)
                matrices = torch.stack(torch._foreach_lerp(gradients, averages, momentum))
                updates = orthogonalise(matrices, group['ns_coefficients'], group['ns_steps'], group['eps'])
                torch._foreach_mul_(weights, 1 - rate * group['weight_decay'])
                torch._foreach_add_(weights, list(updates.float().unbind()), alpha=-rate * 0.2 * math.sqrt(max(weights[0].shape)))


def alike(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group matrices by shape, so that all of one shape are worked on in one product, which a GPU needs."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        groups.setdefault(weight.shape, []).append(weight)
    return list(groups.values())


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Move the singular values of matrices (..., M, N) towards 1 by so many Newton-Schulz iterations of the fifth order."""
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16 if has_bfloat16(matrices.device) else torch.float32)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT.contiguous()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
