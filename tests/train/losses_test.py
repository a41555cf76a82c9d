"""The mask loss against loops, all assignments tried."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from padseg.train.losses import mask_loss, match_masks, named_mask_loss, share_over_tokens


def loss_by_loop(maps, masks, counts):
    """The least loss over all ways to give every mask a token of its own."""
    total = 0.0
    for picture, truth, count in zip(maps.tolist(), masks.tolist(), counts.tolist(), strict=True):
        picture, truth = np.array(picture), np.array(truth)[:count]
        area = truth.sum()
        known = truth.sum(0)
        best = math.inf
        for tokens in itertools.permutations(range(len(picture)), count):
            loss = 0.0
            for token, mask in zip(tokens, truth, strict=True):
                overlap = 2 * (picture[token] * mask).sum() / ((picture[token] * known).sum() + mask.sum())
                loss += (1 - overlap) / count - (np.log(picture[token]) * mask).sum() / area
            best = min(best, loss)
        total += best
    return total / len(maps)


def random_case(seed, tokens=5, masks=3):
    generator = torch.Generator().manual_seed(seed)
    maps = share_over_tokens(torch.rand((2, tokens, 4, 5), generator=generator) ** 2 + 0.01)
    owner = torch.randint(0, masks + 1, (2, 1, 4, 5), generator=generator)  # the last number is ignored
    truth = torch.zeros(2, masks + 1, 4, 5).scatter_(1, owner, 1)[:, :masks]
    counts = torch.tensor([masks, masks - 1])
    truth[1, masks - 1] = 0
    return maps, truth, counts


def test_loss_is_the_least_over_all_assignments():
    for seed in range(5):
        maps, truth, counts = random_case(seed)
        assert math.isclose(mask_loss(maps, truth, counts).item(), loss_by_loop(maps, truth, counts), rel_tol=1e-4)


def test_the_truth_as_maps_costs_nothing_whatever_the_order():
    _, truth, _ = random_case(0)
    truth[:, -1] = 1 - truth[:, :-1].sum(1)
    maps = torch.cat([truth.flip(1), torch.zeros(2, 4, 4, 5)], 1)
    assert mask_loss(maps, truth, torch.tensor([3, 3])).item() < 1e-4
    uniform = torch.full_like(maps, 1 / maps.shape[1])
    assert mask_loss(uniform, truth, torch.tensor([3, 3])).item() > math.log(maps.shape[1])


def test_ignored_pixels_have_no_influence():
    maps, truth, counts = random_case(1)
    ignored = truth.sum(1, keepdim=True) == 0
    assert ignored.any()
    other = torch.where(ignored, maps.roll(1, 1), maps)
    assert not torch.equal(maps, other)
    torch.testing.assert_close(mask_loss(maps, truth, counts), mask_loss(other, truth, counts))


def test_a_picture_without_masks_adds_nothing():
    maps, truth, counts = random_case(2)
    alone = mask_loss(maps[:1], truth[:1], counts[:1])
    torch.testing.assert_close(mask_loss(maps, truth * torch.tensor([1, 0])[:, None, None, None], torch.tensor([3, 0])) * 2, alone)


def test_match_leaves_padding_out():
    cost = torch.tensor([[[0.0, 5, 9], [1, 0, 9], [2, 2, 9]]])
    assert match_masks(cost, torch.tensor([2])).tolist() == [[0, 1, -1]]


def test_gradient_reaches_only_matched_tokens_and_their_rivals():
    maps, truth, counts = random_case(3)
    logits = maps.log().requires_grad_()
    mask_loss(logits.softmax(1), truth, counts).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def test_named_masks_are_not_matched():
    """Two names with their pixels exchanged cost what two wrong maps cost, though a matching would find them perfect."""
    masks = torch.zeros((1, 3, 2, 2))
    masks[0, 0, 0], masks[0, 1, 1] = 1, 1  # upper half, lower half, and a name that the picture does not show
    right = masks.clone()
    exchanged = masks[:, [1, 0, 2]]
    assert named_mask_loss(right, masks) == pytest.approx(0, abs=1e-4)
    assert named_mask_loss(exchanged, masks) > 5
    assert mask_loss(exchanged, masks[:, :2], torch.tensor([2])) == pytest.approx(0, abs=1e-4)


def test_a_named_loss_by_hand():
    """Half of each pixel to the right name, half to one that is not there: -log 0.5, and 1 - Dice of 2 * 0.5 / (0.5 + 1)."""
    masks = torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]])
    maps = torch.full((1, 2, 1, 2), 0.5)
    assert named_mask_loss(maps, masks) == pytest.approx(math.log(2) + 1 - 2 / 3, abs=1e-4)
