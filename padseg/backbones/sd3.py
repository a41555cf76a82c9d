"""Stable Diffusion 3 and 3.5: loading, the null prompt, one forward. Text stands after the image among the keys."""

from __future__ import annotations

import hashlib
import logging
import pathlib
import sys
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers import AutoencoderTiny
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save_file
from torch import Tensor
from torch import nn

from padseg.backbones import Backbone
from padseg.backbones import Identity
from padseg.backbones.source import TEXT_PARTS
from padseg.backbones.source import Source
from padseg.backbones.source import cache_home
from padseg.backbones.source import check_files
from padseg.backbones.source import content_hash
from padseg.backbones.source import files
from padseg.backbones.source import read_json
from padseg.backbones.source import tensor_shapes
from padseg.backbones.source import text_files
from padseg.backbones.source import weight_files
from padseg.backbones.weights import build
from padseg.backbones.weights import fill
from padseg.backbones.weights import refuse_lost
from padseg.backbones.weights import refuse_surplus
from padseg.errors import ModelUnavailable
from padseg.errors import UsageError
from padseg.types import Prompt

SMALL = 1 << 30  # bytes: smaller models run in float32 everywhere
BFLOAT16 = ('avx512_bf16', 'amx_bf16', 'bf16', 'sve_bf16')  # what CPUs call it
# what diffusers and transformers raise on files that are missing, damaged or of another kind
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
log = logging.getLogger(__name__)


def load(
    source: Source,
    device: str | None = None,
    dtype: str | None = None,
    layer: int | None = None,
    whole: bool = False,
    vae: Source | None = None,
) -> Backbone:
    """The parts of transformer and VAE that token maps of the blocks up to `layer` need (the row's, unless given), or the whole.

    And the null prompt: text encoders are read only if it is not cached. vae: another VAE, which comes by itself.
    """
    layer = source.spec.layer if layer is None else layer
    last = None if whole else layer
    place = choose_device(device)
    size = sum(path.stat().st_size for path in weight_files(source.folder, ('transformer', 'vae')))
    kind = getattr(torch, dtype) if dtype else choose_dtype(place, size)
    owner, part = (vae, '.') if vae else (source, 'vae')
    with ThreadPoolExecutor(1) as beside:  # hashing four gigabytes takes as long as reading what is needed of them
        hashed = beside.submit(weights_hash, source, vae)
        transformer = filled(source, 'transformer', last, place, kind)
        encoder = filled(owner, part, last, place, kind).to(memory_format=torch.channels_last)  # how convolutions are quick
    config = transformer.config
    if encoder.config.latent_channels != config.in_channels:
        raise UsageError(
            f'the latents of {owner.model} have {encoder.config.latent_channels} channels, the transformer takes {config.in_channels}'
        )
    multiple = config.patch_size * 2 ** (len(encoder.config.block_out_channels) - 1)
    return Backbone(
        spec=source.spec,
        identity=Identity(source.model, str(source.folder), source.commit, hashed.result()),
        family=sys.modules[__name__],
        transformer=transformer,
        vae=encoder,
        scheduler=read_part(FlowMatchEulerDiscreteScheduler, source, 'scheduler', 'scheduler_config.json'),
        prompt=null_prompt(source, transformer, place, kind),
        layers=source.spec.layers if whole else layer + 1,
        patch=config.patch_size,
        multiple=multiple,
        limit=config.pos_embed_max_size * multiple,
    )


def weights_hash(source: Source, vae: Source | None) -> str:
    """SHA-256 over the files of transformer and VAE."""
    if vae is None:
        return content_hash(source.folder, files(source.folder, ('transformer', 'vae')))
    hashes = content_hash(source.folder, files(source.folder, ('transformer',))), content_hash(vae.folder, files(vae.folder, ('.',)))
    return hashlib.sha256(' '.join(hashes).encode()).hexdigest()


def built(source: Source, part: str) -> Any:
    """The whole transformer or VAE without weights. ModelUnavailable for a configuration that cannot be used."""
    config = read_json(source.folder / part / 'config.json')
    try:
        return build(KINDS[part], config)
    except DAMAGE as error:
        raise unreadable(source, part, error) from error


def filled(source: Source, part: str, layer: int | None, place: torch.device, kind: torch.dtype) -> Any:
    """A model with its weights; of a transformer only what blocks 0..layer need, of a VAE only the encoder, unless layer is None."""
    model = built(source, part)
    known = set(model.state_dict())
    if layer is not None:
        CUTS[part](model, layer)
    try:
        return fill(model, weight_files(source.folder, (part,)), known, place, kind, label(source, part))
    except ModelUnavailable:
        raise
    except DAMAGE as error:
        raise unreadable(source, part, error) from error


def label(source: Source, part: str) -> str:
    return source.model if part == '.' else f'{part} of {source.model}'


def cut_transformer(transformer: SD3Transformer2DModel, layer: int) -> None:
    """Leave the blocks 0..layer, of the last of them only what its queries and keys need: there the forward stops."""
    if layer >= len(transformer.transformer_blocks):
        raise UsageError(f'layer is one of 0..{len(transformer.transformer_blocks) - 1}; got {layer}')
    transformer.transformer_blocks = transformer.transformer_blocks[: layer + 1]
    transformer.norm_out = transformer.proj_out = None
    last = transformer.transformer_blocks[layer]
    last.attn2 = last.ff = last.ff_context = None
    last.attn.to_v = last.attn.add_v_proj = nn.Identity()  # the processor asks for values before it comes to queries and keys
    last.attn.to_out = last.attn.to_add_out = None


def cut_vae(vae: AutoencoderKL | AutoencoderTiny, layer: int) -> None:
    """Leave the encoder."""
    vae.decoder = vae.post_quant_conv = None


KINDS = {'transformer': SD3Transformer2DModel, 'vae': AutoencoderKL, '.': AutoencoderTiny}
CUTS: dict[str, Callable[[Any, int], None]] = {'transformer': cut_transformer, 'vae': cut_vae, '.': cut_vae}


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
    """float32 for small models; for others float16 on a GPU, and bfloat16 on a CPU that multiplies in it."""
    if size < SMALL:
        return torch.float32
    if device.type != 'cpu':
        return torch.float16
    capable = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(capable.get(name) for name in BFLOAT16) else torch.float32


def read_model(kind: Any, source: Source, part: str, **options: Any) -> Any:
    """A component with weights, from safetensors only. ModelUnavailable also when a tensor is missing: it would be left random."""
    model, info = read_part(kind, source, part, 'config.json', use_safetensors=True, output_loading_info=True, **options)
    refuse_lost(info['missing_keys'], source.folder / part, f'{part} of {source.model}')
    return model


def check(source: Source) -> None:
    """Raises ModelUnavailable for what `load` would refuse, as far as it shows without reading weights and without a network."""
    for part in ('transformer', 'vae'):
        model = built(source, part)
        known = set(model.state_dict())
        there = {name for path in weight_files(source.folder, (part,)) for name in tensor_shapes(path)}
        refuse_lost(tensors_needed(source, part).keys() - there, source.folder / part, f'{part} of {source.model}')
        refuse_surplus(there - known, source.folder / part, f'{part} of {source.model}')
    if not prompt_is_cached(source):
        check_files(source, TEXT_PARTS)
        for part in ('tokenizer', 'tokenizer_2'):
            read_tokenizer(source, part, source.spec.sequence)


def tensors_needed(source: Source, part: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `load` reads of the transformer or VAE by default."""
    model = built(source, part)
    CUTS[part](model, source.spec.layer)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def prompt_is_cached(source: Source) -> bool:
    """Whether loading does without the text encoders."""
    return bool(read_cache(cache_path(source)))


def unreadable(source: Source, part: str, error: Exception) -> ModelUnavailable:
    reason = ' '.join(str(error).split())[:300]
    return ModelUnavailable(f'{label(source, part)} cannot be read from {source.folder / part}: {reason}')


def read_part(kind: Any, source: Source, part: str, config: str, **options: Any) -> Any:
    """A component from its folder, where its configuration must be. Raises ModelUnavailable for missing and damaged files."""
    folder = source.folder / part
    read_json(folder / config)
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except DAMAGE as error:
        raise unreadable(source, part, error) from error


def null_prompt(source: Source, transformer: SD3Transformer2DModel, device: torch.device, dtype: torch.dtype) -> Prompt:
    """Embedding of the empty prompt, a constant of the model: from the cache, or computed once and cached."""
    slots = source.spec.sequence
    shapes = {
        'embeds': (1, 2 * slots, transformer.config.joint_attention_dim),
        'pooled': (1, transformer.config.pooled_projection_dim),
    }
    cached = cache_path(source)
    tensors = read_cache(cached)
    if shapes_of(tensors) != shapes:
        tensors = compute_null_prompt(source, transformer, slots)
        if shapes_of(tensors) != shapes:
            raise ModelUnavailable(f'the text encoders of {source.model} give {shapes_of(tensors)}; its transformer takes {shapes}')
        write_cache(tensors, cached)
    embeds, pooled = (tensors[name].to(device, dtype) for name in shapes)
    names = ('<|startoftext|>', '<|endoftext|>', *(f'<pad {number}>' for number in range(2, slots)))
    return Prompt(embeds, pooled, tuple(range(slots)), names)


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def compute_null_prompt(source: Source, transformer: SD3Transformer2DModel, slots: int) -> dict[str, Tensor]:
    """CLIP-L and CLIP-G joined along channels in the first half, zeros for T5 in the second: embeds (1, 2 slots, D), pooled (1, E)."""
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    text_files(source)
    check_files(source, TEXT_PARTS)
    parts: dict[str, Any] = {}
    for number in ('', '_2'):
        # on the CPU in float32 always: the result is a constant and must not depend on where it was computed first
        with without_bars():
            parts['text_encoder' + number] = read_model(CLIPTextModelWithProjection, source, 'text_encoder' + number, dtype=torch.float32)
        parts['tokenizer' + number] = read_tokenizer(source, 'tokenizer' + number, slots)
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


@contextmanager
def without_bars() -> Iterator[None]:
    """None of transformers' progress bars while weights are read from disk; those of downloads stay."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def read_tokenizer(source: Source, part: str, slots: int) -> Any:
    """A tokenizer that fills `slots` places. Its vocabulary is looked for first: transformers would make an empty one."""
    from transformers import CLIPTokenizer

    folder = source.folder / part
    if not (folder / 'tokenizer.json').exists() and not ((folder / 'vocab.json').exists() and (folder / 'merges.txt').exists()):
        raise ModelUnavailable(f'{part} of {source.model} has no vocabulary: {folder} needs tokenizer.json, or vocab.json and merges.txt')
    tokenizer = read_part(CLIPTokenizer, source, part, 'tokenizer_config.json')
    if tokenizer.model_max_length != slots:
        raise ModelUnavailable(f'{part} of {source.model} fills {tokenizer.model_max_length} places; expected {slots}')
    return tokenizer


def cache_path(source: Source) -> pathlib.Path:
    """One file a model: keyed by the commit of a hub snapshot, by the content of the text encoders in a folder."""
    key = source.commit or content_hash(source.folder, text_files(source))
    name = hashlib.sha256(f'{source.spec.repo if source.commit else ""} {key} {source.spec.sequence}'.encode()).hexdigest()
    return cache_home() / 'prompts' / f'{name}.safetensors'


def read_cache(path: pathlib.Path) -> dict[str, Tensor]:
    """The cached tensors, none if there are none; what cannot be read is computed again."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return {}


def write_cache(tensors: dict[str, Tensor], path: pathlib.Path) -> None:
    """Whole or not at all; a cache that cannot be written costs time only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = pathlib.Path(folder) / path.name
            save_file(tensors, partial)
            partial.replace(path)
    except (OSError, SafetensorError) as error:
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
