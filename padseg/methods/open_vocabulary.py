"""Names for masks: which of several classes each part of a picture is, from the attention to their names in the prompt.

Words and padding tokens go one way: a prompt differs from the empty one in its text and in the columns that are read of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from padseg.backbones import Backbone
from padseg.backbones.texts import Texts, texts_of
from padseg.errors import UsageError
from padseg.images import Readable, as_image
from padseg.methods.options import LabelOptions, ResolvedLabels
from padseg.methods.seg4diff import batched, regions
from padseg.methods.stages.label_map import label_map, upsample
from padseg.methods.stages.latents import encode_steps
from padseg.methods.stages.prompts import checked, prompts_of
from padseg.methods.stages.proposals import EPS
from padseg.methods.stages.runs import mean_inside, painted, runs_of
from padseg.methods.stages.superpixels import superpixels
from padseg.methods.stages.token_maps import latent_token_maps, maps_of_layers
from padseg.types import Array, Image, LabelMap, Prompt, Proposals, TokenMaps

BACKGROUND = '(background)'  # the name of the map of all background words


class Naming(NamedTuple):
    """A model with the classes that it is to find."""

    backbone: Backbone
    classes: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    options: ResolvedLabels


def label(image: Readable, backbone: Backbone, classes: Sequence[str], options: LabelOptions = LabelOptions()) -> LabelMap:
    """The class of every pixel of a picture, (H, W, 3) uint8 RGB or a path: 1..C by their order, 0 = background or not looked at.

    Seg4Diff, Sec. 4.3; Yamaguchi and Yanai. UsageError for names that are none, there twice, too long, or unknown to the tokenizers.
    """
    naming = naming_of(backbone, classes, options)
    image = as_image(image)
    return classified(image, class_maps([image], naming)[0], naming.classes, naming.options)


def score_maps(image: Readable, backbone: Backbone, classes: Sequence[str], options: LabelOptions = LabelOptions()) -> TokenMaps:
    """The scores that `label` decides by, (C, h, w) with the classes' names."""
    return class_maps([as_image(image)], naming_of(backbone, classes, dataclasses.replace(options, on='words')))[0]


def naming_of(backbone: Backbone, classes: Sequence[str], options: LabelOptions, texts: Texts | None = None) -> Naming:
    """The prompts of all names, encoded once. texts: the model's reader, if there is one already."""
    resolved = options.resolve(backbone.spec)
    for layer in (*resolved.layers, *((resolved.proposals.layer,) if resolved.proposals else ())):
        backbone.attention_module(layer)  # refused now if it was not read
    heads = backbone.transformer.config.num_attention_heads
    if resolved.head is not None and resolved.head >= heads:
        raise UsageError(f'head is one of 0..{heads - 1} for {backbone.identity.model}; got {resolved.head}')
    names = checked(classes)
    everything = checked([*names, *resolved.background_words])
    return Naming(backbone, names, tuple(prompts_of(everything, texts or texts_of(backbone), resolved)), resolved)


def class_maps(images: Sequence[Image], naming: Naming) -> list[TokenMaps]:
    """Scores of the classes in several pictures, (C, h, w) each; after them that of the background's words, if there are any, and for
    proposals the 77 token maps of the empty prompt."""
    options, backbone = naming.options, naming.backbone
    steps = list(dict.fromkeys((*options.steps, *((options.proposals.step,) if options.proposals else ()))))
    latents = [encode_steps(image, backbone, options, steps) for image in images]  # one a step
    found: list[list[Tensor]] = [[] for _ in images]
    for prompt in naming.prompts:
        by_step = []
        for number in range(len(options.steps)):
            read = partial(
                maps_of_layers, backbone=backbone, prompt=prompt, layers=options.layers, head=options.head, softmax=options.softmax
            )
            maps = batched([each[number] for each in latents], backbone, read)
            by_step.append([each.maps for each in maps])  # (T, h, w) each
        for own, several in zip(found, zip(*by_step, strict=True), strict=True):
            own.append(means(torch.stack(several).mean(0), prompt, options.scores))
    names = naming.classes + ((BACKGROUND,) if options.background_words else ())
    scored = [scale_scores(torch.cat(own), len(naming.classes), options.scores) for own in found]
    results = [TokenMaps(maps, names, frames[0].frame) for maps, frames in zip(scored, latents, strict=True)]
    if options.proposals:
        noised = [each[steps.index(options.proposals.step)] for each in latents]
        pads = batched(noised, backbone, partial(latent_token_maps, backbone=backbone, options=options.proposals))
        results = [
            TokenMaps(torch.cat((own.maps, pad.maps)), own.names + pad.names, own.frame) for own, pad in zip(results, pads, strict=True)
        ]
    return results


def means(maps: Tensor, prompt: Prompt, scores: str) -> Tensor:
    """The map of each name of a prompt from those of its tokens: (T, h, w) -> (C, h, w)."""
    if scores == 'minmax-token':
        maps = minmax(maps)
    weighted = maps * torch.tensor(prompt.weights, device=maps.device)[:, None, None]
    names = np.array(prompt.names)
    return torch.stack([weighted[torch.from_numpy(names == name)].sum(0) for name in dict.fromkeys(prompt.names)])


def scale_scores(maps: Tensor, classes: int, scores: str) -> Tensor:
    """The maps of classes and background words as scores: (C + B, h, w) -> (C, h, w), or (C + 1, h, w) with the best background word."""
    if scores == 'minmax':
        maps = minmax(maps)
    if scores == 'share':
        maps = maps / maps.sum(0, keepdim=True).clamp_min(EPS)
    background = maps[classes:]
    return torch.cat((maps[:classes], background.amax(0, keepdim=True))) if len(background) else maps


def minmax(maps: Tensor) -> Tensor:
    """Each map from 0 to 1 over space; a flat one is 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(EPS)


def classified(image: Image, maps: TokenMaps, classes: tuple[str, ...], options: ResolvedLabels) -> LabelMap:
    """The class of every pixel from what `class_maps` gave: no forward is needed."""
    count = len(classes) + bool(options.background_words)
    scores = TokenMaps(maps.maps[:count], maps.names[:count], maps.frame)
    if options.proposals:
        pads = TokenMaps(maps.maps[count:], maps.names[count:], maps.frame)
        return name_regions(regions(image, pads, options.proposals), scores, classes, options.background_below)
    values = scores.maps.double()
    if options.background_below is not None:  # wins where nothing is above it
        values = torch.cat((values, torch.full_like(values[:1], options.background_below)))
    inside = superpixels(image, options.superpixels) if options.superpixels else None  # (H, W)
    proposals = Proposals(values, tuple((number,) for number in range(len(values))), maps.frame)
    found = label_map(proposals, inside, options.min_area > 0, options.min_area, image, options.refine)
    return as_classes(found.labels, [number for (number,) in found.tokens], classes)


def name_regions(found: LabelMap, scores: TokenMaps, classes: tuple[str, ...], below: float | None = None) -> LabelMap:
    """Regions named by the highest mean score inside them: the class of every pixel. below: mean score of what is background."""
    means = mean_scores(found, scores)  # (K, C)
    best = means.argmax(1)
    if below is not None:
        best[means.max(1, initial=-np.inf) < below] = len(classes)
    return as_classes(found.labels, best.tolist(), classes)


def mean_scores(found: LabelMap, scores: TokenMaps) -> Array:
    """Mean of every score over the pixels of every region: (K, C)."""
    top, left, height, width = scores.frame.box
    runs = runs_of(found.labels[top : top + height, left : left + width])
    enlarged = (upsample(values, (height, width)) for values in scores.maps.cpu().numpy())
    return np.stack([mean_inside(runs, values) for values in enlarged], 1)[runs.names > 0]


def as_classes(labels: Array, numbers: Sequence[int], classes: tuple[str, ...]) -> LabelMap:
    """Regions 1..K as the classes of these numbers, from 0; what is no class, and region 0, becomes 0."""
    table = np.array([0, *(number + 1 if number < len(classes) else 0 for number in numbers)], np.int32)
    runs = runs_of(labels)
    return LabelMap(painted(runs, table[runs.names]), (), classes)
