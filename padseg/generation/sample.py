"""Make pictures from texts: the plain loop of denoising, with diffusers' schedulers, for models of every family.

Read it from `sample` down. A guide decides what is predicted at a step from the model's predictions for several prompts (guidance.py,
scfg.py); `around` lets a caller look into the model while it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from padseg.backbones import Backbone, load
from padseg.backbones.cpu_attention import by_rows
from padseg.backbones.cpu_norm import exact_norms
from padseg.backbones.latent_scale import unscaled
from padseg.backbones.texts import Texts as Encoders, texts_of
from padseg.backbones.unet import empty_is_zeros
from padseg.errors import NotFinite, UsageError
from padseg.generation.settings import SamplingSettings
from padseg.types import Image, Prompt, Tokens

KEPT_TEXTS = 16  # embeddings in memory, of a few megabytes each


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A whole model, VAE's decoder included, and what encodes texts for it. kept: the latest encoded texts."""

    backbone: Backbone
    encoders: Encoders
    kept: dict[str, Prompt] = dataclasses.field(default_factory=dict)


class Call(NamedTuple):
    """A step of the loop. number: from 0, the noisiest, to of - 1; timestep: the model's time input; z: (B, C, h, w) latents as the model
    takes them, float32."""

    number: int
    of: int
    timestep: float
    z: Tensor


class Texts(NamedTuple):
    """What guides a batch of B pictures. empty: the empty prompt, of one row; text: the prompts, embeds (B, L, D), pooled (B, E), mask
    (B, L) or None; tokens: of every picture's prompt, by tokenizer (`clip`, `t5`), as in `backbones.texts`, or () if not asked for."""

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
    backbone = sampler.backbone
    check_size(backbone, settings.size)
    texts = encode(sampler, prompts, settings, with_tokens)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cells = settings.size * backbone.patch // backbone.multiple
    scheduler = backbone.schedule(settings.steps, (cells // backbone.patch) ** 2)
    z = first_noise(backbone, cells, generators) * getattr(scheduler, 'init_noise_sigma', 1.0)
    added = {'generator': generators} if 'generator' in inspect.signature(scheduler.step).parameters else {}
    with by_rows(), exact_norms():
        for number, timestep in enumerate(scheduler.timesteps):
            taken = scheduler.scale_model_input(z, timestep) if hasattr(scheduler, 'scale_model_input') else z
            call = Call(number, len(scheduler.timesteps), float(timestep), taken)
            guided = guide(partial(predict, backbone, around), call, texts)
            z = scheduler.step(guided, timestep, z, **added, return_dict=False)[0]
            if seen:
                seen(call, z)
    return decode(backbone, z)


def predict(backbone: Backbone, around: Around, prompts: Sequence[Prompt], call: Call) -> list[Tensor]:
    """Run the model once for all prompts; see `Predict`."""
    count = len(call.z)
    with around(call):
        found = backbone.denoise(call.z.repeat(len(prompts), 1, 1, 1), call.timestep, joined(prompts, count))
    return list(found.float().split(count))


def joined(prompts: Sequence[Prompt], count: int) -> Prompt:
    """One prompt with `count` rows of each of several."""
    embeds, pooled = (torch.cat([part.expand(count, *part.shape[1:]) for part in parts]) for parts in list(zip(*prompts, strict=True))[:2])
    masks = [prompt.mask.expand(count, -1) for prompt in prompts if prompt.mask is not None]
    return Prompt(embeds, pooled, (), (), mask=torch.cat(masks) if masks else None)


def first_noise(backbone: Backbone, cells: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise of every picture's own generator: (B, C, cells, cells) float32."""
    channels = backbone.family.size(backbone.transformer.config).channels
    return torch.cat([torch.randn((1, channels, cells, cells), generator=one) for one in generators]).to(backbone.device)


def check_size(backbone: Backbone, size: int) -> None:
    """Raise UsageError for a side in pixels that the model cannot make."""
    if size % backbone.multiple or not size <= backbone.limit:
        model, multiple = backbone.identity.model, backbone.multiple
        raise UsageError(f'{model} makes pictures of a multiple of {multiple} pixels, up to {backbone.limit}; got {size}')


def encode(sampler: Sampler, prompts: Sequence[str], settings: SamplingSettings, with_tokens: bool = True) -> Texts:
    """Encode a batch's prompts. UsageError, with tokens, for a text that a model's tokenizers cut differently."""
    encoders = sampler.encoders
    rows = [encoded(sampler, text, settings) for text in prompts]
    text = joined(rows, 1)
    tokens = tuple(encoders.tokens(text, settings.encoders) for text in prompts) if with_tokens else ()
    return Texts(empty_prompt(sampler, settings), text, tokens)


def empty_prompt(sampler: Sampler, settings: SamplingSettings) -> Prompt:
    """The prompt that guidance leads away from, as in the model's own pipeline: the empty one, and zeros for SDXL."""
    backbone, empty = sampler.backbone, encoded(sampler, '', settings)
    if backbone.spec.family == 'unet' and empty_is_zeros(Path(backbone.identity.folder), backbone.transformer):
        return empty._replace(embeds=torch.zeros_like(empty.embeds), pooled=torch.zeros_like(empty.pooled))
    return empty


def encoded(sampler: Sampler, text: str, settings: SamplingSettings) -> Prompt:
    """Encode a text, or take it from the latest ones; what does not fit is cut off, as by the model's own pipeline: one row."""
    encoders, kept, key = sampler.encoders, sampler.kept, f'{settings.encoders} {text}'
    if key not in kept:
        while len(kept) >= KEPT_TEXTS:
            del kept[next(iter(kept))]
        embeds, pooled = encoders.encode(text, settings.encoders, 'zeros')
        kept[key] = Prompt(embeds, pooled, (), (), mask=encoders.mask(text))
    return kept[key]


@torch.no_grad()
def decode(backbone: Backbone, z: Tensor) -> list[Image]:
    """Decode clean latents (B, C, h, w), one at a time: (H, W, 3) RGB. NotFinite if numbers overflow."""
    images = []
    z = unscaled(backbone.vae, z)
    for one in z.to(backbone.vae.dtype).split(1):
        with by_rows(), exact_norms():
            pixels = backbone.vae.decode(one.contiguous(memory_format=torch.channels_last), return_dict=False)[0].float()
        if not pixels.isfinite().all():
            raise NotFinite(f'the picture overflowed in {str(backbone.dtype).removeprefix("torch.")}: try --dtype bfloat16 or float32')
        images.append((pixels[0] / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy())
    return images
