"""What a step of fine-tuning is made from: a view of a picture, its masks, its prompt and its noise. All of it follows from a number.

Pictures are numbered over the whole training, so that a step is the same however many processes share it, and after a restart.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from padseg.backbones import Backbone
from padseg.errors import UnreadableLabels, UsageError
from padseg.images import ImageError
from padseg.methods.stages.latents import encode_pixels
from padseg.system.files import atomic
from padseg.system.text import warn
from padseg.train.alignment import columns_by_ids, columns_by_span
from padseg.train.annotated import Annotated, Example, View
from padseg.train.lora_settings import LoraSettings
from padseg.types import Array

ORDER, VIEW, CHANCE = range(3)  # kinds of random numbers, apart from each other
TRIES = 20  # pictures in a row that cannot be read before the training ends
KEPT_TEXTS = 64  # embeddings in memory, of a few megabytes each


class Worded(NamedTuple):
    """The prompt of a picture. columns: the text columns of each mask's class; empty if masks are matched, not named."""

    text: str
    columns: tuple[tuple[int, ...], ...] = ()


class Lesson(NamedTuple):
    """A picture as it is learned from. image: (3, S, S) in 0..1; masks: (M, H, W) bool; columns: as in Worded.

    embeds: (1, L, D), pooled: (1, E); level: index into the schedule's noise levels; noise: (C, h, w), standard normal; place: of its
    latents on disk, if they are kept.
    """

    image: Tensor
    masks: Tensor
    columns: tuple[tuple[int, ...], ...]
    embeds: Tensor
    pooled: Tensor
    level: int
    noise: Tensor
    place: Path | None


class Encoder(Protocol):
    """Turns a text into embeddings (1, L, D) and a pooled vector (1, E)."""

    def __call__(self, text: str) -> tuple[Tensor, Tensor]: ...


class Teacher:
    """Makes lessons from annotated pictures, by number. texts: the model's reader of texts, SD3's."""

    def __init__(self, data: Annotated, backbone: Backbone, texts: Any, settings: LoraSettings, latents: Path) -> None:
        self.data, self.backbone, self.texts, self.settings, self.latents = data, backbone, texts, settings, latents
        self.side = settings.side or backbone.spec.side
        joined = settings.matching == 'names'  # regions of one class
        self.view = View(self.side, settings.crop, settings.flip, settings.least_area, settings.most, joined)
        self.order = {name: place for place, name in enumerate(data.classes)}
        self.encode: Encoder = functools.lru_cache(KEPT_TEXTS)(functools.partial(texts.encode, encoders='l+g', unused='zeros'))
        self.levels = len(backbone.scheduler.timesteps)  # 1000: the loader sets no schedule of inference
        if self.side % backbone.multiple or self.side > backbone.limit:
            raise UsageError(f'side is a multiple of {backbone.multiple} up to {backbone.limit} for this model; got {self.side}')
        length = self.side * backbone.patch // backbone.multiple
        self.shape = (backbone.vae.config.latent_channels, length, length)

    def lesson(self, number: int) -> Lesson:
        """The lesson with this number, from 0: the same in every process and every run."""
        settings, epoch = self.settings, number // len(self.data)
        index = int(order_of(settings.seed, epoch, len(self.data))[number % len(self.data)])
        view = epoch % settings.views if settings.views else number
        index, example = self.example(index, view)
        chance = np.random.default_rng((settings.seed, CHANCE, number))
        words, (mean, deviation) = chance.random(), (settings.noise_mean, settings.noise_std)
        share = 1 / (1 + np.exp(-(mean + deviation * chance.standard_normal())))
        worded = Worded('') if words < settings.caption_dropout else self.worded(example)
        masks = example.masks
        if settings.matching == 'names':  # what has no columns is learned from no more, and is not counted
            shown = [place for place, columns in enumerate(worded.columns) if columns]
            masks, worded = masks[shown], worded._replace(columns=tuple(worded.columns[place] for place in shown))
        noise = chance.standard_normal(self.shape, dtype=np.float32)
        embeds, pooled = self.encode(worded.text)
        place = self.latents / f'{index}-{view}.safetensors' if settings.views else None
        level = min(int(share * self.levels), self.levels - 1)
        return Lesson(example.image, masks, worded.columns, embeds, pooled, level, torch.from_numpy(noise), place)

    def example(self, index: int, view: int) -> tuple[int, Example]:
        """A view of a picture and its index; of the next picture, with a warning, in place of one that cannot be read."""
        for tried in range(TRIES):
            at = (index + tried) % len(self.data)
            try:
                return at, self.data.example(at, np.random.default_rng((self.settings.seed, VIEW, at, view)), self.view)
            except (ImageError, UnreadableLabels) as error:
                if tried + 1 == TRIES:
                    raise
                warn(f'padseg: left out: {error}')
        raise AssertionError

    def worded(self, example: Example) -> Worded:
        """The prompt of an example: its caption or its class names in the order of the data set's classes, in lower case.

        A model whose text encoders know only some words gets the names that are made of these.
        """
        settings, known = self.settings, set(self.backbone.spec.words)
        if settings.prompt == 'none':
            return Worded('')
        if settings.prompt == 'captions' and example.caption and not known:
            return Worded(example.caption)
        names = sorted(set(example.names), key=lambda name: (self.order.get(name, len(self.order)), name))
        names = [name for name in names if not known or known.issuperset(name.lower().split())]
        text, spans = '', {}
        for name in names:
            text += ' ' if text else ''
            spans[name] = (len(text), len(text) + len(name))
            text += name.lower()
        if settings.matching != 'names' or not names:
            return Worded(text, ((),) * len(example.masks) if settings.matching == 'names' else ())
        found = dict(zip(names, self.columns_of(text, list(spans.values())), strict=True))
        return Worded(text, tuple(tuple(found.get(name, ())) for name in example.names))

    def columns_of(self, text: str, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
        """The text columns of the words at these places."""
        if self.settings.columns == 'exact':
            return columns_by_span(self.texts.tokens(text, 'l')['clip'], spans)
        tokenizer = self.texts.clip_tokenizers['tokenizer']  # of SD3's texts, the only ones here
        ids = [tokenizer(part, verbose=False).input_ids for part in (text, *(text[start:end] for start, end in spans))]
        return columns_by_ids(ids[0], [numbers[1:-1] for numbers in ids[1:]], self.backbone.spec.sequence)


@functools.lru_cache(2)
def order_of(seed: int, epoch: int, count: int) -> Array:
    """The order of all pictures in an epoch."""
    return np.random.default_rng((seed, ORDER, epoch)).permutation(count)


def ahead(teacher: Teacher, steps: Sequence[Sequence[int]]) -> Generator[list[Lesson], None, None]:
    """Yield the lessons of each step, made in a thread while the one before is learned from."""
    with ThreadPoolExecutor(1, 'lessons') as thread:
        try:
            waiting = [thread.submit(lambda numbers: [teacher.lesson(number) for number in numbers], numbers) for numbers in steps[:1]]
            for following in [*steps[1:], None]:
                lessons = waiting.pop().result()
                if following is not None:
                    waiting.append(thread.submit(lambda numbers: [teacher.lesson(number) for number in numbers], following))
                yield lessons
        finally:
            thread.shutdown(cancel_futures=True)


@torch.no_grad()
def latents_of(lessons: Sequence[Lesson], backbone: Backbone) -> Tensor:
    """Latents of the pictures, from disk where they are kept: (B, C, h, w) float32."""
    kept = [read_latents(lesson.place) if lesson.place else None for lesson in lessons]
    new = [lesson.image for lesson, latents in zip(lessons, kept, strict=True) if latents is None]
    made = iter(encode_pixels(torch.stack(new) * 2 - 1, backbone)) if new else iter(())
    latents = []
    for lesson, stored in zip(lessons, kept, strict=True):
        one = next(made) if stored is None else stored.to(backbone.device)
        if stored is None and lesson.place:
            with atomic(lesson.place) as temporary:
                save_file({'latents': one.cpu().contiguous()}, temporary)
        latents.append(one.float())
    return torch.stack(latents)


def read_latents(path: Path) -> Tensor | None:
    try:
        return load_file(path)['latents'] if path.is_file() else None
    except (OSError, SafetensorError, KeyError):
        return None
