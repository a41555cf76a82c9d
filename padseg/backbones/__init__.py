"""Load models by name, and provide what the methods need from a loaded model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from padseg.backbones.spec import Spec
from padseg.errors import UsageError
from padseg.types import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from padseg.backbones.family import Family
    from padseg.backbones.noise import NoiseLevel
    from padseg.backbones.recorder import What

DTYPES = ('float32', 'bfloat16', 'float16')


class Identity(NamedTuple):
    """Which model this is. folder: where its files are; revision: commit of a hub model; weights: SHA-256 over the weight files."""

    model: str
    folder: str
    revision: str | None
    weights: str


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A loaded model. null_prompt: the empty prompt, a constant of the model.

    layers: the number of transformer blocks loaded; of the last one only queries and keys, unless `whole`. patch: latent cells along a side
    of an image token; multiple: pixels along it; limit: the longest side the model takes, in pixels. compiled: the number of leading blocks
    that are compiled; their attention cannot be read.
    """

    spec: Spec
    identity: Identity
    family: Family
    transformer: Any
    vae: Any
    scheduler: Any
    null_prompt: Prompt
    layers: int
    whole: bool
    patch: int
    multiple: int
    limit: int
    compiled: int = 0

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def attention_module(self, layer: int, what: Sequence[What] = ('queries', 'keys')) -> nn.Module:
        """Return the joint image-text attention of a block. Raises UsageError if `what` was not loaded or the block is compiled."""
        if layer >= self.layers:
            raise UsageError(f'{self.identity.model} was loaded up to block {self.layers - 1}: load(layer={layer}) loads block {layer} too')
        if layer < self.compiled:
            raise UsageError(
                f'blocks 0..{self.compiled - 1} are compiled: load(layer={layer}, compile=True) does not compile block {layer}'
            )
        if not self.whole and layer == self.layers - 1 and not {'queries', 'keys'}.issuperset(what):
            raise UsageError(
                f'only queries and keys of block {layer} of {self.identity.model} were loaded: load(whole=True) loads all of it'
            )
        return self.family.attention_module(self.transformer, layer)

    def text_columns(self, prompt: Prompt, image_tokens: int) -> list[int]:
        """Positions of the prompt's picked tokens among the keys."""
        return self.family.text_columns(prompt.picked, image_tokens)

    def first_image_token(self, prompt: Prompt) -> int:
        """Position of the first image token among the queries."""
        return self.family.first_image_token(prompt)

    def noise_level(self, step: int, image_tokens: int) -> NoiseLevel:
        """Noise level of the step-th step from the end of the model's schedule; step 1 has the least noise. ValueError if there is none."""
        return self.family.noise_level(self.scheduler, self.spec.steps, step, image_tokens)

    def denoise(self, z: Tensor, timestep: float, prompt: Prompt) -> Tensor:
        """Run the model on noised latents with a prompt: (B, C, H', W') -> the same shape."""
        return self.family.denoise(self.transformer, z, timestep, prompt)


def load(
    model: str = 'tiny',
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    layer: int | None = None,
    whole: bool = False,
    vae: str | None = None,
    compile: bool = False,
) -> Backbone:
    """Load a model by name (tiny, sd3, sd3.5, flux), hub id (`org/name` or `org/name@revision`) or folder in diffusers' layout.

    device: 'cpu', 'cuda', 'mps', ...; by default a GPU if there is one. dtype: float32, bfloat16 or float16; by default float32, but for
    models of more than a gigabyte float16 on a GPU and bfloat16 on a CPU with native support for it. layer: the last block whose token maps
    are wanted, by default the model's expert block; later blocks and the VAE's decoder are not loaded unless `whole` is true. vae: another
    VAE for the same latents, in AutoencoderTiny's layout, by hub id or folder; 'tiny' is TAESD3 or TAEF1. compile: have torch compile the
    blocks before that layer at the first picture.

    Raises UsageError for an unknown name or value, ModelUnavailable when files are missing.
    """
    if dtype not in (None, *DTYPES):
        raise UsageError(f'dtype is one of {", ".join(DTYPES)}; got {dtype}')
    from padseg.backbones.loading import load_family
    from padseg.backbones.source import locate, locate_vae

    source = locate(model, revision)
    other = locate_vae(vae, source.spec.family) if vae else None
    return load_family(family_of(source.spec), source, device, dtype, layer, whole, other, compile)


def family_of(spec: Spec) -> Family:
    """Return the module for the architecture that a spec names."""
    from padseg.backbones import flux, sd3

    families: dict[str, Family] = {'sd3': sd3, 'flux': flux}
    return families[spec.family]


def opened(model: Backbone | str, deepest: Callable[[Spec], int | None]) -> Backbone:
    """Return a loaded model as it is; load a named one up to block `deepest(spec)` (None: all of it) and keep it for the process."""
    if isinstance(model, Backbone):
        return model
    if not isinstance(model, str):
        raise UsageError(f'expected a loaded model or a model name (tiny, sd3, a hub id, a folder); got {type(model).__name__}')
    return kept(model, deepest(spec_of(model)))


@cache
def spec_of(model: str) -> Spec:
    """The facts of a named model."""
    from padseg.backbones.source import locate

    return locate(model).spec


@lru_cache(maxsize=2)
def kept(model: str, layer: int | None) -> Backbone:
    return load(model, layer=layer, whole=layer is None)
