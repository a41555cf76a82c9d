"""What the module of each model family provides: everything that differs between architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from padseg.backbones.layout import FamilyLayout
from padseg.backbones.noise import NoiseLevel
from padseg.backbones.source import Source
from padseg.types import Prompt, TextToken


class Dimensions(NamedTuple):
    """What a transformer takes. channels: of a latent; patch: latent cells along a side of an image token; limit: tokens along a side."""

    channels: int
    patch: int
    limit: int


def padded(template: Sequence[str], slots: int) -> list[TextToken]:
    """The tokens of an empty prompt whose template is followed by pads up to `slots`; pads have the numbers of their slots, from 0."""
    pads = [TextToken(f'<pad {number}>', 'pad') for number in range(len(template), slots)]
    return [*(TextToken(name, 'template') for name in template), *pads]


class Family(Protocol):
    """A module such as backbones/sd3.py. Layers count all blocks in the order in which they run."""

    LAYOUT: FamilyLayout
    TEXT_DTYPE: torch.dtype  # of the text encoders, which always run on the CPU: their output is a constant of the model

    def size(self, config: Any) -> Dimensions:
        """Read the dimensions from the transformer's configuration."""

    def blocks(self, transformer: Any) -> Sequence[nn.Module]:
        """All transformer blocks, in layer order."""

    @property
    def cut(self) -> Callable[[Any, int], None] | None:
        """Function that keeps blocks 0..layer of a transformer, and of the last one only what its queries and keys need.

        None if models of this family are always loaded whole.
        """

    def schedule(self, scheduler: Any, steps: int, image_tokens: int) -> Any:
        """A copy of the scheduler, set to the pipeline's schedule for `steps` steps and `image_tokens` tokens."""

    def noise_level(self, scheduler: Any, steps: int, step: int, image_tokens: int) -> NoiseLevel:
        """Noise level of the step-th step from the end of the pipeline's schedule for `steps` steps and `image_tokens` tokens.

        Does not change the scheduler. Raises ValueError for a step outside the schedule.
        """

    def tokenizers(self, source: Source) -> dict[str, Any]:
        """Load the tokenizers, keyed by folder. Raises ModelUnavailable if one cannot be used."""

    def needs_exact_vae(self, config: Mapping[str, Any]) -> bool:
        """Whether the VAE of a model with this configuration of its transformer runs in float32, because it overflows in 16 bits."""

    def prompt_shapes(self, slots: int, config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of a prompt's tensors: `embeds`, `pooled`, and `mask` if pads are masked."""

    def compute_null_prompt(self, source: Source, transformer: Any, slots: int) -> dict[str, Tensor]:
        """Encode the empty prompt with the text encoders: the tensors of `prompt_shapes`, float32."""

    def null_tokens(self, slots: int) -> Sequence[TextToken]:
        """The null prompt's picked tokens, which are the first ones."""

    def attention_module(self, transformer: Any, layer: int) -> nn.Module:
        """Return the attention of a block in which image queries meet text keys: the joint one, or the cross-attention."""

    def self_attention_module(self, transformer: Any, layer: int) -> nn.Module:
        """Return the attention of a block in which image queries meet image keys: the joint one again, or the self-attention."""

    def output_projection(self, transformer: Any, layer: int) -> tuple[Tensor, Tensor | None] | None:
        """Weight (C, C), output channels first, and bias (C,) that follow the text attention for image tokens; None if there are none."""

    def layer_names(self, transformer: Any) -> list[str]:
        """Names of all blocks as in the GoCA paper's code, in layer order."""

    def grid(self, transformer: Any, layer: int, latent_shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of a block's image tokens for latents of this shape, (..., H', W')."""

    def text_columns(self, picked: Sequence[int], image_tokens: int) -> list[int]:
        """Positions of text tokens among the keys."""

    def first_image_token(self, prompt: Prompt) -> int:
        """Position of the first image token among the queries."""

    def denoise(self, transformer: Any, z: Tensor, timestep: float, prompt: Prompt, guidance: float | None = None) -> Tensor:
        """Run one forward pass: (B, C, H', W') -> the same shape.

        guidance: strength that a model which was distilled for one is told, by default its pipeline's; of no effect on others.
        """
