"""DiffSeg's merging of self-attention maps to proposals, Sec. 3.2 to 3.4, on plain tensors.

Axes: N pixels of a grid (h, w) in row-major order, each with a map over all N that sums to 1; M proposals. Distances are half the symmetric
KL divergence in float64, in closed form: -sum p log q is a matrix product. Maps are float32, and a block of them float64 at any time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from padseg.methods.stages.aggregation import Grid, quotient, resized_keys, source_pixels
from padseg.methods.stages.proposals import EPS, greedy_groups, symmetric_kl

BLOCK = 512  # maps that are float64 at any time: 16 MB of 64 x 64 pixels, and as much of their logarithms
HALF_CELLS = 2**21  # numbers that are compared in 16 bits at any time
ROUNDS, SETTLED = 300, 1e-4  # of k-means: at most so many, until the means move less than this share of the maps' variance


def grid_weights(grids: Mapping[Grid, Tensor]) -> dict[Grid, float]:
    """How much the maps of each grid weigh: in proportion to its side, in sum 1."""
    sides = {grid: math.sqrt(math.prod(grid)) for grid in grids}
    return {grid: side / sum(sides.values()) for grid, side in sides.items()}


def aggregated_maps(maps: Mapping[Grid, Tensor], to: Grid) -> Tensor:
    """Sec. 3.2: the maps of all grids enlarged to one, with shares of 1, weighted and added: (N_s, N_s) each -> (N, N) float32.

    Keys are enlarged bilinearly and divided by their sum; every query is repeated. A map that has the wanted grid is overwritten.
    """
    weights = grid_weights(maps)
    result = None
    for grid in sorted(maps, key=math.prod, reverse=True):
        own = resized_keys(maps[grid][None], grid, to)[0]
        own = own.mul_(weights[grid] / own.sum(1, keepdim=True))
        if result is None:
            result = own if grid == to else own[source_pixels(grid, to).to(own.device)]
        else:
            queries = source_pixels(grid, to).to(own.device)
            for rows, sources in zip(result.split(BLOCK), queries.split(BLOCK), strict=True):
                rows += own[sources]
    assert result is not None
    return result


def anchors(grid: Grid, count: int) -> Tensor:
    """Sec. 3.3: pixels of a regular grid of `count` x `count` points, or of as many as there are pixels along a side: (M,)."""
    row, column = (axis_points(length, min(count, length)) for length in grid)
    return (row[:, None] * grid[1] + column).flatten()


def axis_points(length: int, count: int) -> Tensor:
    """Evenly spaced, with as much left over before as behind: (count,)."""
    step = (length - 1) // max(1, count - 1) if count > 1 else 0
    return (length - 1 - step * (count - 1)) // 2 + step * torch.arange(count)


def first_pass(maps: Tensor, points: Tensor, threshold: float, half: bool = False) -> tuple[Tensor, Tensor]:
    """The mean of all maps that are nearer to each anchor than the threshold: (N, N), (M,) -> (M, N) float64, and their numbers (M,).

    half: compare in 16 bits, as the released code does: small values are 0 there, and a map with one is near to none, not even to itself.
    Anchors without members are left out.
    """
    centres = maps[points].double()  # (M, N)
    logs = centres.clamp_min(EPS).log_()
    entropies = (centres * logs).sum(1)
    sums, counts = torch.zeros_like(centres), torch.zeros(len(points), dtype=torch.float64, device=maps.device)
    for start in range(0, len(maps), BLOCK):
        block = maps[start : start + BLOCK].double()
        if half:
            near = half_distances(centres, block) < threshold
        else:
            other = block.clamp_min(EPS).log_()
            distances = (entropies[:, None] + (block * other).sum(1) - centres @ other.T - logs @ block.T) / 2  # (M, BLOCK)
            near = (distances < threshold) | (points[:, None] == torch.arange(start, start + len(block), device=maps.device))
        members = near.double()
        sums += members @ block
        counts += members.sum(1)
    return sums[counts > 0] / counts[counts > 0, None], counts


def half_distances(one: Tensor, other: Tensor) -> Tensor:
    """Half the symmetric KL divergence of all pairs with logarithms and products in 16 bits: (M, N), (B, N) -> (M, B) float32."""
    p, q = one.half(), other.half()
    log_p, log_q = p.log(), q.log()
    result = p.new_empty(len(p), len(q), dtype=torch.float32)
    step = max(1, HALF_CELLS // q.shape[1])
    for number in range(len(p)):
        for start in range(0, len(q), step):
            rows = slice(start, start + step)
            apart = log_p[number] - log_q[rows]
            there, back = ((weights * apart).sum(1, dtype=torch.float32) for weights in (p[number], q[rows]))
            result[number, rows] = (there - back) / 2
    return result


def later_pass(proposals: Tensor, threshold: float) -> Tensor:
    """The means of groups of near proposals: the first that is in none makes one of all that are near to it: (M, N) -> (M', N)."""
    groups = greedy_groups(symmetric_kl(proposals), threshold)
    return torch.stack([proposals[list(group)].mean(0) for group in groups])


def merged(maps: Tensor, points: Tensor, thresholds: tuple[float, ...], half: bool = False) -> Tensor:
    """Sec. 3.3: proposals from all maps, in a pass for each threshold: (N, N), (M,) -> (M', N) float64, in order of anchors."""
    proposals, _ = first_pass(maps, points, thresholds[0], half)
    for threshold in thresholds[1:]:
        proposals = later_pass(proposals, threshold)
    return proposals


def clustered(maps: Tensor, proposals: Tensor) -> Tensor:
    """k-means of all maps, started at the proposals: the mean of each cluster that has members, (N, N), (M, N) -> (M', N) float64."""
    spread = sum(float(block.double().sub(maps.mean(0).double()).square().sum()) for block in maps.split(BLOCK)) / maps.numel()
    means, labels = proposals, None
    for _ in range(ROUNDS):
        lengths = means.square().sum(1)
        nearest = torch.cat([(lengths - 2 * block.double() @ means.T).argmin(1) for block in maps.split(BLOCK)])  # (N,)
        if labels is not None and torch.equal(nearest, labels):
            break
        labels, before = nearest, means
        means = cluster_means(maps, labels, len(means))
        kept = torch.isfinite(means[:, 0])
        if not kept.all():  # a cluster that empties is gone
            means, labels = means[kept], None
        elif (means - before).square().sum() <= SETTLED * spread:
            break
    return means


def cluster_means(maps: Tensor, labels: Tensor, count: int) -> Tensor:
    """The mean map of each cluster, NaN for one without members: (N, N), (N,) -> (count, N) float64."""
    members = torch.nn.functional.one_hot(labels, count).double()  # (N, count)
    parts = zip(members.split(BLOCK), maps.split(BLOCK), strict=True)
    sums = sum(own.T @ block.double() for own, block in parts)
    assert isinstance(sums, Tensor)
    return sums / members.sum(0)[:, None]


def word_maps(maps: Mapping[Grid, Tensor], to: Grid) -> Tensor:
    """Sec. 3.5: the attention to n words of all grids, enlarged, as shares of each pixel, and added: (N_s, n) each -> (n, h, w)."""
    large = (resized_keys(own.T[None], grid, to)[0] for grid, own in maps.items())  # (n, N) each
    shares = [quotient(own, own.sum(0, keepdim=True)) for own in large]
    return torch.stack(shares).sum(0).unflatten(1, to)


def words_of_regions(labels: Tensor, words: Tensor, by: str = 'mean') -> list[int]:
    """The word of each region 0..K-1: (h, w), (n, h, w) -> K numbers of words.

    Words are scaled to the same length over the picture. by: mean, the word with the highest mean; majority, the one that most pixels have
    (the released code takes the median of their numbers).
    """
    scaled = quotient(words, words.flatten(1).norm(dim=1)[:, None, None])
    inside = [labels == number for number in range(int(labels.max()) + 1)]
    if by == 'mean':
        return [int(scaled[:, mask].mean(1).argmax()) if mask.any() else 0 for mask in inside]
    best = scaled.argmax(0)
    return [int(best[mask].bincount().argmax()) if mask.any() else 0 for mask in inside]
