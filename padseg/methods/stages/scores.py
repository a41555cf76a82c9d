"""Maps of a prompt's tokens -> scores of the names in it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from padseg.methods.stages.proposals import EPS
from padseg.types import Prompt


def means(maps: Tensor, prompt: Prompt, scores: str) -> Tensor:
    """Combine token maps to one map per name of a prompt: (T, h, w) -> (C, h, w)."""
    if scores == 'minmax-token':
        maps = minmax(maps)
    weighted = maps * torch.tensor(prompt.weights, device=maps.device)[:, None, None]
    names = np.array(prompt.names)
    return torch.stack([weighted[torch.from_numpy(names == name)].sum(0) for name in dict.fromkeys(prompt.names)])


def scale_scores(maps: Tensor, classes: int, scores: str) -> Tensor:
    """Scale maps of classes and background words to scores: (C + B, h, w) -> (C, h, w), or (C + 1, h, w) with the best background word."""
    if scores == 'minmax':
        maps = minmax(maps)
    if scores == 'share':
        maps = maps / maps.sum(0, keepdim=True).clamp_min(EPS)
    background = maps[classes:]
    return torch.cat((maps[:classes], background.amax(0, keepdim=True))) if len(background) else maps


def minmax(maps: Tensor) -> Tensor:
    """Scale each map to 0..1 over space; a constant map becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(EPS)


def mean_of_steps(maps: list[Tensor]) -> Tensor:
    """Average maps over noise levels: (T, h, w) each -> (T, h, w)."""
    return torch.stack(maps).mean(0)


def joined_maps(maps: list[Tensor]) -> Tensor:
    """Concatenate the maps of several prompts: (T, h, w) each -> (sum of T, h, w)."""
    return torch.cat(maps)


def with_floor(values: Tensor, floor: float | None) -> Tensor:
    """Scores (C, h, w) as float64, followed by a constant map with value `floor`, if given."""
    values = values.double()
    return values if floor is None else torch.cat((values, torch.full_like(values[:1], floor)))
