"""AuraFlow: what differs from other families. Eight learned registers come before the text's tokens, which come before those of the image;
single blocks follow the joint ones. Pads are zeros without a place, so that all of them are one and the same token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AuraFlowTransformer2DModel
from torch import Tensor, nn

from padseg.backbones.family import Dimensions
from padseg.backbones.layout import LAYOUTS
from padseg.backbones.noise import NoiseLevel, flow_level, scheduled
from padseg.backbones.parts import read_text_encoders, read_tokenizer, without_advice
from padseg.backbones.source import Source, check_files, text_files, text_parts
from padseg.types import Prompt, TextToken

LAYOUT = LAYOUTS['auraflow']
TEXT_DTYPE = torch.bfloat16  # Pile-T5-XL in float32 would take 5 GB without being any closer to what the transformer was trained on
REGISTERS = 8  # of every model of this class; they stand for no text


def size(config: Any) -> Dimensions:
    return Dimensions(config.in_channels, config.patch_size, math.isqrt(config.pos_embed_max_size))


def blocks(transformer: AuraFlowTransformer2DModel) -> list[Any]:
    return [*transformer.joint_transformer_blocks, *transformer.single_transformer_blocks]


def cut(transformer: AuraFlowTransformer2DModel, layer: int) -> None:
    """Keep blocks 0..layer, and of the last one only what its queries and keys need, because the forward pass stops there."""
    joint = len(transformer.joint_transformer_blocks)
    transformer.joint_transformer_blocks = transformer.joint_transformer_blocks[: layer + 1]
    transformer.single_transformer_blocks = transformer.single_transformer_blocks[: max(0, layer + 1 - joint)]
    transformer.norm_out = transformer.proj_out = None
    last = blocks(transformer)[layer]
    last.attn.to_v = nn.Identity()  # the processor computes values before queries and keys meet
    last.attn.to_out = last.ff = None
    if layer < joint:
        last.attn.add_v_proj = nn.Identity()
        last.attn.to_add_out = last.ff_context = None


def schedule(scheduler: Any, steps: int, image_tokens: int) -> Any:
    return scheduled(scheduler, num_inference_steps=steps)


def noise_level(scheduler: Any, steps: int, step: int, image_tokens: int) -> NoiseLevel:
    """Noise level of a step, the same for all picture sizes."""
    return flow_level(schedule(scheduler, steps, image_tokens), step)


def tokenizers(source: Source) -> dict[str, Any]:
    """Load Pile-T5's tokenizer, which is Llama's. Checks for its vocabulary first: transformers would create an empty one."""
    from transformers import LlamaTokenizerFast

    check_files(source, LAYOUT.tokenizers)
    return {'tokenizer': read_tokenizer(LlamaTokenizerFast, source, 'tokenizer')}


def needs_exact_vae(config: Mapping[str, Any]) -> bool:
    """It is that of SDXL."""
    return True


def prompt_shapes(slots: int, config: Any) -> dict[str, tuple[int, ...]]:
    return {'embeds': (1, slots, config.joint_attention_dim), 'pooled': (1, 0)}


def compute_null_prompt(source: Source, transformer: AuraFlowTransformer2DModel, slots: int) -> dict[str, Tensor]:
    return encode_text(text_pipeline(source, transformer), slots, '')


def null_tokens(slots: int, tensors: Mapping[str, Tensor]) -> Sequence[TextToken]:
    """The registers, then a token for each slot. Pads are zeros, before or behind the rest as the tokenizer has it; T5's texts have an end
    token, here the last of what is no pad."""
    filled = tensors['embeds'][0].any(1).nonzero().flatten().tolist()
    named = dict(zip(filled, [*(f'<template {number}>' for number in range(len(filled) - 1)), '</s>'], strict=False))
    tokens = [TextToken(f'<register {number}>', 'register') for number in range(REGISTERS)]
    return tokens + [TextToken(named[slot], 'template') if slot in named else TextToken(f'<pad {slot}>', 'pad') for slot in range(slots)]


def text_pipeline(source: Source, transformer: AuraFlowTransformer2DModel) -> Any:
    """Build diffusers' pipeline with the text encoder and nothing else that encoding texts does not need."""
    with without_advice():
        from diffusers import AuraFlowPipeline

    text_files(source)
    check_files(source, text_parts(source))
    parts = tokenizers(source) | read_text_encoders(source, TEXT_DTYPE)
    return AuraFlowPipeline(transformer=transformer, vae=None, scheduler=None, **parts)


def encode_text(pipeline: Any, slots: int, text: str) -> dict[str, Tensor]:
    """Encode a text, padded with zeros: embeds (1, slots, D); pooled (1, 0)."""
    with torch.no_grad():
        embeds = pipeline.encode_prompt(text, do_classifier_free_guidance=False, device=torch.device('cpu'), max_sequence_length=slots)[0]
    return {'embeds': embeds.float().contiguous(), 'pooled': torch.zeros(1, 0)}


def attention_module(transformer: AuraFlowTransformer2DModel, layer: int) -> nn.Module:
    return blocks(transformer)[layer].attn


def self_attention_module(transformer: AuraFlowTransformer2DModel, layer: int) -> nn.Module:
    """The joint attention, whose keys are those of registers, text and image."""
    return attention_module(transformer, layer)


def output_projection(transformer: AuraFlowTransformer2DModel, layer: int) -> tuple[Tensor, Tensor | None]:
    projection = blocks(transformer)[layer].attn.to_out[0]
    return projection.weight, projection.bias


def layer_names(transformer: AuraFlowTransformer2DModel) -> list[str]:
    return [f'vit-block{number}' for number in range(len(blocks(transformer)))]


def grid(transformer: AuraFlowTransformer2DModel, layer: int, latent_shape: Sequence[int]) -> tuple[int, int]:
    patch = transformer.config.patch_size
    return latent_shape[-2] // patch, latent_shape[-1] // patch


def text_columns(picked: Sequence[int], image_tokens: int) -> list[int]:
    """The registers, numbered below 0, are the first keys."""
    return [REGISTERS + token for token in picked]


def first_image_token(prompt: Prompt) -> int:
    return REGISTERS + prompt.embeds.shape[1]


def denoise(transformer: AuraFlowTransformer2DModel, z: Tensor, timestep: float, prompt: Prompt, guidance: float | None = None) -> Tensor:
    count = len(z)
    # divided in 32 bits and then cast, as the pipeline does: in 16 bits the order matters
    time = (torch.full((count,), timestep, device=z.device) / 1000).to(transformer.dtype)
    return transformer(
        z.to(transformer.dtype).contiguous(),  # its patches are views
        encoder_hidden_states=prompt.embeds.expand(count, -1, -1),
        timestep=time,
        return_dict=False,
    )[0]
