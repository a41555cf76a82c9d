"""The method from picture to label map, as the papers tell it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TypeVar

from padseg.backbones import Backbone
from padseg.images import Readable, as_image
from padseg.methods.options import Options, Resolved
from padseg.methods.stages.label_map import label_map
from padseg.methods.stages.latents import encode
from padseg.methods.stages.proposals import merge
from padseg.methods.stages.superpixels import superpixels
from padseg.methods.stages.token_maps import latent_token_maps
from padseg.types import Image, LabelMap, Latent, TokenMaps

T = TypeVar('T')


def segment(image: Readable, backbone: Backbone, options: Options = Options()) -> LabelMap:
    """Label map (H, W) of a picture, (H, W, 3) uint8 RGB or a path (Seg4Diff, Sec. 4.2)."""
    return segment_batch([as_image(image)], backbone, options)[0]


def segment_batch(images: Sequence[Image], backbone: Backbone, options: Options = Options()) -> list[LabelMap]:
    """Label maps of several pictures, the same as one by one."""
    resolved = options.resolve(backbone.spec)
    maps = token_maps_batch(images, backbone, resolved)  # (T, h, w) each
    return [regions(image, each, resolved) for image, each in zip(images, maps, strict=True)]  # (H, W) each


def token_maps_batch(images: Sequence[Image], backbone: Backbone, options: Resolved) -> list[TokenMaps]:
    """Token maps of several pictures, (T, h, w) each."""
    latents = [encode(image, backbone, options) for image in images]  # (1, C, H', W') each
    return batched(latents, backbone, partial(latent_token_maps, backbone=backbone, options=options))


def regions(image: Image, maps: TokenMaps, options: Resolved) -> LabelMap:
    """Label map (H, W) from the token maps (T, h, w) of a picture: no forward is needed to try another threshold."""
    proposals = merge(maps, options.threshold, options.normalisation)  # (M, h, w)
    inside = superpixels(image, options.superpixels) if options.superpixels else None  # (H, W)
    return label_map(proposals, inside, options.components, options.min_area, image, options.refine, options.join)  # (H, W)


def batched(latents: Sequence[Latent], backbone: Backbone, read: Callable[[list[Latent]], list[T]]) -> list[T]:
    """What `read` gives for every latent, in their order; on a GPU those of one shape share a forward.

    On a CPU a batch saves nothing and would let matrix products round otherwise; a result must not depend on its neighbours.
    """
    groups = [[number] for number in range(len(latents))] if backbone.device.type == 'cpu' else alike([each.z.shape for each in latents])
    found = {number: result for group in groups for number, result in zip(group, read([latents[i] for i in group]), strict=True)}
    return [found[number] for number in range(len(latents))]


def alike(shapes: Sequence[Hashable]) -> list[list[int]]:
    """The places of equal shapes, in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for number, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(number)
    return list(groups.values())
