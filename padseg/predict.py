"""A model's predictions at the compared pixels, and the token maps they came from, kept so that another threshold needs no forward."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from padseg.backbones import Backbone
from padseg.exports.png import write_label_map
from padseg.labels import label_map
from padseg.labels import superpixels
from padseg.maps import token_maps
from padseg.options import Options
from padseg.options import Resolved
from padseg.proposals import merge
from padseg.protocols import View
from padseg.protocols import seen_prediction
from padseg.saved_maps import forward_settings
from padseg.saved_maps import read_maps
from padseg.saved_maps import write_maps
from padseg.types import Array
from padseg.types import Frame
from padseg.types import Image
from padseg.types import LabelMap
from padseg.types import TokenMaps


class Predictor(NamedTuple):
    """Label maps of pictures. thresholds: one prediction each. out: folder for labels/ and, with keep_maps, maps/; None keeps nothing."""

    backbone: Backbone
    options: Options
    thresholds: tuple[float, ...] = ()
    out: Path | None = None
    keep_maps: bool = False

    def __call__(self, name: str, image: Image, where: View) -> list[Array]:
        """Label maps of a picture (H, W, 3) at the compared pixels, 0 = unassigned: (h, w) for each threshold."""
        options = self.options.resolve(self.backbone.spec)
        maps = self.maps(name, image, options)
        inside = superpixels(image, options.superpixels) if options.superpixels else None  # (H, W)
        found = [predicted(maps, inside, where, options, threshold) for threshold in self.thresholds or (options.threshold,)]
        if self.out:
            write_label_map(LabelMap(found[0], ()), self.out / 'labels' / f'{name}.png')
        return found

    def maps(self, name: str, image: Image, options: Resolved) -> TokenMaps:
        """The picture's token maps: those kept by an earlier run with the same settings, or new ones."""
        if not (self.out and self.keep_maps):
            return token_maps(image, self.backbone, self.options)
        path = self.out / 'maps' / f'{name}.npz'
        made_by = forward_settings(self.backbone, options)
        kept = read_maps(path, made_by)
        if kept is None:
            kept = token_maps(image, self.backbone, self.options)
            write_maps(kept, path, made_by)
        return kept


def predicted(maps: TokenMaps, inside: Array | None, where: View, options: Resolved, threshold: float) -> Array:
    """The label map at the compared pixels. Where the model saw just what is compared, maps are enlarged straight to that size."""
    proposals = merge(maps, threshold, options.normalisation)
    if maps.frame.box != where.box:
        return seen_prediction(label_map(proposals, inside, options.components, options.min_area).labels, where)
    proposals = proposals._replace(frame=Frame(where.size, (0, 0, *where.size)))
    near = None if inside is None else seen_prediction(inside, where)
    return label_map(proposals, near, options.components, options.min_area).labels
