"""Convolution of 3 x 3 pixels in float32 on CPUs with a quarter of the multiplications, after a normalisation and SiLU.

A tile of 4 x 4 pixels is transformed to 36 values per channel, which are multiplied by those of the weights and transformed back:
Winograd's minimal filtering F(4 x 4, 3 x 3), see Lavin and Gray, "Fast algorithms for convolutional neural networks" (CVPR 2016). They
interpolate at 0, 1, -1, 2, -2 and infinity, which loses digits. At 0, 5/8, -5/8, 3/2, -3/2 and infinity the result is about as exact as
a convolution in float32 by torch, which sums up more products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

NEAR, FAR = 0.625, 1.5  # where polynomials are interpolated, with both signs
TILE, TAPS = 4, 6  # pixels along a side of a tile, and transformed values
LEAST = 128  # channels; with fewer, transforming takes longer than the multiplications that are saved
FEWEST = 1024  # pixels; with fewer, transforming the weights does
VALUES = 1 << 21  # transformed at a time: 8 MB, which stays in the processor's cache


def pays_off(pixels: Tensor, weight: Tensor) -> bool:
    """Whether `convolved` takes (H, W, C) and weights (O, C, 3, 3), and is faster than torch's own convolution."""
    enough = min(weight.shape[:2]) >= LEAST and pixels.shape[0] * pixels.shape[1] >= FEWEST
    return enough and weight.shape[2:] == (3, 3)


def convolved(
    pixels: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, out: Tensor, add: bool = False, values: int = VALUES
) -> Iterator[Tensor]:
    """Convolve SiLU(pixels * scale + shift), which has zeros around, and write the result to `out`, or add it to what is there.

    pixels: (H, W, C); scale, shift: (C,); weight: (O, C, 3, 3); bias: (O,); out: (H, W, O), contiguous; all float32. Yields parts of
    `out`, whole rows, as soon as they are ready. values: transformed at a time.
    """
    height, width, channels = pixels.shape
    outputs, across, down = len(weight), -(-width // TILE), -(-height // TILE)
    strips = -(-down // max(1, values // (TAPS**2 * max(channels, outputs) * across)))
    rows = -(-down // strips)  # of tiles at a time
    factors = of_weights(weight)  # (36, C, O)
    strip = torch.zeros(TILE * rows + 2, TILE * across + 2, channels)  # with a border of one pixel
    half = torch.empty(TAPS, rows, strip.shape[1], channels)  # transformed along columns only
    whole = torch.empty(TAPS, TAPS, rows, across, channels)
    product = torch.empty(TAPS, TAPS, rows, across, outputs)
    back = torch.empty(TILE, TAPS, rows, across, outputs)
    result = torch.empty(rows, TILE, across, TILE, outputs)
    spare = [torch.empty_like(half[:3]), torch.empty_like(whole[:3]), torch.empty_like(product[:2]), torch.empty_like(back[:, :2])]
    for top in range(0, height, TILE * rows):
        first = 0 if top == 0 else top + 1  # the two rows before are those at the end of the last strip
        last = min(height, top + TILE * rows + 1)
        if top:
            strip[:2] = strip[-2:]
        fresh = strip[first - top + 1 : last - top + 1]
        torch.addcmul(shift, pixels[first:last], scale, out=fresh[:, 1 : width + 1])
        functional.silu(fresh, inplace=True)
        strip[last - top + 1 :] = 0
        transform([strip[place : place + TILE * rows - 3 : TILE] for place in range(TAPS)], half, spare[0])
        places = [half[:, :, place : place + TILE * across - 3 : TILE] for place in range(TAPS)]
        transform(places, whole.transpose(0, 1), spare[1])
        torch.bmm(whole.view(TAPS**2, -1, channels), factors, out=product.view(TAPS**2, -1, outputs))
        transform_back(product, back, spare[2])
        transform_back(back.transpose(0, 1), result.permute(3, 1, 0, 2, 4), spare[3].transpose(0, 1))
        ready = out[top : top + TILE * rows]
        found = result.view(TILE * rows, TILE * across, outputs)[: len(ready), :width]
        if add:
            ready.add_(found).add_(bias)
        else:
            torch.add(found, bias, out=ready)
        yield ready


def of_weights(weight: Tensor) -> Tensor:
    """Transform (O, C, 3, 3) to (36, C, O)."""
    near, far = 2 * NEAR**2 * (NEAR**2 - FAR**2), 2 * FAR**2 * (FAR**2 - NEAR**2)
    rows = [(1 / (NEAR * FAR) ** 2, 0.0, 0.0)]
    rows += [(1 / near, sign * NEAR / near, NEAR**2 / near) for sign in (1, -1)]
    rows += [(1 / far, sign * FAR / far, FAR**2 / far) for sign in (1, -1)]
    matrix = torch.tensor([*rows, (0.0, 0.0, 1.0)], dtype=torch.float64)
    both = torch.kron(matrix, matrix).to(weight.dtype)  # (36, 9)
    taps = weight.permute(2, 3, 0, 1).reshape(9, -1)
    return (both @ taps).view(len(both), *weight.shape[:2]).transpose(1, 2)


def transform(taps: Sequence[Tensor], out: Tensor, spare: Tensor) -> None:
    """Evaluate six values in a row, each a tensor, at the six points: (6, ...), with (3, ...) to compute in."""
    zeroth, first, second, third, fourth, fifth = taps
    even, odd, rest = spare
    torch.sub(fourth, second, alpha=FAR**2, out=even)
    torch.sub(third, first, alpha=FAR**2, out=odd)
    torch.add(even, odd, alpha=NEAR, out=out[1])
    torch.sub(even, odd, alpha=NEAR, out=out[2])
    torch.sub(fourth, second, alpha=NEAR**2, out=even)
    torch.sub(third, first, alpha=NEAR**2, out=odd)
    torch.add(even, odd, alpha=FAR, out=out[3])
    torch.sub(even, odd, alpha=FAR, out=out[4])
    torch.sub(second, zeroth, alpha=NEAR**2, out=rest)
    torch.sub(even, rest, alpha=FAR**2, out=out[0])
    torch.sub(fifth, third, alpha=NEAR**2, out=rest)
    torch.sub(rest, odd, alpha=FAR**2, out=out[5])


def transform_back(points: Tensor, out: Tensor, spare: Tensor) -> None:
    """Turn values at the six points, (6, ...), into four in a row, (4, ...), with (2, ...) to compute in."""
    near, far = spare
    torch.add(points[1], points[2], out=near)
    torch.add(points[3], points[4], out=far)
    torch.add(points[0], near, out=out[0]).add_(far)
    torch.mul(near, NEAR**2, out=out[2]).add_(far, alpha=FAR**2)
    torch.sub(points[1], points[2], out=near)
    torch.sub(points[3], points[4], out=far)
    torch.mul(near, NEAR, out=out[1]).add_(far, alpha=FAR)
    torch.add(points[5], near, alpha=NEAR**3, out=out[3]).add_(far, alpha=FAR**3)
