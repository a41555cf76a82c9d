"""What a training step needs of a small SD3 model: embeddings of texts, noised latents, token maps, and the flow-matching loss."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padseg.backbones.parts import has_bfloat16
from padseg.backbones.recorder import Request, watch
from padseg.backbones.sd3 import text_columns
from padseg.methods.stages.attention import token_attention
from padseg.train.data import Batch
from padseg.train.vocabulary import SLOTS
from padseg.types import Attention


def pixels_of(examples: Batch, device: torch.device) -> Tensor:
    """The images of a batch on the device: (B, 3, H, W) in -1..1, channels last."""
    return examples.images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1


def normalised(latents: Tensor, statistics: Tensor) -> Tensor:
    mean, deviation = statistics
    return ((latents.float() - mean) / deviation).contiguous()


def tokens_of(tokenizers: tuple[Any, Any], texts: list[str]) -> Tensor:
    """The tokens of texts for both text encoders: (2, B, 77) int64."""
    return torch.stack(
        [each(texts, padding='max_length', max_length=SLOTS, truncation=True, return_tensors='pt').input_ids for each in tokenizers]
    )


def encode_batch(learner: nn.ModuleDict, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Encode tokens (2, B, 77) as SD3 does without T5: embeddings (B, 2 x 77, D) with zeros in the second half, and pooled (B, D)."""
    tokens = tokens.to(next(learner.parameters()).device, non_blocking=True)
    encoders = (learner[name] for name in ('text_encoder', 'text_encoder_2'))
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, tokens, strict=True)]
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], -1)  # (B, 77, D)
    return F.pad(embeds, (0, 0, 0, SLOTS)), torch.cat([output.text_embeds for output in outputs], -1)


def noised_batch(z: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    return mixed(z, torch.randn(z.shape, generator=generator).to(z.device), sigma)


def mixed(z: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Latents with noise, (B, C, h, w) each, at noise levels sigma (B,): at 0 the latents, at 1 the noise."""
    return z + sigma[:, None, None, None] * (noise - z)


def token_maps(transformer: Any, z: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """The token maps of some blocks, see `training_maps`, for latents (B, C, h, w) that are noised to the levels sigma (B,).

    The forward pass ends at the last of the blocks.
    """
    reduce = partial(training_maps, shape=z.shape)
    requests = {layer: Request(transformer.transformer_blocks[layer].attn, reduce) for layer in layers}
    with autocast(z.device), watch(requests) as kept:
        transformer(z, embeds, pooled, sigma * 1000)
    return [kept[layer] for layer in layers]


def training_maps(seen: Attention, shape: torch.Size) -> Tensor:
    """The 77 token maps of a layer at the resolution of the masks, twice the token grid: (B, 77, 2h, 2w), float32 even under autocast."""
    h, w = shape[2] // 2, shape[3] // 2
    with torch.autocast(seen.query.device.type, enabled=False):
        maps = token_attention(seen, h * w, text_columns(range(SLOTS), h * w), chunk=h * w)  # (B, h w, 77)
    return F.interpolate(maps.transpose(1, 2).unflatten(2, (h, w)), scale_factor=2, mode='bilinear')


def flow_loss(transformer: Any, z: Tensor, embeds: Tensor, pooled: Tensor, generator: torch.Generator) -> Tensor:
    """Flow-matching loss (Lipman et al. 2023) on latents (B, C, h, w), with SD3's logit-normal noise levels."""
    sigma = torch.randn(len(z), generator=generator).sigmoid().to(z.device)
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    with autocast(z.device):
        velocity = transformer(mixed(z, noise, sigma), embeds, pooled, sigma * 1000, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - z)


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision where the device has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))
