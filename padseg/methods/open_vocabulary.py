"""Open-vocabulary segmentation: classify each pixel by the attention to the class names in the prompt.

Seg4Diff, Sec. 4.3; Yamaguchi and Yanai. Words and pad tokens share one code path: a prompt differs from the empty one only in its text and
in the columns that are read.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from padseg.backbones import opened
from padseg.errors import UsageError
from padseg.images import Readable, as_images
from padseg.methods import seg4diff, stages
from padseg.methods.options import (
    RANGE_ADDED,
    REFINEMENTS,
    SCALE,
    SHARE,
    Range,
    check_options,
    filled,
    geometry_option,
    in_list,
    model_settings,
    option,
    order_option,
    own,
    plain_settings,
    refine_layers_option,
    require,
    require_family,
    seed_option,
    side_option,
)
from padseg.types import LabelMap, Proposals, TokenMaps

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.backbones.spec import Spec
    from padseg.methods.options import Setting
    from padseg.types import Array, Image, Prompt

TASK = 'classes'
FAMILIES = frozenset({'sd3', 'flux', 'flux2'})
BACKGROUND_BY_RULE = False
PROMPTS = ('joined', 'template', 'per-class')
ENCODERS = ('l', 'g', 'l+g', 't5', 'l+g+t5', 'qwen3')
COLUMNS = ('clip', 't5', 'both', 'qwen3')
UNUSED = ('zeros', 'dropped')
SCORES = ('raw', 'minmax', 'minmax-token', 'share')
NAMED = ('words', 'proposals')
COLUMNS_OF = {
    'l': 'clip',
    'g': 'clip',
    'l+g': 'clip',
    't5': 't5',
    'l+g+t5': 'both',
    'qwen3': 'qwen3',
}  # whose tokens have columns, by encoders
log = logging.getLogger(__name__)
BACKGROUND = '(background)'  # the name of the map of all background words


@dataclasses.dataclass(frozen=True)
class LabelOptions:
    """Options of segmentation by class names. Options left open take the model's own values or follow from other options; see `resolve`.

    Raises UsageError for a value outside its range; the message gives the range.
    """

    layers: tuple[int, ...] = own(
        'blocks whose maps are averaged, from one forward pass, counted from 0', range=Range('distinct numbers >= 0', 0)
    )
    steps: tuple[int, ...] = own('noise levels whose maps are averaged, one forward pass each', range=Range('distinct numbers >= 1', 1))
    head: int | None = option(None, 'one attention head, counted from 0', default='the mean of all', range=Range('counted from 0', 0))
    prompt: str = option(
        'joined', 'how names become a prompt: joined by spaces, "a photo of a …, …", or one prompt per class', choices=PROMPTS
    )
    encoders: str = own('text encoders to use: CLIP-L, CLIP-G, T5, Qwen3', choices=ENCODERS)
    unused: str = option('zeros', "what replaces T5's tokens if T5 is not used", choices=UNUSED)
    columns: str = own("whose tokens' attention is read", choices=COLUMNS, default="the encoders' own")
    blanks: bool = own(
        "count T5's token for a space alone to the name behind it, as Seg4Diff's released code does",
        default='only with --geometry seg4diff-ovss',
    )
    softmax: bool = option(True, 'read shares of the attention, not the scores before the softmax')
    scores: str = own(
        'class scores: raw, scaled to 0..1 over the picture (per class or per token), or as shares over classes',
        choices=SCORES,
        default='raw; minmax with per-class',
    )
    background_words: tuple[str, ...] = option(
        (), 'further names: pixels that score highest for one of them are background', default='none'
    )
    background_below: float | None = option(
        None,
        'pixels whose best score is below this are background',
        default='none',
        range=Range('a finite number', -math.nextafter(math.inf, 0), math.inf),
    )
    order: int = order_option()
    refine_layers: tuple[int, ...] = refine_layers_option()
    on: str = option(
        'words', 'what to classify: every pixel by its scores, or the proposals of `padseg run` by their mean score', choices=NAMED
    )
    geometry: str = geometry_option()
    side: int = side_option()
    refine: str = own('how maps are enlarged, as for `padseg run`', choices=REFINEMENTS)
    superpixels: float = own('superpixels inside which maps are averaged, as for `padseg run`', range=SCALE)
    min_area: float = own('parts below this share of the picture go to the neighbour with the longest common border', range=SHARE)
    seed: int = seed_option()

    def __post_init__(self) -> None:
        check_options(self)
        require(self.softmax or self.scores != 'share', 'raw attention scores have no shares: use softmax with share')

    def resolve(self, spec: Spec) -> LabelOptions:
        """Fill in everything left open for a model. UsageError for what the model does not have, or for contradictory options."""
        resolved = filled(self, settings_of(spec) | (seg4diff.UNREFINED if self.geometry != 'whole' else {}))
        used = COLUMNS_OF[resolved.encoders]
        released = self.geometry == 'seg4diff-ovss' and used != 'clip'
        resolved = filled(resolved, {'columns': used, 'scores': 'minmax' if self.prompt == 'per-class' else 'raw', 'blanks': released})
        layers, steps, encoders = (*resolved.layers, *resolved.refine_layers), resolved.steps, resolved.encoders
        require(max(layers) < spec.layers, f'layers are in 0..{spec.layers - 1} for {spec.repo}; got {in_list(layers)}')
        require(max(steps) <= spec.steps, f'steps are in 1..{spec.steps} for {spec.repo}; got {in_list(steps)}')
        require(used in ('both', resolved.columns), f'columns of {resolved.columns} need its encoder; encoders are {encoders}')
        require(
            not (encoders in ('t5', 'l+g+t5') and self.unused == 'dropped'),
            f'T5 can be dropped only if it is not used; encoders are {encoders}',
        )
        return resolved


Options = LabelOptions


def settings_of(spec: Spec) -> dict[str, Any]:
    """The method's settings for a model: Seg4Diff's noise level and refinements, overridden by the model folder's `padseg.json`."""
    regions = seg4diff.settings_of(spec)
    shared = {name: regions[name] for name in ('side', 'refine', 'superpixels', 'min_area')}
    row = {'layers': (spec.layer,), 'refine_layers': (spec.layer,), 'steps': (regions['step'],), 'encoders': spec.encoders, **shared}
    return model_settings(LabelOptions, 'open-vocabulary', spec, row)


class Prepared(NamedTuple):
    """A model with the classes to find. proposals: how to make the regions to classify; None to classify pixels."""

    options: LabelOptions
    classes: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    proposals: seg4diff.Prepared | None
    backbone: Backbone


def deepest(options: LabelOptions, spec: Spec) -> int | None:
    """The last block to read; later blocks need not be loaded."""
    layers = [*(options.layers or (spec.layer,)), *((options.refine_layers or (spec.layer,)) if options.order else ())]
    return max(*layers, spec.layer) if options.on == 'proposals' else max(layers)


def prepare(backbone: Backbone, options: LabelOptions, classes: Sequence[str] = (), keep: bool = True) -> Prepared:
    """Encode the prompts of all names once; keep: also in padseg's cache.

    UsageError for options that the model does not support, and for names that are missing, duplicate, too long, or without tokens.
    """
    from padseg.backbones.texts import kept_texts

    require_family('open-vocabulary', FAMILIES, backbone)
    names = stages.checked_names(classes)
    resolved = options.resolve(backbone.spec)
    for layer in (*resolved.layers, *(resolved.refine_layers if resolved.order else ())):
        backbone.attention_module(layer)  # fails early if the block was not loaded
    heads = backbone.transformer.config.num_attention_heads
    if resolved.head is not None and resolved.head >= heads:
        raise UsageError(f'head is one of 0..{heads - 1} for {backbone.identity.model}; got {resolved.head}')
    everything = stages.checked_names([*names, *resolved.background_words])
    warn_of_untrained(backbone, everything)
    prompts = tuple(stages.prompts_of(everything, kept_texts(backbone, keep), resolved))
    proposals = seg4diff.prepare(backbone, proposal_options(options)) if options.on == 'proposals' else None
    return Prepared(resolved, names, prompts, proposals, backbone)


def warn_of_untrained(backbone: Backbone, names: Sequence[str]) -> None:
    """One warning for each name that a model was not trained on, where its folder lists the words that it was trained on."""
    words = {word.casefold() for word in backbone.spec.words}
    for name in names:
        if words and not words.issuperset(name.casefold().split()):
            warn_once(backbone.identity.model, name)


@cache
def warn_once(model: str, name: str) -> None:
    """A process prepares prompts again and again, such as those of the classes that single pictures show."""
    log.warning('%s was not trained on the name %r: its results for it mean little', model, name)


def proposal_options(options: LabelOptions) -> seg4diff.Options:
    """The options that `padseg run` would use for the same picture."""
    return seg4diff.Options(**{name: getattr(options, name) for name in ('geometry', 'side', 'refine', 'superpixels', 'min_area', 'seed')})


def maps(images: Sequence[Image], prepared: Prepared, names: Sequence[str] = ()) -> list[TokenMaps]:
    """Compute the class scores of several pictures, (C, h, w) each.

    The map of the background words follows, if there are any, and for proposals the token maps of the empty prompt.
    """
    options, classes, prompts, proposals, backbone = prepared
    steps = list(dict.fromkeys((*options.steps, *((proposals.options.step,) if proposals else ()))))
    latents = [stages.encode_steps(image, backbone, options, steps) for image in images]  # one per step
    scores: list[list[Any]] = [[] for _ in images]
    for prompt in prompts:
        read = partial(
            stages.maps_of_layers,
            backbone=backbone,
            prompt=prompt,
            layers=options.layers,
            head=options.head,
            softmax=options.softmax,
            refine=options.refine_layers,
            order=options.order,
        )
        by_step = [stages.batched([by_noise[number] for by_noise in latents], backbone, read) for number in range(len(options.steps))]
        for own_scores, several in zip(scores, zip(*by_step, strict=True), strict=True):
            own_scores.append(stages.means(stages.mean_of_steps([token_maps.maps for token_maps in several]), prompt, options.scores))
    names = classes + ((BACKGROUND,) if options.background_words else ())
    scaled = [stages.scale_scores(stages.joined_maps(own_scores), len(classes), options.scores) for own_scores in scores]
    results = [TokenMaps(values, names, of_steps[0].frame) for values, of_steps in zip(scaled, latents, strict=True)]
    if not proposals:
        return results
    noised = [by_noise[steps.index(proposals.options.step)] for by_noise in latents]
    pads = stages.batched(noised, backbone, partial(stages.latent_token_maps, backbone=backbone, options=proposals.options))
    return [
        TokenMaps(stages.joined_maps([words.maps, pad.maps]), words.names + pad.names, words.frame)
        for words, pad in zip(results, pads, strict=True)
    ]


def labels(image: Image, maps: TokenMaps, prepared: Prepared) -> LabelMap:
    """Class of every pixel, 1..C in their order, 0 = background or not seen by the model, without a forward pass."""
    options, classes, _, proposals, _ = prepared
    count = len(classes) + bool(options.background_words)
    scores = TokenMaps(maps.maps[:count], maps.names[:count], maps.frame)
    if proposals:
        pads = TokenMaps(maps.maps[count:], maps.names[count:], maps.frame)
        return name_regions(seg4diff.labels(image, pads, proposals), scores, classes, options.background_below)
    values = stages.with_floor(scores.maps, options.background_below)  # a score below the floor never wins
    inside = stages.superpixels_of(image, options.superpixels) if options.superpixels else None  # (H, W)
    strongest = Proposals(values, tuple((number,) for number in range(len(values))), maps.frame)
    regions = stages.label_map(strongest, inside, options.min_area > 0, options.min_area, image, options.refine)
    return as_classes(regions.labels, [number for (number,) in regions.tokens], classes)


def recorded(options: LabelOptions, spec: Spec) -> dict[str, Setting]:
    """All settings that affect the results, for a record: the options, and those of the proposals to classify."""
    proposals: dict[str, Setting] = {'proposals': None}
    if options.on == 'proposals':
        proposals = {f'proposals_{name}': value for name, value in seg4diff.recorded(proposal_options(options), spec).items()}
    resolved = options.resolve(spec)
    # version 0.1 divided by the range itself: what it made is not what is made now
    added: dict[str, Setting] = {'range_added': RANGE_ADDED} if resolved.scores.startswith('minmax') else {}
    settings = plain_settings(resolved)
    if not resolved.blanks:  # which version 0.1 never did, nor said
        del settings['blanks']
    if not resolved.order:
        del settings['order'], settings['refine_layers']
    return {**settings, **added, **proposals}


def name_regions(regions: LabelMap, scores: TokenMaps, classes: tuple[str, ...], below: float | None = None) -> LabelMap:
    """Classify regions by their highest mean score: the class of every pixel. below: mean score under which a region is background."""
    means = mean_scores(regions, scores)  # (K, C)
    best = means.argmax(1)
    if below is not None:
        best[means.max(1, initial=-np.inf) < below] = len(classes)
    return as_classes(regions.labels, best.tolist(), classes)


def mean_scores(regions: LabelMap, scores: TokenMaps) -> Array:
    """Mean of every score over each region's pixels: (K, C)."""
    top, left, height, width = scores.frame.box
    runs = stages.runs_of(regions.labels[top : top + height, left : left + width])
    enlarged = (stages.upsample(values, (height, width)) for values in scores.maps.cpu().numpy())
    return np.stack([stages.mean_inside(runs, values) for values in enlarged], 1)[runs.names > 0]


def as_classes(labels: Array, numbers: Sequence[int], classes: tuple[str, ...]) -> LabelMap:
    """Map regions 1..K to the classes with these numbers, from 0; numbers that are not a class, and region 0, become 0."""
    table = np.array([0, *(number + 1 if number < len(classes) else 0 for number in numbers)], np.int32)
    runs = stages.runs_of(labels)
    return LabelMap(stages.painted(runs, table[runs.names]), (), classes)


@overload
def label(image: Readable, backbone: Backbone | str, classes: Sequence[str], options: Any = ..., *, method: str = ...) -> LabelMap: ...
@overload
def label(
    image: list[Any], backbone: Backbone | str, classes: Sequence[str], options: Any = ..., *, method: str = ...
) -> list[LabelMap]: ...
def label(
    image: Any, backbone: Backbone | str, classes: Sequence[str], options: Any = None, *, method: str = 'open-vocabulary'
) -> LabelMap | list[LabelMap]:
    """Classify every pixel of a picture: 1..C in the order of classes, 0 = background or not seen. Several pictures give a list.

    image, backbone: as for `padseg.segment`. classes: a list or tuple of names. method: one of `padseg label --method`. options: the
    method's, by default as they are.
    """
    from padseg.methods import method_named, options_of  # which imports this module

    chosen = method_named(method, TASK)
    options = options_of(chosen, method, options)
    pictures = as_images(image)
    prepared = chosen.prepare(opened(backbone, partial(chosen.deepest, options)), options, classes)
    found = chosen.maps(pictures, prepared)
    results = [chosen.labels(picture, token_maps, prepared) for picture, token_maps in zip(pictures, found, strict=True)]
    return results if isinstance(image, (list, tuple)) else results[0]


def score_maps(image: Readable, backbone: Backbone | str, classes: Sequence[str], options: LabelOptions = LabelOptions()) -> TokenMaps:
    """The scores that `label` decides by, (C, h, w), with the class names."""
    words = dataclasses.replace(options, on='words')
    return maps(as_images(image), prepare(opened(backbone, partial(deepest, words)), words, classes))[0]
