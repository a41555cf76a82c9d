"""Load models by name, and provide what the methods need from a loaded model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from padseg.backbones.spec import FAMILY_FACTS, Spec
from padseg.errors import UsageError
from padseg.system.libraries import imported
from padseg.types import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from padseg.backbones.family import Family
    from padseg.backbones.noise import NoiseLevel
    from padseg.backbones.recorder import What

DTYPES = ('float32', 'bfloat16', 'float16')
QUANTIZED = ('int8', 'fp8')  # forms of weights in 8 bits


class Identity(NamedTuple):
    """Which model this is. folder: where its files are; revision: commit of a hub model.

    All that decides its results, as SHA-256 of contents, names included: weights, over the files of transformer and VAE, with their
    configurations; scheduler, over its configuration and the number of steps; text_encoders, over text encoders and tokenizers whose
    embeddings are used, and the number of slots; lora, over the LoRA that was added to the weights with the strength lora_scale; None
    without one.
    """

    model: str
    folder: str
    revision: str | None
    weights: str
    scheduler: str
    text_encoders: str
    lora: str | None = None
    lora_scale: float | None = None

    def recorded(self) -> dict[str, Any]:
        """The fields for a record: those of a LoRA only if there is one."""
        facts = self._asdict()
        return facts if self.lora else {name: value for name, value in facts.items() if name not in ('lora', 'lora_scale')}


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A loaded model. null_prompt: the empty prompt, a constant of the model.

    layers: the number of transformer blocks loaded; of the last one only queries and keys, unless `whole`. patch: latent cells along a side
    of an image token; multiple: pixels along it; limit: the longest side the model takes, in pixels. compiled: the number of leading blocks
    that are compiled; their attention cannot be read. quantize: form of the weights of the transformer's linear layers, one of QUANTIZED.
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
    quantize: str | None = None

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def attention_module(self, layer: int, what: Sequence[What] = ('queries', 'keys')) -> nn.Module:
        """Return the attention from image to text of a block. Raises UsageError if `what` was not loaded or the block is compiled."""
        self.check_layer(layer, what)
        return self.family.attention_module(self.transformer, layer)

    def self_attention_module(self, layer: int, what: Sequence[What] = ('queries', 'keys')) -> nn.Module:
        """Return the attention from image to image of a block, with joint attention the same module. UsageError as above."""
        self.check_layer(layer, what)
        return self.family.self_attention_module(self.transformer, layer)

    def output_projection(self, layer: int) -> tuple[Tensor, Tensor | None] | None:
        """Weight (C, C), output channels first, and bias (C,) that follow `attention_module` for image tokens. UsageError as above."""
        self.check_layer(layer, ('output',))
        return plain(self.family.output_projection(self.transformer, layer))

    def self_output_projection(self, layer: int) -> tuple[Tensor, Tensor | None] | None:
        """The same of `self_attention_module`."""
        module: Any = self.self_attention_module(layer, ('output',))
        if module is self.attention_module(layer):
            return self.output_projection(layer)
        return plain((module.to_out[0].weight, module.to_out[0].bias))

    def layer_names(self) -> list[str]:
        """Names of all loaded blocks in layer order, such as `up-level2-repeat1-vit-block0` or `vit-block13`."""
        return self.family.layer_names(self.transformer)

    def grid(self, layer: int, latent_shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of a block's image tokens for latents of this shape, (..., H', W')."""
        return self.family.grid(self.transformer, layer, latent_shape)

    def check_layer(self, layer: int, what: Sequence[What] = ('queries', 'keys')) -> None:
        """Raise UsageError if `what` of a block was not loaded, or the block is compiled."""
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

    def text_columns(self, prompt: Prompt, image_tokens: int) -> list[int]:
        """Positions of the prompt's picked tokens among the keys."""
        return self.family.text_columns(prompt.picked, image_tokens)

    def first_image_token(self, prompt: Prompt) -> int:
        """Position of the first image token among the queries."""
        return self.family.first_image_token(prompt)

    def noise_level(self, step: int, image_tokens: int, steps: int | None = None) -> NoiseLevel:
        """Noise level of the step-th step from the end of the model's schedule; step 1 has the least noise. ValueError if there is none.

        steps: length of the schedule, by default the model's own.
        """
        return self.family.noise_level(self.scheduler, steps or self.spec.steps, step, image_tokens)

    def schedule(self, steps: int, image_tokens: int) -> Any:
        """A scheduler of diffusers that is set to the pipeline's schedule for so many steps; the model's own stays as it is."""
        return self.family.schedule(self.scheduler, steps, image_tokens)

    def denoise(self, z: Tensor, timestep: float, prompt: Prompt, guidance: float | None = None) -> Tensor:
        """Run the model on noised latents with a prompt: (B, C, H', W') -> the same shape. guidance: as in `Family.denoise`."""
        return self.family.denoise(self.transformer, z, timestep, prompt, guidance)


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
    lora: str | os.PathLike[str] | None = None,
    lora_scale: float = 1.0,
    quantize: str | None = None,
) -> Backbone:
    """Load a model by name (one of `padseg models`), hub id (`org/name` or `org/name@revision`) or folder in diffusers' layout.

    device: 'cpu', 'cuda', 'mps', ...; by default a GPU if there is one. dtype: float32, bfloat16 or float16; by default float32, but for
    models of more than a gigabyte float16 on a GPU and bfloat16 on a CPU with native support for it. layer: the last block whose token maps
    are wanted, by default the model's expert block; later blocks and the VAE's decoder are not loaded unless `whole` is true. vae: another
    VAE for the same latents, in AutoencoderTiny's layout, by hub id or folder; 'tiny' is TAESD, TAESDXL, TAESD3 or TAEF1. compile: have
    torch compile the blocks before that layer at the first picture. lora: a LoRA for the transformer in diffusers' layout, a safetensors
    file or a folder with one, which is added to the weights; lora_scale: its strength, 1 as it was trained. quantize: keep the weights of
    the transformer's linear layers in 8 bits, as 'int8' or 'fp8', which needs torchao.

    Raises UsageError for an unknown name or value, ModelUnavailable when files are missing.
    """
    check_quantize(quantize, compile, lora)
    if dtype not in (None, *DTYPES):
        raise UsageError(f'dtype is one of {", ".join(DTYPES)}; got {dtype}')
    imported('padseg.backbones.loading')
    from padseg.backbones.loading import load_family
    from padseg.backbones.source import locate, locate_vae

    added = lora_named(lora, lora_scale)  # before gigabytes are downloaded for nothing
    source = locate(model, revision)
    other = locate_vae(vae, source) if vae else None
    return load_family(family_of(source.spec), source, device, dtype, layer, whole, other, compile, added, lora_scale, quantize)


def check_quantize(quantize: str | None, compile: bool, lora: object) -> None:
    """Raise UsageError for an unknown form of weights, and for what does not go with one."""
    if quantize not in (None, *QUANTIZED):
        raise UsageError(f'quantize is one of {", ".join(QUANTIZED)}; got {quantize}')
    if quantize and (compile or lora is not None):
        raise UsageError(f'--quantize cannot be used with {"--compile" if compile else "--lora"}')


def plain(projection: tuple[Tensor, Tensor | None] | None) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias, in floating point if the weight is kept in 8 bits."""
    from padseg.backbones.quantized import plain_weight

    return (plain_weight(projection[0]), projection[1]) if projection else None


def identity(
    model: str,
    *,
    revision: str | None = None,
    vae: str | None = None,
    lora: str | os.PathLike[str] | None = None,
    lora_scale: float = 1.0,
) -> Identity:
    """Which model `load` would load with the same arguments: its files are read, but nothing is loaded. Nothing is downloaded.

    Raises UsageError for an unknown name or value, ModelUnavailable when files are missing.
    """
    imported('padseg.backbones.loading')
    from padseg.backbones.loading import identify
    from padseg.backbones.source import locate, locate_vae

    added = lora_named(lora, lora_scale)
    source = locate(model, revision, fetch=False)
    other = locate_vae(vae, source, fetch=False) if vae else None
    return identify(family_of(source.spec), source, other, added, lora_scale)


def lora_named(lora: str | os.PathLike[str] | None, scale: float) -> str | None:
    """The path of a LoRA. Raises UsageError for a path without one, and for a scale without a LoRA."""
    from padseg.backbones.lora_file import locate_lora

    if lora is not None:
        locate_lora(lora)
    elif scale != 1:
        raise UsageError(f'lora_scale is the strength of a LoRA, and there is none; got {scale}')
    return None if lora is None else os.fspath(lora)


def family_of(spec: Spec) -> Family:
    """Return the module for the architecture that a spec names, such as flux or sd3."""
    assert spec.family in FAMILY_FACTS
    return cast('Family', imported(f'padseg.backbones.{spec.family}'))


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
