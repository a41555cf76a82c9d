"""Build models without allocating weights, cut them down to what is needed, and load only those tensors from safetensors."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from safetensors import safe_open
from torch import Tensor, nn

from padseg.errors import ModelUnavailable
from padseg.system.progress import bytes_bar

AnyModule = TypeVar('AnyModule', bound=nn.Module)
AT_ONCE = 1 << 24  # bytes read from an open file of weights
COUNTER = 'num_batches_tracked'  # whole numbers that are no weights: how often a batch norm's means were updated
# names of attention's tensors in VAEs that were published before diffusers renamed them, such as Stable Diffusion's
FORMER = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}


def build_empty(kind: Any, config: dict[str, Any]) -> Any:
    """Build a diffusers model from its configuration, with parameters that have shapes but no memory."""
    with torch.device('meta'):
        return kind.from_config(config)


def shapes_of_model(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def fill_weights(
    model: AnyModule,
    paths: Sequence[pathlib.Path],
    place: torch.device,
    dtype: torch.dtype,
    label: str,
    keep: Callable[[str, Tensor], Tensor] | None = None,
) -> AnyModule:
    """Load a model's tensors, a few at a time. `refuse_misfits` must have compared files and model before.

    keep: makes of a tensor, by its name, what is kept of it.

    Raises ModelUnavailable, with `label` for the model, for values that are not finite.
    """
    wanted = model.state_dict().keys()
    state: dict[str, Tensor] = {}
    sizes = {path: {stored: size for stored, size in sizes_in(path).items() if present_name(stored) in wanted} for path in paths}
    with bytes_bar(f'loading {label}', sum(sum(held.values()) for held in sizes.values())) as bar:
        for path, held in sizes.items():
            names = sorted(held, reverse=True)
            while names:
                # reopened after every few tensors, because an open file keeps all that was read in memory
                with safe_open(path, 'pt') as file:
                    read = 0
                    while names and read < AT_ONCE:
                        stored = names.pop()
                        tensor = file.get_tensor(stored)
                        read += tensor.nbytes
                        # copied even if the dtype is right: tensors in a file have any alignment, which affects how products are rounded
                        kind = dtype if tensor.is_floating_point() else tensor.dtype
                        state[present_name(stored)] = kept = tensor.to(place, kind, copy=True)
                        if not all_finite(kept):
                            raise ModelUnavailable(f'{label} cannot be used: {stored} in {path} has values that are not finite in {dtype}')
                        if keep:
                            state[present_name(stored)] = keep(present_name(stored), kept)
                        bar.update(held[stored])
    model.load_state_dict(state, assign=True)
    compute_places(model, place)
    return model.eval().requires_grad_(False)


def present_name(name: str) -> str:
    """Today's name of a tensor."""
    front, _, kind = name.rpartition('.')
    attention, _, layer = front.rpartition('.')
    return f'{attention}.{FORMER[layer]}.{kind}' if layer in FORMER else name


def compute_places(model: nn.Module, place: torch.device) -> None:
    """Fill in the embedding of image tokens' places where weights do not hold it (PixArt's), in float32."""
    for module in model.modules():
        if isinstance(module, PatchEmbed) and module.pos_embed is not None and module.pos_embed.is_meta:
            places = get_2d_sincos_pos_embed(
                module.proj.out_channels,
                module.base_size,
                base_size=module.base_size,
                interpolation_scale=module.interpolation_scale,
                output_type='pt',
            )
            module.pos_embed = places.float()[None].to(place)


def all_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, without a second tensor of that size: the extremes are NaN if any value is."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())


def sizes_in(path: pathlib.Path) -> dict[str, int]:
    """The bytes of each tensor in a file, from its header."""
    with safe_open(path, 'pt') as file:
        return {name: math.prod(part.get_shape()) * bits(part.get_dtype()) // 8 for name in file.keys() for part in [file.get_slice(name)]}


def bits(kind: str) -> int:
    """Of a value, by the name of its type in a file: F32, BF16, F8_E4M3, U8, BOOL."""
    digits = re.search(r'\d+', kind)
    return int(digits[0]) if digits else 8


def refuse_misfits(
    needed: Mapping[str, tuple[int, ...]],
    known: Collection[str],
    held: Mapping[str, tuple[int, ...]],
    folder: pathlib.Path,
    label: str,
) -> None:
    """Raise ModelUnavailable if a needed tensor is missing or has another shape, or if the files hold one that the whole model lacks.

    needed: shapes of what is read; known: names of all tensors of the whole model; held: shapes in the headers of the files.
    """
    refuse_lost(needed.keys() - held.keys(), folder, label)
    refuse_surplus(held.keys() - set(known), folder, label)
    for name, shape in needed.items():
        if held[name] != shape:
            raise ModelUnavailable(f'{label} cannot be read from {folder}: {name} is {held[name]}, expected {shape}')


def refuse_whole_numbers(path: pathlib.Path, label: str) -> None:
    """Raise ModelUnavailable if a file holds tensors of integers, which are quantised weights without their scales."""
    with safe_open(path, 'pt') as file:
        for name in file.keys():
            if not file.get_slice(name).get_dtype().startswith(('F', 'BF')) and not name.endswith(COUNTER):
                raise ModelUnavailable(f'{label} cannot be used: {name} in {path} holds integers, as quantised weights do')


def refuse_lost(names: Iterable[str], folder: pathlib.Path, label: str) -> None:
    """Raise ModelUnavailable if the weights lack any tensors: those would stay uninitialised."""
    lost = sorted(names)
    if lost:
        raise ModelUnavailable(f'{label} is incomplete: the weights in {folder} lack {len(lost)} tensors, {lost[0]} first')


def refuse_surplus(names: Iterable[str], folder: pathlib.Path, label: str) -> None:
    """Raise ModelUnavailable if the weights hold extra tensors: the configuration belongs to another model."""
    more = sorted(names)
    if more:
        raise ModelUnavailable(
            f'{label} does not fit its configuration: the weights in {folder} hold {len(more)} more tensors, {more[0]} first'
        )
