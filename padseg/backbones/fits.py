"""Which graphics cards have memory for a model's maps, reckoned from the shapes of its networks: weights, and what one picture takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from padseg.backbones import QUANTIZED
from padseg.backbones.family import Family

MEMORY = (8, 12, 16, 24)  # of graphics cards, in GiB
SPARE = 1 << 30  # bytes that the driver, torch's own kernels and the screen take
FORMS: dict[str, tuple[str, str | None]] = {'float32': ('float32', None), 'bfloat16': ('bfloat16', None), 'int8': ('bfloat16', 'int8')}
VAE_TENSORS = 6  # as large as the first level of a VAE's encoder, that exist at once
TOKEN_TENSORS = 4  # as wide as the widest layer of a transformer's block, that exist at once
SCALE = 4  # bytes of the scale of a row of a weight in 8 bits


class Need(NamedTuple):
    """Bytes. weights: of transformer and VAE, as far as maps need them; picture: what one picture takes besides, at most."""

    weights: int
    picture: int

    @property
    def total(self) -> int:
        return self.weights + self.picture

    @property
    def card(self) -> int | None:
        """The smallest of MEMORY that has room, in GiB; None if none has."""
        return next((size for size in MEMORY if (size << 30) - SPARE >= self.total), None)


def needs(
    family: Family, transformer: Any, vae: Any, side: int, slots: int, exact: Callable[[torch.dtype], torch.dtype]
) -> dict[str, Need]:
    """What maps of one picture of side x side pixels need, by form of the weights, a key of FORMS.

    transformer, vae: built without weights and cut as for the maps; slots: text tokens; exact: the dtype of the VAE beside a transformer's.
    """
    found = {}
    for form, (name, quantize) in FORMS.items():
        dtype = getattr(torch, name)
        beside = exact(dtype)
        weights = bytes_of(transformer, dtype, quantize) + bytes_of(vae, beside)
        found[form] = Need(weights, max(of_vae(vae, side, beside), of_transformer(family, transformer, vae, side, slots, dtype)))
    return found


def bytes_of(network: nn.Module, dtype: torch.dtype, quantize: str | None = None) -> int:
    """Bytes of a network's weights and tables. quantize: form of the weights of its linear layers, which have one scale per row then."""
    whole = sum(tensor.numel() for tensor in network.state_dict().values()) * dtype.itemsize
    if quantize not in QUANTIZED:
        return whole
    linear = [module.weight for module in network.modules() if isinstance(module, nn.Linear)]
    return whole - sum(weight.numel() * (dtype.itemsize - 1) - SCALE * len(weight) for weight in linear)


def of_vae(vae: Any, side: int, dtype: torch.dtype) -> int:
    return VAE_TENSORS * int(vae.config.block_out_channels[0]) * side**2 * dtype.itemsize


def of_transformer(family: Family, transformer: Any, vae: Any, side: int, slots: int, dtype: torch.dtype) -> int:
    patch = family.size(transformer.config).patch
    tokens = (side // (patch * 2 ** (len(vae.config.block_out_channels) - 1))) ** 2 + slots
    parts = [module for block in family.blocks(transformer) for module in block.modules()]
    widest = max(module.in_features for module in parts if isinstance(module, nn.Linear))
    return TOKEN_TENSORS * widest * tokens * dtype.itemsize
