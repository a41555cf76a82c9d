"""GoCA: segment by the cross-attention to class names, aggregated over all heads and layers of one forward pass.

Aggregated maps are rescaled pixel by pixel and refined by self-attention (GoCA, Sec. 3.1 to 3.4). The aggregation is in
stages/aggregation.py and stages/cross_maps.py; here are its settings by model, prompts, and what becomes of maps.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from padseg.backbones import opened
from padseg.errors import UsageError
from padseg.images import ImageError, Readable, Reading, as_image
from padseg.images.files import contents
from padseg.methods import stages
from padseg.methods.goca_rows import ALL, preset_settings
from padseg.methods.open_vocabulary import ENCODERS, UNUSED, as_classes, warn_of_untrained
from padseg.methods.options import (
    Range,
    check_options,
    filled,
    geometry_option,
    in_list,
    model_settings,
    option,
    own,
    plain_settings,
    require,
    require_family,
    seed_option,
    side_option,
)
from padseg.methods.stages.captions import SYNONYMS
from padseg.system.ledger import without_repetition
from padseg.types import Prompt, Proposals, TokenMaps

if TYPE_CHECKING:
    from torch import Tensor

    from padseg.backbones import Backbone
    from padseg.backbones.spec import Spec
    from padseg.methods.options import Setting
    from padseg.methods.stages.captions import Entity, Roles, Scene
    from padseg.methods.stages.cross_maps import Plan
    from padseg.types import Frame, Image, LabelMap, Latent, Tokens

TASK = 'classes'
MOST_BYTES = 2**28  # of a file of captions
FAMILIES = frozenset({'sd3', 'flux', 'unet', 'pixart'})
BACKGROUND_BY_RULE = True
PRESETS = ('goca', 'baseline', 'vanilla')
HEADS = ('dot', 'dot-clamped', 'l2', 'cosine', 'average')
SIMILARITIES = ('dot', 'l2', 'cosine', 'layer-mse', 'layer-iou', 'uniform')
FEATURES = ('cross-q', 'self-q', 'attn-out')
RULES = ('offset', 'max', 'exact', 'avg', 'vanilla')
BACKGROUND = '(background)'  # the name of the map of all background objects
ORDERS = 6  # kept with saved maps, from 0 on: 5 is the most in the paper
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class GocaOptions:
    """Options of GoCA. Options left open take the preset's values for the model; see `resolve`.

    Raises UsageError for a value outside its range; the message gives the range.
    """

    preset: str = option('goca', "the paper's settings for a model: GoCA, its Baseline, or Vanilla", choices=PRESETS)
    layers: tuple[str, ...] = own('layers whose maps are aggregated, by number from 0 or by name (vit-block13), or all')
    heads: str = own(
        'how heads are weighted at each pixel: by the dot product with their sum, that without its negative part, by their length, by the'
        ' cosine, or all the same',
        choices=HEADS,
    )
    value_weights: bool = option(False, "also weigh heads by the spectral norm of their projected values (the paper's VW)")
    joint_values: str = option(
        'all', 'what heads of joint attention are weighted by: their output, or what of it comes from the text', choices=('all', 'text')
    )
    single_blocks: str = option(
        'average',
        "how heads of Flux's single blocks are weighted: all the same, as released, or by the attention's part of the projection that they"
        ' share with the MLP',
        choices=('average', 'projection'),
    )
    similarity: str = own('how layers are weighted: by the likeness of their self-attention to the dense feature', choices=SIMILARITIES)
    dense_layer: str = own('layer of the dense feature, by number or name')
    dense_feature: str = own('what the dense feature is: queries of the cross- or self-attention, or its output', choices=FEATURES)
    dense_channels: str = option(
        'all', 'channels of the dense feature: all, as in the paper, or the first, as released', choices=('all', 'first')
    )
    renorm_after_resize: bool = option(False, 'give layers of all sizes the same say; else small layers count more, as in the paper')
    rescale: bool = own('divide the scores of each pixel by their sum over all words that stand for something')
    refine_layers: tuple[str, ...] = own('layers whose mean self-attention refines the maps, by number or name')
    order: int = own('how often maps are refined', range=Range('a number of times in 0..100', 0, 101))
    rule: str = option(
        'offset',
        'score of background from threshold and background map: sum, as released, maximum, as in the paper, the map alone, mean, or the'
        ' threshold alone',
        choices=RULES,
    )
    tau: float = option(0.0, 'threshold of the background', range=Range('a number from -1000 to below 1000', -1000, 1000))
    background_words: tuple[str, ...] = option((), 'further names: pixels that belong to one of them are background', default='none')
    captions: str | None = option(
        None,
        'JSON file with a text for each picture by its name, which lists what it shows: the prompt in place of the classes',
        default='none',
    )
    complete: bool = option(False, "with captions, look for the classes that a picture's text does not name, too")
    synonyms: str = option('none', 'data set whose list of other words for classes is used with captions', choices=SYNONYMS)
    step: int = own('noise level: the n-th step from the end of the schedule, from 1', range=Range('a number from 1', 1))
    schedule: int = own('steps of the schedule', range=Range('a number of steps in 1..1000', 1, 1001))
    guidance: float | None = own(
        'guidance strength that Flux is told', range=Range('a number >= 0', 0, 1e9), default='1.0; other models have none'
    )
    encoders: str = own('text encoders to use: CLIP-L, CLIP-G, T5', choices=(*ENCODERS, 'clip'))
    unused: str = option('zeros', "what replaces T5's tokens if T5 is not used", choices=UNUSED)
    half_maps: bool = option(False, 'keep self-attention in 16 bits while a picture is processed, in half the memory')
    geometry: str = geometry_option()
    side: int = side_option()
    seed: int = seed_option()

    def __post_init__(self) -> None:
        check_options(self)
        for name in ('layers', 'refine_layers'):
            require(getattr(self, name) != (), f'{name} are numbers or names of layers; got none')

    def resolve(self, spec: Spec) -> GocaOptions:
        """Fill in everything left open for a model. UsageError for what the model does not have."""
        resolved = filled(self, settings_of(spec, self.preset))
        for name in (*resolved.layers, *resolved.refine_layers, resolved.dense_layer):
            require(not name.isdecimal() or int(name) < spec.layers, f'layers are in 0..{spec.layers - 1} for {spec.repo}; got {name}')
        require(resolved.guidance is None or spec.family == 'flux', f'{spec.repo} takes no guidance strength')
        require(resolved.step <= resolved.schedule, f'step is in 1..{resolved.schedule}, the schedule; got {resolved.step}')
        return resolved


Options = GocaOptions


def settings_of(spec: Spec, preset: str = 'goca') -> dict[str, Any]:
    """A preset's settings for a model, overridden by the model folder's `padseg.json`."""
    common = {'side': spec.side, 'encoders': spec.encoders, 'rescale': True, 'similarity': 'dot', 'layers': ALL}
    return model_settings(GocaOptions, 'goca', spec, common | preset_settings(spec, preset))


class Asked(NamedTuple):
    """An encoded prompt. roles: of its columns, for each tokenizer whose columns are read."""

    prompt: Prompt
    roles: tuple[Roles, ...]


class Prepared(NamedTuple):
    """A model with the classes to look for. prompts: the same for all pictures; captions: by picture, in place of these."""

    options: GocaOptions
    classes: tuple[str, ...]
    prompts: tuple[Asked, ...]
    plan: Plan | None
    captions: Mapping[str, str]
    backbone: Backbone | None
    keep: bool = True


def deepest(options: GocaOptions, spec: Spec) -> int | None:
    """All blocks are read, and their outputs."""
    return None


def prepare(backbone: Backbone, options: GocaOptions, classes: Sequence[str] = (), keep: bool = True) -> Prepared:
    """Encode the prompts of all classes once; keep: also in padseg's cache.

    UsageError for options that the model does not support, for captions that cannot be read, and for names that are missing, duplicate or
    too long. A class without tokens is left out, with a warning.
    """
    require_family('goca', FAMILIES, backbone)
    names = stages.checked_names(classes)
    require(BACKGROUND not in names, f'{BACKGROUND} is not the name of a class')
    resolved = options.resolve(backbone.spec)
    plan = plan_of(backbone, resolved)
    captions = read_captions(Path(resolved.captions)) if resolved.captions else {}
    prepared = Prepared(resolved, names, (), plan, captions, backbone, keep)
    if captions:
        return prepared
    warn_of_untrained(backbone, stages.checked_names([*names, *resolved.background_words]))
    return prepared._replace(prompts=tuple(prompts_of(prepared, split(prepared))))


def plan_of(backbone: Backbone, options: GocaOptions) -> Plan:
    """What to read of a model. UsageError for a layer that it does not have."""
    from padseg.methods.stages.cross_maps import Plan

    names = backbone.layer_names()

    def numbers(wanted: Sequence[str]) -> tuple[int, ...]:
        if 'all' in wanted:
            return tuple(range(len(names)))
        strange = [name for name in wanted if name not in names and not (name.isdecimal() and int(name) < len(names))]
        require(not strange, f'{backbone.identity.model} has no layer {in_list(strange)}; it has 0..{len(names) - 1}, such as {names[-1]}')
        return tuple(dict.fromkeys(int(name) if name.isdecimal() else names.index(name) for name in wanted))

    return Plan(
        cross=numbers(options.layers),
        heads=options.heads,
        spectral=options.value_weights,
        text_only=options.joint_values == 'text',
        single=options.single_blocks == 'projection',
        by=options.similarity,
        dense=numbers((options.dense_layer,))[0],
        feature=options.dense_feature,
        channels=options.dense_channels,
        renormalise=options.renorm_after_resize,
        refine=numbers(options.refine_layers),
        half=options.half_maps,
        guidance=options.guidance,
    )


def read_captions(path: Path) -> dict[str, str]:
    """The text of each picture. UsageError for a file that is not a JSON object of texts."""
    try:
        captions = json.loads(captions_text(path).decode('utf-8'), object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:
        raise UsageError(f'{path} cannot be read as JSON: {error}') from error
    if not isinstance(captions, dict) or not captions or not all(isinstance(text, str) for text in captions.values()):
        raise UsageError(f'{path} must hold an object with a text for each picture: {{"a.jpg": "cat, (person, shirt), grass"}}')
    return captions


def captions_text(path: Path) -> bytes:
    """What a file of captions holds. UsageError for one that cannot be read, is no file or is too large."""
    try:
        return contents(path, Reading(max_bytes=MOST_BYTES))
    except (OSError, ImageError) as error:
        raise UsageError(f'{path} cannot be read as JSON: {error}') from error


def caption_of(captions: Mapping[str, str], name: str, file: str | None) -> str:
    """The text of a picture, which the file may name without suffix. UsageError if there is none."""
    caption = next((captions[key] for key in (name, Path(name).stem, Path(name).name) if key in captions), None)
    if caption is None:
        raise UsageError(f'{file} has no caption for {name or "this picture"}')
    return caption


def split(prepared: Prepared) -> list[Scene]:
    """Fill each prompt with classes in order while they fit, each with all words of background. UsageError for a name that is too long."""
    from padseg.methods.stages.captions import named_entities, scene_of

    scenes: list[Scene] = []
    taken: list[Entity] = []
    background = prepared.options.background_words
    for entity in named_entities(prepared.classes, range(len(prepared.classes))):
        alone, longer = (scene_of([*classes, *named_entities((), (), background)]) for classes in ([entity], [*taken, entity]))
        if taken and fits(longer, prepared):
            taken.append(entity)
            scenes[-1] = longer
        else:
            more = f', with {len(background)} words of background,' if background else ''
            require(fits(alone, prepared), f'the name {entity.text!r}{more} is too long for a prompt')
            taken = [entity]
            scenes.append(alone)
    return scenes


def fits(scene: Scene, prepared: Prepared) -> bool:
    return all(len(tokens.spans) <= tokens.slots for tokens in tokens_of(scene.text, prepared).values())


def tokens_of(text: str, prepared: Prepared) -> dict[str, Tokens]:
    from padseg.backbones.texts import kept_texts

    assert prepared.backbone is not None
    return kept_texts(prepared.backbone, prepared.keep).tokens(text, prepared.options.encoders)


def prompts_of(prepared: Prepared, scenes: Sequence[Scene], wanted: Sequence[int] | None = None) -> list[Asked]:
    """Encode prompts, with the roles of their columns. wanted: numbers of the classes that are to have some, by default all."""
    from padseg.backbones.texts import kept_texts
    from padseg.methods.stages.captions import roles_of

    assert prepared.backbone is not None
    texts = kept_texts(prepared.backbone, prepared.keep)
    asked = []
    for scene in scenes:
        roles = tuple(roles_of(scene, tokens, tokens.slots) for tokens in tokens_of(scene.text, prepared).values())
        embeds, pooled = texts.encode(scene.text, prepared.options.encoders, prepared.options.unused)
        asked.append(Asked(Prompt(embeds, pooled, (), (), mask=texts.mask(scene.text)), roles))
    present = {number for prompt in asked for roles in prompt.roles for number in roles.classes}
    missing = [name for number, name in enumerate(prepared.classes) if number not in present and (wanted is None or number in wanted)]
    require(bool(present) or wanted is not None, f'the tokenizer has no tokens for {in_list(prepared.classes)}')
    for name in missing:
        warn_of_missing(prepared.backbone.identity.model, name)
    return asked


@cache
def warn_of_missing(model: str, name: str) -> None:
    log.warning('%s has no tokens for the name %r: it is left out', model, name)


def maps(images: Sequence[Image], prepared: Prepared, names: Sequence[str] = ()) -> list[TokenMaps]:
    """Maps of the classes and of background in 0..1, (K, h, w) for each picture: those refined 0, 1, 2, ... times, one after another.

    names: of the pictures, by which their captions are known. Classes without tokens have no map.
    """
    options, backbone = prepared.options, prepared.backbone
    assert backbone is not None and prepared.plan is not None
    noising = dataclasses.replace(backbone, spec=backbone.spec._replace(steps=options.schedule))
    latents = [stages.encode_steps(image, noising, options, (options.step,))[0] for image in images]
    if prepared.captions:
        shown = [captioned(prepared, name) for name in (names or [''] * len(images))]
        return [refined_maps([latent], prepared, prompts)[0] for latent, prompts in zip(latents, shown, strict=True)]
    return refined_maps(latents, prepared, prepared.prompts)


def captioned(prepared: Prepared, name: str) -> list[Asked]:
    """The prompt of a picture's caption. UsageError if there is none."""
    from padseg.methods.stages.captions import caption_entities, scene_of, with_synonyms

    options = prepared.options
    caption = caption_of(prepared.captions, name, options.captions)
    known = {number: with_synonyms(own_name, options.synonyms) for number, own_name in enumerate(prepared.classes)}
    listed = ', '.join((caption.strip().removesuffix('.'), *options.background_words))
    scene = scene_of(caption_entities(listed, known, complete=options.complete))
    wanted = [entity.number for entity in scene.entities if entity.number is not None]
    return prompts_of(prepared, [scene], wanted) if scene.text else []


def refined_maps(latents: Sequence[Latent], prepared: Prepared, prompts: Sequence[Asked]) -> list[TokenMaps]:
    """Maps of latents, from one forward pass for each prompt; a prompt is GoCA of its own, whose background joins that of the others."""
    assert prepared.backbone is not None
    parts = [stages.batched(latents, prepared.backbone, partial(maps_of_prompt, prepared=prepared, asked=asked)) for asked in prompts]
    return [joined([own[number] for own in parts], latent.frame, prepared) for number, latent in enumerate(latents)]


class Part(NamedTuple):
    """numbers: of K classes; maps: (orders, K + 1, h, w), that of background last."""

    numbers: tuple[int, ...]
    maps: Tensor


def maps_of_prompt(latents: Sequence[Latent], prepared: Prepared, asked: Asked) -> list[Part]:
    """The maps of one prompt's classes for latents of the same shape, from one forward pass."""
    from padseg.methods.stages.cross_maps import aggregated

    assert prepared.backbone is not None and prepared.plan is not None
    found = aggregated(latents, prepared.backbone, asked.prompt, prepared.plan)
    parts = []
    for maps, self_map in zip(found.maps, found.self_map, strict=True):
        numbers, stacked = stages.class_maps(maps, asked.roles, prepared.options.rescale)
        parts.append(Part(numbers, stages.orders_of(stacked, self_map, orders_kept(prepared.options))))
    return parts


def orders_kept(options: GocaOptions) -> int:
    return max(ORDERS, options.order + 1)


def joined(parts: Sequence[Part], frame: Frame, prepared: Prepared) -> TokenMaps:
    """The maps of all prompts, of one order after another: of the classes, then the maximum of their backgrounds."""
    import torch

    if not parts:  # a caption that lists nothing
        orders = orders_kept(prepared.options)
        return TokenMaps(torch.zeros(orders, 1, 1), (BACKGROUND,) * orders, frame)
    background = torch.stack([part.maps[:, -1] for part in parts]).amax(0)  # (orders, h, w)
    maps = torch.cat((*(part.maps[:, :-1] for part in parts), background[:, None]), 1)  # (orders, K + 1, h, w)
    names = (*(prepared.classes[number] for part in parts for number in part.numbers), BACKGROUND)
    return TokenMaps(maps.flatten(0, 1), names * len(maps), frame)


def labels(image: Image, maps: TokenMaps, prepared: Prepared) -> LabelMap:
    """Class of every pixel, 1..C in their order, 0 = background or not seen by the model, without a forward pass (GoCA, Sec. 3.4).

    UsageError for an order of refinement that the maps were not kept for.
    """
    import torch

    options, classes = prepared.options, prepared.classes
    count = maps.names.index(BACKGROUND) + 1
    orders = len(maps.names) // count
    require(options.order < orders, f'these maps are refined 0..{orders - 1} times; got order {options.order}')
    scores = maps.maps[options.order * count : (options.order + 1) * count]  # (K + 1, h, w)
    background = stages.background_maps(scores[-1], options.tau, options.rule)
    values = torch.cat((background, scores[:-1])).double()  # background wins where all are the same
    numbers = [len(classes)] * len(background) + [classes.index(name) for name in maps.names[: count - 1]]
    regions = stages.label_map(Proposals(values, tuple((number,) for number in range(len(values))), maps.frame))
    return as_classes(regions.labels, [numbers[number] for (number,) in regions.tokens], classes)


def recorded(options: GocaOptions, spec: Spec) -> dict[str, Setting]:
    """All settings that affect the results, for a record: the options, and what the file of captions holds."""
    settings = plain_settings(options.resolve(spec))
    if options.captions:
        read_captions(Path(options.captions))
        settings['captions_sha256'] = hashlib.sha256(captions_text(Path(options.captions))).hexdigest()
    return settings


def score_maps(image: Readable, backbone: Backbone | str, classes: Sequence[str], options: GocaOptions = GocaOptions()) -> TokenMaps:
    """The refined maps that `label` decides by, (K, h, w), with the names of the classes, then background."""
    prepared = prepare(opened(backbone, partial(deepest, options)), options, classes)
    found = maps([as_image(image)], prepared)[0]
    count = found.names.index(BACKGROUND) + 1
    rows = slice(prepared.options.order * count, (prepared.options.order + 1) * count)
    return TokenMaps(found.maps[rows], found.names[rows], found.frame)


def relabel(image: Readable, maps: TokenMaps, classes: Sequence[str], options: GocaOptions) -> LabelMap:
    """The label map of maps that were kept, with another order of refinement, rule or threshold; no model is needed.

    UsageError unless options has the order, which is a model's own, and maps were kept for it.
    """
    require(options.order is not None, 'say the order of refinement: it is not in the maps')
    return labels(as_image(image), maps, Prepared(options, stages.checked_names(classes), (), None, {}, None))
