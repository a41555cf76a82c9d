"""DiffCut: cut the graph of image tokens in two, again and again, by the likeness of their features (Couairon et al., NeurIPS 2024).

Features come from one layer, by default the last self-attention of a U-Net's encoder. The cuts are in stages/normalised_cut.py; each pixel
belongs to the region whose mean feature is most like its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from padseg.methods import seg4diff, stages
from padseg.methods.options import (
    SHARE,
    Range,
    check_levels,
    check_options,
    filled,
    geometry_option,
    model_settings,
    own,
    plain_settings,
    require,
    require_family,
    seed_option,
    side_option,
)
from padseg.types import Proposals

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.backbones.spec import Spec
    from padseg.methods.options import Setting
    from padseg.types import Array, Image, LabelMap, TokenMaps

TASK = 'regions'
FAMILIES = seg4diff.FAMILIES | {'unet', 'pixart'}
BACKGROUND_BY_RULE = False
# options that come after the features
LATER = ('tau', 'alpha', 'graph', 'clusters', 'tokens', 'refine', 'pamr_times', 'pamr_side', 'components', 'min_area', 'levels')
FEATURES = ('output', 'keys', 'maps')
PLAIN = {
    'alpha': 10.0,
    'graph': 'whole',
    'clusters': 'cut',
    'tokens': 1024,
    'refine': 'none',
    'pamr_times': 10,
    'pamr_side': 256,
    'components': False,
    'min_area': 0.0,
    'levels': (),
}
ENCODER = 'encoder'  # in place of a layer's name: the last one of a U-Net's encoder
BLOCK = 'vit-block'


MOST_SCORES = 2**28  # numbers: likeness of every token to every region


@dataclasses.dataclass(frozen=True)
class DiffCutOptions:
    """Options of DiffCut. Options left open take the model's own values, filled in by `resolve`.

    Raises UsageError for a value outside its range; the message gives the range.
    """

    tau: float = own(
        'cut in two wherever the normalised cut is below this; 0 cuts nothing, from 2 on each token is a region',
        range=Range('a number >= 0', 0, 1e9),
    )
    alpha: float = own('power of the likeness of tokens', range=Range('a number in 0..1000', 0, 1001), default='10.0')
    features: str = own(
        "what tokens are compared by: the self-attention's output, its keys, or the maps of the empty prompt's tokens", choices=FEATURES
    )
    layer: str = own("layer of the features, by number or name (vit-block4); encoder is the last one of a U-Net's encoder")
    graph: str = own(
        'tokens of a cut: all, or, as released, without those that have a likeness of 0 to any other',
        choices=('whole', 'released'),
        default='whole',
    )
    clusters: str = own(
        'regions by cuts, or by AutoSC, which needs no threshold; as released, it takes the vectors of the wrong exponent',
        choices=('cut', 'autosc', 'autosc-released'),
        default='cut',
    )
    tokens: int = own('average features to at most so many tokens', range=Range('a whole number in 4..16384', 4, 16385), default='1024')
    step: int = own('noise level: the n-th step from the end of the schedule, from 1', range=Range('a number from 1', 1))
    schedule: int = own('steps of the schedule', range=Range('a number of steps in 1..1000', 1, 1001))
    geometry: str = geometry_option()
    side: int = side_option()
    refine: str = own(
        'how maps are enlarged: bilinear, guided by the edges of the picture (guided filter), or by pixel-adaptive refinement (PAMR)',
        choices=('none', 'guided', 'pamr'),
        default='none',
    )
    pamr_times: int = own('how often PAMR mixes neighbours', range=Range('a whole number in 1..1000', 1, 1001), default='10')
    pamr_side: int = own(
        "side in pixels of PAMR's masks (of the square with the same area)",
        range=Range('a number of pixels in 16..4096', 16, 4097),
        default='256',
    )
    components: bool = own('split regions into connected components', default='False')
    min_area: float = own(
        'merge regions below this share of the picture into the neighbour with the longest common border', range=SHARE, default='0.0'
    )
    levels: tuple[float, ...] = own('also write nested label maps at these thresholds, such as 0.2,0.5', default='none')
    seed: int = seed_option()

    def __post_init__(self) -> None:
        check_options(self)
        check_levels(self.levels, 'numbers')

    def resolve(self, spec: Spec) -> DiffCutOptions:
        """Fill in everything left open for a model. UsageError for a layer or step that the model does not have."""
        resolved = filled(self, settings_of(spec))
        number = number_of(resolved.layer)
        require(number is None or number < spec.layers, f'layers are in 0..{spec.layers - 1} for {spec.repo}; got {resolved.layer}')
        require(resolved.layer != ENCODER or spec.family == 'unet', f'{spec.repo} has no encoder: name a layer')
        require(resolved.step <= resolved.schedule, f'step is in 1..{resolved.schedule}, the schedule; got {resolved.step}')
        return resolved


Options = DiffCutOptions


def settings_of(spec: Spec) -> dict[str, Any]:
    """The method's settings for a model, overridden by the model folder's `padseg.json`: those of the released code for U-Nets.

    For other models they are our own: the maps of the expert block's tokens have proved better than its keys and its output.
    """
    released = {'tau': 0.5, 'features': 'output', 'layer': ENCODER, 'step': 50, 'schedule': 1000, 'side': 1024}
    if spec.family == 'pixart':
        released |= {'layer': str(spec.layer), 'side': spec.side}
    if spec.family in seg4diff.FAMILIES:
        step = seg4diff.settings_of(spec)['step']
        released = {'tau': 0.3, 'features': 'maps', 'layer': str(spec.layer), 'step': step, 'schedule': spec.steps, 'side': spec.side}
    return model_settings(DiffCutOptions, 'diffcut', spec, {**PLAIN, **released})


def number_of(layer: str) -> int | None:
    """A layer's number, if its name tells it."""
    number = layer.removeprefix(BLOCK)
    return int(number) if number.isdecimal() else None


class Prepared(NamedTuple):
    """The method, ready to run on a model. layer: its number; backbone: None if stored features replace it."""

    options: DiffCutOptions
    layer: int
    backbone: Backbone | None


def deepest(options: DiffCutOptions, spec: Spec) -> int | None:
    """The last block to load: the one after the features' layer if its output is read."""
    settings = filled(options, settings_of(spec))
    number = number_of(settings.layer)
    if number is None or spec.family not in seg4diff.FAMILIES:
        return spec.layers - 1
    last = number + (settings.features == 'output')
    return last if last < spec.layers else None


def prepare(backbone: Backbone, options: DiffCutOptions, classes: Sequence[str] = (), keep: bool = True) -> Prepared:
    """Resolve the options for a model and find the layer. UsageError for what it does not support."""
    require_family('diffcut', FAMILIES, backbone)
    resolved = options.resolve(backbone.spec)
    layer = number_of(resolved.layer)
    if layer is None:
        names = backbone.layer_names()
        wanted = [number for number, name in enumerate(names) if name == resolved.layer]
        if resolved.layer == ENCODER:
            wanted = [number for number, name in enumerate(names) if name.startswith('down-')]
        require(bool(wanted), f'{backbone.identity.model} has no layer {resolved.layer}; it has 0..{len(names) - 1}, such as {names[-1]}')
        layer = wanted[-1]
    if resolved.features == 'output':
        backbone.self_attention_module(layer, ('output',))  # fails early if it was not loaded
    return Prepared(resolved, layer, backbone)


def without_model(options: DiffCutOptions) -> Prepared:
    """The method, ready for features that were kept. options: resolved."""
    return Prepared(options, -1, None)


def are_shares(options: DiffCutOptions) -> bool:
    """Whether what is kept are shares of attention."""
    return options.features == 'maps'


def maps(images: Sequence[Image], prepared: Prepared, names: Sequence[str] = ()) -> list[TokenMaps]:
    """The features of the layer's image tokens, (C, h, w) for each picture."""
    from padseg.methods.stages.self_attention import features_of_layer

    options, layer, backbone = prepared
    assert backbone is not None
    scheduled = dataclasses.replace(backbone, spec=backbone.spec._replace(steps=options.schedule))
    latents = [stages.encode_steps(image, scheduled, options, (options.step,))[0] for image in images]
    return stages.batched(latents, backbone, partial(features_of_layer, backbone=backbone, layer=layer, of=options.features))


def proposals(maps: TokenMaps, options: DiffCutOptions) -> Proposals:
    """What pixels are divided by, (K, h, w); their numbers are those of the released code."""
    features, regions_at = tokens_of(maps, options)
    return scored(features, regions_at(options.tau), maps)


def labels(image: Image, maps: TokenMaps, prepared: Prepared) -> LabelMap:
    """Cut tokens into regions and segment the picture by the regions' mean features, (H, W), without a forward pass."""
    options = prepared.options
    features, regions_at = tokens_of(maps, options)
    regions = divided(image, scored(features, regions_at(options.tau), maps), options)
    if not options.levels:
        return regions
    taus = sorted(options.levels)
    finest = regions_at(taus[-1])  # (N,)
    return regions._replace(
        levels=nested(divided(image, scored(features, finest, maps), options), finest, [regions_at(tau) for tau in taus])
    )


def nested(found: LabelMap, finest: Array, levels: Sequence[Array]) -> tuple[Array, ...]:
    """Label maps at all levels, from coarse to fine, each of which divides the regions of the one before it.

    The finest is a label map as any other; those before it join its regions as the tree of cuts does. finest, levels: regions of tokens.
    """
    import numpy as np

    maps = []
    for regions in levels:
        joined = dict(zip(finest.tolist(), regions.tolist(), strict=True))
        numbers = np.array([-1, *(joined[region] for (region,) in found.tokens)])
        pixels = numbers[found.labels]
        maps.append(np.where(found.labels > 0, stages.as_regions(pixels).labels, 0))
    return tuple(maps)


def divided(image: Image, proposals: Proposals, options: DiffCutOptions) -> LabelMap:
    """Give each pixel to the region that it is most like."""
    import torch

    refine = options.refine
    if refine == 'pamr':
        proposals, refine = proposals._replace(maps=torch.from_numpy(pamr_masks(image, proposals, options))), 'none'
    return stages.label_map(proposals, None, options.components, options.min_area, image, refine)


class Features(NamedTuple):
    """Features of length 1. every: (h w, C); few: (N, C), those that are cut, averaged from them."""

    every: Array
    few: Array


def tokens_of(maps: TokenMaps, options: DiffCutOptions) -> tuple[Features, Callable[[float], Array]]:
    """Features of length 1, and a function from a threshold among the options to the region of each token that is cut, (N,)."""
    from padseg.methods.stages import normalised_cut as cuts

    values = maps.maps.double().cpu()  # (C, h, w)
    if options.features == 'maps':
        values = (values / values.sum(0).clamp_min(1e-12)).sqrt()  # shares of a pixel; then they have a length of 1
    features = Features(*(cuts.unit(own.flatten(1).T.numpy()) for own in (values, averaged(values, options.tokens))))
    if options.clusters != 'cut':
        clusters = cuts.automatic_clusters(features.few, options.clusters == 'autosc-released')
        return features, lambda tau: clusters
    highest = max(options.tau, *options.levels, 0)
    tree = cuts.cut_tree(cuts.affinity(features.few, options.alpha), highest, options.graph == 'released')
    return features, partial(cuts.token_labels, tree)


def scored(features: Features, regions: Array, maps: TokenMaps) -> Proposals:
    """The likeness of each token to the mean feature of each region. It is linear in the features, so it can be enlarged in their place."""
    import torch

    from padseg.images import ImageError
    from padseg.methods.stages.normalised_cut import prototypes

    if (count := int(regions.max()) + 1) * len(features.every) > MOST_SCORES:
        raise ImageError(f'{count} regions of {len(features.every)} tokens take too much memory: try a lower --tau')
    scores = (prototypes(features.few, regions) @ features.every.T).reshape(-1, *maps.maps.shape[1:])  # (K, h, w)
    return Proposals(torch.from_numpy(scores), tuple((number,) for number in range(len(scores))), maps.frame)


def averaged(values: Any, most: int) -> Any:
    """Features averaged to at most so many tokens of the same shape: (C, h, w) -> (C, h', w')."""
    from torch.nn.functional import adaptive_avg_pool2d

    height, width = values.shape[1:]
    if height * width <= most:
        return values
    factor = math.ceil(math.sqrt(height * width / most))
    return adaptive_avg_pool2d(values, (max(1, height // factor), max(1, width // factor)))


def pamr_masks(image: Image, proposals: Proposals, options: DiffCutOptions) -> Array:
    """The masks of all regions, refined on a reduced copy of what the model saw: (K, h', w') float32."""
    import cv2
    import numpy as np

    from padseg.methods.stages.pamr import refined_masks

    top, left, height, width = proposals.frame.box
    scale = min(1.0, options.pamr_side / math.sqrt(height * width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small = cv2.resize(image[top : top + height, left : left + width], size[::-1], interpolation=cv2.INTER_AREA) / np.float32(255)
    large = np.stack([stages.upsample(values, size) for values in proposals.maps.numpy().astype(np.float32)])
    best = large.argmax(0)
    return refined_masks(np.stack([best == number for number in range(len(large))]), small, options.pamr_times)


def swept(options: DiffCutOptions) -> str:
    """The option that decides how many regions there are."""
    return 'tau'


def recorded(options: DiffCutOptions, spec: Spec) -> dict[str, Setting]:
    """All settings that affect the results, for a record."""
    return plain_settings(options.resolve(spec))
