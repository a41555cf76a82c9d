"""Seg4Diff: segment by the attention of image tokens to the pad tokens of an empty prompt (Kim et al., 2025). Start reading here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from padseg.backbones import opened
from padseg.errors import UsageError
from padseg.images import Readable, as_image, as_images
from padseg.methods import stages
from padseg.methods.options import (
    NORMALISATIONS,
    PIXELS,
    REFINEMENTS,
    SCALE,
    SHARE,
    TOKENS,
    Range,
    check_levels,
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

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.backbones.spec import Spec
    from padseg.methods.options import Setting
    from padseg.types import Image, LabelMap, Proposals, TokenMaps

TASK = 'regions'
FAMILIES = frozenset({'sd3', 'flux', 'flux2', 'auraflow', 'zimage'})
BACKGROUND_BY_RULE = False
# options that come after the token maps
LATER = ('normalisation', 'threshold', 'refine', 'superpixels', 'join', 'components', 'min_area', 'regroup', 'levels')
SMALLEST_TILE = 64  # pixels
TILES = ('tiles', 'overlap')
IF_USED = (*TILES, 'regroup', 'levels')  # options that are recorded only if they are used
UNJOINED = 'regroup compares regions of joined superpixels: it needs --superpixels and --join above 0'
UNREFINED = {'refine': 'none', 'superpixels': 0.0, 'join': 0.0, 'components': False, 'min_area': 0.0}  # the papers end with the argmax
RELEASED = {'step': 8, 'tokens': 'all', 'normalisation': 'released', 'threshold': 0.1, **UNREFINED}  # of the released code, for SD3-medium


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the method. Options left open take the model's own values, filled in by `resolve`.

    Raises UsageError for a value outside its range; the message gives the range.
    """

    layer: int = own('expert block whose attention is read, counted from 0', range=Range('counted from 0', 0))
    step: int = own(
        'noise level: the n-th step from the end of the schedule, from 1', range=Range('counted from the end of the schedule, from 1', 1)
    )
    tokens: str = own("which tokens of the empty prompt are read: all, its pads, its template, or a model's registers", choices=TOKENS)
    normalisation: str = own('how token maps are normalised before merging', choices=NORMALISATIONS)
    threshold: float = own(
        'merge maps whose symmetric KL divergence / 2 is below this; 0 merges none, inf all', range=Range('a number >= 0 or inf', 0)
    )
    geometry: str = geometry_option()
    side: int = side_option()
    refine: str = own('how maps are enlarged: bilinear, or guided by the edges of the picture (guided filter)', choices=REFINEMENTS)
    superpixels: float = own(
        'average maps inside Felzenszwalb superpixels of this scale before the argmax; 0 = off',
        range=SCALE,
    )
    join: float = own(
        'instead of the argmax, join neighbouring superpixels while the odds that they are of different regions are below this; 0 = off',
        range=Range('finite odds >= 0', 0, float('inf')),
    )
    components: bool = own('split regions into connected components')
    min_area: float = own('merge regions below this share of the picture into the neighbour with the longest common border', range=SHARE)
    regroup: float = own(
        'where superpixels are joined: one number for regions that do not touch while the odds that they differ are below this; 0 = off',
        range=Range('finite odds >= 0', 0, float('inf')),
    )
    levels: tuple[float, ...] = own('also write nested label maps at these odds of --join, such as 0.3,0.9,3', default='none')
    seed: int = seed_option()
    tiles: int = option(
        0,
        'look at pictures larger than this through overlapping windows of this many pixels along a side, each seen at --side; 0 = off',
        range=Range('0, or a number of pixels in 64..65536', 0, 65537),
    )
    overlap: int = option(128, 'pixels along a side that neighbouring windows share', range=PIXELS)

    def __post_init__(self) -> None:
        check_options(self)
        require(
            self.tiles == 0 or self.tiles >= SMALLEST_TILE, f'tiles is 0, or a number of pixels in {SMALLEST_TILE}..65536; got {self.tiles}'
        )
        require(self.tiles == 0 or self.overlap <= self.tiles // 2, f'overlap is at most half of tiles; got {self.overlap} of {self.tiles}')
        require(self.tiles == 0 or self.geometry == 'whole', f'tiles are for the geometry whole; got {self.geometry}')
        check_levels(self.levels, 'odds')
        joins = 0.0 not in (self.superpixels, self.join)
        require(joins or not self.levels, 'levels join superpixels: they need --superpixels and --join above 0')
        require(not (self.levels and self.tiles), 'levels are for pictures seen as a whole: leave out --tiles')

    def resolve(self, spec: Spec) -> Options:
        """Fill in everything left open for a model. UsageError for a block or step that the model does not have."""
        resolved = self.with_settings(settings_of(spec))
        require(resolved.layer < spec.layers, f'layer is one of 0..{spec.layers - 1} for {spec.repo}; got {resolved.layer}')
        require(resolved.step <= spec.steps, f'step is one of 1..{spec.steps} for {spec.repo}; got {resolved.step}')
        return resolved

    def with_settings(self, settings: Mapping[str, Any]) -> Options:
        """Fill in what is left open from a model's settings; with a paper's preset, refinements left open are off.

        UsageError for `regroup` where superpixels are not joined.
        """
        resolved = filled(self, {'regroup': 0.0, 'levels': (), **settings, **(UNREFINED if self.geometry != 'whole' else {})})
        joins = 0.0 not in (resolved.superpixels, resolved.join)
        require(joins or not self.regroup, UNJOINED)
        return resolved if joins else dataclasses.replace(resolved, regroup=0.0)


def settings_of(spec: Spec) -> dict[str, Any]:
    """The method's settings for a model: those of the released code, overridden by the model folder's `padseg.json`."""
    return {'layer': spec.layer, 'side': spec.side, **model_settings(Options, 'seg4diff', spec, RELEASED)}


class Prepared(NamedTuple):
    """The method, ready to run on a model. options: resolved; settings: the model's own; backbone: None if stored maps replace it."""

    options: Options
    settings: Mapping[str, Any]
    backbone: Backbone | None


def deepest(options: Options, spec: Spec) -> int | None:
    """The last block to read; later blocks need not be loaded."""
    return spec.layer if options.layer is None else options.layer


def prepare(backbone: Backbone, options: Options, classes: Sequence[str] = (), keep: bool = True) -> Prepared:
    """Resolve the options for a model. UsageError for options that it does not support."""
    require_family('seg4diff', FAMILIES, backbone)
    resolved = options.resolve(backbone.spec)
    backbone.attention_module(resolved.layer)  # fails early if the block was not loaded
    stages.read_prompt(backbone, resolved.tokens)  # or if there are no such tokens
    return Prepared(resolved, settings_of(backbone.spec), backbone)


def without_model(options: Options) -> Prepared:
    """The method, ready for token maps that were kept. options: resolved."""
    return Prepared(options, {}, None)


def maps(images: Sequence[Image], prepared: Prepared, names: Sequence[str] = (), sizes: Sequence[tuple[int, int]] = ()) -> list[TokenMaps]:
    """Token maps of the empty prompt in the expert block, (T, h, w) for each picture (Seg4Diff, Eq. 10).

    sizes: (H, W) of the pictures, for tiles, if `images` are reduced copies.
    """
    options, settings, backbone = prepared
    assert backbone is not None
    if options.tiles:
        sizes = sizes or [(len(image), image.shape[1]) for image in images]
        tiled = [stages.tiled_token_maps(image, backbone, options, size) for image, size in zip(images, sizes, strict=True)]
        return [picture_maps._replace(settings=settings) for picture_maps in tiled]
    latents = [stages.encode(image, backbone, options) for image in images]  # (1, C, H', W') each
    token_maps = stages.batched(latents, backbone, partial(stages.latent_token_maps, backbone=backbone, options=options))
    return [picture_maps._replace(settings=settings) for picture_maps in token_maps]


def proposals(maps: TokenMaps, options: Options) -> Proposals:
    """What pixels are divided by, (M, h, w); their numbers are those of the released code."""
    return stages.merge(maps, options.threshold, options.normalisation)


def labels(image: Image, maps: TokenMaps, prepared: Prepared) -> LabelMap:
    """Merge token maps to proposals and segment the picture by them, (H, W), without a forward pass (Seg4Diff, Sec. 4.2)."""
    options = prepared.options
    merged = proposals(maps, options)  # (M, h, w)
    if options.tiles:
        whole = None if maps.whole is None else proposals(maps._replace(maps=maps.whole), options)
        return stages.tiled_label_map(image, merged, options, whole)
    inside = stages.superpixels_of(image, options.superpixels) if options.superpixels else None  # (H, W)
    rules = options.components, options.min_area, image, options.refine
    if not options.levels:
        return stages.label_map(merged, inside, *rules, options.join, regroup=options.regroup)  # (H, W)
    assert inside is not None
    order = stages.join_order(merged, inside, image, options.refine, max(options.join, *options.levels))
    finest, *coarser = sorted(options.levels)
    base = stages.label_map(merged, inside, *rules, finest, order)
    levels = stages.coarsened(base.labels, order, merged.frame, coarser, options.components)
    usual = stages.label_map(merged, inside, *rules, options.join, order, regroup=options.regroup)
    return usual._replace(levels=(*levels[::-1], base.labels))


def swept(options: Options) -> str:
    """The option that decides how many regions there are."""
    return 'join' if options.superpixels and options.join else 'threshold'


def recorded(options: Options, spec: Spec) -> dict[str, Setting]:
    """All settings that affect the results, for a record."""
    resolved = options.resolve(spec)
    used = {**dict.fromkeys(TILES, resolved.tiles), 'regroup': resolved.regroup, 'levels': resolved.levels}
    return {name: value for name, value in plain_settings(resolved).items() if used.get(name, True)}


def merged_settings(settings: Mapping[str, Setting], given: Mapping[str, Setting]) -> dict[str, Setting]:
    """A run's settings with those given for merging its maps again, without what then has no effect.

    UsageError for `regroup` where superpixels are not joined.
    """
    joins = bool(settings.get('superpixels')) and bool(settings.get('join'))
    require(joins or not given.get('regroup'), UNJOINED)
    return {name: value for name, value in settings.items() if joins or name != 'regroup'}


@overload
def segment(image: Readable, backbone: Backbone | str | None = ..., options: Any = ..., *, method: str = ...) -> LabelMap: ...
@overload
def segment(image: list[Any], backbone: Backbone | str | None = ..., options: Any = ..., *, method: str = ...) -> list[LabelMap]: ...
def segment(
    image: Any, backbone: Backbone | str | None = None, options: Any = None, *, method: str = 'seg4diff'
) -> LabelMap | list[LabelMap]:
    """Segment a picture into regions: a label map (H, W), or a list of label maps for several pictures.

    image: a path, a file object, a PIL image, a uint8 array (H, W), (H, W, 3) or (H, W, 4), or a list of these. backbone: a loaded model,
    or a model name, which is loaded once per process; by default `tiny`, or the model of the method's paper where the method does not
    support `tiny`; methods without a model ignore it. method: one of `padseg run --method`. options: the method's, by default as they are.
    """
    from padseg.methods import method_named, options_of, usual_model  # which imports this module

    chosen = method_named(method, TASK)
    options = options_of(chosen, method, options)
    pictures = as_images(image)
    model = usual_model(chosen) if backbone is None else backbone
    prepared = chosen.prepare(opened(model, partial(chosen.deepest, options)) if chosen.FAMILIES else None, options)
    found = chosen.maps(pictures, prepared)
    results = [chosen.labels(picture, picture_maps, prepared) for picture, picture_maps in zip(pictures, found, strict=True)]
    return results if isinstance(image, (list, tuple)) else results[0]


@overload
def token_maps(image: Readable, backbone: Backbone | str = ..., options: Options = ...) -> TokenMaps: ...
@overload
def token_maps(image: list[Any], backbone: Backbone | str = ..., options: Options = ...) -> list[TokenMaps]: ...
def token_maps(image: Any, backbone: Backbone | str = 'tiny', options: Options = Options()) -> TokenMaps | list[TokenMaps]:
    """Return the token maps (T, h, w) behind `segment`, with the same arguments; `regions` turns them into a label map."""
    results = maps(as_images(image), prepare(opened(backbone, partial(deepest, options)), options))
    return results if isinstance(image, (list, tuple)) else results[0]


def regions(image: Readable, maps: TokenMaps, options: Options = Options()) -> LabelMap:
    """Return the label map (H, W) that `segment` gives with these options, from the picture's token maps and without the model.

    Options that decide the token maps themselves have no effect here. UsageError if an option is left open and the maps do not record the
    model's setting.
    """
    resolved = options.with_settings(maps.settings)
    missing = [name for name in LATER if getattr(resolved, name) is None]
    if missing:
        raise UsageError(f"these token maps do not record the model's settings for {', '.join(missing)}: set these options")
    return labels(as_image(image), maps, Prepared(resolved, maps.settings, None))
