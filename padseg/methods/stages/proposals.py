"""Token maps -> proposals: normalise, compare by KL divergence, merge greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from padseg.errors import UsageError
from padseg.methods.options import NORMALISATIONS, RANGE_ADDED
from padseg.types import Array, Proposals, TokenMaps

EPS = 1e-12  # floor for probabilities in logarithms; the smallest share in 77 maps of 64 x 64 is about 1e-6
AT_ONCE = 16  # maps that are worked on together: as many as fit into the processor's cache in float64
SPARE = 16  # roundings besides those of a sum: of a map to float32, of its logarithm, and of what is added at the end


def merge(maps: TokenMaps, threshold: float = 0.1, normalisation: str = 'released') -> Proposals:
    """Proposals from token maps: normalised, then every group of near maps averaged (DiffSeg, Sec. 3.3; Seg4Diff, Sec. 4.2).

    threshold >= 0 bounds half the symmetric KL divergence between maps as distributions over space: 0 merges none, inf merges all.
    """
    check_threshold(threshold)
    normalised = normalise(maps.maps, normalisation).flatten(1)  # (T, h w)
    return averaged(maps, normalised, near_groups(as_shares(normalised, normalisation), threshold))


def merge_each(maps: TokenMaps, thresholds: Sequence[float], normalisation: str) -> list[Proposals]:
    """As `merge`, at each of several thresholds, for which all maps are compared once."""
    for threshold in thresholds:
        check_threshold(threshold)
    normalised = normalise(maps.maps, normalisation).flatten(1)  # (T, h w)
    distance = symmetric_kl(as_shares(normalised, normalisation))
    return [averaged(maps, normalised, greedy_groups(distance, threshold)) for threshold in thresholds]


def check_threshold(threshold: float) -> None:
    if not threshold >= 0:
        raise UsageError(f'threshold is a number >= 0 or inf; got {threshold}')


def as_shares(normalised: Tensor, normalisation: str) -> Tensor:
    """Normalised maps as distributions over space, (T, N); all but `share` gives those already."""
    return spatial(normalised) if normalisation == 'share' else normalised


def averaged(maps: TokenMaps, normalised: Tensor, groups: tuple[tuple[int, ...], ...]) -> Proposals:
    """The means of groups of normalised maps (T, h w)."""
    merged = torch.stack([mean_of(normalised, group) for group in groups])  # (M, h w)
    return Proposals(merged.unflatten(1, maps.maps.shape[1:]), groups, maps.frame)


def mean_of(rows: Tensor, group: Sequence[int]) -> Tensor:
    """Mean of some rows (T, N) -> (N,), as a product, which takes half the time of a mean."""
    return rows.new_full((len(group),), 1 / len(group)) @ rows.index_select(0, torch.tensor(group, device=rows.device))


def normalise(maps: Tensor, normalisation: str) -> Tensor:
    """Normalise maps (T, h, w), as float64.

    `released`: each pixel to 0..1 over the tokens, then a softmax of each map over space (Seg4Diff's released code, whose range has
    1e-6 added); `minmax-softmax`: each map to 0..1 over space, then the same softmax; `sum`: each map divided by its sum over space
    (DiffSeg); `share`: each pixel divided by its sum over tokens.
    """
    change = normaliser(maps, normalisation)
    result = torch.empty(maps.shape, dtype=torch.float64, device=maps.device)
    for some, out in zip(maps.split(AT_ONCE), result.split(AT_ONCE), strict=True):
        change(out.copy_(some))  # in place: page faults of fresh memory would take as long as the sums
    return result


def normaliser(maps: Tensor, normalisation: str) -> Callable[[Tensor], object]:
    """What normalises some of the maps (T, h, w), float64, in place."""
    if normalisation == 'released':
        low, high = maps.amin(0).double(), maps.amax(0).double()
        reach = (high - low).add_(RANGE_ADDED)
        return lambda some: soften(some.sub_(low).div_(reach))
    if normalisation == 'minmax-softmax':
        return lambda some: soften(some.sub_(some.amin((1, 2), keepdim=True)).div_(some.amax((1, 2), keepdim=True).clamp_min_(EPS)))
    if normalisation == 'sum':
        return lambda some: some.copy_(spatial(some.flatten(1)).view_as(some))
    if normalisation == 'share':
        total = maps.sum(0, dtype=torch.float64).clamp_min_(EPS)
        return lambda some: some.div_(total)
    raise UsageError(f'normalisation is one of {", ".join(NORMALISATIONS)}; got {normalisation}')


def soften(some: Tensor) -> Tensor:
    """Replace maps (T, h, w) by their softmax over space."""
    return torch.softmax(some.flatten(1), 1, out=some.flatten(1))


def spatial(rows: Tensor) -> Tensor:
    """Normalise rows to distributions over space, a row of zeros to the uniform one: (T, N) -> (T, N)."""
    total = rows.sum(1, keepdim=True)
    return (rows / total.clamp_min(1e-300)).masked_fill_(~(total > 0), 1 / rows.shape[1])


def symmetric_kl(p: Tensor, others: Tensor | None = None) -> Tensor:
    """(KL(a || b) + KL(b || a)) / 2 for rows a of p and b of others, by default p: (T, N), (U, N) float64 -> (T, U) (DiffSeg, Eq. 3)."""
    logs = p.clamp_min(EPS).log_()
    if others is None:
        cross = p @ logs.T  # (T, T), sum of p_a log p_b
        own = cross.diagonal()
        return ((own[:, None] + own[None, :] - cross - cross.T) / 2).clamp_min(0)
    their_logs = others.clamp_min(EPS).log_()
    both = torch.linalg.vecdot(p, logs)[:, None] + torch.linalg.vecdot(others, their_logs)
    return ((both - p @ their_logs.T - logs @ others.T) / 2).clamp_min(0)


def greedy_groups(distance: Tensor, threshold: float) -> tuple[tuple[int, ...], ...]:
    """Group maps in one pass: each map not yet taken becomes an anchor and takes all maps closer than the threshold.

    As in the released code, maps taken by an earlier anchor are also averaged into later groups, so groups may overlap.
    """
    near = (distance < threshold).cpu().numpy()  # (T, T)
    np.fill_diagonal(near, True)
    return grouped(len(near), lambda anchors: near[anchors])


def near_groups(shares: Tensor, threshold: float) -> tuple[tuple[int, ...], ...]:
    """As `greedy_groups` of all distances between maps (T, N), distributions in float64, but only those from anchors are computed."""
    rough = torch.empty_like(shares, dtype=torch.float32)
    logs, own = torch.empty_like(rough), rough.new_empty(len(rough))
    for some, *parts in zip(*(rows.split(AT_ONCE) for rows in (shares, rough, logs, own)), strict=True):
        rounded, log, product = parts
        torch.clamp_min(rounded.copy_(some), EPS, out=log).log_()
        torch.linalg.vecdot(rounded, log, out=product)
    return grouped(len(shares), lambda anchors: near_anchors(shares, rough, logs, own, anchors, threshold))


def grouped(count: int, near: Callable[[Array], Array]) -> tuple[tuple[int, ...], ...]:
    """The groups of `greedy_groups`. near: from the numbers (A,) of some maps, which maps are near them, (A, count) bool."""
    taken = np.zeros(count, bool)
    groups = []
    while not taken.all():
        anchors = np.flatnonzero(~taken)[:AT_ONCE]  # unless an earlier one of them takes it
        for anchor, row in zip(anchors, near(anchors), strict=True):
            if not taken[anchor]:
                taken |= row
                groups.append(tuple(np.flatnonzero(row).tolist()))
    return tuple(groups)


def near_anchors(shares: Tensor, rough: Tensor, logs: Tensor, own: Tensor, anchors: Array, threshold: float) -> Array:
    """Which maps are closer to each anchor than the threshold, and the anchor itself: (A, T) bool.

    rough, logs, own: the maps (T, N), their logarithms and their products (T,), in float32. These decide all pairs but those whose distance
    is nearer to the threshold than rounding can move it, which are compared in float64.
    """
    some = torch.as_tensor(anchors, device=shares.device)
    crossed = rough[some] @ logs.T + logs[some] @ rough.T  # (A, T)
    distance = (own[some, None] + own - crossed) / 2
    # the n terms of a product have the same sign, so it is wrong by less than n roundings, however they are added (Higham, Sec. 3.1)
    doubt = (shares.shape[1] + SPARE) * torch.finfo(torch.float32).eps / 2 * (crossed.abs() + own[some, None].abs() + own.abs()) / 2
    near = (distance < threshold).cpu().numpy()
    open_pairs = ((distance - threshold).abs() <= doubt).cpu().numpy()
    if open_pairs.any():
        rows, columns = np.flatnonzero(open_pairs.any(1)), np.flatnonzero(open_pairs.any(0))
        exact = symmetric_kl(shares[anchors[rows]], shares[columns]).cpu().numpy() < threshold
        block = np.ix_(rows, columns)
        near[block] = np.where(open_pairs[block], exact, near[block])
    near[np.arange(len(anchors)), anchors] = True
    return near
