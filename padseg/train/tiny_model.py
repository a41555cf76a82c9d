"""The embedded model: an SD3-architecture model small enough to ship, built from configurations and saved in the diffusers layout."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from padseg.backbones.parts import without_bars
from padseg.errors import ModelUnavailable
from padseg.train.vocabulary import END, SLOTS, START, vocabulary_and_merges

TEXT: dict[str, Any] = {'hidden_size': (64, 96), 'num_hidden_layers': 3, 'heads': (1, 2)}  # pairs: one value per text encoder
VAE: dict[str, Any] = {'block_out_channels': (16, 32, 64, 64), 'layers_per_block': 1, 'norm_num_groups': 4, 'latent_channels': 16}
TRANSFORMER: dict[str, Any] = {'num_layers': 6, 'num_attention_heads': 4, 'attention_head_dim': 64, 'qk_norm': 'rms_norm'}
TRANSFORMER |= {'sample_size': 32, 'pos_embed_max_size': 48}


class Parts(NamedTuple):
    """The networks of a pipeline, trained or untrained."""

    transformer: SD3Transformer2DModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection


def build_tiny(words: list[str], transformer: dict[str, Any] = TRANSFORMER, vae: dict[str, Any] = VAE) -> Parts:
    """Build untrained networks with weights from torch's global generator. words: words that the tokenizers encode as one token."""
    vocabulary = len(vocabulary_and_merges(words)[0])
    width = transformer['num_attention_heads'] * transformer['attention_head_dim']
    text = sum(TEXT['hidden_size'])
    blocks = len(vae['block_out_channels'])
    channels = vae['latent_channels']
    denoiser = SD3Transformer2DModel(
        in_channels=channels,
        out_channels=channels,
        joint_attention_dim=text,
        pooled_projection_dim=text,
        caption_projection_dim=width,
        **transformer,
    )
    open_gates(denoiser)
    autoencoder = AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * blocks,
        up_block_types=('UpDecoderBlock2D',) * blocks,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        **{'scaling_factor': 1.0, 'shift_factor': 0.0, **vae},
    )
    clear_path(autoencoder)
    encoders = (make_text_encoder(vocabulary, size, heads) for size, heads in zip(TEXT['hidden_size'], TEXT['heads'], strict=True))
    return Parts(denoiser, autoencoder, *encoders)


@torch.no_grad()
def open_gates(transformer: SD3Transformer2DModel, gate: float = 0.5) -> None:
    """Open the gates of attention and MLP, so that every block contributes from the start.

    Otherwise they start near 0.07 and stay there in a short training.
    """
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            chunks = norm.linear.bias.chunk(norm.linear.out_features // transformer.inner_dim)
            for number in (2, 5):  # order: shift, scale, gate of attention, then of the MLP; dual blocks have three more for attn2
                if len(chunks) > number:
                    chunks[number].fill_(gate)


@torch.no_grad()
def clear_path(vae: AutoencoderKL) -> None:
    """Initialise the convolutions near the identity. From random weights, colours take thousands of steps to appear."""
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d) and name.endswith(('conv_in', 'conv_out', 'conv_shortcut', '.conv')):
            noise = 0.02 * torch.randn_like(module.weight) / module.weight[0].numel() ** 0.5
            nn.init.dirac_(module.weight).add_(noise)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d) and name.endswith('conv2'):
            module.weight.mul_(0.1)


def make_text_encoder(vocabulary: int, size: int, heads: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=size,
        intermediate_size=4 * size,
        projection_dim=size,
        num_hidden_layers=TEXT['num_hidden_layers'],
        num_attention_heads=heads,
        max_position_embeddings=SLOTS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    model = CLIPTextModelWithProjection(config)
    # Pad tokens differ only by position. With CLIP's usual 0.02, all 77 null-prompt tokens stay alike for thousands of steps.
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.5)
    return model


def make_tokenizers(words: list[str]) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Make the two tokenizers of SD3: the first pads with the end token, the second with '!' (id 0)."""
    vocabulary, merges = vocabulary_and_merges(words)
    return tuple(
        CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, unk_token=END, bos_token=START, eos_token=END, model_max_length=SLOTS)
        for pad in (END, '!')
    )


def pipeline(parts: Parts, words: list[str]) -> StableDiffusion3Pipeline:
    """Assemble the parts into a diffusers pipeline without T5."""
    first, second = make_tokenizers(words)
    return StableDiffusion3Pipeline(
        transformer=parts.transformer,
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        text_encoder_2=parts.text_encoder_2,
        text_encoder_3=None,
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def read_tiny(folder: pathlib.Path, words: list[str]) -> Parts:
    """Load the parts that `save_tiny` wrote, in float32.

    Raises ModelUnavailable if the folder has no such parts, or if its tokenizer has another vocabulary.
    """
    try:
        parts = Parts(
            read_tiny_part(SD3Transformer2DModel, folder / 'transformer'),
            read_tiny_part(AutoencoderKL, folder / 'vae'),
            CLIPTextModelWithProjection.from_pretrained(folder / 'text_encoder').float(),
            CLIPTextModelWithProjection.from_pretrained(folder / 'text_encoder_2').float(),
        )
        known = CLIPTokenizer.from_pretrained(folder / 'tokenizer').get_vocab()
    except OSError as error:
        raise ModelUnavailable(f'{folder} has no model to start from: {error}') from error
    if known != vocabulary_and_merges(words)[0]:
        raise ModelUnavailable(f'the tokenizer in {folder} has a different vocabulary from the one this program uses')
    return parts


def read_tiny_part(kind: Any, folder: pathlib.Path) -> Any:
    """Load one network. diffusers' from_pretrained would copy the folder's name into the configuration of the next model."""
    model = kind.from_config(kind.load_config(folder))
    model.load_state_dict(load_file(folder / 'diffusion_pytorch_model.safetensors'))  # copies into float32 weights
    return model


def save_tiny(parts: Parts, words: list[str], folder: pathlib.Path, row: dict[str, Any], dtype: torch.dtype = torch.float16) -> None:
    """Save the pipeline in the diffusers layout, as safetensors of this dtype, with `row` as its `padseg.json`."""
    with without_bars():
        pipeline(parts, words).to(dtype=dtype).save_pretrained(folder, safe_serialization=True)
    (folder / 'padseg.json').write_text(json.dumps(row, indent=2) + '\n')
