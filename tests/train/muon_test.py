"""Muon against torch's own, and its orthogonal matrices against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from padseg.backbones.parts import has_bfloat16
from padseg.train.muon import Muon, orthogonalise

CUBIC = (1.5, -0.5, 0.0)  # converges to the orthogonal matrix itself


@pytest.mark.parametrize('shape', [(8, 8), (6, 20), (20, 6)])
def test_iterations_that_converge_give_the_nearest_orthogonal_matrix(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    tolerance = 0.05 if has_bfloat16(matrix.device) else 1e-4
    torch.testing.assert_close(orthogonalise(matrix, CUBIC, 60, 1e-7).float(), left @ right, atol=tolerance, rtol=0)


@pytest.mark.parametrize('shape', [(8, 8), (6, 20), (20, 6)])
def test_steps_are_those_of_torch_but_for_rounding(shape):
    """Torch's update is always rounded to bfloat16, 8 bits: each step may differ by that share of its length, or twice if ours is too."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(first.clone()) for _ in range(2))
    settings = {'lr': 0.1, 'weight_decay': 0.02, 'adjust_lr_fn': 'match_rms_adamw'}
    optimisers = Muon([ours], **settings), torch.optim.Muon([theirs], **settings)
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        for weight, optimiser in zip((ours, theirs), optimisers, strict=True):
            weight.grad = gradient.clone()
            optimiser.step()
    moved = (theirs - first).norm()
    assert (ours - theirs).norm() < (0.04 if has_bfloat16(first.device) else 0.02) * moved
    assert optimisers[0].state_dict()['state'][0]['momentum_buffer'].equal(optimisers[1].state_dict()['state'][0]['momentum_buffer'])
