"""The encoder of AutoencoderKL in float32 on CPUs: the same network with less work and memory than by its own modules.

Group normalisation and SiLU are one step, residual branches are added in place, nothing is padded as a whole, and wide convolutions are
those of `winograd`. In 16 bits the modules themselves are as fast as the processor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from padseg.backbones import winograd
from padseg.backbones.cpu_norm import Moments, in_parts, moments, scale_and_shift

STRIP = 1 << 24  # values that are padded at a time


class Features(NamedTuple):
    """pixels: (H, W, C), contiguous; parts: their moments."""

    pixels: Tensor
    parts: list[Moments]


class CpuEncoder(nn.Module):
    """Takes the place of a VAE's encoder, with the same parts by the same names: (B, 3, H, W) in -1..1 -> (B, C, H', W')."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        for name, part in encoder.named_children():
            self.add_module(name, part)
        self.encoder = (encoder,)  # in a tuple: its parts have their names already

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.device.type != 'cpu' or pixels.dtype != torch.float32 or torch.is_grad_enabled():
            return self.encoder[0](pixels)
        return torch.stack([encode(self, picture) for picture in pixels])


def speed_up(vae: Any) -> None:
    """Have a VAE on a CPU encode by `encode`, if it can. Narrow ones, such as the embedded model's, gain little and stay as they are."""
    encoder: Any = getattr(vae, 'encoder', None)
    if is_known(encoder) and encoder.conv_in.out_channels >= winograd.LEAST:
        vae.encoder = CpuEncoder(encoder)


def is_known(encoder: Any) -> bool:
    """Whether `encode` computes what this module of diffusers does."""
    try:
        residuals = [block for level in (*encoder.down_blocks, encoder.mid_block) for block in level.resnets]
        halving = [step for level in encoder.down_blocks for step in level.downsamplers or ()]
        attentions = [module for module in encoder.mid_block.attentions if module is not None]
        convolutions = [encoder.conv_in, encoder.conv_out, *(step.conv for step in halving)]
        convolutions += [each for block in residuals for each in (block.conv1, block.conv2)]
        convolutions += [block.conv_shortcut for block in residuals if block.conv_shortcut is not None]
        return (
            all(type(level).__name__ == 'DownEncoderBlock2D' for level in encoder.down_blocks)
            and type(encoder.mid_block).__name__ == 'UNetMidBlock2D'
            and all(is_known_residual(block) for block in residuals)
            and all(step.use_conv and step.padding == 0 and step.norm is None and step.conv.stride == (2, 2) for step in halving)
            and all(is_known_attention(module) for module in attentions)
            and all(type(each) is nn.Conv2d and each.bias is not None for each in convolutions)
            and isinstance(encoder.conv_act, nn.SiLU)
        )
    except AttributeError:
        return False


def is_known_residual(block: Any) -> bool:
    added = (block.time_emb_proj, block.upsample, block.downsample)
    return (
        all(each is None for each in added)
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.dropout.p == 0
        and block.output_scale_factor == 1
    )


def is_known_attention(module: Any) -> bool:
    absent = (module.spatial_norm, module.norm_q, module.norm_k)
    usual = module.group_norm is not None and module.residual_connection and module.rescale_output_factor == 1
    return usual and all(each is None for each in absent) and module.scale == (module.inner_dim // module.heads) ** -0.5


def encode(encoder: Any, picture: Tensor) -> Tensor:
    """Encode one picture (3, H, W) -> (C, H', W')."""
    features = measured(plain(encoder.conv_in, picture.permute(1, 2, 0)))
    for level in encoder.down_blocks:
        for block in level.resnets:
            features = residual(block, features)
        for step in level.downsamplers or ():
            features = measured(halved(step.conv, features.pixels))
    first, *others = encoder.mid_block.resnets
    features = residual(first, features)
    for attention, block in zip(encoder.mid_block.attentions, others, strict=True):
        features = features if attention is None else attended(attention, features)
        features = residual(block, features)
    return plain(encoder.conv_out, normalised(encoder.conv_norm_out, features, activated=True)).permute(2, 0, 1)


def measured(pixels: Tensor) -> Features:
    return Features(pixels, moments(pixels.view(-1, pixels.shape[-1])))


def residual(block: Any, features: Features) -> Features:
    """A residual block. Without a shortcut, it overwrites the features."""
    hidden = convolution(block.conv1, block.norm1, features, None)
    block.dropout(hidden.pixels)  # does nothing but call hooks, by which callers may end what takes too long
    onto = features.pixels if block.conv_shortcut is None else plain(block.conv_shortcut, features.pixels)
    return convolution(block.conv2, block.norm2, hidden, onto)


def convolution(conv: nn.Conv2d, norm: nn.GroupNorm, features: Features, onto: Tensor | None) -> Features:
    """Normalise, apply SiLU and convolve; the result is new, or added to `onto`, in place."""
    pixels, weight, bias = features.pixels, conv.weight, conv.bias
    if bias is not None and winograd.pays_off(pixels, weight):
        out = pixels.new_empty(*pixels.shape[:2], len(weight)) if onto is None else onto
        scale, shift = of_channels(norm, features)
        ready = winograd.convolved(pixels, scale, shift, weight, bias, out, add=onto is not None)
        return Features(out, [each for rows in ready for each in moments(rows.view(-1, len(weight)))])
    found = plain(conv, normalised(norm, features, activated=True))
    return measured(found if onto is None else onto.add_(found))


def of_channels(norm: nn.GroupNorm, features: Features) -> tuple[Tensor, Tensor]:
    """Scale and shift, (C,) float32 each, that are the group normalisation of these features."""
    scale, shift = scale_and_shift(features.parts, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return scale.float(), shift.float()


def normalised(norm: nn.GroupNorm, features: Features, activated: bool) -> Tensor:
    """Normalise, and with `activated` apply SiLU: (H, W, C), new."""
    scale, shift = of_channels(norm, features)
    out = torch.empty_like(features.pixels)
    flat = (tensor.view(-1, tensor.shape[-1]) for tensor in (features.pixels, out))
    for part, place in zip(*(in_parts(tensor) for tensor in flat), strict=True):
        torch.addcmul(shift, part, scale, out=place)
        if activated:
            functional.silu(place, inplace=True)
    return out


def plain(conv: nn.Conv2d, pixels: Tensor) -> Tensor:
    """Convolve (H, W, C) -> (H', W', O)."""
    return conv(pixels.permute(2, 0, 1)[None])[0].permute(1, 2, 0).contiguous()


def halved(conv: nn.Conv2d, pixels: Tensor) -> Tensor:
    """Convolve with a stride of 2 and zeros after the last row and column, some rows at a time, so that only these are copied."""
    height, width, channels = pixels.shape
    out = pixels.new_empty(height // 2, width // 2, conv.out_channels)
    top = 0
    for ready in out.split(max(1, STRIP // (2 * width * channels))):
        part = pixels[2 * top : 2 * (top + len(ready)) + 1]
        below = 2 * len(ready) + 1 - len(part)
        ready.copy_(plain(conv, functional.pad(part, (0, 0, 0, 1, 0, below))))
        top += len(ready)
    return out


def attended(module: Any, features: Features) -> Features:
    """Self-attention of all pixels, added to the features in place."""
    rows = normalised(module.group_norm, features, activated=False).view(-1, features.pixels.shape[-1])
    query, key, value = (
        layer(rows).view(1, len(rows), module.heads, -1).transpose(1, 2) for layer in (module.to_q, module.to_k, module.to_v)
    )
    found = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(len(rows), -1)
    features.pixels.view(-1, features.pixels.shape[-1]).add_(module.to_out[0](found))
    return measured(features.pixels)
