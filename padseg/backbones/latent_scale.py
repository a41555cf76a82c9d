"""Between a VAE's latents and what transformers were trained on: a shift and a factor, or the mean and deviation of FLUX.2's channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PATCH = 2  # cells along a side of what FLUX.2 has a mean and a deviation for


def scaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents of the VAE's encoder as the transformer takes them: (B, C, H', W') -> the same shape."""
    if hasattr(vae, 'bn'):
        mean, deviation = channel_statistics(vae, latents)
        return in_cells(latents).sub(mean).div(deviation).view_as(latents)
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Undo `scaled`, for the VAE's decoder."""
    if hasattr(vae, 'bn'):
        mean, deviation = channel_statistics(vae, latents)
        return in_cells(latents).mul(deviation).add(mean).view_as(latents)
    return latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)


def in_cells(latents: Tensor) -> Tensor:
    """The cells of each patch apart: (B, C, 2 h, 2 w) -> (B, C, h, 2, w, 2)."""
    return latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))


def channel_statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel and cell of a patch, (C, 1, 2, 1, 2) each, with the latents' dtype and device."""
    mean, deviation = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    mean, deviation = (values.to(latents).view(-1, 1, PATCH, 1, PATCH) for values in (mean, deviation))
    return mean, deviation
