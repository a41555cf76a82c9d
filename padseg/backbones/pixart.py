"""PixArt-alpha and PixArt-Sigma: what differs from other families. Image tokens attend to T5's in layers of their own; pads are masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from padseg.backbones.family import Dimensions, padded
from padseg.backbones.layout import LAYOUTS
from padseg.backbones.noise import NoiseLevel, ddpm_level, scheduled
from padseg.backbones.parts import read_part, read_text_encoders, without_advice
from padseg.backbones.source import Source, check_files, text_files, text_parts
from padseg.backbones.spec import CELL
from padseg.types import Prompt, TextToken

LAYOUT = LAYOUTS['pixart']
TEXT_DTYPE = torch.bfloat16  # T5-XXL in float32, as it is published here, takes 19 GB
LIMIT = 192  # tokens along a side, as for SD3: places are computed for any size, but the training sizes have a limit
cut = None


def size(config: Any) -> Dimensions:
    return Dimensions(config.in_channels, config.patch_size, LIMIT)


def blocks(transformer: PixArtTransformer2DModel) -> list[Any]:
    return list(transformer.transformer_blocks)


def schedule(scheduler: Any, steps: int, image_tokens: int) -> Any:
    return scheduled(scheduler, num_inference_steps=steps)


def noise_level(scheduler: Any, steps: int, step: int, image_tokens: int) -> NoiseLevel:
    """Noise level of a step, the same for all picture sizes."""
    return ddpm_level(schedule(scheduler, steps, image_tokens), step)


def needs_exact_vae(config: Mapping[str, Any]) -> bool:
    """Sigma's is that of SDXL."""
    return True


def tokenizers(source: Source) -> dict[str, Any]:
    """Load T5's tokenizer, whose vocabulary `check_files` has looked for: transformers would create an empty one."""
    from transformers import T5TokenizerFast

    check_files(source, LAYOUT.tokenizers)
    return {'tokenizer': read_part(T5TokenizerFast, source, 'tokenizer', 'tokenizer_config.json')}


def prompt_shapes(slots: int, config: Any) -> dict[str, tuple[int, ...]]:
    return {'embeds': (1, slots, config.caption_channels), 'pooled': (1, 0), 'mask': (1, slots)}


def null_tokens(slots: int) -> Sequence[TextToken]:
    """The pads of the empty prompt are masked; nothing else is there to be read."""
    return padded(('</s>',), 1)


def compute_null_prompt(source: Source, transformer: PixArtTransformer2DModel, slots: int) -> dict[str, Tensor]:
    return encode_text(text_pipeline(source, transformer), slots, '')


def text_pipeline(source: Source, transformer: PixArtTransformer2DModel) -> Any:
    """Build diffusers' pipeline with the text encoder and nothing else that encoding texts does not need."""
    with without_advice():
        from diffusers import PixArtSigmaPipeline

    text_files(source)
    check_files(source, text_parts(source))
    parts = tokenizers(source) | read_text_encoders(source, TEXT_DTYPE)
    return PixArtSigmaPipeline(transformer=transformer, vae=None, scheduler=None, **parts)


def encode_text(pipeline: Any, slots: int, text: str) -> dict[str, Tensor]:
    """Encode a text in lower case, padded: embeds (1, slots, D); mask (1, slots), 0 for pads; pooled (1, 0)."""
    with torch.no_grad():
        embeds, mask, _, _ = pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, device=torch.device('cpu'), max_sequence_length=slots
        )
    return {'embeds': embeds.float().contiguous(), 'pooled': torch.zeros(1, 0), 'mask': mask.float()}


def attention_module(transformer: PixArtTransformer2DModel, layer: int) -> nn.Module:
    return transformer.transformer_blocks[layer].attn2


def self_attention_module(transformer: PixArtTransformer2DModel, layer: int) -> nn.Module:
    return transformer.transformer_blocks[layer].attn1


def output_projection(transformer: PixArtTransformer2DModel, layer: int) -> tuple[Tensor, Tensor | None]:
    projection = transformer.transformer_blocks[layer].attn2.to_out[0]
    return projection.weight, projection.bias


def layer_names(transformer: PixArtTransformer2DModel) -> list[str]:
    return [f'vit-block{number}' for number in range(len(transformer.transformer_blocks))]


def grid(transformer: PixArtTransformer2DModel, layer: int, latent_shape: Sequence[int]) -> tuple[int, int]:
    patch = transformer.config.patch_size
    return latent_shape[-2] // patch, latent_shape[-1] // patch


def text_columns(picked: Sequence[int], image_tokens: int) -> list[int]:
    return list(picked)


def first_image_token(prompt: Prompt) -> int:
    return 0


def denoise(transformer: PixArtTransformer2DModel, z: Tensor, timestep: float, prompt: Prompt, guidance: float | None = None) -> Tensor:
    """The predicted noise, without the variance that the network predicts too. Only alpha at 1024 pixels is told the picture's size."""
    assert prompt.mask is not None
    count, channels, height, width = z.shape
    added: dict[str, Tensor | None] = {'resolution': None, 'aspect_ratio': None}
    if transformer.use_additional_conditions:
        sides = torch.tensor([[height * CELL, width * CELL]], device=z.device)
        added = {'resolution': sides.expand(count, -1), 'aspect_ratio': torch.full((count, 1), height / width, device=z.device)}
    return transformer(
        z.to(transformer.dtype),
        encoder_hidden_states=prompt.embeds.expand(count, -1, -1),
        encoder_attention_mask=prompt.mask.expand(count, -1),
        timestep=torch.full((count,), timestep, device=z.device),
        added_cond_kwargs=added,
        return_dict=False,
    )[0][:, :channels]
