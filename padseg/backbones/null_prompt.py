"""The embedding of the empty prompt: a constant of each model, computed once and kept in padseg's cache."""

from __future__ import annotations

import hashlib
import logging
import pathlib
import tempfile
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from padseg.backbones.family import Family
from padseg.backbones.source import Source, cache_home, content_hash, text_files
from padseg.errors import ModelUnavailable
from padseg.types import Prompt

log = logging.getLogger(__name__)


def null_prompt(family: Family, source: Source, transformer: Any, device: torch.device, dtype: torch.dtype) -> Prompt:
    """Load the empty prompt from the cache, or compute and cache it."""
    slots = source.spec.sequence
    shapes = family.prompt_shapes(slots, transformer.config)
    cached = cache_path(source)
    tensors = read_cache(cached)
    if shapes_of(tensors) != shapes:
        tensors = family.compute_null_prompt(source, transformer, slots)
        if shapes_of(tensors) != shapes:
            raise ModelUnavailable(f'the text encoders of {source.model} produce {shapes_of(tensors)}; its transformer takes {shapes}')
        write_cache(tensors, cached)
    embeds, pooled = (tensors[name].to(device, dtype) for name in shapes)
    names = tuple(family.null_names(slots))
    return Prompt(embeds, pooled, tuple(range(len(names))), names)


def prompt_is_cached(source: Source) -> bool:
    """Return whether the model loads without its text encoders."""
    return bool(read_cache(cache_path(source)))


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def cache_path(source: Source, text: str = '') -> pathlib.Path:
    """Cache file for a model and a text."""
    return path_of(source, encoders_key(source), text)


def encoders_key(source: Source) -> str:
    """Identify a model's text encoders: by commit for a hub snapshot, by content for a folder."""
    return source.commit or content_hash(source.folder, text_files(source))


def path_of(source: Source, key: str, text: str = '') -> pathlib.Path:
    """Cache file for the embedding of a text by the encoders with this key."""
    words = f'{source.spec.repo if source.commit else ""} {key} {source.spec.sequence}' + (f' {text}' if text else '')
    return cache_home() / 'prompts' / f'{hashlib.sha256(words.encode()).hexdigest()}.safetensors'


def read_cache(path: pathlib.Path) -> dict[str, Tensor]:
    """Read the cached tensors; an empty dict if the file is missing or unreadable, so that they are computed again."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return {}


def write_cache(tensors: dict[str, Tensor], path: pathlib.Path, what: str = 'the null prompt') -> None:
    """Write the cache file atomically. A failure is only logged, because a missing cache costs only time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = pathlib.Path(folder) / path.name
            save_file(tensors, partial)
            partial.replace(path)
    except (OSError, SafetensorError) as error:
        log.warning('%s cannot be cached in %s: %s', what, path.parent, error)
