"""Build models without allocating weights, cut them down to what is needed, and load only those tensors from safetensors."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Iterable, Sequence
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


def fill_weights(
    model: AnyModule, paths: Sequence[pathlib.Path], known: Collection[str], place: torch.device, dtype: torch.dtype, label: str
) -> AnyModule:
    """Load the tensors of a model, one at a time. known: tensor names of the uncut model, which the files should hold.

    Raises ModelUnavailable, with `label` for the model, if the files lack a tensor of the model or hold one that the uncut model lacks.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    held: set[str] = set()
    for path in paths:
        names = names_in(path)
        held |= names
        for name in sorted(names & wanted.keys()):
            # Reopened for each tensor: an open file keeps everything read from it in memory. Copied even if the dtype is right: tensors
            # in a file have arbitrary alignment, which changes how matrix products round.
            with safe_open(path, 'pt') as file:
                state[name] = file.get_tensor(name).to(place, dtype, copy=True)
    refuse_lost(wanted.keys() - held, paths[0].parent, label)
    refuse_surplus(held - set(known), paths[0].parent, label)
    for name, tensor in state.items():
        if tensor.shape != wanted[name]:
            raise ModelUnavailable(
                f'{label} cannot be read from {paths[0].parent}: {name} is {tuple(tensor.shape)}, expected {tuple(wanted[name])}'
            )
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def names_in(path: pathlib.Path) -> set[str]:
    with safe_open(path, 'pt') as file:
        return set(file.keys())


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
