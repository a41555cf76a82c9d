"""Loaded models: where a name leads, what is read from it, and the little that the method needs to know of it."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

from padseg.backbones.spec import Spec
from padseg.errors import UsageError
from padseg.types import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch import nn

DTYPES = ('float32', 'bfloat16', 'float16')


class Identity(NamedTuple):
    """Which model this is. folder: where its files are; revision: commit of a hub model; weights: SHA-256 over the weight files read."""

    model: str
    folder: str
    revision: str | None
    weights: str


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A loaded model. Sizes are in latent cells (patch) and pixels (multiple); limit is the longest side it can take, in pixels."""

    spec: Spec
    identity: Identity
    family: ModuleType
    transformer: Any
    vae: Any
    scheduler: Any
    prompt: Prompt
    patch: int
    multiple: int
    limit: int

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def attention_module(self, layer: int) -> nn.Module:
        """The attention of one block, in which image and text tokens meet."""
        return self.family.attention_module(self.transformer, layer)

    def text_columns(self, image_tokens: int) -> list[int]:
        """Where the picked text tokens stand among the keys."""
        return self.family.text_columns(self.prompt.picked, image_tokens)

    def denoise(self, z: Tensor, timestep: float) -> Tensor:
        """The model's forward on noised latents with the null prompt: (B, C, H', W') -> the same shape."""
        return self.family.denoise(self.transformer, z, timestep, self.prompt)


def load(model: str = 'tiny', *, revision: str | None = None, device: str | None = None, dtype: str | None = None) -> Backbone:
    """A model by its name (tiny, sd3, sd3.5), hub id (`org/name` or `org/name@revision`) or folder in diffusers' layout.

    device: 'cpu', 'cuda', 'mps', ...; by default the GPU if there is one. dtype: float32, bfloat16 or float16; by default float16 for
    models of more than a gigabyte on a GPU, float32 otherwise. Raises UsageError for an unknown name or value, ModelUnavailable when
    files are missing.
    """
    if dtype not in (None, *DTYPES):
        raise UsageError(f'dtype is one of {", ".join(DTYPES)}; got {dtype}')
    from padseg.backbones import sd3
    from padseg.backbones.source import locate

    source = locate(model, revision)
    families = {'sd3': sd3}
    return families[source.spec.family].load(source, device, dtype)
