"""The method from picture to label map, as the papers tell it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from padseg.backbones import Backbone
from padseg.images import Readable
from padseg.images import as_image
from padseg.labels import label_map
from padseg.labels import superpixels
from padseg.latents import encode
from padseg.maps import latent_token_maps
from padseg.options import Options
from padseg.proposals import merge
from padseg.types import Image
from padseg.types import LabelMap
from padseg.types import TokenMaps


def segment(image: Readable, backbone: Backbone, options: Options = Options()) -> LabelMap:
    """Label map (H, W) of a picture, (H, W, 3) uint8 RGB or a path (Seg4Diff, Sec. 4.2)."""
    options = options.resolve(backbone.spec)
    image = as_image(image)
    latent = encode(image, backbone, options)  # (1, C, H', W')
    (maps,) = latent_token_maps([latent], backbone, options)  # (T, h, w)
    return regions(image, maps, options)  # (H, W)


def regions(image: Image, maps: TokenMaps, options: Options) -> LabelMap:
    """Label map (H, W) from the token maps of a picture, without another forward; the options must be resolved."""
    assert options.threshold is not None and options.normalisation is not None
    proposals = merge(maps, options.threshold, options.normalisation)  # (M, h, w)
    inside = superpixels(image, options.superpixels) if options.superpixels else None  # (H, W)
    return label_map(proposals, inside, bool(options.split))


def segment_batch(images: Sequence[Image], backbone: Backbone, options: Options) -> list[LabelMap]:
    """Label maps of several pictures; those that follow each other with latents of one shape share a forward.

    On a CPU every picture has its own forward: a matrix product may round otherwise in a batch, and a result must not depend on it.
    """
    options = options.resolve(backbone.spec)
    latents = [encode(image, backbone, options) for image in images]
    alone = backbone.device.type == 'cpu'
    maps: list[TokenMaps] = []
    for _, group in groupby(enumerate(latents), lambda item: item[0] if alone else tuple(item[1].z.shape)):
        maps += latent_token_maps([latent for _, latent in group], backbone, options)
    return [regions(image, each, options) for image, each in zip(images, maps, strict=True)]
