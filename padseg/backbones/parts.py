"""Load a model's parts from its folder: transformer and VAE, cut down to what is needed, tokenizers and text encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError

from padseg.backbones.family import Family
from padseg.backbones.layout import LAYOUTS, config_name
from padseg.backbones.source import Source, content_hash, part_files, read_json, weight_files
from padseg.backbones.weights import build_empty, fill_weights, refuse_lost
from padseg.errors import ModelUnavailable, UsageError
from padseg.types import Tokens

BLANK = '▁'  # T5's token for a space before a character that it has no space-prefixed token for
SMALL = 1 << 30  # bytes; smaller models run in float32 on every device
BFLOAT16 = ('avx512_bf16', 'amx_bf16', 'bf16', 'sve_bf16')  # torch's names for CPU support of bfloat16
# raised by diffusers and transformers for files that are missing, damaged or of the wrong kind
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


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


def built(family: Family, source: Source, part: str) -> Any:
    """Build the whole transformer or VAE without weights. Raises ModelUnavailable for an unusable configuration."""
    config = read_json(source.folder / part / 'config.json')
    layout = family.LAYOUT
    kinds = {layout.denoiser: layout.network, 'vae': layout.vae, '.': 'AutoencoderTiny'}
    try:
        return build_empty(getattr(diffusers, kinds[part]), config)
    except DAMAGE as error:
        raise unreadable(source, part, error) from error


def cut_model(family: Family, model: Any, part: str, layer: int | None) -> None:
    """Reduce a transformer to what blocks 0..layer need, if its family allows it, or a VAE to its encoder; None keeps everything."""
    if layer is None:
        return
    if part != family.LAYOUT.denoiser:
        model.decoder = model.post_quant_conv = None
    elif family.cut:
        family.cut(model, layer)


def filled_part(family: Family, source: Source, part: str, layer: int | None, place: torch.device, kind: torch.dtype) -> Any:
    """Load a transformer or VAE with its weights, cut as by `cut_model`."""
    model = built(family, source, part)
    known = set(model.state_dict())
    cut_model(family, model, part, layer)
    try:
        return fill_weights(model, weight_files(source.folder, (part,)), known, place, kind, part_name(source, part))
    except ModelUnavailable:
        raise
    except DAMAGE as error:
        raise unreadable(source, part, error) from error


def tensors_needed(family: Family, source: Source, part: str, layer: int | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that `load` reads from the transformer or VAE for blocks 0..layer, or from all of it."""
    model = built(family, source, part)
    cut_model(family, model, part, layer)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def part_name(source: Source, part: str) -> str:
    return source.model if part == '.' else f'{part} of {source.model}'


def unreadable(source: Source, part: str, error: Exception) -> ModelUnavailable:
    reason = ' '.join(str(error).split())[:300]
    return ModelUnavailable(f'{part_name(source, part)} cannot be read from {source.folder / part}: {reason}')


def read_part(kind: Any, source: Source, part: str, config: str, **options: Any) -> Any:
    """Load a component from its folder, which must hold its configuration. Raises ModelUnavailable for missing or damaged files."""
    folder = source.folder / part
    read_json(folder / config)
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except DAMAGE as error:
        raise unreadable(source, part, error) from error


def read_model(kind: Any, source: Source, part: str, **options: Any) -> Any:
    """Load a component with weights, from safetensors only. A missing tensor is also ModelUnavailable: it would stay random."""
    with without_bars():
        model, info = read_part(kind, source, part, 'config.json', use_safetensors=True, output_loading_info=True, **options)
    refuse_lost(info['missing_keys'], source.folder / part, f'{part} of {source.model}')
    return model


def read_text_encoders(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """Load the text encoders, keyed by folder. They always run on the CPU: their output is a constant of the model and must not depend on
    the device that computed it first.
    """
    import transformers

    encoders = LAYOUTS[source.spec.family].text_encoders
    return {part: read_model(getattr(transformers, kind), source, part, dtype=dtype) for part, kind in encoders.items()}


def read_scheduler(family: Family, source: Source) -> Any:
    """Load the model's own scheduler. Raises ModelUnavailable for a scheduler unknown to its family."""
    known = family.LAYOUT.schedulers
    kind = read_json(source.folder / 'scheduler' / config_name('scheduler')).get('_class_name', known[0])
    if kind not in known:
        raise ModelUnavailable(f'the scheduler of {source.model} is a {kind}; known: {", ".join(known)}')
    return read_part(getattr(diffusers, kind), source, 'scheduler', config_name('scheduler'))


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


def clip_tokenizer(source: Source, part: str, slots: int) -> Any:
    """Load a CLIP tokenizer with maximum length `slots`. Checks for its vocabulary first: transformers would create an empty one."""
    from transformers import CLIPTokenizer

    folder = source.folder / part
    if not (folder / 'tokenizer.json').exists() and not ((folder / 'vocab.json').exists() and (folder / 'merges.txt').exists()):
        raise ModelUnavailable(f'{part} of {source.model} has no vocabulary: {folder} needs tokenizer.json, or vocab.json and merges.txt')
    tokenizer = read_part(CLIPTokenizer, source, part, 'tokenizer_config.json')
    if tokenizer.model_max_length != slots:
        raise ModelUnavailable(f'{part} of {source.model} has {tokenizer.model_max_length} slots; expected {slots}')
    return tokenizer


def tokens_of(tokenizer: Any, text: str, first: int, slots: int) -> Tokens:
    """Tokenize a text without truncation, and return the tokens with their positions in the text."""
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    special = set(tokenizer.all_special_ids)
    words = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    spans = tuple((0, 0) if word == BLANK else span for word, span in zip(words, encoded.offset_mapping, strict=True))
    return Tokens(first, slots, spans, tuple(number in special for number in encoded.input_ids))
