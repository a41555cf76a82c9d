"""Exact group normalisation in float32 on CPUs for the channels-last memory format, in which convolutions are fast.

For this format, torch's own computes the variance as the mean of squares minus the square of the mean, which loses digits, and its order
of summation depends on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

VALUES = 1 << 18  # processed at a time: 1 MB, which stays in the processor's cache


class _Exact(TorchFunctionMode):
    """Computes group normalisation of channels-last float32 tensors on a CPU part by part."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.group_norm and _loses_digits(args[0]):
            return group_norm_by_parts(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _loses_digits(input: Tensor) -> bool:
    last = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return last and input.device.type == 'cpu' and input.dtype == torch.float32


def exact_norms() -> TorchFunctionMode:
    """A context in which float32 group normalisation on CPUs is exact to rounding, and the same with any number of threads."""
    return _Exact()


def group_norm_by_parts(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, values: int = VALUES
) -> Tensor:
    """Normalise (B, C, H, W), channels last: every group of channels gets mean 0 and variance 1, then weight and bias. Keeps the format."""
    count, channels, height, width = input.shape
    rows = input.permute(0, 2, 3, 1).reshape(count, height * width, channels)
    out = torch.empty_like(rows)
    for picture, result in zip(rows, out, strict=True):
        scale, shift = (each.to(input.dtype) for each in scale_and_shift(moments(picture, values), num_groups, weight, bias, eps))
        for part, place in zip(in_parts(picture, values), in_parts(result, values), strict=True):
            torch.addcmul(shift, part, scale, out=place)
    return out.view(count, height, width, channels).permute(0, 3, 1, 2)


class Moments(NamedTuple):
    """Of some pixels: their number, and of each channel the mean and the sum of squared deviations from it, (C,) float32 each."""

    pixels: int
    means: Tensor
    squares: Tensor


def in_parts(pixels: Tensor, values: int = VALUES) -> tuple[Tensor, ...]:
    """Split (pixels, C) into parts of so many values."""
    return pixels.split(max(1, values // pixels.shape[1]))


def moments(pixels: Tensor, values: int = VALUES) -> list[Moments]:
    """Moments of each part of (pixels, C)."""
    found = []
    for part in in_parts(pixels, values):
        part = part.float()
        mean = part.mean(0)
        found.append(Moments(len(part), mean, (part - mean).square_().sum(0)))
    return found


def scale_and_shift(
    parts: Sequence[Moments], num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift that normalise the channels, (C,) float64 each, from the moments of all parts of a picture.

    Means and variances of parts are combined by the formula of Chan et al. (1983).
    """
    sizes = torch.tensor([part.pixels for part in parts], dtype=torch.float64)[:, None]
    means = torch.stack([part.means for part in parts]).double()  # (parts, C)
    squares = torch.stack([part.squares for part in parts]).double()
    channels = means.shape[1]
    each = channels // num_groups
    total = sizes.sum() * each
    mean = ((means * sizes).sum(0).view(num_groups, -1).sum(1) / total).repeat_interleave(each)  # (C,)
    variance = ((squares + sizes * (means - mean).square()).sum(0).view(num_groups, -1).sum(1) / total).repeat_interleave(each)
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    return scale, (0 if bias is None else bias) - mean * scale
