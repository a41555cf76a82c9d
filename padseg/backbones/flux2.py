"""FLUX.2: what differs from Flux.1. Qwen3 reads the text, every token has its own place, and single blocks have one projection for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from padseg.backbones.family import Dimensions, padded
from padseg.backbones.flux import PATCH, blocks as blocks, grid as grid, layer_names as layer_names, packed, unpacked
from padseg.backbones.layout import LAYOUTS
from padseg.backbones.noise import NoiseLevel, flow_level, scheduled
from padseg.backbones.qwen_text import NOT_THINKING, qwen_encoder, qwen_states, qwen_tokenizer
from padseg.backbones.source import Source
from padseg.errors import ModelUnavailable
from padseg.types import Prompt, TextToken

LAYOUT = LAYOUTS['flux2']
TEXT_DTYPE = torch.bfloat16  # Qwen3's published precision
LIMIT = 192  # tokens along a side, as for Flux.1
GUIDANCE = 4.0  # the pipeline's default, for models that are told one, such as FLUX.2-dev
STATES = (9, 18, 27)  # whose hidden states of Qwen3 are the embedding, side by side


def size(config: Any) -> Dimensions:
    return Dimensions(config.in_channels // PATCH**2, PATCH, LIMIT)


def cut(transformer: Flux2Transformer2DModel, layer: int) -> None:
    """Keep blocks 0..layer, and of the last one only what its queries and keys need, because the forward pass stops there.

    The projection of a single block stays whole: it is one tensor for queries, keys, values and MLP.
    """
    double = len(transformer.transformer_blocks)
    transformer.transformer_blocks = transformer.transformer_blocks[: layer + 1]
    transformer.single_transformer_blocks = transformer.single_transformer_blocks[: max(0, layer + 1 - double)]
    transformer.norm_out = transformer.proj_out = None
    last = blocks(transformer)[layer]
    last.attn.to_out = None
    if layer < double:
        transformer.single_stream_modulation = nn.Identity()  # runs before all blocks
        last.ff = last.ff_context = last.attn.to_add_out = None
        last.attn.to_v = last.attn.add_v_proj = nn.Identity()  # the processor computes values before queries and keys


def schedule(scheduler: Any, steps: int, image_tokens: int) -> Any:
    """The pipeline's schedule, whose shift depends on the number of image tokens and of steps."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    return scheduled(scheduler, sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(image_tokens, steps))


def noise_level(scheduler: Any, steps: int, step: int, image_tokens: int) -> NoiseLevel:
    """Noise level of a step, which depends on the size of the picture."""
    return flow_level(schedule(scheduler, steps, image_tokens), step)


def tokenizers(source: Source) -> dict[str, Any]:
    return {'tokenizer': qwen_tokenizer(source, 'tokenizer', NOT_THINKING)}


def needs_exact_vae(config: Mapping[str, Any]) -> bool:
    return False


def prompt_shapes(slots: int, config: Any) -> dict[str, tuple[int, ...]]:
    return {'embeds': (1, slots, config.joint_attention_dim), 'pooled': (1, 0)}


def null_tokens(slots: int, tensors: Mapping[str, Tensor]) -> Sequence[TextToken]:
    return padded(NOT_THINKING.names, slots)


def compute_null_prompt(source: Source, transformer: Flux2Transformer2DModel, slots: int) -> dict[str, Tensor]:
    return encode_text(*qwen_encoder(source, TEXT_DTYPE, NOT_THINKING), slots, '')


def encode_text(encoder: Any, tokenizer: Any, slots: int, text: str) -> dict[str, Tensor]:
    """Encode a text: three layers' hidden states side by side, padded to `slots` tokens, as embeds (1, slots, D); pooled (1, 0)."""
    states, _ = qwen_states(encoder, tokenizer, text, slots, NOT_THINKING)
    if len(states) <= STATES[-1]:
        raise ModelUnavailable(f'the text encoder {encoder.name_or_path} has {len(states) - 1} layers; layer {STATES[-1]} is read')
    return {'embeds': torch.cat([states[number] for number in STATES], 2).float(), 'pooled': torch.zeros(1, 0)}


def attention_module(transformer: Flux2Transformer2DModel, layer: int) -> nn.Module:
    return blocks(transformer)[layer].attn


def self_attention_module(transformer: Flux2Transformer2DModel, layer: int) -> nn.Module:
    """The joint attention, whose keys are those of the text and the image."""
    return attention_module(transformer, layer)


def output_projection(transformer: Flux2Transformer2DModel, layer: int) -> tuple[Tensor, Tensor | None]:
    """In single blocks, attention and MLP share a projection: the attention's part of its weight."""
    attention = blocks(transformer)[layer].attn
    if layer < len(transformer.transformer_blocks):
        return attention.to_out[0].weight, attention.to_out[0].bias
    return attention.to_out.weight[:, : attention.inner_dim], None


def text_columns(picked: Sequence[int], image_tokens: int) -> list[int]:
    return list(picked)


def first_image_token(prompt: Prompt) -> int:
    return prompt.embeds.shape[1]


def denoise(transformer: Flux2Transformer2DModel, z: Tensor, timestep: float, prompt: Prompt, guidance: float | None = None) -> Tensor:
    count, _, height, width = z.shape
    h, w = height // PATCH, width // PATCH
    strength = GUIDANCE if guidance is None else guidance
    zero, rows, columns, slots = (torch.arange(length) for length in (1, h, w, prompt.embeds.shape[1]))
    slots[len(slots) - prompt.outside :] = 0  # of tokens without an order, as all text of Flux.1
    velocity = transformer(
        hidden_states=packed(z).to(transformer.dtype),
        encoder_hidden_states=prompt.embeds.expand(count, -1, -1),
        # cast to the transformer's dtype before dividing, as the pipeline does: in 16 bits the order matters
        timestep=torch.full((count,), timestep, device=z.device, dtype=transformer.dtype) / 1000,
        guidance=torch.full((count,), strength, device=z.device) if transformer.config.guidance_embeds else None,
        img_ids=torch.cartesian_prod(zero, rows, columns, zero).to(z.device),  # (h w, 4): time, row, column, slot of the text
        txt_ids=torch.cartesian_prod(zero, zero, zero, slots).to(z.device),
        return_dict=False,
    )[0]
    return unpacked(velocity, h, w)
