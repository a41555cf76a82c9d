"""Load a model's parts from its folder: transformer and VAE, cut down to what is needed, tokenizers and text encoders."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import diffusers
import torch

from padseg.backbones.configuration import check_network, read_json, refuse_specials
from padseg.backbones.family import Family
from padseg.backbones.latent_scale import PATCH
from padseg.backbones.layout import config_name, network_class
from padseg.backbones.quantized import quantized, quantizer_of
from padseg.backbones.source import Source, content_hash, part_files, tensor_shapes, text_encoders, weight_files, weights_variant
from padseg.backbones.weights import (
    build_empty,
    fill_weights,
    present_name,
    refuse_lost,
    refuse_misfits,
    refuse_whole_numbers,
    shapes_of_model,
)
from padseg.errors import ModelUnavailable, UsageError
from padseg.system.progress import bars_shown
from padseg.system.streams import to_nowhere
from padseg.types import Tokens

BLANK = '▁'  # T5's token for a single space, before a word that it has no token for
PROBES = ('', 'a cat, on the grass 12', 'é 猫 ' + chr(0x1F600))  # texts to try a tokenizer on: words, and what it may not know
SLACK = 1e-3  # for the rounding of noise levels
MOST_TOKENS = 192 * 192  # of a picture; no family has more than 192 along a side
SMALL = 1 << 30  # bytes: smaller models run in float32 everywhere
BFLOAT16 = ('avx512_bf16', 'amx_bf16', 'bf16', 'sve_bf16')  # names of the feature on CPUs
# Missing, damaged or wrong files make diffusers, transformers and tokenizers raise anything, such as a division by zero heads; tokenizers
# raises a plain Exception.
DAMAGE = Exception


def choose_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f'device {device} is not available here: {str(error).splitlines()[0]}') from error
    return place


def choose_dtype(device: torch.device, size: int) -> torch.dtype:
    """Choose float32 for small models, else float16 on a GPU, bfloat16 on a CPU with native support for it, and float32 on other CPUs."""
    if size < SMALL:
        return torch.float32
    if device.type != 'cpu':
        return torch.float16
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is worth using: CPUs without native support emulate it, and convolutions take many times as long."""
    if device.type != 'cpu':
        return True
    capable = torch.cpu.get_capabilities()
    return any(capable.get(name) for name in BFLOAT16)


def weights_hash(family: Family, source: Source, vae: Source | None) -> str:
    """SHA-256 over the files of the transformer and the VAE."""
    if vae is None:
        return content_hash(source.folder, part_files(source.folder, family.LAYOUT.networks))
    hashes = (
        content_hash(source.folder, part_files(source.folder, (family.LAYOUT.denoiser,))),
        content_hash(vae.folder, part_files(vae.folder, ('.',))),
    )
    return hashlib.sha256(' '.join(hashes).encode()).hexdigest()


def built(family: Family, source: Source, part: str, held: Mapping[str, tuple[int, ...]]) -> Any:
    """Build the whole transformer or VAE without weights. Raises ModelUnavailable for a configuration that cannot be used, or does not fit
    weights of the shapes `held`; building such a model could take forever."""
    path = source.folder / part / 'config.json'
    config = read_json(path)
    layout = family.LAYOUT
    kind = {layout.denoiser: layout.network, 'vae': layout.vae, '.': 'AutoencoderTiny'}[part]
    if network_class(config, kind) != kind:
        raise ModelUnavailable(f'{path} describes a {str(config["_class_name"])[:100]}; expected {kind}')
    check_network(config, path, held)
    try:
        network = getattr(diffusers, kind)
        taken = inspect.signature(network).parameters  # what else was written by an earlier diffusers, for a class of another name
        return build_empty(network, {name: value for name, value in config.items() if name in taken})
    except DAMAGE as error:
        raise unreadable(source, part, error) from error


def held_shapes(source: Source, part: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a part's weight files, by today's names."""
    return {present_name(name): shape for path in weight_files(source.folder, (part,)) for name, shape in tensor_shapes(path).items()}


def linear_layers(family: Family, source: Source) -> dict[str, tuple[int, ...]]:
    """Shapes (out, in) of the weights of all linear layers of the whole transformer, by the layer's name. Builds it without weights."""
    part = family.LAYOUT.denoiser
    network = built(family, source, part, held_shapes(source, part))
    return {name: tuple(module.weight.shape) for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}


def outlined(family: Family, source: Source, part: str, layer: int | None) -> Any:
    """Build a transformer or VAE without weights, cut as by `cut_model`, and check it against the headers of the weight files."""
    files, label = weight_files(source.folder, (part,)), part_name(source, part)
    held = held_shapes(source, part)
    model = built(family, source, part, held)
    known = set(model.state_dict())
    cut_model(family, model, part, layer)
    refuse_misfits(shapes_of_model(model), known, held, source.folder / part, label)
    for path in files:
        refuse_whole_numbers(path, label)
    check_scales(model, source.folder / part / 'config.json')
    return model


def check_scales(model: Any, path: pathlib.Path) -> None:
    """Raise ModelUnavailable if a VAE's configuration has no usable scale for its latents."""
    if hasattr(model, 'bn') and len(model.bn.running_mean) != PATCH**2 * model.config.latent_channels:
        raise ModelUnavailable(f'{path}: patch_size is [2, 2]; got {repr(model.config.patch_size)[:100]}')
    scales = {'batch_norm_eps': False} if hasattr(model, 'bn') else {'scaling_factor': False, 'shift_factor': True}
    for name, optional in scales.items():
        value = getattr(model.config, name, None)
        if hasattr(model, 'encoder') and not (isinstance(value, (int, float)) or (optional and value is None)):
            raise ModelUnavailable(f'{path}: {name} is a number; got {repr(value)[:100]}')


def cut_model(family: Family, model: Any, part: str, layer: int | None) -> None:
    """Reduce a transformer to what blocks 0..layer need, if its family allows it, or a VAE to its encoder; None keeps everything."""
    if layer is None:
        return
    if part != family.LAYOUT.denoiser:
        model.decoder = model.post_quant_conv = None
    elif family.cut:
        family.cut(model, layer)


def filled_part(
    family: Family, source: Source, part: str, layer: int | None, place: torch.device, kind: torch.dtype, quantize: str | None = None
) -> Any:
    """Load a transformer or VAE with its weights, cut as by `cut_model`. quantize: as for `padseg.load`."""
    model = outlined(family, source, part, layer)
    keep = partial(quantized, quantizer_of(quantize, model, place), model) if quantize else None
    try:
        return fill_weights(model, weight_files(source.folder, (part,)), place, kind, part_name(source, part), keep)
    except ModelUnavailable:
        raise
    except DAMAGE as error:
        raise unreadable(source, part, error) from error


def tensors_needed(family: Family, source: Source, part: str, layer: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `load` reads of the transformer or VAE for blocks 0..layer, or of the whole."""
    return shapes_of_model(outlined(family, source, part, layer))


def vae_dtype(family: Family, source: Source, owner: Source, part: str, kind: torch.dtype) -> torch.dtype:
    """The dtype of a VAE: that of the transformer, but for one that overflows in 16 bits; 'force_upcast': false is of one that does not.

    owner, part: where it is; a small VAE never overflows.
    """
    if part == '.' or kind == torch.float32:
        return kind
    network = read_json(source.folder / family.LAYOUT.denoiser / config_name(family.LAYOUT.denoiser))
    overflows = family.needs_exact_vae(network) and read_json(owner.folder / part / config_name(part)).get('force_upcast', True)
    return torch.float32 if overflows else kind


def part_name(source: Source, part: str) -> str:
    return source.model if part == '.' else f'{part} of {source.model}'


def unreadable(source: Source, part: str, error: Exception) -> ModelUnavailable:
    reason = ' '.join(str(error).split())[:300]
    return ModelUnavailable(f'{part_name(source, part)} cannot be read from {source.folder / part}: {reason}')


def read_part(kind: Any, source: Source, part: str, config: str, /, **options: Any) -> Any:
    """Load a component from its folder, which must hold its configuration. Raises ModelUnavailable for missing or damaged files."""
    folder = source.folder / part
    read_json(folder / config)
    refuse_specials(folder)
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except DAMAGE as error:
        raise unreadable(source, part, error) from error


def read_model(kind: Any, source: Source, part: str, **options: Any) -> Any:
    """Load a text encoder, from safetensors only. Raises ModelUnavailable also for a missing tensor, which would stay random."""
    config = encoder_config(kind, source, part)
    size = sum(path.stat().st_size for path in weight_files(source.folder, (part,)))
    with nullcontext() if bars_shown(size) else without_bars():
        model, info = read_part(
            kind,
            source,
            part,
            'config.json',
            config=config,
            attn_implementation='sdpa',  # otherwise a repository named in the configuration would be looked up on the hub
            trust_remote_code=False,
            use_safetensors=True,
            variant=weights_variant(source.folder, part),
            output_loading_info=True,
            **options,
        )
    refuse_lost(info['missing_keys'], source.folder / part, f'{part} of {source.model}')
    return model


def encoder_config(kind: Any, source: Source, part: str) -> Any:
    """The configuration of a text encoder, reduced to what describes the network. Raises ModelUnavailable if it cannot be used, or if it
    describes more parameters than the files hold."""
    values, held = encoder_values(source, part)
    # `rope_theta` is what files of earlier versions call a part of `rope_parameters`
    known = kind.config_class.__annotations__.keys() | {'tie_word_embeddings', 'rope_theta', 'rope_scaling'}
    try:
        config = kind.config_class(**{name: value for name, value in values.items() if name in known})
        with torch.device('meta'):
            described = sum(tensor.numel() for tensor in kind(config).parameters())
    except DAMAGE as error:
        raise unreadable(source, part, error) from error
    if described > 2 * held:
        folder = source.folder / part
        raise ModelUnavailable(f'{part} of {source.model} is incomplete: {folder} holds {held} weights, its configuration has {described}')
    return config


def encoder_values(source: Source, part: str) -> tuple[dict[str, Any], int]:
    """The values in a text encoder's configuration, and its number of weights. Raises ModelUnavailable if the two do not fit."""
    folder = source.folder / part
    if (folder / 'adapter_config.json').exists():
        raise ModelUnavailable(f'{folder} has an adapter, which padseg does not read')
    values = read_json(folder / 'config.json')
    shapes = {name: shape for path in weight_files(source.folder, (part,)) for name, shape in tensor_shapes(path).items()}
    check_network(values, folder / 'config.json', shapes)
    inner = values.get('text_config')  # for a model that is more than a text encoder
    return (inner if isinstance(inner, dict) else values), sum(map(math.prod, shapes.values()))


def read_text_encoders(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """Load the text encoders, keyed by folder. They always run on the CPU: their output is a constant of the model and must not depend on
    the device that computed it first.
    """
    import transformers

    return {part: read_model(getattr(transformers, kind), source, part, dtype=dtype) for part, kind in text_encoders(source).items()}


def read_scheduler(family: Family, source: Source) -> Any:
    """Load the model's scheduler. Raises ModelUnavailable if its family has no such scheduler, or if it gives no noise levels."""
    known = family.LAYOUT.schedulers
    path = source.folder / 'scheduler' / config_name('scheduler')
    config = read_json(path)
    kind = config.get('_class_name', known[0])
    if kind not in known:
        raise ModelUnavailable(f'the scheduler of {source.model} is a {str(kind)[:100]}; known: {", ".join(known)}')
    check_network(config, path, {})
    scheduler = read_part(getattr(diffusers, kind), source, 'scheduler', config_name('scheduler'))
    steps = source.spec.steps
    try:
        some = range(1, steps + 1, max(1, steps // 16))
        levels = [family.noise_level(scheduler, steps, step, image_tokens) for step in some for image_tokens in (1, MOST_TOKENS)]
    except DAMAGE as error:
        raise unreadable(source, 'scheduler', error) from error
    if not all(
        math.isfinite(level.timestep) and -SLACK < level.signal < 1 + SLACK and -SLACK < level.sigma < 1 + SLACK for level in levels
    ):
        raise ModelUnavailable(f'{path} describes a schedule whose noise levels are not in 0..1')
    return scheduler


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide transformers' progress bars for reading and writing weights on disk; download bars stay visible."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def without_advice() -> Iterator[None]:
    """Hide transformers' developer advice, such as warnings about imports of pipelines that padseg does not use."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def read_tokenizer(kind: Any, source: Source, part: str) -> Any:
    """A tokenizer, tried on some text: whatever is wrong with its files is ModelUnavailable."""
    with told_errors(f'{part_name(source, part)} cannot be read from {source.folder / part}'):
        tokenizer = read_part(kind, source, part, 'tokenizer_config.json')
        for text in PROBES:
            tokenizer(text, verbose=False)
        highest = max(tokenizer.get_vocab().values(), default=0)
    config = source.folder / part.replace('tokenizer', 'text_encoder') / config_name('text_encoder')
    known = read_json(config).get('vocab_size') if config.is_file() else None
    if isinstance(known, int) and highest >= known:
        raise ModelUnavailable(f'{part_name(source, part)} has a token {highest}; its text encoder has embeddings for {known} tokens')
    return tokenizer


@contextmanager
def told_errors(what: str) -> Iterator[None]:
    """Raise whatever tokenizers raise as ModelUnavailable: a panic of their Rust code is no Exception, and writes to stderr besides."""
    kept = None
    with suppress(OSError):
        kept = os.dup(2)
        to_nowhere(2)
    try:
        yield
    except ModelUnavailable:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
            raise
        raise ModelUnavailable(f'{what}: {" ".join(str(error).split())[:300]}') from error
    finally:
        if kept is not None:
            os.dup2(kept, 2)
            os.close(kept)


def clip_tokenizer(source: Source, part: str, slots: int) -> Any:
    """Load a CLIP tokenizer with maximum length `slots`. Checks for its vocabulary first: transformers would create an empty one."""
    from transformers import CLIPTokenizer

    folder = source.folder / part
    if not (folder / 'tokenizer.json').exists() and not ((folder / 'vocab.json').exists() and (folder / 'merges.txt').exists()):
        raise ModelUnavailable(f'{part} of {source.model} has no vocabulary: {folder} needs tokenizer.json, or vocab.json and merges.txt')
    tokenizer = read_tokenizer(CLIPTokenizer, source, part)
    if tokenizer.model_max_length != slots:
        raise ModelUnavailable(f'{part} of {source.model} has {tokenizer.model_max_length} slots; expected {slots}')
    return tokenizer


def tokens_of(tokenizer: Any, text: str, first: int, slots: int) -> Tokens:
    """Tokenize a text without truncation, and return the tokens with their positions in the text."""
    with told_errors(f'the tokenizer in {tokenizer.name_or_path} fails'):
        encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    special = set(tokenizer.all_special_ids)
    words = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    spans = tuple((0, 0) if word == BLANK else span for word, span in zip(words, encoded.offset_mapping, strict=True))
    blanks = tuple(place for place, word in enumerate(words) if word == BLANK)
    return Tokens(first, slots, spans, tuple(number in special for number in encoded.input_ids), blanks)
