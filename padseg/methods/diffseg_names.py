"""DiffSeg's naming: its regions get the names whose words their pixels attend to (Tian et al., CVPR 2024, Sec. 3.5).

The names are the prompt. One forward pass gives self-attention for the regions, by diffseg.py, and cross-attention for the names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from padseg.methods import diffseg, stages
from padseg.methods.open_vocabulary import as_classes, name_regions
from padseg.methods.options import (
    REFINEMENTS,
    Range,
    check_options,
    filled,
    geometry_option,
    model_settings,
    option,
    own,
    plain_settings,
    require,
    require_family,
    seed_option,
    side_option,
)
from padseg.types import Prompt, Proposals, TokenMaps

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.backbones.spec import Spec
    from padseg.methods.options import Setting
    from padseg.types import Image, LabelMap, Latent

TASK = 'classes'
FAMILIES = diffseg.FAMILIES
BACKGROUND_BY_RULE = False
PUBLISHED = diffseg.PUBLISHED
DATASETS = diffseg.DATASETS
OF_REGIONS = ('threshold', 'kmeans', 'noise', 'geometry', 'side', 'refine', 'seed')


@dataclass(frozen=True)
class DiffSegNamesOptions:
    """Options of DiffSeg's naming. Options left open take the model's own values, filled in by `resolve`.

    Raises UsageError for a value outside its range; the message gives the range.
    """

    by: str = option('mean', "a region's name: that with the highest mean, or the strongest at most pixels", choices=('mean', 'majority'))
    background_words: tuple[str, ...] = option((), 'further names: regions that get one of them are background', default='none')
    threshold: float = own(
        'merge maps whose symmetric KL divergence / 2 is below this; 0 merges none, inf all', range=Range('a number >= 0 or inf', 0)
    )
    kmeans: bool = option(False, 'cluster all maps by k-means, started at the proposals, which are replaced by the means')
    noise: str = option('none', 'add no noise, as released, or as much as the model is told of', choices=('none', 'ddpm'))
    geometry: str = geometry_option()
    side: int = side_option()
    refine: str = own(
        'how maps are enlarged: bilinear, or guided by the edges of the picture (guided filter)', choices=REFINEMENTS, default='none'
    )
    seed: int = seed_option()

    def __post_init__(self) -> None:
        check_options(self)

    def resolve(self, spec: Spec) -> DiffSegNamesOptions:
        """Fill in everything left open for a model."""
        return filled(self, settings_of(spec))


Options = DiffSegNamesOptions


def settings_of(spec: Spec) -> dict[str, Any]:
    """Those of DiffSeg for the model, overridden by the section of this method in the model folder's `padseg.json`."""
    known = {field.name for field in fields(DiffSegNamesOptions)}
    row = {name: value for name, value in diffseg.settings_of(spec).items() if name in known}
    return model_settings(DiffSegNamesOptions, 'diffseg-names', spec, row)


class Prepared(NamedTuple):
    """A model with the names to look for. columns: of the prompt, by the number of a name, words of background last."""

    options: DiffSegNamesOptions
    regions: diffseg.Prepared
    classes: tuple[str, ...]
    prompt: Prompt
    columns: Mapping[int, tuple[int, ...]]
    backbone: Backbone


def deepest(options: DiffSegNamesOptions, spec: Spec) -> int | None:
    """All blocks are read."""
    return spec.layers - 1


def prepare(backbone: Backbone, options: DiffSegNamesOptions, classes: Sequence[str] = (), keep: bool = True) -> Prepared:
    """Encode all names as one prompt. UsageError for names that are missing, duplicate, without tokens, or too long together."""
    from padseg.backbones.texts import kept_texts
    from padseg.methods.stages.captions import named_entities, roles_of, scene_of

    require_family('diffseg-names', FAMILIES, backbone)
    names = stages.checked_names(classes)
    resolved = options.resolve(backbone.spec)
    every = stages.checked_names([*names, *resolved.background_words])
    scene = scene_of(named_entities(every, range(len(every))))
    texts = kept_texts(backbone, keep)
    encoders = backbone.spec.encoders
    (tokens,) = texts.tokens(scene.text, encoders).values()
    require(len(tokens.spans) <= tokens.slots, f'the names are too long together: {len(tokens.spans)} of {tokens.slots} tokens')
    columns = roles_of(scene, tokens, tokens.slots).classes
    missing = [name for number, name in enumerate(every) if number not in columns]
    require(not missing, f'the tokenizer has no tokens for {", ".join(missing)}')
    embeds, pooled = texts.encode(scene.text, encoders, 'zeros')
    prompt = Prompt(embeds, pooled, (), (), mask=texts.mask(scene.text))
    regions = diffseg.DiffSegOptions(**{name: getattr(resolved, name) for name in OF_REGIONS})
    return Prepared(resolved, diffseg.prepare(backbone, regions), names, prompt, columns, backbone)


def maps(images: Sequence[Image], prepared: Prepared, names: Sequence[str] = ()) -> list[TokenMaps]:
    """The maps of all names, (C, h, w) for each picture, of words of background behind them, then the proposals."""
    latents = diffseg.latents_of(images, prepared.regions)
    return stages.batched(latents, prepared.backbone, partial(maps_of_latents, prepared=prepared))


def maps_of_latents(latents: Sequence[Latent], prepared: Prepared) -> list[TokenMaps]:
    """The maps of latents with the same shape, from one forward pass."""
    import torch

    from padseg.methods.stages.anchor_merging import word_maps
    from padseg.methods.stages.self_attention import maps_by_grid

    found = maps_by_grid(latents, prepared.backbone, prepared.prompt)
    proposals = diffseg.merged_maps(latents, found, prepared.regions.options)
    words = (*prepared.classes, *prepared.options.background_words)
    results = []
    for number, regions in enumerate(proposals):
        shares = word_maps({grid: own[number] for grid, own in found.words.items()}, found.to)  # (T, h, w)
        of_names = torch.stack([shares[list(prepared.columns[name])].mean(0) for name in range(len(words))])
        scaled = torch.nn.functional.normalize(of_names.flatten(1)).view_as(of_names)
        results.append(TokenMaps(stages.joined_maps([scaled.float(), regions.maps]), (*words, *regions.names), regions.frame))
    return results


def labels(image: Image, maps: TokenMaps, prepared: Prepared) -> LabelMap:
    """Class of every pixel, 1..C in their order, 0 = background or not seen by the model, without a forward pass."""
    classes, options = prepared.classes, prepared.options
    count = len(classes) + len(options.background_words)
    regions = diffseg.labels(image, TokenMaps(maps.maps[count:], maps.names[count:], maps.frame), prepared.regions)
    words = TokenMaps(maps.maps[:count], maps.names[:count], maps.frame)
    if options.by == 'mean':
        return name_regions(regions, words, classes)
    return as_classes(regions.labels, strongest(regions, words), classes)


def strongest(regions: LabelMap, words: TokenMaps) -> list[int]:
    """The number of the name that is strongest at most pixels of each region."""
    import numpy as np

    best = stages.label_map(Proposals(words.maps.double(), tuple((number,) for number in range(len(words.maps))), words.frame))
    numbers = np.array([-1, *(number for (number,) in best.tokens)])[best.labels]
    return [int(np.bincount(numbers[regions.labels == region]).argmax()) for region in range(1, len(regions.tokens) + 1)]


def recorded(options: DiffSegNamesOptions, spec: Spec) -> dict[str, Setting]:
    """All settings that affect the results, for a record."""
    return {**plain_settings(options.resolve(spec)), 'encoders': spec.encoders}
