"""LoRAs in diffusers' layout: read one, add it to a model's weights, write one. peft is not needed."""

from __future__ import annotations

import json
import logging
import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from padseg.backbones.configuration import read_json, refuse_constant
from padseg.backbones.lora_file import LoraFile, Stored, locate_lora, lora_hash, lora_header
from padseg.backbones.weights import all_finite
from padseg.errors import ModelUnavailable, UsageError
from padseg.system.files import atomic

DOWN, UP, ALPHA = '.lora_A.weight', '.lora_B.weight', '.alpha'
FORMER = {'.lora.down.weight': DOWN, '.lora.up.weight': UP}  # how diffusers wrote them before, and its scripts for UNets still do
DENOISER = 'transformer'
PREFIXES = (f'{DENOISER}.', 'unet.', 'base_model.model.')  # diffusers' and peft's, before the name of a layer; there may be none
ENCODERS = ('text_encoder', 'lora_te', 'te1.', 'te2.')  # how names of text encoders' tensors begin, in several layouts
STATED = 'lora_adapter_metadata'  # diffusers' key in the header: settings of peft as JSON
MOST_STATED = 1 << 20  # letters of these settings
MOST_BYTES = 1 << 32  # of tensors; a LoRA of rank 128 for all layers of Flux.1 has 1.4 GB
REBASED = ('pissa', 'olora', 'corda', 'loftq')  # ways of peft to begin that also change the weights of the model
TYPES = {'F32': 4, 'F16': 2, 'BF16': 2}  # bytes of the types that are read
log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """What a LoRA adds to a layer's weight (out, in): factor * up @ down. down: (r, in); up: (out, r); factor: alpha / r."""

    down: Tensor
    up: Tensor
    factor: float


class Lora(NamedTuple):
    """A LoRA that was read. hash: SHA-256 of its content; scale: its strength, 1 as trained; pairs: by the name of the layer."""

    path: pathlib.Path
    hash: str
    scale: float
    pairs: Mapping[str, Pair]


class Parts(NamedTuple):
    """Names in a file of the tensors for one layer. alpha: None if the file has none for it."""

    down: str
    up: str
    alpha: str | None


class Stated(NamedTuple):
    """What the settings beside the tensors say. rank, alpha: None if they do not; own: alphas of single layers, by the end of their names.

    ranks: whether single layers may have ranks of their own; root: whether the factor is alpha / sqrt(rank).
    """

    rank: int | None = None
    alpha: float | None = None
    own: Mapping[str, float] = {}
    ranks: bool = False
    root: bool = False


def read_lora(path: pathlib.Path | str, scale: float = 1.0, layers: Mapping[str, Sequence[int]] | None = None) -> Lora:
    """Read a LoRA from a safetensors file as diffusers or peft writes it, or from a folder with one.

    layers: shape of the weight (out, in) of every linear layer of the whole model, with which the header is compared before any tensor is
    read. Alpha is taken from the file or the settings beside it, else it is the rank, with a warning.

    Raises UsageError if there is no such file or the scale is no finite number; ModelUnavailable for a file that is damaged, too large, of
    another layout or for another model, and for a LoRA that changes nothing.
    """
    scale = checked_scale(scale)
    file = locate_lora(path)
    stored, metadata = lora_header(file.weights)
    parts = parts_of(file.weights, stored)
    stated = stated_of(file, metadata)
    for layer, names in parts.items():
        refuse_odd(file.weights, layer, names, stored, stated)
        if layers is not None:
            if layer not in layers:
                strange = sum(name not in layers for name in parts)
                raise misfit(file.weights, f'it has no linear layer {layer[:100]} ({strange} of {len(parts)} layers are unknown to it)')
            refuse_misfit(file.weights, layer, stored[names.down].shape, stored[names.up].shape, layers[layer])
    if stated.alpha is None and not all(names.alpha for names in parts.values()):
        log.warning('%s does not say its alpha: it is taken to be the rank, as in diffusers', file.weights)
    digest = lora_hash(file)
    pairs = read_pairs(file.weights, parts, stated)
    if not any(bool(pair.up.any()) and bool(pair.down.any()) for pair in pairs.values()):
        raise ModelUnavailable(f'{file.weights} changes nothing: lora_B is zero in all layers, as before the first step of training')
    return Lora(file.weights, digest, scale, pairs)


def checked_scale(scale: float) -> float:
    """The strength of a LoRA. Raises UsageError unless it is a finite number."""
    if not math.isfinite(scale):
        raise UsageError(f'the scale of a LoRA is a finite number; got {scale}')
    return float(scale)


def parts_of(path: pathlib.Path, stored: Mapping[str, Stored]) -> dict[str, Parts]:
    """Group the tensors of a file by layer. Raises ModelUnavailable for tensors that are not of a LoRA of the denoiser."""
    found: dict[str, dict[str, str]] = {}
    size = 0
    for name, (dtype, shape) in sorted(stored.items()):
        if name.startswith(ENCODERS):
            raise ModelUnavailable(f'{path} has a LoRA of text encoders ({name[:100]}), which padseg does not merge: save it without them')
        layer, end = split(name)
        if not end:
            raise ModelUnavailable(
                f"{path} is not a LoRA in diffusers' layout: {name[:100]} is no lora_A.weight, lora_B.weight or alpha; if diffusers "
                'loads it, save it again with save_lora_weights'
            )
        if dtype not in TYPES:
            raise ModelUnavailable(f'{path} cannot be used: {name[:100]} has the type {dtype}; padseg reads {", ".join(TYPES)}')
        size += TYPES[dtype] * math.prod(shape)
        of_layer = found.setdefault(layer, {})
        if end in of_layer:
            raise ModelUnavailable(f'{path} has two tensors for one layer: {of_layer[end][:100]} and {name[:100]}')
        of_layer[end] = name
    if not found:
        raise ModelUnavailable(f'{path} holds no tensors')
    if size > MOST_BYTES:
        raise ModelUnavailable(f'{path} is too large for a LoRA: its tensors have {size} bytes; at most {MOST_BYTES} are read')
    for layer, names in found.items():
        for end, other in ((DOWN, UP), (UP, DOWN)):
            if end not in names:
                raise ModelUnavailable(f'{path} is incomplete: {layer[:100]} has no {(end if other in names else DOWN)[1:]}')
    return {layer: Parts(names[DOWN], names[UP], names.get(ALPHA)) for layer, names in found.items()}


def split(name: str) -> tuple[str, str]:
    """The layer that a tensor belongs to, and which of DOWN, UP and ALPHA it is; nothing if it is none."""
    short = without_prefix(name)
    ends = {**dict.fromkeys((DOWN, UP, ALPHA)), **FORMER}
    end = next((end for end in ends if short.endswith(end)), '')
    return short.removesuffix(end), ends.get(end) or end


def without_prefix(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def refuse_odd(path: pathlib.Path, layer: str, names: Parts, stored: Mapping[str, Stored], stated: Stated) -> None:
    """Raise ModelUnavailable unless a layer's matrices have one rank, that of the settings, and a size that a LoRA can have."""
    down, up = stored[names.down].shape, stored[names.up].shape
    if len(down) != 2 or len(up) != 2 or not all((*down, *up)):
        raise ModelUnavailable(f'{path} cannot be used: of {layer[:100]}, lora_A is {down} and lora_B {up}; padseg reads matrices')
    rank = down[0]
    if up[1] != rank:
        raise ModelUnavailable(f'{path} is damaged: of {layer[:100]}, lora_A has rank {rank} and lora_B rank {up[1]}')
    if rank > max(down[1], up[0]):
        raise ModelUnavailable(f'{path} cannot be used: the rank {rank} of {layer[:100]} is above its {down[1]} inputs and {up[0]} outputs')
    if stated.rank not in (None, rank) and not stated.ranks:
        raise ModelUnavailable(f'{path} is damaged: its settings say rank {stated.rank}, but {layer[:100]} has rank {rank}')
    if names.alpha and math.prod(stored[names.alpha].shape) != 1:
        raise ModelUnavailable(f'{path} cannot be used: {names.alpha[:100]} is {stored[names.alpha].shape}, not one number')


def refuse_misfit(path: pathlib.Path, layer: str, down: Sequence[int], up: Sequence[int], weight: Sequence[int]) -> None:
    """Raise ModelUnavailable unless matrices (r, in) and (out, r) fit a weight (out, in)."""
    if (up[0], down[1]) != tuple(weight):
        raise misfit(path, f'{layer[:100]} is {up[0]} x {down[1]} in the LoRA and {weight[0]} x {weight[1]} in the model')


def misfit(path: pathlib.Path, why: str) -> ModelUnavailable:
    return ModelUnavailable(f'{path} does not fit the model: {why}')


def stated_of(file: LoraFile, metadata: Mapping[str, str]) -> Stated:
    """Rank and alpha from peft's configuration beside the weights, or from the header's metadata."""
    if file.config:
        return checked_settings(file.config, read_json(file.config))
    text = metadata.get(STATED)
    if not text:
        return Stated()
    try:
        if len(text) > MOST_STATED:
            raise ValueError('too long')
        values = json.loads(text, parse_constant=refuse_constant)
        if not isinstance(values, dict):
            raise ValueError('not an object')
    except (ValueError, RecursionError) as error:
        raise ModelUnavailable(f'{file.weights} is damaged: {STATED} in its header is not JSON of settings ({str(error)[:100]})') from error
    return checked_settings(file.weights, {without_prefix(name): value for name, value in values.items()})


def checked_settings(path: pathlib.Path, values: Mapping[str, Any]) -> Stated:
    """Pick what matters from settings of peft. Raises ModelUnavailable for values that it would not have written."""
    rank, own, start = values.get('r'), values.get('alpha_pattern') or {}, values.get('init_lora_weights')
    if isinstance(start, str) and start.startswith(REBASED):
        raise ModelUnavailable(
            f'{path} is for changed weights, which {start[:100]} made before training: convert it to a plain LoRA with peft'
        )
    if rank is not None and not (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1):
        raise ModelUnavailable(f'{path}: the rank is a number >= 1; got {str(rank)[:100]}')
    if not isinstance(own, dict):
        raise ModelUnavailable(f'{path}: alpha_pattern is not an object')
    own = {name.removeprefix('^'): value for name, value in own.items()}  # diffusers writes it before whole names
    strange = next((name for name in own if not name.replace('.', '').replace('_', '').isalnum()), None)
    if strange is not None:
        raise ModelUnavailable(f'{path}: alpha_pattern has {strange[:100]}; padseg reads names of layers, not regular expressions')
    alpha = values.get('lora_alpha')
    return Stated(
        rank=rank,
        alpha=None if alpha is None else checked_alpha(path, alpha),
        own={name: checked_alpha(path, value) for name, value in own.items()},
        ranks=bool(values.get('rank_pattern')),
        root=values.get('use_rslora') is True,
    )


def checked_alpha(path: pathlib.Path, alpha: Any) -> float:
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < 1e6:
        raise ModelUnavailable(f'{path}: alpha is a number above 0 and below a million; got {str(alpha)[:100]}')
    return float(alpha)


def read_pairs(path: pathlib.Path, parts: Mapping[str, Parts], stated: Stated) -> dict[str, Pair]:
    """Read the matrices. Raises ModelUnavailable for values that are not finite."""
    pairs: dict[str, Pair] = {}
    try:
        with safe_open(path, 'pt') as file:
            for layer, names in parts.items():
                # copied, as in weights: tensors in a file have any alignment, which affects the rounding of matrix products
                down, up = file.get_tensor(names.down).clone(), file.get_tensor(names.up).clone()
                alpha = checked_alpha(path, float(file.get_tensor(names.alpha))) if names.alpha else alpha_of(layer, stated, len(down))
                for name, tensor in ((names.down, down), (names.up, up)):
                    if not all_finite(tensor):
                        raise ModelUnavailable(f'{path} cannot be used: {name[:100]} has values that are not finite')
                rank = len(down)
                pairs[layer] = Pair(down, up, alpha / (math.sqrt(rank) if stated.root else rank))
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, ModelUnavailable):
            raise
        raise ModelUnavailable(f'{path} cannot be read: {" ".join(str(error).split())[:300]}') from error
    return pairs


def alpha_of(layer: str, stated: Stated, rank: int) -> float:
    """Alpha of a layer by the settings: its own, that of all, or the rank."""
    own = next((alpha for name, alpha in stated.own.items() if layer == name or layer.endswith(f'.{name}')), stated.alpha)
    return rank if own is None else own


@torch.no_grad()
def merge_lora(transformer: nn.Module, lora: Lora, known: Collection[str]) -> None:
    """Add a LoRA to the weights of a model, in place: W + scale * factor * B A, computed in float32 and rounded to the type of W.

    known: names of all tensors of the whole model, of which the transformer may have only the first blocks; what the LoRA adds to others is
    left out. Raises ModelUnavailable, with nothing changed, for a layer that the whole model does not have or that is not linear, and for
    matrices of another size; and for merged weights that are not finite in their type.
    """
    modules = dict(transformer.named_modules())
    kept: dict[str, nn.Linear] = {}
    for layer, pair in lora.pairs.items():
        module = modules.get(layer)
        if f'{layer}.weight' not in known:
            raise misfit(lora.path, f'it has no linear layer {layer[:100]}')
        if isinstance(module, nn.Linear):
            refuse_misfit(lora.path, layer, pair.down.shape, pair.up.shape, module.weight.shape)
            kept[layer] = module
        elif isinstance(getattr(module, 'weight', None), Tensor):
            raise misfit(lora.path, f'its {layer[:100]} is no linear layer')
    for layer, module in kept.items():
        weight, pair = module.weight, lora.pairs[layer]
        change = pair.up.to(weight.device, torch.float32) @ pair.down.to(weight.device, torch.float32)
        merged = (weight.float() + lora.scale * pair.factor * change).to(weight.dtype)
        if not all_finite(merged):
            raise ModelUnavailable(f'{lora.path} cannot be used: {layer} with it has values that are not finite in {weight.dtype}')
        weight.copy_(merged)


def save_lora(path: pathlib.Path, matrices: Mapping[str, Tensor], rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Write a LoRA in diffusers' layout, which `pipeline.load_lora_weights` and `read_lora` take; equal ones give equal files.

    matrices: (r, in) under `<layer>.lora_A.weight` and (out, r) under `<layer>.lora_B.weight`, as peft's `get_peft_model_state_dict` gives
    them; targets: the layers, by the ends of their names. The file is written completely or not at all.
    """
    settings = {'r': rank, 'lora_alpha': int(alpha) if alpha == int(alpha) else alpha, 'target_modules': sorted(targets)}
    stated = json.dumps({f'{DENOISER}.{name}': value for name, value in settings.items()}, indent=2, sort_keys=True)
    tensors = {f'{DENOISER}.{name}': tensor.detach().cpu().contiguous() for name, tensor in sorted(matrices.items())}
    content = save(tensors, {STATED: stated})  # one key, because safetensors writes several in any order
    with atomic(path) as temporary:
        temporary.write_bytes(content)
