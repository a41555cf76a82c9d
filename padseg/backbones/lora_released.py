"""Take the LoRA out of a checkpoint as MAGNET's authors release it: what torch saved of their whole trainer."""

from __future__ import annotations

import collections
import math
import pathlib
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from padseg.backbones.lora import DOWN, MOST_BYTES, UP, save_lora
from padseg.backbones.weights import all_finite
from padseg.errors import ModelUnavailable, OutputConflict, UsageError
from padseg.system.files import full_disk

MODEL = 'model'  # key of the tensors in the checkpoint
PREFIX, ADAPTER = 'backbone.transformer.', '.default'  # before the name of a layer, and in the middle of a tensor's
MATRIX = re.compile(r'(?P<layer>[A-Za-z_]\w*(?:\.\w+)*)\.(?P<kind>lora_[AB])(?:\.default)?\.weight', re.ASCII)
MOST_RECORDS = 1 << 16  # files in the archive; one for every tensor of model and optimizer
MOST_PICKLE = 1 << 26  # bytes of the pickle, which has names and shapes; that of all of SD3 has less than a megabyte
LONGEST = 512  # letters of a name
# What zipfile and torch raise for damaged or crafted files.
DAMAGE = (Exception,)


class Converted(NamedTuple):
    """A LoRA that was written. layers: how many it changes; left_out: number of other tensors and values, by the start of their names."""

    rank: int
    alpha: float
    layers: int
    left_out: dict[str, int]


def convert_lora(released: pathlib.Path, out: pathlib.Path, alpha: float | None = None) -> Converted:
    """Write the LoRA in a released checkpoint to a safetensors file in diffusers' layout. Nothing in the checkpoint is executed.

    Only LoRA matrices are kept, so not the score layer, which is for training alone. alpha: by default the rank.

    Raises UsageError for a path or alpha that cannot be, OutputConflict if `out` exists or cannot be written; ModelUnavailable for a file
    that torch did not save, that has no LoRA, and for matrices that do not fit together, are not finite, or change nothing.
    """
    if alpha is not None and not 0 < alpha < 1e6:
        raise UsageError(f'alpha is a number above 0 and below a million; got {alpha}')
    if out.suffix != '.safetensors':
        raise UsageError(f'{out} is to be a safetensors file: give it a name that ends in .safetensors')
    if out.exists() or out.is_symlink():
        raise OutputConflict(f'{out} exists: remove it, or choose another name')
    state = read_checkpoint(released)
    matrices, left_out = divided(released, state)
    rank = checked_rank(released, matrices)
    layers = sorted({name.rpartition('.lora_')[0] for name in matrices})
    used = float(rank) if alpha is None else alpha
    with full_disk(out):
        save_lora(out, matrices, rank, used, layers)
    return Converted(rank, used, len(layers), left_out)


def read_checkpoint(path: pathlib.Path) -> Mapping[str, Any]:
    """What torch saved in a file, by `weights_only`, so without running any code in it. Raises UsageError, ModelUnavailable.

    Tensors stay in the file until they are used, and none can claim more than it has there.
    """
    if not path.is_file():
        raise UsageError(f'{path} is not a file')
    refuse_archive(path)
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except (*DAMAGE, MemoryError) as error:
        reason = ' '.join(str(error).split())
        if 'weights_only' in reason or 'Weights only' in reason or 'Unsupported' in reason:
            word = re.search(r'GLOBAL ([\w.]{1,100})', reason)
            what = f' ({word[1]})' if word else ''
            raise ModelUnavailable(f'{path} holds code or objects{what}, not only tensors: padseg does not load it') from error
        raise ModelUnavailable(f'{path} cannot be read as a checkpoint of torch: {reason[:200]}') from error
    if not isinstance(state, dict):
        raise ModelUnavailable(f'{path} is not a checkpoint: it holds no names')
    return state


def refuse_archive(path: pathlib.Path) -> None:
    """Raise ModelUnavailable unless a file is a zip archive as torch writes it: nothing packed, and a pickle of a sensible size."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (*DAMAGE, MemoryError) as error:
        raise ModelUnavailable(f'{path} is not a checkpoint as torch writes it since version 1.6: {str(error)[:200]}') from error
    if len(records) > MOST_RECORDS:
        raise ModelUnavailable(f'{path} holds {len(records)} records; at most {MOST_RECORDS} are read')
    if any(record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size for record in records):
        raise ModelUnavailable(f'{path} is packed, as torch never does: it could unfold to any size')
    if any(record.filename.endswith('.pkl') and record.file_size > MOST_PICKLE for record in records):
        raise ModelUnavailable(f'{path} has names and shapes of more than {MOST_PICKLE} bytes')


def divided(path: pathlib.Path, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The LoRA's matrices, as `save_lora` takes them, and the number of other entries by the start of their names."""
    model = state.get(MODEL)
    if not isinstance(model, dict):
        raise ModelUnavailable(f"{path} is not a released checkpoint: it has no tensors under '{MODEL}'")
    others = collections.Counter(start_of(name) for name in state if name != MODEL)
    kept: dict[str, Tensor] = {}
    size = 0
    for name, tensor in model.items():
        match = MATRIX.fullmatch(name[len(PREFIX) :]) if is_name(name) and name.startswith(PREFIX) else None
        if match is None:
            others[start_of(name)] += 1
            continue
        if not is_matrix(tensor):
            raise ModelUnavailable(f'{path}: {name[:100]} is no matrix of floating-point numbers')
        size += tensor.numel() * 4
        if size > min(MOST_BYTES, 4 * path.stat().st_size):
            raise ModelUnavailable(f'{path}: its LoRA has more numbers than the file or a LoRA can hold')
        short = f'{match["layer"]}.{match["kind"]}.weight'
        if short in kept:
            raise ModelUnavailable(f'{path} has {short[:100]} twice')
        kept[short] = tensor.detach()
    if not kept:
        raise ModelUnavailable(
            f'{path} has no LoRA: no tensor is named {PREFIX}….lora_A{ADAPTER}.weight; it has {in_words(others) or "nothing"}'
        )
    return {name: tensor.float() for name, tensor in kept.items()}, dict(sorted(others.items()))


def is_name(name: object) -> bool:
    return isinstance(name, str) and len(name) <= LONGEST


def is_matrix(value: object) -> bool:
    """Whether this is a plain dense matrix in memory; other tensors, such as sparse ones, can claim any size."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == 'cpu'
        and value.ndim == 2
        and value.numel() > 0
        and value.dtype in (torch.float32, torch.float16, torch.bfloat16)
    )


def start_of(name: object) -> str:
    """The module that a tensor belongs to, in words for a report: the first part of its name, the second too below `backbone`."""
    parts = name[:LONGEST].split('.') if isinstance(name, str) else [type(name).__name__]
    return '.'.join(parts[: 2 if parts[0] == PREFIX.split('.')[0] else 1])


def in_words(entries: Mapping[str, int]) -> str:
    """A few of these names, with their numbers."""
    shown = [f'{name[:60]} ({count})' for name, count in list(entries.items())[:8]]
    return ', '.join(shown) + (f' and {len(entries) - len(shown)} more' if len(entries) > len(shown) else '')


def checked_rank(path: pathlib.Path, matrices: Mapping[str, Tensor]) -> int:
    """The rank of all pairs. Raises ModelUnavailable for halves of pairs, several ranks, values that are not finite, and zeros alone."""
    ranks: set[int] = set()
    for layer in sorted({name.rpartition('.lora_')[0] for name in matrices}):
        down, up = matrices.get(f'{layer}{DOWN}'), matrices.get(f'{layer}{UP}')
        if down is None or up is None:
            raise ModelUnavailable(f'{path} is incomplete: {layer[:100]} has no {"lora_A" if down is None else "lora_B"}')
        if len(down) != up.shape[1]:
            raise ModelUnavailable(f'{path} is damaged: of {layer[:100]}, lora_A has rank {len(down)} and lora_B rank {up.shape[1]}')
        if not (all_finite(down) and all_finite(up)):
            raise ModelUnavailable(f'{path} cannot be used: {layer[:100]} has values that are not finite')
        ranks.add(len(down))
    if len(ranks) > 1:
        raise ModelUnavailable(f'{path} has several ranks: {in_list(ranks)}')
    if not any(bool(tensor.any()) for name, tensor in matrices.items() if name.endswith(UP)):
        raise ModelUnavailable(f'{path} changes nothing: lora_B is zero in all layers, as before the first step of training')
    rank = ranks.pop()
    widest = max(math.prod(tensor.shape) // rank for tensor in matrices.values())
    if rank > widest:
        raise ModelUnavailable(f'{path} cannot be used: its rank {rank} is above the size of its widest layer, {widest}')
    return rank


def in_list(numbers: Iterable[int]) -> str:
    return ', '.join(map(str, sorted(numbers)))
