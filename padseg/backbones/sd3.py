"""Stable Diffusion 3 and 3.5: loading, the null prompt, one forward. Text stands after the image among the keys."""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from safetensors.torch import save_file
from torch import Tensor
from torch import nn

from padseg.backbones import Backbone
from padseg.backbones import Identity
from padseg.backbones.source import Source
from padseg.backbones.source import content_hash
from padseg.backbones.source import files
from padseg.backbones.source import text_files
from padseg.errors import ModelUnavailable
from padseg.errors import UsageError
from padseg.types import Prompt

SMALL = 1 << 30  # bytes: smaller models run in float32 everywhere
log = logging.getLogger(__name__)


def load(source: Source, device: str | None = None, dtype: str | None = None) -> Backbone:
    """The transformer, the VAE and the null prompt of a located model; text encoders are read only if the prompt is not cached."""
    weights = files(source.folder, ('transformer', 'vae'))
    place = choose_device(device)
    kind = getattr(torch, dtype) if dtype else choose_dtype(place, sum(path.stat().st_size for path in weights))
    # `to` again: diffusers leaves a file of float32 weights in float32 whatever type it is asked for
    transformer = read_part(SD3Transformer2DModel, source, 'transformer', kind).to(place, kind).eval().requires_grad_(False)
    vae = read_part(AutoencoderKL, source, 'vae', kind).to(place, kind).eval().requires_grad_(False)
    config = transformer.config
    multiple = config.patch_size * 2 ** (len(vae.config.block_out_channels) - 1)
    return Backbone(
        spec=source.spec,
        identity=Identity(source.model, str(source.folder), source.commit, content_hash(source.folder, weights)),
        family=sys.modules[__name__],
        transformer=transformer,
        vae=vae,
        scheduler=read_part(FlowMatchEulerDiscreteScheduler, source, 'scheduler'),
        prompt=null_prompt(source, transformer, place, kind),
        patch=config.patch_size,
        multiple=multiple,
        limit=config.pos_embed_max_size * multiple,
    )


def choose_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f'device {device} is not to be had here: {str(error).splitlines()[0]}') from error
    return place


def choose_dtype(device: torch.device, size: int) -> torch.dtype:
    return torch.float32 if device.type == 'cpu' or size < SMALL else torch.float16


def read_part(kind: Any, source: Source, part: str, dtype: torch.dtype | None = None) -> Any:
    """One component from its folder, from safetensors only."""
    options = {'torch_dtype': dtype, 'use_safetensors': True, 'low_cpu_mem_usage': False} if dtype else {}
    try:
        return kind.from_pretrained(source.folder / part, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelUnavailable(
            f'{part} of {source.model} cannot be read from {source.folder / part}: {str(error).strip().splitlines()[0]}'
        ) from error


def null_prompt(source: Source, transformer: SD3Transformer2DModel, device: torch.device, dtype: torch.dtype) -> Prompt:
    """Embedding of the empty prompt, a constant of the model: from the cache, or computed once and cached."""
    slots = source.spec.sequence
    cached = cache_path(source)
    if cached.exists():
        tensors = load_file(cached)
    else:
        tensors = compute_null_prompt(source, transformer, slots)
        write_cache(tensors, cached)
    embeds, pooled = (tensors[name].to(device, dtype) for name in ('embeds', 'pooled'))
    if embeds.shape[1] != 2 * slots:
        raise ModelUnavailable(
            f'the null prompt of {source.model} has {embeds.shape[1]} tokens; expected {slots} of CLIP and {slots} of T5'
        )
    names = ('<|startoftext|>', '<|endoftext|>', *(f'<pad {number}>' for number in range(2, slots)))
    return Prompt(embeds, pooled, tuple(range(slots)), names)


def compute_null_prompt(source: Source, transformer: SD3Transformer2DModel, slots: int) -> dict[str, Tensor]:
    """CLIP-L and CLIP-G joined along channels in the first half, zeros for T5 in the second: embeds (1, 2 slots, D), pooled (1, E)."""
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection
    from transformers import CLIPTokenizer

    text_files(source)
    parts: dict[str, Any] = {}
    for number in ('', '_2'):
        parts['text_encoder' + number] = read_text_part(CLIPTextModelWithProjection, source, 'text_encoder' + number)
        parts['tokenizer' + number] = read_text_part(CLIPTokenizer, source, 'tokenizer' + number)
    absent: dict[str, Any] = dict.fromkeys(('text_encoder_3', 'tokenizer_3', 'vae', 'scheduler'))
    # diffusers fills T5's half with zeros by itself; its length must be said, as the default is not 77
    pipeline = StableDiffusion3Pipeline(transformer=transformer, **parts, **absent)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt='',
            prompt_2='',
            prompt_3='',
            device=torch.device('cpu'),
            do_classifier_free_guidance=False,
            max_sequence_length=slots,
        )
    return {'embeds': embeds.float().contiguous(), 'pooled': pooled.float().contiguous()}


def read_text_part(kind: Any, source: Source, part: str) -> Any:
    # on the CPU in float32 always: the result is a constant and must not depend on where it was computed first
    options = {'dtype': torch.float32} if part.startswith('text') else {}
    try:
        return kind.from_pretrained(source.folder / part, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        raise ModelUnavailable(
            f'{part} of {source.model} cannot be read from {source.folder / part}: {str(error).strip().splitlines()[0]}'
        ) from error


def cache_path(source: Source) -> pathlib.Path:
    """One file a model: keyed by the commit of a hub snapshot, by the content of the text encoders in a folder."""
    key = source.commit or content_hash(source.folder, text_files(source))
    name = hashlib.sha256(f'{source.spec.repo if source.commit else ""} {key} {source.spec.sequence}'.encode()).hexdigest()
    home = os.environ.get('PADSEG_CACHE') or os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'padseg')
    return pathlib.Path(home).expanduser() / 'prompts' / f'{name}.safetensors'


def write_cache(tensors: dict[str, Tensor], path: pathlib.Path) -> None:
    """Whole or not at all; a cache that cannot be written costs time only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = pathlib.Path(folder) / path.name
            save_file(tensors, partial)
            partial.replace(path)
    except OSError as error:
        log.warning('the null prompt cannot be cached in %s: %s', path.parent, error)


def attention_module(transformer: SD3Transformer2DModel, layer: int) -> nn.Module:
    """The joint attention of a block (not attn2, the image-only attention of SD3.5's dual blocks)."""
    return transformer.transformer_blocks[layer].attn


def text_columns(picked: Sequence[int], image_tokens: int) -> list[int]:
    return [image_tokens + token for token in picked]


def denoise(transformer: SD3Transformer2DModel, z: Tensor, timestep: float, prompt: Prompt) -> Tensor:
    count = len(z)
    return transformer(
        hidden_states=z.to(transformer.dtype),
        encoder_hidden_states=prompt.embeds.expand(count, -1, -1),
        pooled_projections=prompt.pooled.expand(count, -1),
        timestep=torch.full((count,), timestep, device=z.device),
        return_dict=False,
    )[0]
