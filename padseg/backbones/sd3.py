"""Stable Diffusion 3 and 3.5: what differs from other families. Text tokens come after image tokens among the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from padseg.backbones.family import Dimensions, padded
from padseg.backbones.layout import LAYOUTS
from padseg.backbones.noise import NoiseLevel, flow_level, scheduled
from padseg.backbones.parts import clip_tokenizer, read_text_encoders, without_advice
from padseg.backbones.source import Source, check_files, text_files, text_parts
from padseg.types import Prompt, TextToken

LAYOUT = LAYOUTS['sd3']
TEXT_DTYPE = torch.float32


def size(config: Any) -> Dimensions:
    return Dimensions(config.in_channels, config.patch_size, config.pos_embed_max_size)


def blocks(transformer: SD3Transformer2DModel) -> Sequence[nn.Module]:
    return list(transformer.transformer_blocks)


def cut(transformer: SD3Transformer2DModel, layer: int) -> None:
    """Keep blocks 0..layer, and of the last one only what its queries and keys need, because the forward pass stops there."""
    transformer.transformer_blocks = transformer.transformer_blocks[: layer + 1]
    transformer.norm_out = transformer.proj_out = None
    last = transformer.transformer_blocks[layer]
    last.attn2 = last.ff = last.ff_context = None
    last.attn.to_v = last.attn.add_v_proj = nn.Identity()  # the processor computes values before queries and keys
    last.attn.to_out = last.attn.to_add_out = None


def schedule(scheduler: Any, steps: int, image_tokens: int) -> Any:
    return scheduled(scheduler, num_inference_steps=steps)


def noise_level(scheduler: Any, steps: int, step: int, image_tokens: int) -> NoiseLevel:
    """Noise level of a step, the same for all picture sizes."""
    return flow_level(schedule(scheduler, steps, image_tokens), step)


def tokenizers(source: Source) -> dict[str, Any]:
    return {part: clip_tokenizer(source, part, source.spec.sequence) for part in ('tokenizer', 'tokenizer_2')}


def needs_exact_vae(config: Mapping[str, Any]) -> bool:
    return False


def prompt_shapes(slots: int, config: Any) -> dict[str, tuple[int, ...]]:
    return {'embeds': (1, 2 * slots, config.joint_attention_dim), 'pooled': (1, config.pooled_projection_dim)}


def null_tokens(slots: int) -> Sequence[TextToken]:
    return padded(('<|startoftext|>', '<|endoftext|>'), slots)


def compute_null_prompt(source: Source, transformer: SD3Transformer2DModel, slots: int) -> dict[str, Tensor]:
    return encode_text(text_pipeline(source, transformer), slots, '')


def text_pipeline(source: Source, transformer: SD3Transformer2DModel) -> Any:
    """Build diffusers' pipeline with the two CLIP text encoders and nothing else that encoding texts does not need."""
    with without_advice():
        from diffusers import StableDiffusion3Pipeline

    text_files(source)
    check_files(source, text_parts(source))
    parts = tokenizers(source) | read_text_encoders(source, TEXT_DTYPE)
    absent: dict[str, Any] = dict.fromkeys(('text_encoder_3', 'tokenizer_3', 'vae', 'scheduler'))
    return StableDiffusion3Pipeline(transformer=transformer, **parts, **absent)


def encode_text(pipeline: Any, slots: int, text: str) -> dict[str, Tensor]:
    """CLIP-L and CLIP-G joined along the channels of the first half, zeros for T5 in the second: embeds (1, 2 slots, D); pooled (1, E)."""
    # diffusers fills T5's half with zeros, but needs its length, because the default is not 77
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=text,
            prompt_2=text,
            prompt_3=text,
            device=torch.device('cpu'),
            do_classifier_free_guidance=False,
            max_sequence_length=slots,
        )
    return {'embeds': embeds.float().contiguous(), 'pooled': pooled.float().contiguous()}


def attention_module(transformer: SD3Transformer2DModel, layer: int) -> nn.Module:
    """The joint attention of a block (not attn2, the image-only attention of SD3.5's dual blocks)."""
    return transformer.transformer_blocks[layer].attn


def self_attention_module(transformer: SD3Transformer2DModel, layer: int) -> nn.Module:
    """The joint attention, whose keys are those of the image and the text."""
    return attention_module(transformer, layer)


def output_projection(transformer: SD3Transformer2DModel, layer: int) -> tuple[Tensor, Tensor | None]:
    projection = transformer.transformer_blocks[layer].attn.to_out[0]
    return projection.weight, projection.bias


def layer_names(transformer: SD3Transformer2DModel) -> list[str]:
    return [f'vit-block{number}' for number in range(len(transformer.transformer_blocks))]


def grid(transformer: SD3Transformer2DModel, layer: int, latent_shape: Sequence[int]) -> tuple[int, int]:
    patch = transformer.config.patch_size
    return latent_shape[-2] // patch, latent_shape[-1] // patch


def text_columns(picked: Sequence[int], image_tokens: int) -> list[int]:
    return [image_tokens + token for token in picked]


def first_image_token(prompt: Prompt) -> int:
    return 0


def denoise(transformer: SD3Transformer2DModel, z: Tensor, timestep: float, prompt: Prompt, guidance: float | None = None) -> Tensor:
    count = len(z)
    return transformer(
        hidden_states=z.to(transformer.dtype),
        encoder_hidden_states=prompt.embeds.expand(count, -1, -1),
        pooled_projections=prompt.pooled.expand(count, -1),
        timestep=torch.full((count,), timestep, device=z.device),
        return_dict=False,
    )[0]
