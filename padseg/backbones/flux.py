"""Flux.1: what differs from other families. Text tokens come before image tokens; single blocks follow the double ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from padseg.backbones.family import Dimensions, padded
from padseg.backbones.layout import LAYOUTS
from padseg.backbones.noise import NoiseLevel, flow_level, scheduled
from padseg.backbones.parts import clip_tokenizer, read_text_encoders, read_tokenizer, without_advice
from padseg.backbones.source import Source, check_files, text_files, text_parts
from padseg.errors import ModelUnavailable
from padseg.types import Prompt, TextToken

LAYOUT = LAYOUTS['flux']
TEXT_DTYPE = torch.bfloat16  # T5's published precision: float32 would double the memory without being any closer to the trained weights
PATCH = 2  # latent cells along a side of an image token; packed by the pipeline, not by the transformer
LIMIT = 192  # tokens along a side, as for SD3: rotary embeddings have no limit, but the training sizes do
CLIP_SLOTS = 77
GUIDANCE = 3.5  # guidance strength that the model was distilled for, the pipeline's default


def size(config: Any) -> Dimensions:
    return Dimensions(config.in_channels // PATCH**2, PATCH, LIMIT)


def blocks(transformer: FluxTransformer2DModel) -> list[Any]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def cut(transformer: FluxTransformer2DModel, layer: int) -> None:
    """Keep blocks 0..layer, and of the last one only what its queries and keys need, because the forward pass stops there."""
    double = len(transformer.transformer_blocks)
    transformer.transformer_blocks = transformer.transformer_blocks[: layer + 1]
    transformer.single_transformer_blocks = transformer.single_transformer_blocks[: max(0, layer + 1 - double)]
    transformer.norm_out = transformer.proj_out = None
    last = blocks(transformer)[layer]
    last.attn.to_v = nn.Identity()  # the processor computes values before queries and keys
    if layer < double:
        last.ff = last.ff_context = None
        last.attn.add_v_proj = nn.Identity()
        last.attn.to_out = last.attn.to_add_out = None
    else:
        last.proj_mlp = last.act_mlp = nn.Identity()  # these run before the attention
        last.proj_out = None


def schedule(scheduler: Any, steps: int, image_tokens: int) -> Any:
    """The pipeline's schedule; pictures with more tokens get more noise at every step."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    shift = calculate_shift(image_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    return scheduled(scheduler, sigmas=np.linspace(1, 1 / steps, steps), mu=shift)


def noise_level(scheduler: Any, steps: int, step: int, image_tokens: int) -> NoiseLevel:
    """Noise level of a step, which depends on the size of the picture."""
    return flow_level(schedule(scheduler, steps, image_tokens), step)


def tokenizers(source: Source) -> dict[str, Any]:
    """Load the CLIP and T5 tokenizers. Checks for T5's vocabulary first: transformers would create an empty one."""
    from transformers import T5TokenizerFast

    clip = clip_tokenizer(source, 'tokenizer', CLIP_SLOTS)
    if not (source.folder / 'tokenizer_2' / 'tokenizer.json').is_file():
        raise ModelUnavailable(f'tokenizer_2 of {source.model} has no vocabulary: {source.folder / "tokenizer_2"} needs tokenizer.json')
    t5 = read_tokenizer(T5TokenizerFast, source, 'tokenizer_2')
    if t5.model_max_length < source.spec.sequence:
        raise ModelUnavailable(f'tokenizer_2 of {source.model} has {t5.model_max_length} slots; expected {source.spec.sequence}')
    return {'tokenizer': clip, 'tokenizer_2': t5}


def needs_exact_vae(config: Mapping[str, Any]) -> bool:
    return False


def prompt_shapes(slots: int, config: Any) -> dict[str, tuple[int, ...]]:
    return {'embeds': (1, slots, config.joint_attention_dim), 'pooled': (1, config.pooled_projection_dim)}


def null_tokens(slots: int) -> Sequence[TextToken]:
    return padded(('</s>',), slots)


def compute_null_prompt(source: Source, transformer: FluxTransformer2DModel, slots: int) -> dict[str, Tensor]:
    return encode_text(text_pipeline(source, transformer), slots, '')


def text_pipeline(source: Source, transformer: FluxTransformer2DModel) -> Any:
    """Build diffusers' pipeline with the two text encoders and nothing else that encoding texts does not need."""
    with without_advice():
        from diffusers import FluxPipeline

    text_files(source)
    check_files(source, text_parts(source))
    parts = tokenizers(source) | read_text_encoders(source, TEXT_DTYPE)
    return FluxPipeline(transformer=transformer, vae=None, scheduler=None, **parts)


def encode_text(pipeline: Any, slots: int, text: str) -> dict[str, Tensor]:
    """Encode a text: T5's embeddings, padded to `slots` tokens without a mask, as embeds (1, slots, D); CLIP's summary as pooled (1, E)."""
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(text, device=torch.device('cpu'), max_sequence_length=slots)
    return {'embeds': embeds.float().contiguous(), 'pooled': pooled.float().contiguous()}


def attention_module(transformer: FluxTransformer2DModel, layer: int) -> nn.Module:
    return blocks(transformer)[layer].attn


def self_attention_module(transformer: FluxTransformer2DModel, layer: int) -> nn.Module:
    """The joint attention, whose keys are those of the text and the image."""
    return attention_module(transformer, layer)


def output_projection(transformer: FluxTransformer2DModel, layer: int) -> tuple[Tensor, Tensor | None]:
    """In single blocks, attention and MLP share a projection: the attention's part of its weight, without the bias, which is of both."""
    block = blocks(transformer)[layer]
    if layer < len(transformer.transformer_blocks):
        return block.attn.to_out[0].weight, block.attn.to_out[0].bias
    return block.proj_out.weight[:, : block.proj_out.out_features], None


def layer_names(transformer: FluxTransformer2DModel) -> list[str]:
    return [f'vit-block{number}' for number in range(len(blocks(transformer)))]


def grid(transformer: FluxTransformer2DModel, layer: int, latent_shape: Sequence[int]) -> tuple[int, int]:
    return latent_shape[-2] // PATCH, latent_shape[-1] // PATCH


def text_columns(picked: Sequence[int], image_tokens: int) -> list[int]:
    return list(picked)


def first_image_token(prompt: Prompt) -> int:
    return prompt.embeds.shape[1]


def denoise(transformer: FluxTransformer2DModel, z: Tensor, timestep: float, prompt: Prompt, guidance: float | None = None) -> Tensor:
    count, _, height, width = z.shape
    h, w = height // PATCH, width // PATCH
    row, column = torch.arange(float(h)), torch.arange(float(w))
    strength = GUIDANCE if guidance is None else guidance
    # cast to the transformer's dtype before dividing, as the pipeline does: in 16 bits the order matters
    time = torch.full((count,), timestep, device=z.device, dtype=transformer.dtype) / 1000
    velocity = transformer(
        hidden_states=packed(z).to(transformer.dtype),
        encoder_hidden_states=prompt.embeds.expand(count, -1, -1),
        pooled_projections=prompt.pooled.expand(count, -1),
        timestep=time,
        guidance=torch.full((count,), strength, device=z.device) if transformer.config.guidance_embeds else None,
        img_ids=torch.cartesian_prod(torch.zeros(1), row, column).to(z.device),  # (h w, 3)
        txt_ids=torch.zeros(prompt.embeds.shape[1], 3, device=z.device),
        return_dict=False,
    )[0]
    return unpacked(velocity, h, w)


def packed(z: Tensor) -> Tensor:
    """Gather the 2 x 2 cells of each patch into one token, channel by channel: (B, C, 2 h, 2 w) -> (B, h w, 4 C)."""
    cells = z.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (B, C, h, 2, w, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, h: int, w: int) -> Tensor:
    """Undo `packed`: (B, h w, 4 C) -> (B, C, 2 h, 2 w)."""
    cells = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (h, w))  # (B, h, w, C, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
