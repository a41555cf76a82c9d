"""Where an analysis reads attention: in one forward pass on each picture and noise level, or in the loop that makes pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from padseg.analysis.blocks import every_block, grid_of, shown_classes
from padseg.backbones import Backbone
from padseg.backbones.recorder import QUERIES_AND_KEYS, What, requests_of, watch
from padseg.backbones.texts import Texts, kept_texts
from padseg.datasets.own import label_folder
from padseg.errors import NoImages, UsageError
from padseg.generation.guidance import guide_of
from padseg.generation.prompts import Item
from padseg.generation.sample import Call, Sampler, sample
from padseg.generation.settings import SamplingSettings
from padseg.images import ImageError, Reading, decode_apart, find
from padseg.methods.options import ViewOptions
from padseg.methods.stages.latents import encode_steps
from padseg.methods.stages.prompts import worded
from padseg.system.progress import Progress
from padseg.types import Array, Attention, Frame, Image, Prompt, Tokens

T = TypeVar('T')


class Subject(NamedTuple):
    """A picture (H, W, 3) to analyse. text: what the model is given; truth: (H, W) regions or class indices from 0, None without labels."""

    name: str
    image: Image
    text: str
    truth: Array | None = None


class Text(NamedTuple):
    """An encoded text. prompt: all its slots are picked; tokens: of each tokenizer that has columns."""

    text: str
    prompt: Prompt
    tokens: Mapping[str, Tokens]


class Sight(NamedTuple):
    """A forward pass in which attention is read.

    name: of the picture; step: counted from the end of the schedule, from 1; text: what the model was given; grid: rows and columns of
    image tokens; sets: positions among the keys of each set of tokens, see `token_sets`; frame: the part of the picture that is seen;
    image, truth: as in `Subject`. `read` gets the last three as None for pictures that are being made.
    """

    name: str
    step: int
    text: Text
    grid: tuple[int, int]
    sets: Mapping[str, Sequence[int]]
    frame: Frame | None = None
    image: Image | None = None
    truth: Array | None = None


class Source(Protocol):
    """Yields, for every picture and step, what `read` makes of the attention of each block, in layer order."""

    def __call__(self, read: Callable[[Attention, Sight], T], what: tuple[What, ...] = ...) -> Iterator[tuple[Sight, list[T]]]: ...


def text_of(texts: Texts, text: str, encoders: str) -> Text:
    """Encode a text. What has no room is cut off, as in the pipelines."""
    tokens = {kind: cut(found) for kind, found in texts.tokens(text, encoders).items()}
    return Text(text, encoded(texts, text, encoders), tokens)


def encoded(texts: Texts, text: str, encoders: str) -> Prompt:
    embeds, pooled = texts.encode(text, encoders, 'zeros')
    slots = range(embeds.shape[1])
    return Prompt(embeds, pooled, tuple(slots), tuple(map(str, slots)), mask=texts.mask(text))


def cut(tokens: Tokens) -> Tokens:
    """Tokens that fit into the slots: of a longer text, the last slot has the end token."""
    if len(tokens.spans) <= tokens.slots:
        return tokens
    keep = tokens.slots - 1
    blanks = tuple(place for place in tokens.blanks if place < keep)
    return tokens._replace(spans=(*tokens.spans[:keep], tokens.spans[-1]), strange=(*tokens.strange[:keep], True), blanks=blanks)


def token_sets(backbone: Backbone, text: Text, image_tokens: int) -> dict[str, list[int]]:
    """Positions among the keys of sets of tokens, some of them empty.

    image: the image tokens; text: all text slots, and of these: clip, t5: the slots of that tokenizer; empty: slots that no text encoder
    fills, T5's in SD3 without T5; prompt: tokens of the text itself, without start, end and pads; sos: CLIP's start token. others, if there
    are any: those of neither image nor text, such as AuraFlow's registers.
    """
    start, slots = backbone.first_image_token(text.prompt), text.prompt.embeds.shape[1]

    def among_keys(columns: Sequence[int]) -> list[int]:
        return backbone.text_columns(text.prompt._replace(picked=tuple(columns)), image_tokens)

    filled = {kind: list(range(tokens.first, min(tokens.first + tokens.slots, slots))) for kind, tokens in text.tokens.items()}
    known = {column for columns in filled.values() for column in columns}
    own = [
        tokens.first + place
        for tokens in text.tokens.values()
        for place, (begin, end) in enumerate(tokens.spans)
        if begin < end or place in tokens.blanks
    ]
    image, words = list(range(start, start + image_tokens)), among_keys(range(slots))
    others = sorted({*range(max(*image, *words))}.difference(image, words))
    return {
        'image': image,
        'text': words,
        **{kind: among_keys(filled.get(kind, ())) for kind in ('clip', 't5')},
        'empty': among_keys([column for column in range(slots) if column not in known]),
        'prompt': among_keys(own),
        'sos': among_keys([text.tokens['clip'].first] if 'clip' in text.tokens else ()),
        **({'others': others} if others else {}),
    }


def subjects(images: Path, labels: Path | None, classes: Sequence[str], text: str | None, count: int) -> list[Subject]:
    """The first `count` pictures of a folder by name, each with its text: `text`, or else the names of the classes that it shows.

    With labels only pictures that have some. Raises NoImages if there are none, UsageError for classes without labels.
    """
    if classes and labels is None:
        raise UsageError('names of classes need the labels that they name')
    found = find(images)
    files = {file.path.stem: file.path for file in reversed(found)}
    truths: dict[str, Any] = {}
    if labels is not None:
        dataset = label_folder(labels, None, pictures=files)
        truths = {sample.name: sample for sample in dataset.samples if sample.name in files}
        found = [file for file in found if file.path.stem in truths]
    if not found:
        raise NoImages(f'no picture in {images} has labels in {labels}' if labels else f'there are no pictures in {images}')
    made = []
    for file in found[:count]:
        truth = dataset.read(truths[file.path.stem])[0] if labels is not None else None
        said = text if text is not None else named(truth, classes)
        made.append(Subject(file.name, read_picture(file.path), said, truth))
    return made


def read_picture(path: Path) -> Image:
    """Read a picture, (H, W, 3). ImageError, which names it, if that fails."""
    try:
        return decode_apart(path, Reading()).image
    except ImageError as error:
        raise ImageError(f'{path}: {error}') from error
    except OSError as error:
        raise ImageError(f'{path}: {error.strerror}') from error


def named(truth: Array | None, classes: Sequence[str]) -> str:
    """The names of the classes that a picture shows, joined by spaces as in Seg4Diff, Sec. 4.3; else the empty text."""
    if truth is None or not classes:
        return ''
    return worded([classes[number] for number in shown_classes(truth, classes)], 'joined').text


def of_sight(read: Callable[[Attention, Sight], T], sight: Sight, seen: Attention) -> T:
    return read(seen, sight)


class Pictures(NamedTuple):
    """A source: real pictures with noise at some steps, one forward pass for each picture and step. Steps count from the end, from 1."""

    subjects: Sequence[Subject]
    backbone: Backbone
    options: ViewOptions
    steps: Sequence[int]
    progress: Progress

    def __call__(self, read: Callable[[Attention, Sight], T], what: tuple[What, ...] = QUERIES_AND_KEYS) -> Iterator[tuple[Sight, list[T]]]:
        self.progress.start(len(self.subjects))
        for subject in self.subjects:
            text = text_of(kept_texts(self.backbone, True), subject.text, self.backbone.spec.encoders)
            latents = encode_steps(subject.image, self.backbone, self.options, self.steps)
            for step, latent in zip(self.steps, latents, strict=True):
                grid = grid_of(latent, self.backbone)
                sets = token_sets(self.backbone, text, grid[0] * grid[1])
                sight = Sight(subject.name, step, text, grid, sets, latent.frame, subject.image, subject.truth)
                yield sight, every_block(latent, self.backbone, text.prompt, partial(of_sight, read, sight), what)
            self.progress.step()
        self.progress.close()


class Made(NamedTuple):
    """A source: pictures in the making, read inside the loop at some steps, where the model gets the prompt itself. settings: resolved."""

    items: Sequence[Item]
    sampler: Sampler
    settings: SamplingSettings
    steps: Sequence[int]
    progress: Progress

    def __call__(self, read: Callable[[Attention, Sight], T], what: tuple[What, ...] = QUERIES_AND_KEYS) -> Iterator[tuple[Sight, list[T]]]:
        backbone, settings = self.sampler.backbone, self.settings
        if max(self.steps) > settings.steps:
            raise UsageError(f'steps are in 1..{settings.steps}, the number of steps of denoising; got {max(self.steps)}')
        guide = guide_of(backbone, settings)
        self.progress.start(len(self.items))
        for item in self.items:
            text = text_of(self.sampler.encoders, item.prompt, settings.encoders)
            found: list[tuple[Sight, list[T]]] = []
            around = partial(recorded, backbone, item.name, text, self.steps, read, what, found)
            (picture,) = sample(self.sampler, [item.prompt], [item.seed], settings, guide, around)
            size = picture.shape[0], picture.shape[1]
            for sight, blocks in sorted(found, key=lambda one: self.steps.index(one[0].step)):  # the loop runs the other way round
                yield sight._replace(frame=Frame(size, (0, 0, *size)), image=picture), blocks
            self.progress.step()
        self.progress.close()


@contextmanager
def recorded(
    backbone: Backbone,
    name: str,
    text: Text,
    steps: Sequence[int],
    read: Callable[[Attention, Sight], T],
    what: tuple[What, ...],
    found: list[tuple[Sight, list[T]]],
    call: Call,
) -> Iterator[None]:
    """Record the attention of every block in a call of the model for one picture, if its step is wanted, and add it to `found`.

    The last row of the call's batch is that of the prompt, with classifier-free guidance and without.
    """
    step = call.of - call.number
    if step not in steps:
        yield
        return
    height, width = call.z.shape[2:]
    grid = height // backbone.patch, width // backbone.patch
    sight = Sight(name, step, text, grid, token_sets(backbone, text, grid[0] * grid[1]))
    layers = range(backbone.layers)
    with watch(requests_of(backbone, layers, lambda seen: read(last_row(seen), sight), what), stop=False) as kept:
        yield
    found.append((sight, [kept[layer] for layer in layers]))


def last_row(seen: Attention) -> Attention:
    """The attention of the last picture of a batch."""
    mask = seen.mask if seen.mask is None or seen.mask.ndim < 4 else seen.mask[-1:]
    value, output = (None if part is None else part[-1:] for part in (seen.value, seen.output))
    return Attention(seen.query[-1:], seen.key[-1:], value, mask, output)


def over_pictures(readings: Sequence[tuple[Sight, Array]]) -> tuple[Array, Array]:
    """Mean and standard deviation over pictures, step by step in order of first appearance: (steps, …) each, of arrays of one shape.

    NaN stands for what a picture does not have, such as words of an empty prompt, and is left out.
    """
    by_step: dict[int, list[Array]] = {}
    for sight, measured in readings:
        by_step.setdefault(sight.step, []).append(measured)
    stacked = np.stack([np.stack(arrays) for arrays in by_step.values()])  # (steps, pictures, …)
    there = ~np.isnan(stacked)
    number = there.sum(1)
    counts = np.where(number == 0, np.nan, number)
    mean = np.where(there, stacked, 0).sum(1) / counts
    deviation = np.where(there, stacked - mean[:, None], 0)
    return mean, np.sqrt((deviation**2).sum(1) / counts)


def sizes(sets: Mapping[str, Sequence[int]]) -> Array:
    """Number of tokens in each set, NaN for none: (sets,)."""
    return np.array([len(tokens) or np.nan for tokens in sets.values()], float)
