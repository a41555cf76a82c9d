"""Z-Image: what differs from other families. Image tokens come before the text, each filled up to a multiple of 32 by a learned token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from padseg.backbones.family import Dimensions
from padseg.backbones.layout import LAYOUTS
from padseg.backbones.noise import NoiseLevel, flow_level, scheduled
from padseg.backbones.qwen_text import THINKING, qwen_encoder, qwen_states, qwen_tokenizer
from padseg.backbones.source import Source
from padseg.errors import ModelUnavailable
from padseg.types import Prompt, TextToken

LAYOUT = LAYOUTS['zimage']
TEXT_DTYPE = torch.bfloat16  # Qwen3's published precision
PATCH = 2  # latent cells along a side of an image token; some models of this class have other sizes besides
LIMIT = 192  # tokens along a side, as for SD3: rotary embeddings have places for more, but the training sizes do not
MULTIPLE = 32  # of the numbers of image tokens and of text tokens


def size(config: Any) -> Dimensions:
    """See `Family`. Raises ModelUnavailable for lengths of the axes that are none: no weight has their shape."""
    lens = config.axes_lens
    if not isinstance(lens, (list, tuple)) or len(lens) != 3 or not all(type(length) is int and length > 0 for length in lens):
        raise ModelUnavailable(f'axes_lens of a Z-Image transformer is three numbers above 0; got {repr(lens)[:100]}')
    return Dimensions(config.in_channels, PATCH, min(LIMIT, *lens[1:]))


def blocks(transformer: ZImageTransformer2DModel) -> list[Any]:
    """Those in which image and text meet; both go through refiner blocks of their own before."""
    return list(transformer.layers)


def cut(transformer: ZImageTransformer2DModel, layer: int) -> None:
    """Keep blocks 0..layer, and of the last one only what its queries and keys need, because the forward pass stops there."""
    transformer.layers = transformer.layers[: layer + 1]
    transformer.all_final_layer = None
    last = transformer.layers[layer]
    last.attention.to_v = nn.Identity()  # the processor computes values before queries and keys meet
    last.attention.to_out = last.feed_forward = None
    last.attention_norm2 = last.ffn_norm1 = last.ffn_norm2 = None


def schedule(scheduler: Any, steps: int, image_tokens: int) -> Any:
    """The pipeline's schedule; pictures with more tokens get more noise at every step if the scheduler shifts dynamically."""
    from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

    config = scheduler.config
    shift = calculate_shift(image_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    return scheduled(scheduler, sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=shift)


def noise_level(scheduler: Any, steps: int, step: int, image_tokens: int) -> NoiseLevel:
    return flow_level(schedule(scheduler, steps, image_tokens), step)


def tokenizers(source: Source) -> dict[str, Any]:
    return {'tokenizer': qwen_tokenizer(source, 'tokenizer', THINKING)}


def needs_exact_vae(config: Mapping[str, Any]) -> bool:
    """It is that of Flux.1."""
    return False


def prompt_shapes(slots: int, config: Any) -> dict[str, tuple[int, ...]]:
    """See `Family`. Raises ModelUnavailable if the first axis has no place for the image behind a text that fills all slots."""
    places = filled_up(max(slots, len(THINKING.tokens))) + 2  # that of the first token is 1
    if config.axes_lens[0] < places:
        raise ModelUnavailable(
            f'a Z-Image transformer with {slots} slots of text has {places} places along its first axis or more; got {config.axes_lens[0]}'
        )
    return text_shapes(len(THINKING.tokens), config)


def text_shapes(count: int, config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a text with so many tokens, those of its template included."""
    length = filled_up(count)
    return {'embeds': (1, length, config.cap_feat_dim), 'pooled': (1, 0), 'mask': (1, length)}


def compute_null_prompt(source: Source, transformer: ZImageTransformer2DModel, slots: int) -> dict[str, Tensor]:
    return encode_text(*qwen_encoder(source, TEXT_DTYPE, THINKING), slots, '')


def null_tokens(slots: int, tensors: Mapping[str, Tensor]) -> Sequence[TextToken]:
    """The tokens of the chat's template, and the learned ones that fill them up."""
    tokens = [TextToken(name, 'template') for name in THINKING.names]
    return tokens + [TextToken(f'<learned pad {number}>', 'pad') for number in range(len(tokens), filled_up(len(tokens)))]


def encode_text(encoder: Any, tokenizer: Any, slots: int, text: str) -> dict[str, Tensor]:
    """Encode a text, cut off behind `slots` tokens: the hidden states before the last layer, embeds (1, L, D), zeros where the transformer
    fills up; mask (1, L), 0 there; pooled (1, 0)."""
    states, mask = qwen_states(encoder, tokenizer, text, slots, THINKING)
    tokens = states[-2][mask.bool()].float()  # (n, D)
    more = filled_up(len(tokens)) - len(tokens)
    embeds, filled = nn.functional.pad(tokens, (0, 0, 0, more)), nn.functional.pad(torch.ones(len(tokens)), (0, more))
    return {'embeds': embeds[None], 'pooled': torch.zeros(1, 0), 'mask': filled[None]}


def attention_module(transformer: ZImageTransformer2DModel, layer: int) -> nn.Module:
    return transformer.layers[layer].attention


def self_attention_module(transformer: ZImageTransformer2DModel, layer: int) -> nn.Module:
    """The joint attention, whose keys are those of the image and the text."""
    return attention_module(transformer, layer)


def output_projection(transformer: ZImageTransformer2DModel, layer: int) -> tuple[Tensor, Tensor | None]:
    projection = transformer.layers[layer].attention.to_out[0]
    return projection.weight, projection.bias


def layer_names(transformer: ZImageTransformer2DModel) -> list[str]:
    return [f'vit-block{number}' for number in range(len(transformer.layers))]


def grid(transformer: ZImageTransformer2DModel, layer: int, latent_shape: Sequence[int]) -> tuple[int, int]:
    return latent_shape[-2] // PATCH, latent_shape[-1] // PATCH


def text_columns(picked: Sequence[int], image_tokens: int) -> list[int]:
    """Text comes after the image and what fills it up."""
    first = filled_up(image_tokens)
    return [first + token for token in picked]


def filled_up(count: int) -> int:
    """The number of tokens after filling up."""
    return -(-count // MULTIPLE) * MULTIPLE


def first_image_token(prompt: Prompt) -> int:
    return 0


def denoise(transformer: ZImageTransformer2DModel, z: Tensor, timestep: float, prompt: Prompt, guidance: float | None = None) -> Tensor:
    """The velocity, whose sign is the opposite of what the network gives, for time from 1, noise, to 0."""
    assert prompt.mask is not None
    count = len(z)
    texts = [embeds[mask.bool()] for embeds, mask in zip(prompt.embeds.expand(count, -1, -1), prompt.mask.expand(count, -1), strict=True)]
    pictures = transformer(
        list(z.to(transformer.dtype)[:, :, None].unbind()),  # each a film of one picture
        (1000 - torch.full((count,), timestep, device=z.device)) / 1000,
        texts,
        return_dict=False,
    )[0]
    return -torch.stack(pictures)[:, :, 0]
