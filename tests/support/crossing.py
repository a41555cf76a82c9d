"""Random models of the classes with cross-attention, in small, written to disk by diffusers' own pipelines in the hub's layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from padseg.backbones import identity

WORDS = ['a', 'cat', 'dog', 'on', 'grass']
STABLE = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear', 'num_train_timesteps': 1000, 'steps_offset': 1}
PNDM = {**STABLE, 'skip_prk_steps': True, 'set_alpha_to_one': False}  # Stable Diffusion 1.5's schedule, as on the hub
EULER = {**STABLE, 'timestep_spacing': 'leading'}  # SDXL's
DPM = {'beta_start': 0.0001, 'beta_end': 0.02, 'beta_schedule': 'linear', 'num_train_timesteps': 1000}  # PixArt-Sigma's

# Stable Diffusion 1.5's layout: 16 blocks at four sizes
SD15: dict[str, Any] = {
    'sample_size': 8,
    'block_out_channels': (8, 8, 16, 16),
    'norm_num_groups': 4,
    'layers_per_block': 2,
    'down_block_types': ('CrossAttnDownBlock2D',) * 3 + ('DownBlock2D',),
    'up_block_types': ('UpBlock2D',) + ('CrossAttnUpBlock2D',) * 3,
    'cross_attention_dim': 24,
    'attention_head_dim': 2,
}
SD21: dict[str, Any] = {**SD15, 'attention_head_dim': (2, 2, 4, 4), 'use_linear_projection': True, 'upcast_attention': True}
SDXL: dict[str, Any] = {
    'sample_size': 16,
    'block_out_channels': (8, 16, 16),
    'norm_num_groups': 4,
    'layers_per_block': 2,
    'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
    'up_block_types': ('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
    'transformer_layers_per_block': (1, 2, 3),
    'cross_attention_dim': 44,
    'attention_head_dim': (2, 4, 4),
    'use_linear_projection': True,
    'addition_embed_type': 'text_time',
    'addition_time_embed_dim': 8,
    'projection_class_embeddings_input_dim': 12 + 6 * 8,
}
SSD: dict[str, Any] = {
    **SDXL,
    'mid_block_type': 'UNetMidBlock2D',
    'transformer_layers_per_block': [[1], [2, 2], [2, 2]],
    'reverse_transformer_layers_per_block': [[2, 2, 3], [2, 1, 1], 1],
}
UNETS = {'sd15': SD15, 'sd21': SD21, 'sdxl': SDXL, 'ssd': SSD}
PIXART: dict[str, Any] = {
    'num_layers': 3,
    'num_attention_heads': 2,
    'attention_head_dim': 12,
    'cross_attention_dim': 24,
    'caption_channels': 32,
    'sample_size': 16,
    'interpolation_scale': 2,
    'use_additional_conditions': False,
}


def random_unet(folder: Path, kind: str) -> Path:
    """A UNet of UNETS with its text encoders; `sd15` has the schedule of its row, `sdxl` and `ssd` of theirs."""
    import torch
    from diffusers import (
        DDIMScheduler,
        EulerDiscreteScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    from padseg.train import tiny_model as tiny

    torch.manual_seed(0)
    unet = sharpened(UNet2DConditionModel(**UNETS[kind]))
    first, second = tiny.make_tokenizers(WORDS)
    if 'addition_embed_type' in UNETS[kind]:
        pipeline: Any = StableDiffusionXLPipeline(
            unet=unet,
            vae=random_vae(0.13025),
            text_encoder=random_clip(20),
            text_encoder_2=random_clip(24, 12),
            tokenizer=first,
            tokenizer_2=second,
            scheduler=EulerDiscreteScheduler(**EULER),
        )
    else:
        pipeline = StableDiffusionPipeline(
            unet=unet,
            vae=random_vae(0.18215),
            text_encoder=random_clip(24),
            tokenizer=second if kind == 'sd21' else first,
            scheduler=DDIMScheduler(**STABLE, set_alpha_to_one=False, clip_sample=False, prediction_type='v_prediction')
            if kind == 'sd21'
            else PNDMScheduler(**PNDM),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / 'padseg.json').write_text('{"side": 32}')
    return folder


def random_pixart(folder: Path, alpha: bool = False) -> Path:
    """PixArt-Sigma with files as on the hub: the former name of its class, T5 in shards, a vocabulary of SentencePiece. Or PixArt-alpha
    that is told sizes."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    torch.manual_seed(0)
    pieces = t5_pieces()
    t5 = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    pipeline = (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(
        transformer=sharpened(PixArtTransformer2DModel(**{**PIXART, 'use_additional_conditions': alpha})),
        vae=random_vae(0.18215 if alpha else 0.13025),
        tokenizer=T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=120),
        text_encoder=t5,
        scheduler=DPMSolverMultistepScheduler(**DPM),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / 'padseg.json').write_text('{"side": 32}')
    if not alpha:
        t5.save_pretrained(folder / 'text_encoder', max_shard_size=12_000)
        (folder / 'text_encoder' / 'model.safetensors').unlink()
        (folder / 'tokenizer' / 'tokenizer.json').unlink()
        write_spiece(pieces, folder / 'tokenizer' / 'spiece.model')
        config = folder / 'transformer' / 'config.json'
        former = {'_class_name': 'Transformer2DModel', 'double_self_attention': False, 'only_cross_attention': False}
        config.write_text(json.dumps({**json.loads(config.read_text()), **former}))
    return folder


def sharpened(network: Any) -> Any:
    """Attention of freshly built layers is almost even; this one's differs from key to key."""
    import torch

    for name, weight in network.named_parameters():
        if name.endswith(('to_q.weight', 'to_k.weight')):
            torch.nn.init.normal_(weight, std=1.5 / weight.shape[1] ** 0.5)
    return network


def random_vae(scale: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=scale,
    )


def random_clip(width: int, projection: int | None = None) -> Any:
    """CLIP's text encoder, with its projection if that has a size."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from padseg.train import tiny_model as tiny

    tokenizer = tiny.make_tokenizers(WORDS)[0]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=projection or width,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5_pieces() -> list[tuple[str, float]]:
    letters = [(letter, -9.0) for letter in 'abcdefghijklmnopqrstuvwxyz-,.']
    return [('<pad>', 0.0), ('</s>', 0.0), ('<unk>', 0.0), ('▁', -4.0), *letters, *(('▁' + word, -5.0) for word in WORDS)]


def write_spiece(pieces: list[tuple[str, float]], path: Path) -> None:
    """A vocabulary in SentencePiece's form, the only one of PixArt's published folders."""
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    kinds = {'<pad>': 3, '</s>': 3, '<unk>': 2}  # control, control, unknown; the others are plain pieces
    for piece, score in pieces:
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 1, 2
    path.write_bytes(model.SerializeToString())


def changed_by_files(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Change every file of a model's parts in turn: the file, and the fields of the model's identity that change with it."""
    before = identity(str(folder))
    for path in sorted(folder.rglob('*.*')):
        if len(path.relative_to(folder).parts) != 2:
            continue
        kept = path.read_bytes()
        if path.suffix == '.safetensors':
            tensors = load_file(path)
            first = min(tensors)
            save_file({**tensors, first: 2 * tensors[first] + 1}, path, {'format': 'pt'})
        else:
            path.write_bytes(kept + b'\n')
        yield path, {name for name, value in identity(str(folder))._asdict().items() if value != getattr(before, name)}
        path.write_bytes(kept)
    assert identity(str(folder)) == before
