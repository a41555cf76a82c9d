"""Models built without memory for weights, cut down to what is needed, and filled with just that from safetensors."""

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
    """A diffusers model by its configuration, whose parameters have shapes but no memory."""
    with torch.device('meta'):
        return kind.from_config(config)


def fill_weights(
    model: AnyModule, paths: Sequence[pathlib.Path], known: Collection[str], place: torch.device, dtype: torch.dtype, label: str
) -> AnyModule:
    """Give a model the tensors it has, read one at a time. known: the names of the whole model's, which the files should hold.

    Raises ModelUnavailable, with `label` for the model, if the files lack one of its tensors, or hold one that the whole model lacks.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    held: set[str] = set()
    for path in paths:
        names = names_in(path)
        held |= names
        for name in sorted(names & wanted.keys()):
            # opened for each anew: an open file keeps all that was read of it in memory. A copy even of the right dtype: in the file,
            # tensors lie at any address, by which matrix products round
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
    """ModelUnavailable if weights lack these tensors: they would be left without values."""
    lost = sorted(names)
    if lost:
        raise ModelUnavailable(f'{label} is incomplete: the weights in {folder} lack {len(lost)} tensors, {lost[0]} first')


def refuse_surplus(names: Iterable[str], folder: pathlib.Path, label: str) -> None:
    """ModelUnavailable if weights hold these tensors beside those of the model: its configuration is another model's."""
    more = sorted(names)
    if more:
        raise ModelUnavailable(
            f'{label} does not fit its configuration: the weights in {folder} hold {len(more)} more tensors, {more[0]} first'
        )
