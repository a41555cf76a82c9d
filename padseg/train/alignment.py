"""Mask alignment: the scores of image queries against text keys become mask logits, which a class name or a matching ties to masks.

MAGNET (Seg4Diff; Kim et al. 2025, Sec. 5). Scores -> score layer -> pairs of a candidate and a mask -> focal and Dice loss. `released` is
what the released code computes where that differs from what the paper says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from padseg.methods.stages.attention import token_attention
from padseg.types import Attention, Tokens

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss
FOCAL_COST, DICE_COST = 0.02, 1.0  # weights of matching, which are not those of the losses
EPS = 1e-4  # the least share of a token, and of all others
AT_ONCE = 128  # candidates that the score layer sees in one pass where nothing is learned: a pass of 1848 would take 8 GB


class Pairs(NamedTuple):
    """What is learned from one picture. logits: (P, h, w) of the candidates; masks: (P, H, W) bool, their targets."""

    logits: Tensor
    masks: Tensor


# scores


def scores(query: Tensor, key: Tensor, heads: bool) -> Tensor:
    """Scores before softmax, q k^T / sqrt(d): (B, H, N, d), (B, H, T, d) -> (B, T, N) float32, the mean over heads.

    heads: keep all heads instead, in head-major order, (B, H T, N): candidate h T + t is token t of head h.
    """
    query, key, scale = query.float(), key.float(), query.shape[-1] ** -0.5
    if heads:
        return (key @ query.transpose(2, 3) * scale).flatten(1, 2)
    return torch.einsum('bhnd,bhtd->btn', query, key) * (scale / query.shape[1])


def share_logits(seen: Attention, image_tokens: int, columns: Sequence[int], heads: bool) -> Tensor:
    """As `scores`, but the logit of a text token's share of a pixel's attention to the text, from all of the call's queries and keys.

    The sigmoid of a candidate is then the share that segmentation compares, and what a token gains in its mask the others lose.
    """
    numbers: Sequence[int | None] = range(seen.query.shape[1]) if heads else [None]
    parts = [token_attention(seen, image_tokens, columns, head=number).transpose(1, 2) for number in numbers]  # (B, T, N) each
    return torch.cat([torch.logit(part / part.sum(1, keepdim=True), EPS) for part in parts], 1)


class ScoreLayer(nn.Module):
    """Three convolutions whose output is added to a map: (M, h, w) -> (M, h, w) mask logits. Every map is treated alone.

    Used in training only: 38,145 parameters.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.layers(maps[:, None])[:, 0]


# which candidate belongs to which mask


def columns_by_span(tokens: Tokens, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The columns of words of a prompt: of all tokens whose place in the text overlaps (start, end). None for words behind the cut.

    tokens: of the whole prompt, uncut; the last slot of a prompt that is too long belongs to the end token.
    """
    room = len(tokens.spans) if len(tokens.spans) <= tokens.slots else tokens.slots - 1
    kept = [(place, span) for place, span in enumerate(tokens.spans[:room]) if not tokens.strange[place]]
    return [[tokens.first + place for place, span in kept if max(span[0], start) < min(span[1], end)] for start, end in spans]


def columns_by_ids(prompt: Sequence[int], classes: Sequence[Sequence[int]], slots: int) -> list[list[int]]:
    """As released: every column whose token is any token of the class name, so that names which share a word share its columns.

    prompt: token numbers, the start token's first, cut to `slots` here; classes: those of each name, without start and end.
    """
    held = torch.tensor(list(prompt)[:slots])
    return [torch.isin(held, torch.tensor(list(numbers), dtype=held.dtype)).nonzero()[:, 0].tolist() for numbers in classes]


def named_pairs(maps: Tensor, columns: Sequence[Sequence[int]], masks: Tensor, layer: nn.Module) -> Pairs:
    """The candidate of a class is the mean of the mask logits of its columns, its target the mask of the class; nothing is matched.

    maps: (T, h, w) scores; columns: of each mask's class; masks: (M, H, W). A class without columns is left out with its mask.
    """
    shown = [number for number, places in enumerate(columns) if places]
    used = sorted({place for places in columns for place in places})
    if not shown:
        return Pairs(maps[:0], masks[:0])
    logits = dict(zip(used, layer(maps[used]), strict=True))
    means = [torch.stack([logits[place] for place in columns[number]]).mean(0) for number in shown]
    return Pairs(torch.stack(means), masks[shown])


def matched_pairs(maps: Tensor, masks: Tensor, layer: nn.Module, focal: str) -> Pairs:
    """Pair every mask with the candidate that the Hungarian method gives it: (C, h, w) scores, (M, H, W) -> at most M pairs.

    Candidates are judged without a graph, a few at a time; only the chosen ones pass the score layer again to be learned from.
    """
    candidates, chosen = match(every_logit(maps, layer), masks, focal)
    if not len(candidates):
        return Pairs(maps[:0], masks[:0])
    return Pairs(layer(maps[candidates]), masks[chosen])


@torch.no_grad()
def every_logit(maps: Tensor, layer: nn.Module) -> Tensor:
    """The mask logits of all candidates, (C, h, w), of which nothing is learned."""
    return torch.cat([layer(part) for part in maps.split(AT_ONCE)])


@torch.no_grad()
def match(logits: Tensor, masks: Tensor, focal: str) -> tuple[Tensor, Tensor]:
    """Candidates and masks (P,) each of the cheapest assignment, candidates ascending: (C, h, w), (M, H, W) -> P = min(C, M) pairs."""
    cost = FOCAL_COST * focal_cost(logits, small := smaller(masks, logits.shape[1:]), focal) + DICE_COST * dice_cost(logits, small)
    rows, columns = assignment(cost)
    return rows, columns


@torch.library.custom_op('padseg::assignment', mutates_args=())
def assignment(cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cheapest assignment by the Hungarian method: costs (C, M) -> rows and columns (P,) each, rows ascending, P = min(C, M)."""
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device)


@assignment.register_fake
def _(cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes alone, for a step that is reckoned without values."""
    pairs = min(cost.shape)
    return cost.new_empty(pairs, dtype=torch.int64), cost.new_empty(pairs, dtype=torch.int64)


def smaller(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (M, H, W) at the size of the candidates by nearest neighbour, float32; of one smaller than a token nothing may be left."""
    if not len(masks):
        return masks.new_zeros((0, *size), dtype=torch.float32)
    return F.interpolate(masks[None].float(), tuple(size), mode='nearest')[0]


def focal_cost(logits: Tensor, masks: Tensor, focal: str) -> Tensor:
    """Focal loss of every candidate for every mask, mean over pixels: (C, h, w), (M, h, w) -> (C, M)."""
    inside, outside = (values.flatten(1) for values in focal_parts(logits.float(), focal))
    masks = masks.flatten(1)
    return (inside @ masks.T + outside @ (1 - masks).T) / masks.shape[1]


def dice_cost(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice loss of every candidate for every mask: (C, h, w), (M, h, w) -> (C, M)."""
    shown, masks = logits.float().sigmoid().flatten(1), masks.flatten(1)
    return 1 - (2 * shown @ masks.T + 1) / (shown.sum(1)[:, None] + masks.sum(1)[None] + 1)


def largest(masks: Tensor, least: float, most: int) -> Tensor:
    """Masks (M, H, W) bool that cover more than the share `least` of the picture, largest first, at most `most` of them."""
    areas = masks.flatten(1).sum(1)
    kept = (areas > least * masks[0].numel()).nonzero()[:, 0] if len(masks) else areas.long()
    return masks[kept[areas[kept].argsort(descending=True, stable=True)][:most]]


# losses


def focal_parts(logits: Tensor, focal: str) -> tuple[Tensor, Tensor]:
    """Focal loss (Lin et al. 2017) of every pixel if it belongs to the mask, and if not; shapes as of the logits.

    `released` takes the logit itself for the probability in the modulator: the loss of a confident right answer grows again.
    """
    shown = logits if focal == 'released' else logits.sigmoid()
    inside = ALPHA * (1 - shown) ** GAMMA * F.softplus(-logits)
    outside = (1 - ALPHA) * shown**GAMMA * F.softplus(logits)
    return inside, outside


def focal_loss(logits: Tensor, masks: Tensor, focal: str) -> Tensor:
    """Focal loss, mean over pixels, sum over pairs: (P, H, W) each -> a scalar."""
    inside, outside = focal_parts(logits, focal)
    return torch.where(masks > 0.5, inside, outside).flatten(1).mean(1).sum()


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - Dice with 1 added to both sides of the fraction, sum over pairs: (P, H, W) each -> a scalar."""
    shown, masks = logits.sigmoid().flatten(1), masks.float().flatten(1)
    return (1 - (2 * (shown * masks).sum(1) + 1) / (shown.sum(1) + masks.sum(1) + 1)).sum()


def mask_losses(pairs: Pairs, focal: str) -> tuple[Tensor, Tensor]:
    """Focal and Dice loss of a picture's pairs, sums over pairs: two scalars, zero without pairs.

    Candidates are enlarged to the size of the masks. The caller divides by the number of pairs of a batch.
    """
    if not len(pairs.logits):
        zero = pairs.logits.sum()  # keeps the graph, so that a batch without masks can be learned from like any other
        return zero, zero
    logits = F.interpolate(pairs.logits[None].float(), tuple(pairs.masks.shape[1:]), mode='bilinear')[0]
    return focal_loss(logits, pairs.masks, focal), dice_loss(logits, pairs.masks)
