"""SD3-medium's architecture with random weights, on disk in the hub's layout, so that bin/bench needs no published weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection

    from padseg.train.tiny_model import Parts

WORDS = ['a']  # the empty prompt needs no words
SHARPER = 2  # factor on the weights of queries and keys
TINY_VAE = 'tiny-vae'  # folder of the second, smaller autoencoder


class Architecture(NamedTuple):
    """Configurations of a pipeline's networks, and the contents of its `padseg.json`."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    tiny_vae: dict[str, Any]
    text: tuple[dict[str, Any], dict[str, Any]]
    row: dict[str, Any]


SIZES: dict[str, Architecture] = {
    'full': Architecture(
        transformer={
            'num_layers': 24,
            'num_attention_heads': 24,
            'attention_head_dim': 64,
            'joint_attention_dim': 4096,
            'pooled_projection_dim': 2048,
            'pos_embed_max_size': 192,
            'sample_size': 128,
        },
        vae={'block_out_channels': (128, 256, 512, 512), 'layers_per_block': 2, 'norm_num_groups': 32, 'sample_size': 1024},
        tiny_vae={'encoder_block_out_channels': (64, 64, 64, 64)},
        text=(
            {'hidden_size': 768, 'num_hidden_layers': 12, 'num_attention_heads': 12, 'hidden_act': 'quick_gelu', 'vocab_size': 49408},
            {'hidden_size': 1280, 'num_hidden_layers': 32, 'num_attention_heads': 20, 'hidden_act': 'gelu', 'vocab_size': 49408},
        ),
        row={},
    ),
    'small': Architecture(
        transformer={
            'num_layers': 4,
            'num_attention_heads': 2,
            'attention_head_dim': 16,
            'joint_attention_dim': 64,
            'pooled_projection_dim': 40,
            'pos_embed_max_size': 24,
            'sample_size': 16,
        },
        vae={'block_out_channels': (8, 16, 16, 24), 'layers_per_block': 2, 'norm_num_groups': 4, 'sample_size': 128},
        tiny_vae={'encoder_block_out_channels': (8, 8, 8, 8), 'decoder_block_out_channels': (8, 8, 8, 8)},
        text=(
            {'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'hidden_act': 'quick_gelu', 'vocab_size': 256},
            {'hidden_size': 24, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'hidden_act': 'gelu', 'vocab_size': 256},
        ),
        row={'layer': 2, 'side': 128},
    ),
}


def make_model(folder: Path, size: str) -> Path:
    """Write a model of this size in bfloat16 to the folder, unless it exists, and return the folder.

    There is no T5, as in Seg4Diff's release. The weights come from a fixed seed. The subfolder TINY_VAE has an autoencoder in TAESD3's
    layout.
    """
    from diffusers import AutoencoderTiny

    from padseg.train import tiny_model as tiny

    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial, default_dtype(torch.bfloat16):
            whole = Path(partial) / 'model'
            torch.manual_seed(0)
            architecture = SIZES[size]
            tiny.save_tiny(build_random(architecture), WORDS, whole, architecture.row, torch.bfloat16)
            smaller = AutoencoderTiny(latent_channels=16, **architecture.tiny_vae)
            smaller.to(torch.bfloat16).save_pretrained(whole / TINY_VAE)
            whole.rename(folder)
    return folder


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create new tensors in this dtype, so that a large model is not built in float32 first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_random(architecture: Architecture) -> Parts:
    """Build the networks with their default initialisation, but with sharper attention, which would otherwise be nearly uniform."""
    from diffusers import SD3Transformer2DModel

    from padseg.train.tiny_model import Parts

    settings = architecture.transformer
    width = settings['num_attention_heads'] * settings['attention_head_dim']
    transformer = SD3Transformer2DModel(in_channels=16, out_channels=16, caption_projection_dim=width, qk_norm=None, **settings)
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            for projection in (block.attn.to_q, block.attn.to_k, block.attn.add_q_proj, block.attn.add_k_proj):
                projection.weight.mul_(SHARPER)
    vae = random_vae(architecture.vae)
    first, second = (random_text_encoder(**settings) for settings in architecture.text)
    return Parts(transformer, vae, first, second)


def random_vae(configuration: Mapping[str, Any]) -> Any:
    """SD3's VAE in some size, with random weights."""
    from diffusers import AutoencoderKL

    blocks = len(configuration['block_out_channels'])
    return AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * blocks,
        up_block_types=('UpDecoderBlock2D',) * blocks,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        **configuration,
    )


def random_text_encoder(**settings: Any) -> CLIPTextModelWithProjection:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from padseg.train.vocabulary import vocabulary_and_merges

    end = len(vocabulary_and_merges(WORDS)[0]) - 1
    width = settings['hidden_size']
    ends = {'bos_token_id': end - 1, 'eos_token_id': end, 'pad_token_id': end}
    return CLIPTextModelWithProjection(CLIPTextConfig(intermediate_size=4 * width, projection_dim=width, **settings, **ends))
