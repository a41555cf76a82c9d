"""A model's predictions at the compared pixels, and the token maps they came from, kept so that another threshold needs no forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from padseg.backbones import Backbone
from padseg.backbones.texts import texts_of
from padseg.errors import UsageError
from padseg.evaluation.protocols import View, seen_prediction
from padseg.exports.png import write_label_map
from padseg.methods.open_vocabulary import Naming, class_maps, classified, naming_of
from padseg.methods.options import LabelOptions, Options, Resolved
from padseg.methods.stages.label_map import label_map
from padseg.methods.stages.proposals import merge
from padseg.methods.stages.saved_maps import forward_settings, read_maps, write_maps
from padseg.methods.stages.superpixels import superpixels
from padseg.methods.stages.token_maps import token_maps
from padseg.run.job import plain_settings
from padseg.types import Array, Frame, Image, LabelMap, TokenMaps

PROMPTS_KEPT = 64  # in memory: many pictures show the same classes


class Predictor(NamedTuple):
    """Label maps of pictures. thresholds: one prediction each. out: folder for labels/ and, with keep_maps, maps/; None keeps nothing."""

    backbone: Backbone
    options: Options
    thresholds: tuple[float, ...] = ()
    out: Path | None = None
    keep_maps: bool = False

    def __call__(self, name: str, image: Image, where: View, present: Sequence[int] = ()) -> list[Array]:
        """Label maps of a picture (H, W, 3) at the compared pixels, 0 = unassigned: (h, w) for each threshold, whatever is present."""
        options = self.options.resolve(self.backbone.spec)
        maps = self.maps(name, image, options)
        inside = superpixels(image, options.superpixels) if options.superpixels else None  # (H, W)
        found = [predicted(image, maps, inside, where, options, threshold) for threshold in self.thresholds or (options.threshold,)]
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


class NamePredictor:
    """The classes of pixels by their names. classes: of the data set, the number of one is its place; background: which of them it is.

    names: 'present', only those that the ground truth of a picture has are looked for in it, as Seg4Diff does; 'all': all of them.
    """

    def __init__(
        self, backbone: Backbone, options: LabelOptions, classes: Sequence[str], background: int | None, names: str, out: Path | None
    ) -> None:
        self.backbone, self.options, self.classes, self.background, self.names, self.out = (
            backbone,
            options,
            classes,
            background,
            names,
            out,
        )
        texts = texts_of(backbone, keep=names == 'all')  # prompts of single pictures would fill the cache
        wanted = lru_cache(PROMPTS_KEPT)(lambda chosen: naming_of(backbone, [classes[number] for number in chosen], options, texts))
        self.naming: Callable[[tuple[int, ...]], Naming] = wanted

    def __call__(self, name: str, image: Image, where: View, present: Sequence[int] = ()) -> list[Array]:
        """The class of every compared pixel of a picture (H, W, 3), as a number from 0: one (h, w). present: its classes."""
        chosen = tuple(present) if self.names == 'present' else tuple(range(len(self.classes)))
        found = np.zeros(where.size, np.int32)
        if chosen:
            naming = self.naming(chosen)
            labels = classified(image, class_maps([image], naming)[0], naming.classes, naming.options).labels
            found = np.array([self.otherwise(labels), *chosen], np.int32)[seen_prediction(labels, where)]
        if self.out:
            write_label_map(LabelMap(found, ()), self.out / 'labels' / f'{name}.png')
        return [found]

    def otherwise(self, labels: Array) -> int:
        """The class of pixels that were given none. UsageError if there are such and it is not to be had."""
        if self.background is None and not labels.all():
            raise UsageError('the data set has no class for pixels without class, which --background-below and some geometries leave')
        return self.background or 0


def predicted(image: Image, maps: TokenMaps, inside: Array | None, where: View, options: Resolved, threshold: float) -> Array:
    """The label map at the compared pixels. Where the model saw just what is compared, maps are enlarged straight to that size."""
    proposals = merge(maps, threshold, options.normalisation)
    direct = maps.frame.box == where.box
    if direct:
        proposals = proposals._replace(frame=Frame(where.size, (0, 0, *where.size)))
        image = np.ascontiguousarray(seen_prediction(image, where))
        inside = None if inside is None else seen_prediction(inside, where)
    labels = label_map(proposals, inside, options.components, options.min_area, image, options.refine, options.join).labels
    return labels if direct else seen_prediction(labels, where)


def source_of(predictor: Predictor | NamePredictor) -> dict[str, Any]:
    """The model and settings behind predictions, as scores.json has them."""
    backbone = predictor.backbone
    named = {'names': predictor.names} if isinstance(predictor, NamePredictor) else {}
    return {
        **backbone.identity._asdict(),
        'device': str(backbone.device),
        'dtype': str(backbone.dtype).removeprefix('torch.'),
        'compiled': backbone.compiled,
        **named,
        **plain_settings(predictor.options.resolve(backbone.spec)),
    }
