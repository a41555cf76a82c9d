"""Token maps -> proposals: normalise, compare by KL divergence, merge greedily."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from padseg.errors import UsageError
from padseg.methods.options import NORMALISATIONS
from padseg.types import Proposals, TokenMaps

EPS = 1e-12  # floor for probabilities in logarithms; the smallest share in 77 maps of 64 x 64 is about 1e-6


def merge(maps: TokenMaps, threshold: float = 0.1, normalisation: str = 'minmax-softmax') -> Proposals:
    """Normalise token maps and average each group of similar maps to a proposal (DiffSeg, Sec. 3.3; Seg4Diff, Sec. 4.2).

    threshold >= 0 bounds half the symmetric KL divergence between maps as distributions over space: 0 merges none, inf merges all.
    """
    if not threshold >= 0:
        raise UsageError(f'threshold is a number >= 0 or inf; got {threshold}')
    normalised = normalise(maps.maps, normalisation).flatten(1)  # (T, h w)
    groups = greedy_groups(symmetric_kl(spatial(normalised)), threshold)
    merged = torch.stack([normalised[list(group)].mean(0) for group in groups])  # (M, h w)
    return Proposals(merged.unflatten(1, maps.maps.shape[1:]), groups, maps.frame)


def normalise(maps: Tensor, normalisation: str) -> Tensor:
    """Normalise maps (T, h, w), as float64.

    `minmax-softmax`: scale each map to 0..1 over space, then softmax over space (Seg4Diff's release); `sum`: divide each map by its sum
    over space (DiffSeg); `share`: divide each pixel by its sum over tokens.
    """
    maps = maps.to(torch.float64, copy=True)  # a copy to modify in place: page faults for new memory would take as long as the arithmetic
    if normalisation == 'minmax-softmax':
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        return maps.sub_(low).div_((high - low).clamp_min_(EPS)).flatten(1).softmax(1).view_as(maps)
    if normalisation == 'sum':
        return spatial(maps.flatten(1)).view_as(maps)
    if normalisation == 'share':
        return maps.div_(maps.sum(0, keepdim=True).clamp_min_(EPS))
    raise UsageError(f'normalisation is one of {", ".join(NORMALISATIONS)}; got {normalisation}')


def spatial(rows: Tensor) -> Tensor:
    """Normalise rows to distributions over space, a row of zeros to the uniform one: (T, N) -> (T, N)."""
    total = rows.sum(1, keepdim=True)
    return (rows / total.clamp_min(1e-300)).masked_fill_(~(total > 0), 1 / rows.shape[1])


def symmetric_kl(p: Tensor) -> Tensor:
    """(KL(a || b) + KL(b || a)) / 2 for all pairs of rows: (T, N) float64 -> (T, T), zero on the diagonal (DiffSeg, Eq. 3)."""
    cross = p @ p.clamp_min(EPS).log_().T  # (T, T), sum of p_a log p_b
    own = cross.diagonal()
    return ((own[:, None] + own[None, :] - cross - cross.T) / 2).clamp_min(0)


def greedy_groups(distance: Tensor, threshold: float) -> tuple[tuple[int, ...], ...]:
    """Group maps in one pass: each map not yet taken becomes an anchor and takes all maps closer than the threshold.

    As in the released code, maps taken by an earlier anchor are also averaged into later groups, so groups may overlap.
    """
    near = (distance < threshold).cpu().numpy()  # (T, T)
    np.fill_diagonal(near, True)
    taken = np.zeros(len(near), bool)
    groups = []
    for anchor, row in enumerate(near):
        if not taken[anchor]:
            taken |= row
            groups.append(tuple(np.flatnonzero(row).tolist()))
    return tuple(groups)
