"""Build models without allocating weights, cut them down to what is needed, and load only those tensors from safetensors."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from padseg.errors import ModelUnavailable

AnyModule = TypeVar('AnyModule', bound=nn.Module)


def build_empty(kind: Any, config: dict[str, Any]) -> Any:
    """Build a diffusers model from its configuration, with parameters that have shapes but no memory."""
    with torch.device('meta'):
        return kind.from_config(config)


def shapes_of_model(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def fill_weights(model: AnyModule, paths: Sequence[pathlib.Path], place: torch.device, dtype: torch.dtype, label: str) -> AnyModule:
    """Load a model's tensors one at a time. `refuse_misfits` must have compared files and model before.

    Raises ModelUnavailable, with `label` for the model, for values that are not finite.
    """
    wanted = model.state_dict().keys()
    state: dict[str, Tensor] = {}
    for path in paths:
        for name in sorted(names_in(path) & wanted):
            # reopened for every tensor, because an open file keeps all that was read in memory; copied even if the dtype is right,
            # because tensors in a file have any alignment, which affects the rounding of matrix products
            with safe_open(path, 'pt') as file:
                state[name] = file.get_tensor(name).to(place, dtype, copy=True)
            if not all_finite(state[name]):
                raise ModelUnavailable(f'{label} cannot be used: {name} in {path} has values that are not finite in {dtype}')
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def all_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, without a second tensor of that size: the extremes are NaN if any value is."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())


def names_in(path: pathlib.Path) -> set[str]:
    with safe_open(path, 'pt') as file:
        return set(file.keys())


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
            if not file.get_slice(name).get_dtype().startswith(('F', 'BF')):
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
