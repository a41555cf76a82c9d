"""What a model takes, counted from the shapes of its published networks without their weights: bin/bench sizes."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import click
import torch

from padseg.backbones import family_of
from padseg.backbones.parts import cut_model
from padseg.backbones.spec import BACKBONES

BYTES = 2  # of a weight in 16 bits
VAE = {
    'block_out_channels': (128, 256, 512, 512),
    'down_block_types': ('DownEncoderBlock2D',) * 4,
    'up_block_types': ('UpDecoderBlock2D',) * 4,
    'layers_per_block': 2,
    'latent_channels': 16,
    'use_quant_conv': False,
    'use_post_quant_conv': False,
}
CLIP_L = ('CLIPTextModelWithProjection', {'hidden_size': 768, 'intermediate_size': 3072, 'num_hidden_layers': 12})
CLIP_G = (
    'CLIPTextModelWithProjection',
    {'hidden_size': 1280, 'intermediate_size': 5120, 'num_hidden_layers': 32, 'projection_dim': 1280},
)
T5 = (
    'T5EncoderModel',
    {'vocab_size': 32128, 'd_model': 4096, 'd_ff': 10240, 'num_layers': 24, 'num_heads': 64, 'feed_forward_proj': 'gated-gelu'},
)
QWEN = (
    'Qwen3ForCausalLM',
    {
        'hidden_size': 2560,
        'intermediate_size': 9728,
        'num_hidden_layers': 36,
        'num_key_value_heads': 8,
        'tie_word_embeddings': True,
    },
)


class Shape(NamedTuple):
    """The published configurations of a model's networks, where they differ from the defaults of their classes."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text: tuple[tuple[str, dict[str, Any]], ...]


SD3 = {'joint_attention_dim': 4096, 'pooled_projection_dim': 2048, 'pos_embed_max_size': 192, 'sample_size': 128}
MEDIUM = {**SD3, 'num_layers': 24, 'num_attention_heads': 24, 'caption_projection_dim': 1536}
LARGE = {**SD3, 'num_layers': 38, 'num_attention_heads': 38, 'caption_projection_dim': 2432, 'qk_norm': 'rms_norm'}
KLEIN = {'num_layers': 5, 'num_single_layers': 20, 'num_attention_heads': 24, 'joint_attention_dim': 7680, 'guidance_embeds': False}
SHAPES = {
    'sd3': Shape(MEDIUM, VAE, (CLIP_L, CLIP_G)),
    'sd3.5-large': Shape(LARGE, VAE, (CLIP_L, CLIP_G)),
    'flux': Shape({'guidance_embeds': True}, VAE, (CLIP_L, T5)),
    'openflux': Shape({'guidance_embeds': False}, VAE, (CLIP_L, T5)),
    'flux2-klein': Shape(KLEIN, {}, (QWEN,)),
}


class Size(NamedTuple):
    """parameters: of the transformer; the others are gigabytes in 16 bits: the transformer, what maps up to the expert block need of
    transformer and VAE, the text encoders, which are read once, and all that is downloaded."""

    parameters: int
    transformer: float
    maps: float
    text: float
    download: float


@click.command('sizes')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object')
def command(as_json: bool) -> None:
    """Count parameters and gigabytes of named models. No weights are read or made."""
    sizes = {name: size_of(name) for name in SHAPES}
    if as_json:
        print(json.dumps({name: size._asdict() for name, size in sizes.items()}))
        return
    print(f'{"":14}{"parameters":>14}{"transformer":>14}{"for maps":>14}{"text":>14}{"download":>14}')
    for name, size in sizes.items():
        print(f'{name:14}{size.parameters:14,}' + ''.join(f'{value:11.2f} GB' for value in size[1:]))


def size_of(name: str) -> Size:
    """Count the networks of a named model, built without memory."""
    import diffusers
    import transformers

    shape, spec = SHAPES[name], BACKBONES[name]
    family = family_of(spec)
    layout = family.LAYOUT
    with torch.device('meta'):
        network = getattr(diffusers, layout.network)(**shape.transformer)
        vae = getattr(diffusers, layout.vae)(**shape.vae)
        kinds = [getattr(transformers, kind) for kind, _ in shape.text]
        text = sum(count(kind(kind.config_class(**config))) for kind, (_, config) in zip(kinds, shape.text, strict=True))
    parameters = count(network)
    whole = parameters + count(vae)
    cut_model(family, network, layout.denoiser, spec.layer)
    cut_model(family, vae, 'vae', spec.layer)
    numbers = (parameters, count(network) + count(vae), text, whole + text)
    return Size(parameters, *(BYTES * number / 1e9 for number in numbers))


def count(network: Any) -> int:
    """The number of parameters, tied ones once."""
    return sum(tensor.numel() for tensor in network.parameters())
