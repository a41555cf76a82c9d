"""Regions of a picture that is held: made again without a forward pass, found under a click, described in words."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any, NamedTuple

import numpy as np

from padseg.demo.picture import Held, without_model
from padseg.demo.settings import Settings
from padseg.evaluation.metrics import region_scores
from padseg.methods import METHODS, kept_method
from padseg.methods.options import MethodOptions, kind_of
from padseg.types import Array, LabelMap, box_of

# Options that make regions larger (1) or smaller (-1); of a method, the first one that comes after the forward pass counts.
KNOBS = {'join': 1, 'threshold': 1, 'tau': -1, 'scale': 1, 'distance': 1, 'clusters': -1, 'cells': -1}
OCTAVES = 3.0  # the slider goes from an eighth of the model's own setting to eight times it


class Found(NamedTuple):
    """A label map on the page. lit: the region that is lit, 0 for none; made_by: what it is from."""

    labels: LabelMap
    made_by: dict[str, str | None]
    lit: int = 0


def knob(held: Held) -> str | None:
    """The option that the slider turns; None if the method has none that comes after its forward pass."""
    kept = kept_method(held.method)
    later = kept.LATER if kept else held.options.__dataclass_fields__
    return next((name for name in KNOBS if name in later and getattr(held.options, name)), None)


def turned(held: Held, coarser: float = 0.0, smallest: float | None = None) -> Any:
    """The options for a place of the sliders.

    coarser: how many times the setting is doubled towards larger regions, in -OCTAVES..OCTAVES, 0 for the model's own setting; smallest:
    share of the picture below which regions join a neighbour, in 0..1, None for the model's own.
    """
    options, name = held.options, knob(held)
    own: type[MethodOptions] = type(options)
    if name and coarser:
        value = getattr(options, name) * 2.0 ** (coarser * KNOBS[name])
        kind, _ = kind_of(own, name)
        options = dataclasses.replace(options, **{name: max(1, round(value)) if kind is int else round(value, 6)})
    if smallest is not None and hasattr(options, 'min_area'):
        options = dataclasses.replace(options, min_area=smallest)
    return options


def regions_of(held: Held, options: Any) -> Found:
    """Make the regions of a picture that is held, without a forward pass."""
    from padseg.methods import stages

    image = held.picture.image
    if held.joining is None:
        labels = METHODS[held.method].labels(image, held.maps, without_model(held, options))
    else:
        proposals, superpixels, order = held.joining
        rules = options.components, options.min_area, image, options.refine
        labels = stages.label_map(proposals, superpixels, *rules, options.join, order, regroup=options.regroup)
    return Found(labels, held.made_by)


def region_at(labels: Array, place: tuple[float, float], shown: tuple[int, int]) -> int:
    """The label (H, W) under a point (x, y) of a preview (height, width); a point outside counts as the nearest inside."""
    rows, columns = (min(side - 1, max(0, int(at * side / of))) for side, at, of in zip(labels.shape, place[::-1], shown, strict=True))
    return int(labels[rows, columns])


def shares(labels: LabelMap) -> dict[int, float]:
    """The regions, or the classes shown, and their shares of the picture."""
    areas = np.bincount(labels.labels.ravel())
    return {number: int(area) / labels.labels.size for number, area in enumerate(areas.tolist()) if number and area}


def count_in_words(labels: LabelMap, seconds: float | None = None) -> str:
    count = len(shares(labels))
    took = f', made in {seconds:.2f} s' if seconds is not None else ''
    return f'{count} {"region" if count == 1 else "regions"}{took}'


def in_words(labels: LabelMap, number: int) -> str:
    """A region's area and box in words."""
    mask = labels.labels == number
    if not number:
        return 'No region here: the model did not look at this part of the picture'
    left, top, width, height = box_of(mask)
    area = int(np.count_nonzero(mask))
    name = f' ({labels.names[number - 1]})' if labels.names else ''
    return (
        f'Region {number}{name} of {int(labels.labels.max())}: {area:,} pixels, {area / mask.size:.1%} of the picture; '
        f'box from ({left}, {top}), {width} wide, {height} high'
    )


def command(held: Held, options: Any, settings: Settings) -> str:
    """The command that makes the same regions from the same file."""
    words = ['padseg', 'run', '--dir', held.picture.name, '--method', held.method]
    if METHODS[held.method].FAMILIES:
        words += ['--model', held.model]
    words += ['--shrink', str(settings.shrink)]
    if held.picture.name.startswith('-'):
        words[3] = f'./{held.picture.name}'
    for name in (knob(held), 'min_area'):
        value, own = getattr(options, name or '', None), getattr(held.options, name or '', None)
        if name and value != own:
            words += [f'--{name.replace("_", "-")}', str(value)]
    return shlex.join([*words, '--coco'])


def proposals_shown(held: Held) -> tuple[Array, tuple[str, ...]] | None:
    """The maps behind the regions, (T, h, w) float32, with their words; None if the method has none."""
    if held.maps is None:
        return None
    return held.maps.maps.float().cpu().numpy(), held.maps.names


def agreement(one: LabelMap, other: LabelMap) -> str:
    """How well two label maps agree, in words."""
    both = [region_scores(*pair).covering for pair in ((one.labels, other.labels), (other.labels, one.labels))]
    return f'They agree by {sum(both) / 2:.0%}: the mean overlap of a region with its best match, weighted by area (covering, both ways).'
