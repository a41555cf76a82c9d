"""Principal components of queries, keys and values of image tokens, and what explains them: places or regions (Seg4Diff, Sec. 3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from padseg.analysis.recording import Sight, Source, over_pictures
from padseg.backbones.recorder import What
from padseg.types import Array, Attention, Frame

COMPONENTS = 3  # drawn as red, green and blue
WAVES = 4  # sines and cosines of 1 to this many half periods along each axis
KINDS: tuple[What, ...] = ('queries', 'keys', 'values')
FIGURES = ('explained', 'position', 'position_adjusted', 'region', 'region_adjusted')
VOID = 255


class Components(NamedTuple):
    """Principal components over pictures. steps: S; mean, std: (S, kinds, layers, figures), see KINDS and FIGURES.

    explained: share of the variance in the first three components; position, region: R² of their scores by place and by the true regions,
    NaN without labels, and with `adjusted` less what as many random features would explain. pictures: number; maps: of the first picture at
    the first step, (kinds, layers, h, w, 3) in 0..1.
    """

    pictures: int
    steps: list[int]
    mean: Array
    std: Array
    maps: Array
    image: Array | None
    name: str


def principal(tokens: Tensor, count: int = COMPONENTS) -> tuple[Tensor, float]:
    """Scores of tokens (N, C) on their first principal components, (N, count) float64, and the share of the variance that these explain.

    The sign of a component is that in which its largest loading is positive.
    """
    centred = tokens.double() - tokens.double().mean(0)
    wide = centred.shape[1] > centred.shape[0]  # the smaller of the two matrices has the same eigenvalues
    values, vectors = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values, vectors = values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    loadings = centred.T @ vectors if wide else vectors
    signs = loadings.gather(0, loadings.abs().argmax(0, keepdim=True)).sign()[0]
    scores = (vectors * values.sqrt() if wide else centred @ vectors) * torch.where(signs == 0, 1, signs)
    total = float(centred.square().sum())
    return scores, float(values.sum()) / total if total else 0.0


def explained(scores: Array, features: Array) -> tuple[float, float]:
    """R² of scores (N, K) by features (N, F) and a constant, by least squares; and adjusted for the number of features.

    1 - the squares that are left / all squares around the mean, summed over scores. NaN for scores without variance; the adjusted one also
    where there are no more tokens than features.
    """
    centred, given = scores - scores.mean(0), features - features.mean(0)
    total = (centred**2).sum()
    if not total > 0:
        return np.nan, np.nan
    weights, _, rank, _ = np.linalg.lstsq(given, centred, rcond=1e-9)
    left = ((centred - given @ weights) ** 2).sum() / total
    free = len(scores) - 1 - int(rank)
    return float(1 - left), float(1 - left * (len(scores) - 1) / free) if free > 0 else np.nan


def places(grid: tuple[int, int], waves: int = WAVES) -> Array:
    """Sines and cosines of 1..waves half periods over the rows and over the columns of a grid (h, w): (h w, 4 waves)."""
    features = []
    for axis, length in enumerate(grid):
        angles = np.pi * (np.arange(length) + 0.5) / length
        for wave in range(1, waves + 1):
            for values in (np.sin(wave * angles), np.cos(wave * angles)):
                features.append(np.broadcast_to(values[:, None] if axis == 0 else values, grid).ravel())
    return np.stack(features, axis=1)


def regions_of(truth: Array, frame: Frame, grid: tuple[int, int]) -> tuple[Array, Array]:
    """Which tokens count, (h w,) bool, and of which region these are as one column each: (N', R). truth: (H, W), 255 is void."""
    top, left, height, width = frame.box
    seen = truth[top : top + height, left : left + width].astype(np.int32)
    small = cv2.resize(seen, grid[::-1], interpolation=cv2.INTER_NEAREST).ravel()
    valid = small != VOID
    return valid, (small[valid, None] == np.unique(small[valid])).astype(float)


def kind_of(seen: Attention, kind: str, sight: Sight) -> Tensor:
    """Queries, keys or values of the image tokens, all heads side by side: (N, C)."""
    tensor = {'queries': seen.query, 'keys': seen.key, 'values': seen.value}[kind]
    assert tensor is not None
    return tensor[0][:, list(sight.sets['image'])].transpose(0, 1).flatten(1)


def read_components(seen: Attention, sight: Sight) -> tuple[Array, Array]:
    """FIGURES of every kind, (kinds, figures), and the components as colours, (kinds, h, w, 3) float32."""
    figures, maps = [], []
    for kind in KINDS:
        scores, share = principal(kind_of(seen, kind, sight))
        values = scores.cpu().numpy()
        of_regions = (np.nan, np.nan)
        if sight.truth is not None and sight.frame is not None:
            valid, regions = regions_of(sight.truth, sight.frame, sight.grid)
            of_regions = explained(values[valid], regions) if regions.shape[1] > 1 else of_regions
        figures.append([share, *explained(values, places(sight.grid)), *of_regions])
        maps.append(colours(values).reshape(*sight.grid, -1))
    return np.array(figures), np.stack(maps).astype(np.float32)


def colours(scores: Array) -> Array:
    """Scores (N, 3), each component from 0 to 1; with fewer components the rest is 0."""
    low, high = scores.min(0), scores.max(0)
    scaled = (scores - low) / np.where(high > low, high - low, 1)
    return np.pad(scaled, ((0, 0), (0, COMPONENTS - scaled.shape[1])))


def measure(source: Source) -> Components:
    """Measure every block over pictures."""
    readings: list[tuple[Sight, Array]] = []
    first: tuple[Sight, Array] | None = None
    for sight, blocks in source(read_components, KINDS):
        readings.append((sight, np.stack([figures for figures, _ in blocks], axis=1)))  # (kinds, layers, figures)
        first = first or (sight, np.stack([maps for _, maps in blocks], axis=1))  # (kinds, layers, h, w, 3)
    assert first is not None
    mean, std = over_pictures(readings)
    sight, maps = first
    return Components(
        pictures=len({sight.name for sight, _ in readings}),
        steps=list(dict.fromkeys(sight.step for sight, _ in readings)),
        mean=mean,
        std=std,
        maps=maps,
        image=sight.image,
        name=sight.name,
    )


def rows(components: Components) -> list[dict[str, Any]]:
    """A row for every step, layer and kind: means over pictures and, with `_std`, standard deviations; None where there are no labels."""
    return [
        {
            'step': step,
            'layer': layer,
            'kind': kind,
            **{name: number(components.mean[s, k, layer, f]) for f, name in enumerate(FIGURES)},
            **{f'{name}_std': number(components.std[s, k, layer, f]) for f, name in enumerate(FIGURES)},
        }
        for s, step in enumerate(components.steps)
        for layer in range(components.mean.shape[2])
        for k, kind in enumerate(KINDS)
    ]


def summary(components: Components) -> list[dict[str, Any]]:
    """A row for every step, layer and kind, with what the figure shows."""
    shown = ('step', 'layer', 'kind', 'explained', 'position_adjusted', 'region_adjusted')
    return [{name: row[name] for name in shown} for row in rows(components)]


def number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
