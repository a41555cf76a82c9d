"""Stable Diffusion 1 and 2, SDXL and SSD-1B: what differs from other families. Image tokens attend to text in layers of their own."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from padseg.backbones.configuration import read_json
from padseg.backbones.family import Dimensions, padded
from padseg.backbones.layout import LAYOUTS
from padseg.backbones.noise import NoiseLevel, ddpm_level, scheduled
from padseg.backbones.parts import clip_tokenizer, read_text_encoders, without_advice
from padseg.backbones.source import Source, check_files, text_files, text_parts
from padseg.backbones.spec import CELL
from padseg.types import Prompt, TextToken

LAYOUT = LAYOUTS['unet']
TEXT_DTYPE = torch.float32
LIMIT = 256  # latent cells along a side, 2048 pixels: convolutions have no limit, but the training sizes do
SIZES = 6  # numbers that SDXL takes: height and width of the original, top and left of the crop, height and width of the result
cut = None


class Place(NamedTuple):
    """Where a transformer block is. halvings: how often the latent's sides were halved before it."""

    block: nn.Module
    name: str
    halvings: int


def size(config: Any) -> Dimensions:
    return Dimensions(config.in_channels, 1, LIMIT)


def places(unet: UNet2DConditionModel) -> Iterator[Place]:
    """All transformer blocks in the order in which they run, which is not the order of the network's children."""
    halvings = 0
    for number, level in enumerate(unet.down_blocks):
        yield from places_in(level, f'down-level{number}-repeat{{}}-', halvings)
        halvings += level.downsamplers is not None
    yield from places_in(unet.mid_block, 'mid-', halvings)
    for number, level in enumerate(unet.up_blocks):
        yield from places_in(level, f'up-level{number}-repeat{{}}-', halvings)
        halvings -= level.upsamplers is not None


def places_in(level: Any, name: str, halvings: int) -> Iterator[Place]:
    for repeat, attention in enumerate(getattr(level, 'attentions', ())):
        for number, block in enumerate(getattr(attention, 'transformer_blocks', ())):
            yield Place(block, f'{name.format(repeat)}vit-block{number}', halvings)


def blocks(unet: UNet2DConditionModel) -> list[Any]:
    return [place.block for place in places(unet)]


def schedule(scheduler: Any, steps: int, image_tokens: int) -> Any:
    return scheduled(scheduler, num_inference_steps=steps)


def noise_level(scheduler: Any, steps: int, step: int, image_tokens: int) -> NoiseLevel:
    """Noise level of a step, the same for all picture sizes."""
    return ddpm_level(schedule(scheduler, steps, image_tokens), step)


def needs_exact_vae(config: Mapping[str, Any]) -> bool:
    """SDXL's does."""
    return takes_sizes(config)


def takes_sizes(config: Mapping[str, Any]) -> bool:
    """Whether a network takes a pooled text and sizes of pictures, as SDXL's does."""
    return config.get('addition_embed_type') == 'text_time'


def tokenizers(source: Source) -> dict[str, Any]:
    return {part: clip_tokenizer(source, part, source.spec.sequence) for part in text_parts(source) if part.startswith('tokenizer')}


def prompt_shapes(slots: int, config: Any) -> dict[str, tuple[int, ...]]:
    pooled = config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim if takes_sizes(config) else 0
    return {'embeds': (1, slots, config.cross_attention_dim), 'pooled': (1, pooled)}


def null_tokens(slots: int) -> Sequence[TextToken]:
    return padded(('<|startoftext|>', '<|endoftext|>'), slots)


def compute_null_prompt(source: Source, transformer: UNet2DConditionModel, slots: int) -> dict[str, Tensor]:
    return encode_text(text_pipeline(source, transformer), '')


def text_pipeline(source: Source, unet: UNet2DConditionModel) -> Any:
    """Build diffusers' pipeline with the text encoders and nothing else that encoding texts does not need."""
    with without_advice():
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    text_files(source)
    check_files(source, text_parts(source))
    parts = tokenizers(source) | read_text_encoders(source, TEXT_DTYPE)
    absent: dict[str, Any] = dict.fromkeys(('vae', 'scheduler'))
    if takes_sizes(unet.config):
        return StableDiffusionXLPipeline(unet=unet, **parts, **absent)
    nothing: dict[str, Any] = dict.fromkeys(('safety_checker', 'feature_extractor'))
    return StableDiffusionPipeline(unet=unet, **parts, **absent, **nothing, requires_safety_checker=False)


def encode_text(pipeline: Any, text: str) -> dict[str, Tensor]:
    """Encode a text: embeds (1, slots, D), of SDXL those of both encoders joined along the channels; pooled (1, E), else empty."""
    with torch.no_grad():
        embeds, _, *pooled = pipeline.encode_prompt(
            prompt=text, device=torch.device('cpu'), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return {'embeds': embeds.float().contiguous(), 'pooled': pooled[0].float().contiguous() if pooled else torch.zeros(1, 0)}


def empty_is_zeros(folder: pathlib.Path, unet: UNet2DConditionModel) -> bool:
    """Whether the pipeline of a model guides away from zeros, instead of the empty text's embeddings, as SDXL's does."""
    return takes_sizes(unet.config) and read_json(folder / 'model_index.json').get('force_zeros_for_empty_prompt', True) is True


def attention_module(transformer: UNet2DConditionModel, layer: int) -> nn.Module:
    return blocks(transformer)[layer].attn2


def self_attention_module(transformer: UNet2DConditionModel, layer: int) -> nn.Module:
    return blocks(transformer)[layer].attn1


def output_projection(transformer: UNet2DConditionModel, layer: int) -> tuple[Tensor, Tensor | None]:
    projection = blocks(transformer)[layer].attn2.to_out[0]
    return projection.weight, projection.bias


def layer_names(transformer: UNet2DConditionModel) -> list[str]:
    return [place.name for place in places(transformer)]


def grid(transformer: UNet2DConditionModel, layer: int, latent_shape: Sequence[int]) -> tuple[int, int]:
    factor = 2 ** list(places(transformer))[layer].halvings
    return -(-latent_shape[-2] // factor), -(-latent_shape[-1] // factor)  # halving an odd length rounds up


def text_columns(picked: Sequence[int], image_tokens: int) -> list[int]:
    return list(picked)


def first_image_token(prompt: Prompt) -> int:
    return 0


def denoise(transformer: UNet2DConditionModel, z: Tensor, timestep: float, prompt: Prompt, guidance: float | None = None) -> Tensor:
    """For SDXL, the picture is its own original, uncropped."""
    count, _, height, width = z.shape
    sizes = torch.tensor([[height * CELL, width * CELL, 0, 0, height * CELL, width * CELL]], device=z.device)
    added = {'text_embeds': prompt.pooled.expand(count, -1), 'time_ids': sizes.expand(count, -1)}
    return transformer(
        z.to(transformer.dtype),
        torch.full((count,), timestep, device=z.device),
        encoder_hidden_states=prompt.embeds.expand(count, -1, -1),
        added_cond_kwargs=added if takes_sizes(transformer.config) else None,
        return_dict=False,
    )[0]
