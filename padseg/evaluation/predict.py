"""A method's predictions at the compared pixels, and their token maps, which are kept so that another threshold needs no forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from padseg.backbones import Backbone
from padseg.errors import UsageError
from padseg.evaluation.binary_maps import above_mean, nearest
from padseg.evaluation.protocols import NAMINGS, RELEASED_CUT, Naming, Protocol, View, seen_prediction
from padseg.exports.png import write_label_map
from padseg.methods import Method, seg4diff, swept_method
from padseg.methods.stages.enlarging import upsample
from padseg.methods.stages.labels import argmax
from padseg.methods.stages.saved_maps import forward_settings, read_maps, write_maps
from padseg.system.files import inside
from padseg.types import Array, Frame, Image, LabelMap, TokenMaps

PROMPTS_KEPT = 64  # in memory, because many pictures show the same classes

# (picture name, pixels (H, W, 3), compared view, classes in its ground truth) -> one prediction (h, w) per setting.
Predict = Callable[[str, Image, View, Sequence[int]], list[Array]]


def predict_regions(
    method: Method,
    prepared: Any,
    thresholds: Sequence[float] = (),
    out: Path | None = None,
    keep_maps: bool = False,
    rules: Protocol | None = None,
) -> Predict:
    """Predict regions, 0 = unassigned, once per threshold.

    out: folder for labels/ and, with keep_maps, maps/; None keeps nothing. rules: where they take ids as they are, regions that were
    not refined have the numbers of their proposals from 0 on, as in released code.
    """
    settings = [prepared]
    if thresholds and (sweeping := swept_method(method)):
        swept = sweeping.swept(prepared.options)
        settings = [prepared._replace(options=dataclasses.replace(prepared.options, **{swept: value})) for value in thresholds]

    def predict(name: str, image: Image, where: View, present: Sequence[int] = ()) -> list[Array]:
        maps = (
            kept_maps(method, prepared, image, inside(out, f'maps/{name}.npz')) if out and keep_maps else method.maps([image], prepared)[0]
        )
        if rules and has_numbers(method, prepared.options, maps, where, rules):
            predictions = [proposal_numbers(setting.options, maps, where, rules, method) for setting in settings]
        else:
            predictions = [compared_labels(method, setting, image, maps, where) for setting in settings]
        if out:
            write_label_map(LabelMap(predictions[0], ()), inside(out, f'labels/{name}.png', linked=True))
        return predictions

    return predict


def kept_maps(method: Method, prepared: Any, image: Image, path: Path) -> Any:
    """Load the picture's token maps from an earlier run with the same settings, or compute and store them."""
    made_by = forward_settings(prepared.backbone, prepared.options)
    if hasattr(prepared.options, 'features'):
        made_by += f' features {prepared.options.features} schedule {prepared.options.schedule}'
    maps = read_maps(path, made_by)
    if maps is None:
        maps = method.maps([image], prepared)[0]
        write_maps(maps, path, made_by)
    return maps


def compared_labels(method: Method, prepared: Any, image: Image, maps: Any, where: View) -> Array:
    """Label map at the compared pixels. If the model saw exactly those, maps are enlarged directly to that size."""
    if maps is not None and maps.frame.box == where.box:
        direct = maps._replace(frame=Frame(where.size, (0, 0, *where.size)))
        return method.labels(np.ascontiguousarray(seen_prediction(image, where)), direct, prepared).labels
    return seen_prediction(method.labels(image, maps, prepared).labels, where)


def has_numbers(method: Method, options: Any, maps: Any, where: View, rules: Protocol) -> bool:
    """Whether numbers count, and the regions at the compared pixels are plainly those of the strongest proposals."""
    if (
        rules.ids != 'as they are'
        or not hasattr(method, 'proposals')
        or any(getattr(options, name, value) != value for name, value in seg4diff.UNREFINED.items())
    ):
        return False
    size = maps.frame.size
    return bool(maps.frame.box == ((0, 0, *size) if rules.compare == RELEASED_CUT else where.box))


def proposal_numbers(options: Any, maps: TokenMaps, where: View, rules: Protocol, method: Any = seg4diff) -> Array:
    """The number of the strongest proposal at each compared pixel, proposals without a pixel counted too: (h, w).

    Maps are enlarged straight to the compared size; by the rules of Seg4Diff's released code first to the size of the picture, of which
    the upper left corner is then cut out and enlarged.
    """

    def enlarged(values: Array) -> Array:
        if rules.compare != RELEASED_CUT:
            return upsample(values, where.size)
        _, _, height, width = where.box
        cut = upsample(values, maps.frame.size)[:height, :width]
        return cut if cut.shape == where.size else upsample(cut, where.size)

    return argmax(method.proposals(maps, options), lambda values: [(slice(None), enlarged(values))])


def predict_classes(
    method: Method,
    backbone: Backbone | None,
    options: Any,
    classes: Sequence[str],
    background: int | None,
    names: str = 'present',
    out: Path | None = None,
    taus: Sequence[float] = (),
    rules: Protocol | None = None,
    naming: Naming | None = None,
) -> Predict:
    """Predict the class of every compared pixel, as a number from 0. classes: of the data set; background: number of that class.

    names: 'present' looks only for classes in the picture's ground truth, as Seg4Diff does; 'all' looks for all of them, but not for
    background if the method leaves it to a rule. taus: thresholds of that rule to predict with, too, after the method's own.
    rules: if they count an object, its map follows the prediction. naming: what the protocol calls classes and background.
    """
    unnamed = background if method.BACKGROUND_BY_RULE or naming else None  # a class that is not looked for
    of_object = rules is not None and rules.counted == 'object'
    keep = names == 'all'  # prompts for single pictures would fill the cache

    @lru_cache(PROMPTS_KEPT)
    def prepared_for(chosen: tuple[int, ...]) -> Any:
        names = [classes[number] for number in chosen]
        if not naming:
            return method.prepare(backbone, options, names, keep)
        names = [naming.called.get(name, name) for name in names]
        return method.prepare(backbone, as_told(options, names, naming), names, keep)

    def predict(name: str, image: Image, where: View, present: Sequence[int] = ()) -> list[Array]:
        wanted = present if names == 'present' else range(len(classes))
        chosen = tuple(number for number in wanted if number != unnamed)
        predictions = [np.full(where.size, unnamed or 0, np.int32)] * (1 + len(taus))
        if chosen:
            prepared = prepared_for(chosen)
            maps = method.maps([image], prepared, (name,))[0]
            settings = [prepared, *(prepared._replace(options=dataclasses.replace(prepared.options, tau=tau)) for tau in taus)]
            found = [method.labels(image, maps, setting).labels for setting in settings]
            predictions = [np.array([otherwise(labels, background), *chosen], np.int32)[seen_prediction(labels, where)] for labels in found]
            if rules and of_object and not method.BACKGROUND_BY_RULE:
                values = object_map(maps, where)
                if rules.decision == 'above mean':
                    assert background is not None
                    predictions = [np.where(nearest(above_mean(values), where.size), chosen[0], background).astype(np.int32)]
                predictions = [predictions[0], nearest(values, where.size)]
        if out:
            write_label_map(LabelMap(predictions[0], ()), inside(out, f'labels/{name}.png', linked=True))
        return predictions

    return predict


def naming_for(method: Method, options: Any, protocol: str, background: int | None) -> Naming | None:
    """What a protocol tells a method on a data set with this class for background, if the method takes words for it and none were given."""
    takes = not method.BACKGROUND_BY_RULE and getattr(options, 'background_words', None) == ()
    return NAMINGS.get(protocol) if takes and background is not None else None


def as_told(options: Any, names: Sequence[str], told: Naming) -> Any:
    """Options with a protocol's names of background and, for a method that takes one, its prompt, unless another was given."""
    given: dict[str, Any] = {'background_words': tuple(word for word in told.background if word not in names)}
    if hasattr(options, 'caption') and options.caption is None and options.captions is None and options.on == 'words':
        given['caption'] = ','.join(told.caption.format(name) for name in names)
    return dataclasses.replace(options, **given)


def object_map(maps: TokenMaps, where: View) -> Array:
    """The map of the first name, (h, w). UsageError if the model did not see all that is compared."""
    if maps.frame.box != where.box:
        raise UsageError('the map of an object must show the whole picture: leave out --geometry')
    return np.asarray(maps.maps[0].double().cpu())


def otherwise(labels: Array, background: int | None) -> int:
    """Class of unlabelled pixels. UsageError if there are any and the data set has no class for them."""
    if background is None and not labels.all():
        raise UsageError('the data set has no class for unlabelled pixels, which --background-below, --tau and some geometries leave')
    return background or 0
