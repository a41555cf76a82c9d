"""The embeddings of texts, above all of the empty prompt, a constant of each model: computed once and kept in padseg's cache."""

from __future__ import annotations

import hashlib
import logging
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from padseg.backbones.family import Family
from padseg.backbones.source import Source, cache_home, check_files, content_hash, part_files, text_files, text_parts
from padseg.errors import ModelUnavailable
from padseg.types import Prompt

log = logging.getLogger(__name__)


def null_prompt(family: Family, source: Source, transformer: Any, device: torch.device, dtype: torch.dtype) -> tuple[Prompt, str]:
    """The empty prompt, from the cache, or computed once and cached; and the `content_hash` of the text encoders that made it."""
    slots = source.spec.sequence
    shapes = family.prompt_shapes(slots, transformer.config)
    cached = cache_path(source)
    tensors, encoders = read_cache(cached)
    if shapes_of(tensors) != shapes:
        tensors = family.compute_null_prompt(source, transformer, slots)
        if shapes_of(tensors) != shapes:
            raise ModelUnavailable(f'the text encoders of {source.model} give {shapes_of(tensors)}; its transformer takes {shapes}')
        refuse_not_finite(source, tensors)
        encoders = content_hash(source.folder, part_files(source.folder, text_parts(source)))
        write_cache(tensors, cached, encoders=encoders)
    names, kinds = zip(*family.null_tokens(slots), strict=True)
    values = {name: tensors[name].to(device, dtype) for name in shapes}
    picked = tuple(range(len(names)))
    return Prompt(values['embeds'], values['pooled'], picked, names, mask=values.get('mask'), kinds=kinds), encoders


def cached_embedding(
    source: Source, text: str, shapes: Mapping[str, tuple[int, ...]], encode: Callable[[], dict[str, Tensor]], keep: bool
) -> dict[str, Tensor]:
    """The tensors of an encoded text from the cache, or from `encode`, and then cached if `keep`. shapes: of these tensors, by name."""
    path = cache_path(source, text)
    tensors, _ = read_cache(path)
    if shapes_of(tensors) != shapes:
        tensors = encode()
        refuse_not_finite(source, tensors)
        if keep:
            write_cache(tensors, path, 'a prompt')
    return tensors


def refuse_not_finite(source: Source, tensors: dict[str, Tensor]) -> None:
    """Raise ModelUnavailable if the embedding of a text is not finite, with which no picture could be segmented."""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ModelUnavailable(f'the text encoders of {source.model} give values that are not finite: their weights are damaged')


def prompt_is_cached(source: Source) -> bool:
    """Whether the empty prompt is cached, so that loading needs no text encoders."""
    return bool(read_cache(cache_path(source))[0])


def encoders_hash(source: Source) -> str | None:
    """The `content_hash` of a model's text encoders and tokenizers, as `null_prompt` gives it; None if neither their files nor the cached
    embedding are on this machine."""
    tensors, encoders = read_cache(cache_path(source))
    if tensors:
        return encoders
    try:
        check_files(source, text_parts(source))
    except ModelUnavailable:
        return None
    return content_hash(source.folder, part_files(source.folder, text_parts(source)))


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


def read_cache(path: pathlib.Path) -> tuple[dict[str, Tensor], str]:
    """Read the cached tensors and the hash of the encoders that made them. Returns no tensors, so that they are computed again, if there
    are none, if they are not what `write_cache` wrote under this name, or if some are not finite."""
    try:
        if not path.is_file():
            return {}, ''
        with safe_open(path, 'pt') as file:
            encoders, _, content = (file.metadata() or {}).get('padseg', '').partition(' ')
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        return {}, ''
    good = content == signature(tensors, path.stem, encoders) and all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    return (tensors, encoders) if good else ({}, '')


def signature(tensors: dict[str, Tensor], key: str, encoders: str) -> str:
    """SHA-256 over the content of a cache file and its purpose."""
    digest = hashlib.sha256(f'{key} {encoders}'.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f' {name} {tensor.dtype} {tuple(tensor.shape)} '.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_cache(tensors: dict[str, Tensor], path: pathlib.Path, what: str = 'the null prompt', encoders: str = '') -> None:
    """Write a cache file, completely or not at all. Failing to write only costs time later. encoders: hash of what made the tensors."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            partial = pathlib.Path(folder) / path.name
            save_file(tensors, partial, {'padseg': f'{encoders} {signature(tensors, path.stem, encoders)}'})
            partial.replace(path)
    except (OSError, SafetensorError) as error:
        log.warning('%s cannot be cached in %s: %s', what, path.parent, error)
