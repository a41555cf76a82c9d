"""Muon (Jordan et al. 2024) in the precision that suits the device.

torch.optim.Muon orthogonalises in bfloat16 everywhere. A CPU that emulates bfloat16 takes half a minute for one step of the embedded model.
"""

from __future__ import annotations

import math
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
            for weight in group['params']:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                average = state.setdefault('momentum_buffer', torch.zeros_like(weight.grad))
                average.lerp_(weight.grad, 1 - momentum)
                update = orthogonalise(weight.grad.lerp(average, momentum), group['ns_coefficients'], group['ns_steps'], group['eps'])
                weight.mul_(1 - rate * group['weight_decay'])
                weight.add_(update, alpha=-rate * 0.2 * math.sqrt(max(weight.shape)))


def orthogonalise(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Move the singular values of a matrix (M, N) towards 1 by so many Newton-Schulz iterations of the fifth order."""
    a, b, c = coefficients
    x = matrix.to(torch.bfloat16 if has_bfloat16(matrix.device) else torch.float32)
    if tall := matrix.shape[0] > matrix.shape[1]:
        x = x.T.contiguous()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
