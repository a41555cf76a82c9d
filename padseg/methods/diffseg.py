"""DiffSeg: merge the self-attention maps of all layers of a U-Net to regions (Tian et al., CVPR 2024).

One forward pass gives a map for each pixel of a grid. Those near to the anchors of a coarser grid are averaged, and the means merged in
turn; each pixel belongs to the strongest. The merging is in stages/anchor_merging.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from padseg.methods import stages
from padseg.methods.options import (
    REFINEMENTS,
    SHARE,
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
from padseg.types import Proposals, TokenMaps

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.backbones.spec import Spec
    from padseg.methods.options import Setting
    from padseg.methods.stages.self_attention import MapsByGrid
    from padseg.types import Image, LabelMap, Latent

TASK = 'regions'
FAMILIES = frozenset({'unet'})
BACKGROUND_BY_RULE = False
PUBLISHED = 'sd1.4'  # the model of the paper
LATER = ('refine', 'components', 'min_area')  # options that come after the proposals
DATASETS: Mapping[str, Mapping[str, Any]] = {'coco-stuff27': {'threshold': 1.1}, 'cityscapes27': {'threshold': 0.9}}  # of the paper
RELEASED = {'threshold': 0.9, 'step': 300, 'schedule': 1000, 'refine': 'none', 'components': False, 'min_area': 0.0}


@dataclasses.dataclass(frozen=True)
class DiffSegOptions:
    """Options of DiffSeg. Options left open take the model's own values, filled in by `resolve`.

    Raises UsageError for a value outside its range; the message gives the range.
    """

    anchors: int = option(16, 'anchors down, and as many across', range=Range('a whole number in 1..256', 1, 257))
    threshold: float = own(
        'merge maps whose symmetric KL divergence / 2 is below this; 0 merges none, inf all', range=Range('a number >= 0 or inf', 0)
    )
    passes: int = option(3, 'passes of merging, the first of all maps with the anchors', range=Range('a whole number in 1..100', 1, 101))
    comparison: str = option(
        'float64',
        'compare maps with anchors in 64 bits, or in 16, as released, where a map with a value below 3e-8 is near to none',
        choices=('float64', 'float16'),
    )
    kmeans: bool = option(False, 'cluster all maps by k-means, started at the proposals, which are replaced by the means')
    noise: str = option('none', 'add no noise, as released, or as much as the model is told of', choices=('none', 'ddpm'))
    step: int = own('noise level: the n-th step from the end of the schedule, from 1', range=Range('a number from 1', 1))
    schedule: int = own('steps of the schedule', range=Range('a number of steps in 1..1000', 1, 1001))
    geometry: str = geometry_option()
    side: int = side_option()
    refine: str = own(
        'how maps are enlarged: bilinear, or guided by the edges of the picture (guided filter)', choices=REFINEMENTS, default='none'
    )
    components: bool = own('split regions into connected components', default='False')
    min_area: float = own(
        'merge regions below this share of the picture into the neighbour with the longest common border', range=SHARE, default='0.0'
    )
    seed: int = seed_option()

    def __post_init__(self) -> None:
        check_options(self)

    def resolve(self, spec: Spec) -> DiffSegOptions:
        """Fill in everything left open for a model. UsageError for a step that the schedule does not have."""
        resolved = filled(self, settings_of(spec))
        require(resolved.step <= resolved.schedule, f'step is in 1..{resolved.schedule}, the schedule; got {resolved.step}')
        return resolved


Options = DiffSegOptions


def settings_of(spec: Spec) -> dict[str, Any]:
    """The method's settings for a model: those of the released code, overridden by the model folder's `padseg.json`."""
    return model_settings(DiffSegOptions, 'diffseg', spec, {'side': spec.side, **RELEASED})


class Prepared(NamedTuple):
    """The method, ready to run on a model. backbone: None if stored proposals replace it."""

    options: DiffSegOptions
    backbone: Backbone | None


def deepest(options: DiffSegOptions, spec: Spec) -> int | None:
    """All blocks are read."""
    return spec.layers - 1


def prepare(backbone: Backbone, options: DiffSegOptions, classes: Sequence[str] = (), keep: bool = True) -> Prepared:
    """Resolve the options for a model. UsageError for options that it does not support."""
    require_family('diffseg', FAMILIES, backbone)
    backbone.self_attention_module(0)  # fails early if blocks are compiled
    return Prepared(options.resolve(backbone.spec), backbone)


def without_model(options: DiffSegOptions) -> Prepared:
    """The method, ready for proposals that were kept. options: resolved."""
    return Prepared(options, None)


def maps(images: Sequence[Image], prepared: Prepared, names: Sequence[str] = ()) -> list[TokenMaps]:
    """The proposals, (M, h, w) for each picture, whose values sum to 1 (DiffSeg, Sec. 3.2 and 3.3)."""
    options, backbone = prepared.options, prepared.backbone
    assert backbone is not None
    return stages.batched(latents_of(images, prepared), backbone, partial(proposals_of, backbone=backbone, options=options))


def latents_of(images: Sequence[Image], prepared: Prepared) -> list[Latent]:
    options, backbone = prepared.options, prepared.backbone
    assert backbone is not None
    scheduled = dataclasses.replace(backbone, spec=backbone.spec._replace(steps=options.schedule))
    return [
        stages.encode_steps(image, scheduled, options, (options.step,))[0]
        if options.noise == 'ddpm'
        else stages.encode_without_noise(image, scheduled, options, options.step)
        for image in images
    ]


def proposals_of(latents: Sequence[Latent], backbone: Backbone, options: DiffSegOptions) -> list[TokenMaps]:
    """The proposals of latents with the same shape, from one forward pass."""
    from padseg.methods.stages.self_attention import maps_by_grid

    return merged_maps(latents, maps_by_grid(latents, backbone), options)


def merged_maps(latents: Sequence[Latent], found_maps: MapsByGrid, options: DiffSegOptions) -> list[TokenMaps]:
    """The proposals of latents from their self-attention, which is overwritten."""
    from padseg.methods.stages import anchor_merging as merging

    by_grid, _, grid = found_maps
    found = []
    for number, latent in enumerate(latents):
        every = merging.aggregated_maps({own: maps[number] for own, maps in by_grid.items()}, grid)  # (N, N)
        points = merging.anchors(grid, options.anchors).to(every.device)
        means = merging.merged(every, points, (options.threshold,) * options.passes, options.comparison == 'float16')
        if options.kmeans:
            means = merging.clustered(every, means)
        kept = means.float().unflatten(1, grid)
        found.append(TokenMaps(kept, tuple(f'proposal {own}' for own in range(len(kept))), latent.frame))
    return found


def proposals(maps: TokenMaps, options: DiffSegOptions) -> Proposals:
    """What pixels are divided by; their numbers are those of the released code."""
    return Proposals(maps.maps.double(), tuple((number,) for number in range(len(maps.maps))), maps.frame)


def labels(image: Image, maps: TokenMaps, prepared: Prepared) -> LabelMap:
    """Segment the picture by its proposals, (H, W), without a forward pass (DiffSeg, Sec. 3.4)."""
    options = prepared.options
    return stages.label_map(proposals(maps, options), None, options.components, options.min_area, image, options.refine)


def recorded(options: DiffSegOptions, spec: Spec) -> dict[str, Setting]:
    """All settings that affect the results, for a record."""
    return plain_settings(options.resolve(spec))
