"""Mask-alignment loss: token maps matched one to one with ground-truth masks (Seg4Diff, Eqs. 12-13)."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

EPS = 1e-6


def share_over_tokens(maps: Tensor) -> Tensor:
    """Each pixel's attention to text, divided by its sum over tokens: (..., T, h, w) -> the same."""
    return maps / maps.sum(-3, keepdim=True).clamp_min(EPS)


def dice(maps: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice coefficient of every map with every mask: (B, T, P), (B, M, P) -> (B, T, M) in 0..1."""
    common = maps @ masks.transpose(1, 2)  # (B, T, M)
    return (2 * common + EPS) / (maps.sum(2)[:, :, None] + masks.sum(2)[:, None, :] + EPS)


def cross_entropy(maps: Tensor, masks: Tensor) -> Tensor:
    """Mean of -log map inside every mask: (B, T, P), (B, M, P) -> (B, T, M)."""
    area = masks.sum(2)[:, None, :].clamp_min(EPS)
    return -(maps.clamp_min(EPS).log() @ masks.transpose(1, 2)) / area


def match_masks(cost: Tensor, counts: Tensor) -> Tensor:
    """Token of each mask by bipartite matching, one assignment a picture.

    cost: (B, T, M); counts: (B,) masks of each picture, the rest is padding. Returns (B, M) int64, -1 for padding.
    """
    tokens = torch.full((cost.shape[0], cost.shape[2]), -1, dtype=torch.int64)
    for index, (matrix, count) in enumerate(zip(cost.detach().float().cpu().numpy(), counts.tolist(), strict=True)):
        rows, columns = linear_sum_assignment(matrix[:, :count])
        tokens[index, columns] = torch.from_numpy(rows)
    return tokens.to(cost.device)


def mask_loss(maps: Tensor, masks: Tensor, counts: Tensor) -> Tensor:
    """1 - Dice + cross-entropy of the matched pairs, per picture, then the mean over pictures: a scalar.

    maps: (B, T, h, w) in 0..1, summing to 1 over tokens; masks: (B, M, h, w) soft masks in 0..1, zero where padded;
    counts: (B,) masks of each picture. The cross-entropy weighs masks by area, Dice weighs them alike.
    """
    cost = pair_costs(maps.flatten(2), masks.flatten(2), counts)  # (B, T, M)
    tokens = match_masks(cost, counts)[:, None, :]  # (B, 1, M)
    matched = cost.gather(1, tokens.clamp_min(0)) * (tokens >= 0)
    return matched.sum((1, 2)).mean()


def named_mask_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """As mask_loss for maps that belong to their masks by name, token by token: (B, M, h, w) each, no matching; classes that are not
    in the picture have a mask of zeros and count only by what other classes lose to them."""
    shown = masks.flatten(2).sum(2) > 0  # (B, M)
    cost = pair_costs(maps.flatten(2), masks.flatten(2), shown.sum(1))  # (B, M, M)
    return (cost.diagonal(dim1=1, dim2=2) * shown).sum(1).mean()


def pair_costs(maps: Tensor, masks: Tensor, counts: Tensor) -> Tensor:
    """Share of every pair in a picture's loss: (B, T, P), (B, M, P) and (B,) masks to average over -> (B, T, M)."""
    labelled = masks.sum(1, keepdim=True)  # (B, 1, P), zero where the truth is to be ignored
    area = masks.sum(2)[:, None, :]  # (B, 1, M), zero where padded
    share = 1 / counts.clamp_min(1)[:, None, None]
    return (1 - dice(maps * labelled, masks)) * share + cross_entropy(maps, masks) * area / area.sum(2, keepdim=True).clamp_min(EPS)


def affinity_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of "these two pixels have one token" against "these two pixels have one mask", over all labelled pairs: a scalar.

    maps: (B, T, h, w) summing to 1 over tokens; masks: (B, M, h, w) soft masks. It needs no matching: it does not matter which token
    a region gets, so it already teaches grouping while the assignments of `mask_loss` still change from step to step.
    """
    maps, masks = maps.flatten(2), masks.flatten(2)  # (B, T, P), (B, M, P)
    together = (maps.transpose(1, 2) @ maps).clamp(1e-4, 1 - 1e-4)  # (B, P, P), chance that both take the same token
    same = masks.transpose(1, 2) @ masks  # (B, P, P)
    labelled = masks.sum(1)  # (B, P)
    pairs = labelled[:, :, None] * labelled[:, None, :]  # (B, P, P)
    entropy = -(same * together.log() + (pairs - same).clamp_min(0) * (1 - together).log())
    return (entropy.sum((1, 2)) / pairs.sum((1, 2)).clamp_min(EPS)).mean()
