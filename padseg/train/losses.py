"""Mask-alignment losses: token maps matched one to one with ground-truth masks (Seg4Diff, Eqs. 12-13)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

EPS = 1e-6


def share_over_tokens(maps: Tensor) -> Tensor:
    """Normalise each pixel's attention to sum to 1 over the tokens: (..., T, h, w) -> the same shape."""
    return maps / maps.sum(-3, keepdim=True).clamp_min(EPS)


def dice(maps: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice coefficient of every map with every mask: (B, T, P), (B, M, P) -> (B, T, M) in 0..1."""
    common = maps @ masks.transpose(1, 2)  # (B, T, M)
    return (2 * common + EPS) / (maps.sum(2)[:, :, None] + masks.sum(2)[:, None, :] + EPS)


def cross_entropy(maps: Tensor, masks: Tensor) -> Tensor:
    """Mean of -log map inside every mask, for all pairs: (B, T, P), (B, M, P) -> (B, T, M)."""
    area = masks.sum(2)[:, None, :].clamp_min(EPS)
    return -(maps.clamp_min(EPS).log() @ masks.transpose(1, 2)) / area


def match_masks(cost: Tensor, counts: Tensor) -> Tensor:
    """Match each mask to a token by bipartite matching, separately for each image.

    cost: (B, T, M); counts: (B,) masks per image, the rest is padding. Returns token indices (B, M) int64, -1 for padding.
    """
    tokens = torch.full((cost.shape[0], cost.shape[2]), -1, dtype=torch.int64)
    for index, (matrix, count) in enumerate(zip(cost.detach().float().cpu().numpy(), counts.tolist(), strict=True)):
        rows, columns = linear_sum_assignment(matrix[:, :count])
        tokens[index, columns] = torch.from_numpy(rows)
    return tokens.to(cost.device)


def mask_loss(maps: Tensor, masks: Tensor, counts: Tensor) -> Tensor:
    """Loss of the matched pairs, 1 - Dice + cross-entropy, averaged within each image and then over images: a scalar.

    maps: (B, T, h, w) in 0..1, summing to 1 over tokens; masks: (B, M, h, w) soft masks in 0..1, zero where padded;
    counts: (B,) masks per image. The cross-entropy weights masks by area; Dice weights them equally.
    """
    cost = pair_costs(maps.flatten(2), masks.flatten(2), counts)  # (B, T, M)
    tokens = match_masks(cost, counts)[:, None, :]  # (B, 1, M)
    matched = cost.gather(1, tokens.clamp_min(0)) * (tokens >= 0)
    return matched.sum((1, 2)).mean()


def named_mask_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """Like `mask_loss`, but map i belongs to mask i by name, so nothing is matched: (B, M, h, w) each -> a scalar.

    The mask of an absent class is zero. Its map adds no term of its own; it costs only the attention it takes from the other classes.
    """
    shown = masks.flatten(2).sum(2) > 0  # (B, M)
    cost = pair_costs(maps.flatten(2), masks.flatten(2), shown.sum(1))  # (B, M, M)
    return (cost.diagonal(dim1=1, dim2=2) * shown).sum(1).mean()


def pair_costs(maps: Tensor, masks: Tensor, counts: Tensor) -> Tensor:
    """Contribution of every pair to its image's loss: (B, T, P), (B, M, P) and (B,) numbers of masks to average over -> (B, T, M)."""
    labelled = masks.sum(1, keepdim=True)  # (B, 1, P), zero at ignored pixels
    area = masks.sum(2)[:, None, :]  # (B, 1, M), zero where padded
    share = 1 / counts.clamp_min(1)[:, None, None]
    return (1 - dice(maps * labelled, masks)) * share + cross_entropy(maps, masks) * area / area.sum(2, keepdim=True).clamp_min(EPS)


def affinity_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy between "same token" and "same mask" over all pairs of labelled pixels: a scalar.

    maps: (B, T, h, w) summing to 1 over tokens; masks: (B, M, h, w) soft masks. Nothing is matched: any token may take any region. So the
    loss teaches grouping even while the assignments of `mask_loss` still change from step to step.
    """
    maps, masks = maps.flatten(2), masks.flatten(2)  # (B, T, P), (B, M, P)
    together = (maps.transpose(1, 2) @ maps).clamp(1e-4, 1 - 1e-4)  # (B, P, P), probability that both take the same token
    same = masks.transpose(1, 2) @ masks  # (B, P, P)
    labelled = masks.sum(1)  # (B, P)
    pairs = labelled[:, :, None] * labelled[:, None, :]  # (B, P, P)
    entropy = -(same * together.log() + (pairs - same).clamp_min(0) * (1 - together).log())
    return (entropy.sum((1, 2)) / pairs.sum((1, 2)).clamp_min(EPS)).mean()


def divergence_of_maps(were: Sequence[Tensor], are: Sequence[Tensor]) -> Tensor:
    """KL(were || are) of the shares of tokens, averaged over pixels, pictures and layers: for each layer (B, T, h, w), not below 0."""
    shares = ([share_over_tokens(each).clamp_min(EPS) for each in layer] for layer in zip(were, are, strict=True))
    return torch.stack([(one * (one / other).log()).sum(1).mean() for one, other in shares]).mean()
