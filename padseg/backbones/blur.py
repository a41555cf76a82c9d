"""Blur the attention from image to text along the text, inside fused attention (Seg4Diff, Sec. 4.3).

Blurring the columns of the attention A with a matrix K is the same as blurring the values the other way round: (A Kᵀ) V = A (Kᵀ V).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from padseg.backbones import Backbone
from padseg.types import Prompt


class Blur(NamedTuple):
    """What is blurred. layers: blocks, from 0; size, sigma: of the Gaussian, in tokens; pad: what is beyond the ends, 'reflect' (the end
    token is not repeated) or 'symmetric' (it is); renorm: whether each image token keeps the share of its attention that text has; slots:
    how many text columns, from the first, None for CLIP's of SD3, T5's and CLIP's of other models without the pads that are masked."""

    layers: tuple[int, ...]
    size: int = 5
    sigma: float = 9.0
    pad: str = 'reflect'
    renorm: bool = False
    slots: int | None = None


@contextmanager
def blurred(backbone: Backbone, blur: Blur, prompt: Prompt, image_tokens: int, rows: slice | None = None) -> Iterator[None]:
    """Inside the block, blur the attention of these layers. Attention of text tokens, and what recorders see of values, stays as it is.

    prompt: of the call, for its number of columns; image_tokens: of latents, for joint attention; rows: of the call's batch, by default all.
    """
    yield
