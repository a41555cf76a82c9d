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
    """A loaded model. layers: transformer blocks that were read, of the last of which only queries and keys, unless these are all.

    Sizes are in latent cells (patch) and pixels (multiple); limit is the longest side it can take, in pixels.
    """

    spec: Spec
    identity: Identity
    family: ModuleType
    transformer: Any
    vae: Any
    scheduler: Any
    prompt: Prompt
    layers: int
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
        """The attention of one block, in which image and text tokens meet. UsageError if it was not read."""
        if layer >= self.layers:
            raise UsageError(f'{self.identity.model} was read up to block {self.layers - 1}: load(layer={layer}) reads block {layer} too')
        return self.family.attention_module(self.transformer, layer)

    def text_columns(self, image_tokens: int) -> list[int]:
        """Where the picked text tokens stand among the keys."""
        return self.family.text_columns(self.prompt.picked, image_tokens)

    def denoise(self, z: Tensor, timestep: float) -> Tensor:
        """The model's forward on noised latents with the null prompt: (B, C, H', W') -> the same shape."""
        return self.family.denoise(self.transformer, z, timestep, self.prompt)


def load(
    model: str = 'tiny',
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    layer: int | None = None,
    whole: bool = False,
    vae: str | None = None,
) -> Backbone:
    """A model by its name (tiny, sd3, sd3.5), hub id (`org/name` or `org/name@revision`) or folder in diffusers' layout.

    device: 'cpu', 'cuda', 'mps', ...; by default the GPU if there is one. dtype: float32, bfloat16 or float16; by default float32, for
    models of more than a gigabyte float16 on a GPU and bfloat16 on a CPU that multiplies in it. layer: the last block whose token maps
    are wanted, by default the model's expert block; what comes after it is not read, nor the VAE's decoder, unless `whole` is true.
    vae: another VAE for the same latents in the layout of AutoencoderTiny, by hub id or folder; 'tiny' is TAESD3.

    Raises UsageError for an unknown name or value, ModelUnavailable when files are missing.
    """
    if dtype not in (None, *DTYPES):
        raise UsageError(f'dtype is one of {", ".join(DTYPES)}; got {dtype}')
    from padseg.backbones import sd3
    from padseg.backbones.source import locate
    from padseg.backbones.source import locate_vae

    source = locate(model, revision)
    families = {'sd3': sd3}
    return families[source.spec.family].load(source, device, dtype, layer, whole, locate_vae(vae) if vae else None)
