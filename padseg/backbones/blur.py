"""Blur the attention from image to text along the text, inside fused attention (Seg4Diff, Sec. 4.3).

Blurring the columns of the attention A with a matrix K is the same as multiplying the values with its transpose: (A Kᵀ) V = A (Kᵀ V). The
transpose matters, because K is not symmetric where the ends are reflected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from padseg.backbones import Backbone
from padseg.backbones.recorder import inputs_of
from padseg.types import Attention, Prompt

MASKED = -1000.0  # additive masks are 0 or some -10000
Attend = Callable[[Attention], Tensor]


class Blur(NamedTuple):
    """What is blurred. layers: blocks, from 0; size, sigma: of the Gaussian, in tokens; pad: what is beyond the ends, 'reflect' (the end
    token is not repeated, as in the paper) or 'symmetric' (it is); renorm: whether each image token keeps the share of its attention that
    text has, which 'reflect' changes; slots: how many text columns, from the first, None for those of CLIP for SD3, and of other models all
    that are not masked."""

    layers: tuple[int, ...]
    size: int = 5
    sigma: float = 9.0
    pad: str = 'reflect'
    renorm: bool = False
    slots: int | None = None


def blur_matrix(count: int, size: int = 5, sigma: float = 9.0, pad: str = 'reflect') -> Tensor:
    """K of a blur: (count, count) float32, output token first. Rows sum to 1; columns do so only with `symmetric`.

    Of a text shorter than the blur, the ends are reflected several times.
    """
    offsets = torch.arange(size) - size // 2
    taps = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    period = max(1, 2 * count - 2) if pad == 'reflect' else 2 * count
    places = (torch.arange(count)[:, None] + offsets) % period  # (count, size)
    places = torch.where(places < count, places, (period if pad == 'reflect' else period - 1) - places)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (taps / taps.sum()).expand(count, -1)).float()


@contextmanager
def blurred(backbone: Backbone, blur: Blur, prompt: Prompt, image_tokens: int, rows: slice | None = None) -> Iterator[None]:
    """Inside the block, blur the attention from image to text of these layers. That of text tokens stays as it is.

    prompt: of the call, for its number of columns; image_tokens: of latents, for joint attention; rows: of the call's batch, by default
    all.
    A recorder that is entered inside the block sees the model's own queries, keys and values, and the blurred output. UsageError for a
    layer that was not fully loaded, or is compiled.
    """
    modules = [backbone.attention_module(layer, ('values', 'output')) for layer in blur.layers]
    joint = any(module is backbone.self_attention_module(layer) for module, layer in zip(modules, blur.layers, strict=True))
    mode = _Blurring(backbone, blur, prompt, image_tokens, rows or slice(None), joint)
    handles = [module.register_forward_pre_hook(lambda *_: setattr(mode, 'running', True)) for module in modules]
    handles += [module.register_forward_hook(lambda *_: setattr(mode, 'running', False)) for module in modules]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Blurring(TorchFunctionMode):
    """Replaces what the running module's fused attention gives to image tokens."""

    def __init__(self, backbone: Backbone, blur: Blur, prompt: Prompt, image_tokens: int, rows: slice, joint: bool) -> None:
        super().__init__()
        self.backbone, self.blur, self.rows = backbone, blur, rows
        self.running = False
        columns = prompt.embeds.shape[1]
        first = backbone.first_image_token(prompt)
        self.image = slice(first, first + image_tokens) if joint else slice(None)
        own = backbone.spec.sequence if backbone.spec.family == 'sd3' else columns
        count = min(columns, own if blur.slots is None else blur.slots)
        self.text = backbone.family.text_columns(range(count), image_tokens)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        compute: Any = func
        plain = compute(*args, **(kwargs or {}))
        if func is not nn.functional.scaled_dot_product_attention or not self.running:
            return plain
        seen = inputs_of(*args, **(kwargs or {}))
        query, key, value = (part[self.rows] for part in (seen.query, seen.key, seen.value) if part is not None)
        mask = None if seen.mask is None else seen.mask.expand(len(plain), -1, -1, -1)[self.rows]
        some = Attention(query, key, value, mask)
        found = blurred_attention(some, self.text, self.blur, lambda of: compute(of.query, of.key, of.value, of.mask))
        plain[self.rows, :, self.image] = found[:, :, self.image]
        return plain


def blurred_attention(seen: Attention, text: list[int], blur: Blur, attend: Attend) -> Tensor:
    """Attention whose part on the columns `text` is blurred along them, without masked ones: (B, heads, N, d).

    attend: computes attention; called once, and two times more to renormalise.
    """
    assert seen.value is not None
    columns = torch.tensor(text, device=seen.value.device)
    value = seen.value.clone()
    value[:, :, columns] = blurred_values(value[:, :, columns], seen.mask, columns, blur)
    if not blur.renorm:
        return attend(seen._replace(value=value))
    # the blurred part by itself, what it sums to and what it summed to before, and the rest by itself
    of_text, shares, rest = (torch.zeros_like(value) for _ in range(3))
    of_text[:, :, columns] = value[:, :, columns]
    ones = torch.ones_like(value[:, :, columns, :1])
    shares[:, :, columns, :1] = ones
    shares[:, :, columns, 1:2] = blurred_values(ones, seen.mask, columns, blur)
    rest.copy_(value)[:, :, columns] = 0
    before, after = attend(seen._replace(value=shares))[..., :2].float().split(1, 3)
    factor = torch.where(after > 0, before / after, 1.0).to(value.dtype)
    return attend(seen._replace(value=rest)) + factor * attend(seen._replace(value=of_text))


def blurred_values(values: Tensor, mask: Tensor | None, columns: Tensor, blur: Blur) -> Tensor:
    """Kᵀ V of the text's values (B, heads, n, d), of each picture's tokens that are not masked."""
    counts = [values.shape[2]] * len(values)
    if mask is not None:
        counts = (mask[:, 0, 0, columns] > MASKED).sum(1).tolist()
    found = values.clone()
    for row, count in enumerate(counts):
        matrix = blur_matrix(count, blur.size, blur.sigma, blur.pad).to(values.device)
        found[row, :, :count] = (matrix.T @ values[row, :, :count].float()).to(values.dtype)
    return found
