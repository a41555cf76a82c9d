"""Make pictures from texts: the plain loop of denoising, with diffusers' schedulers, for models of every family.

Read it from `sample` down. A guide decides what is predicted at a step from the model's predictions for several prompts (guidance.py,
scfg.py); `around` lets a caller look into the model while it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from padseg.backbones import Backbone, load
from padseg.backbones.configuration import read_json
from padseg.backbones.texts import Texts as Encoders
from padseg.backbones.texts import texts_of
from padseg.errors import NotFinite, UsageError
from padseg.generation.settings import SamplingSettings
from padseg.types import Image, Prompt, Tokens

KEPT_TEXTS = 16  # embeddings in memory, of a few megabytes each


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A whole model, VAE's decoder included, and what encodes texts for it. kept: the latest embeddings by text."""

    backbone: Backbone
    encoders: Encoders
    kept: dict[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)


class Call(NamedTuple):
    """A step of the loop. number: from 0, the noisiest, to of - 1; timestep: the model's time input; z: (B, C, h, w) latents as the model
    takes them, float32."""

    number: int
    of: int
    timestep: float
    z: Tensor


class Texts(NamedTuple):
    """What guides a batch of B pictures. empty: the empty prompt, of one row; text: the prompts, of B rows: embeds (B, L, D), pooled (B, E),
    mask (B, L) or None; tokens: of every picture's prompt, by tokenizer (`clip`, `t5`), as in `backbones.texts`, or () if not asked for."""

    empty: Prompt
    text: Prompt
    tokens: tuple[dict[str, Tokens], ...] = ()


Predict = Callable[[Sequence[Prompt], Call], list[Tensor]]
"""Predictions for several prompts from one batched call of the model: [(B, C, h, w), ...] float32. Prompt k is in rows kB..(k+1)B."""

Guide = Callable[[Predict, Call, Texts], Tensor]
"""What is predicted at a step, (B, C, h, w) float32. It calls Predict once."""

Around = Callable[[Call], AbstractContextManager[Any]]
"""A context that the model is called in at a step, inside every other one: what it records is what the model really computed."""


def open_sampler(
    model: str = 'tiny',
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    vae: str | None = None,
    lora: str | os.PathLike[str] | None = None,
    lora_scale: float = 1.0,
    keep_texts: bool = False,
) -> Sampler:
    """Load all of a model for making pictures; arguments and errors as for `padseg.load`. keep_texts: keep embeddings in padseg's cache."""
    backbone = load(model, revision=revision, device=device, dtype=dtype, whole=True, vae=vae, lora=lora, lora_scale=lora_scale)
    return sampler_of(backbone, keep_texts)


def sampler_of(backbone: Backbone, keep_texts: bool = False) -> Sampler:
    """Make pictures with a model that was loaded with `whole=True`. UsageError for one that was not."""
    if not backbone.whole or getattr(backbone.vae, 'decoder', None) is None:
        raise UsageError(f'{backbone.identity.model} was loaded in part: load(whole=True) loads what makes pictures')
    return Sampler(backbone, texts_of(backbone, keep_texts))


def nothing(call: Call) -> AbstractContextManager[None]:
    """The usual `around`."""
    return contextlib.nullcontext()


@torch.no_grad()
def sample(
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    guide: Guide,
    around: Around = nothing,
    with_tokens: bool = True,
    seen: Callable[[Call, Tensor], None] | None = None,
) -> list[Image]:
    """Make a picture from each prompt and its seed, all in one batch: (size, size, 3) RGB.

    The first noise, and any that a scheduler adds later, comes from a generator of the picture's seed on the CPU: it depends on nothing
    else. settings: resolved. around: a context that the model is called in at each step. with_tokens: whether the guide reads
    `Texts.tokens`. seen: called after each step with the latents (B, C, h, w). Raises UsageError for settings that do not fit the model, or
    a text whose tokens cannot be told; NotFinite if numbers overflow.
    """
    raise NotImplementedError


def encode(sampler: Sampler, prompts: Sequence[str], settings: SamplingSettings, with_tokens: bool = True) -> Texts:
    """Encode a batch's prompts. UsageError, with tokens, for a text that a model's tokenizers cut differently."""
    raise NotImplementedError


def decode(backbone: Backbone, z: Tensor) -> list[Image]:
    """Decode clean latents (B, C, h, w), one at a time: (H, W, 3) RGB. NotFinite if numbers overflow."""
    raise NotImplementedError
