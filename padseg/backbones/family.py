"""What a module for a family of models provides: all that differs between architectures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from padseg.backbones.layout import FamilyLayout
from padseg.backbones.noise import NoiseLevel
from padseg.backbones.source import Source
from padseg.types import Prompt


class Dimensions(NamedTuple):
    """What a transformer takes. channels: of a latent; patch: latent cells along a side of an image token; limit: tokens along a side."""

    channels: int
    patch: int
    limit: int


class Family(Protocol):
    """A module such as backbones/sd3.py. Layers are counted over all blocks in the order in which they run."""

    LAYOUT: FamilyLayout
    TEXT_DTYPE: torch.dtype  # of the text encoders, which always run on the CPU: what they give is a constant of the model

    def size(self, config: Any) -> Dimensions:
        """The dimensions from the configuration of the transformer."""

    def blocks(self, transformer: Any) -> Sequence[nn.Module]:
        """All transformer blocks, in the order of layers."""

    @property
    def cut(self) -> Callable[[Any, int], None] | None:
        """Leaves the blocks 0..layer of a transformer, of the last of them only what its queries and keys need: there the forward stops.

        None where models of this family are always read whole.
        """

    def noise_level(self, scheduler: Any, steps: int, step: int, image_tokens: int) -> NoiseLevel:
        """Of the step-th step from the end of the schedule that the model's pipeline has for so many steps and tokens.

        The scheduler stays as it is. ValueError for a step that the schedule does not have.
        """

    def tokenizers(self, source: Source) -> dict[str, Any]:
        """The tokenizers by the names of their folders. Raises ModelUnavailable if one cannot be used."""

    def prompt_shapes(self, slots: int, config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a prompt, `embeds` and `pooled`."""

    def compute_null_prompt(self, source: Source, transformer: Any, slots: int) -> dict[str, Tensor]:
        """The empty prompt by the text encoders: `embeds` (1, L, D) and `pooled` (1, E), float32."""

    def null_names(self, slots: int) -> Sequence[str]:
        """Words for its tokens, as many as are picked: the first ones."""

    def attention_module(self, transformer: Any, layer: int) -> nn.Module:
        """The attention of a block, in which image and text tokens meet."""

    def text_columns(self, picked: Sequence[int], image_tokens: int) -> list[int]:
        """Where text tokens stand among the keys."""

    def first_image_token(self, prompt: Prompt) -> int:
        """Where image tokens begin among the queries."""

    def denoise(self, transformer: Any, z: Tensor, timestep: float, prompt: Prompt) -> Tensor:
        """One forward: (B, C, H', W') -> the same shape."""
