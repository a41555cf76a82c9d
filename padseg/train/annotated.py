"""Annotated pictures as training examples: crops with the masks and names of their regions; and a check before training begins."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from padseg.datasets.base import VOID, some
from padseg.errors import UnreadableLabels, UsageError
from padseg.images import ImageError
from padseg.train.sources import Picture, Regions, Size, Source, open_source, read_captions, read_image, read_regions, with_captions

if TYPE_CHECKING:
    from padseg.types import Array

CROPS = ('random', 'released', 'whole')
RELEASED = 640 / 1024  # the side of the released code's crop, as a share of the picture's
SENTENCES = 2  # of a caption of SA-1B
LOOKS = 500  # pictures of a source that are read before training begins


class View(NamedTuple):
    """How an example is cut from a picture. side: of the result in pixels; flip: mirror half of them.

    crop: `random` resizes the shorter side to `side` and cuts a square at random; `released` takes the top left 640/1024 of that square, as
    the released code does by its SIZE_DIVISIBILITY, and resizes the picture, but not its masks, back to `side`; `whole` squeezes the whole
    picture. least_area: masks of no more than this share of the crop are left out; most: number of masks. merge: whether regions of one
    class are one mask.
    """

    side: int = 1024
    crop: str = 'random'
    flip: bool = True
    least_area: float = 0.005
    most: int = 32
    merge: bool = True


class Example(NamedTuple):
    """A picture after crop and resize.

    image: (3, side, side) float32 in 0..1, RGB; masks: (M, h, w) bool, largest first, M may be 0, h = w = side but for the crop `released`;
    names: the class of each mask, or () if regions have no classes; caption: a description, or ''.
    """

    image: Tensor
    masks: Tensor
    names: tuple[str, ...]
    caption: str


class Checked(NamedTuple):
    """What the pictures of a source hold that were looked at. void: share of their pixels in no region; maps: number of
    annotations, one or more a picture; regions: number in all of these.

    smallest, largest: sizes by area; sizes: number of different ones; classes: in how many pictures each class is; empty: names of pictures
    without regions; bad: pictures that cannot be used, with reasons.
    """

    looked: int
    void: float
    maps: int
    regions: int
    smallest: Size
    largest: Size
    sizes: int
    classes: dict[str, int]
    empty: tuple[str, ...]
    bad: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Annotated:
    """Annotated pictures of one or several sources, one after the other."""

    sources: tuple[Source, ...]
    checks: tuple[Checked, ...]

    def __len__(self) -> int:
        return sum(len(source.pictures) for source in self.sources)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all classes, in order of the sources."""
        return tuple(dict.fromkeys(name for source in self.sources for name in source.names))

    @property
    def digest(self) -> str:
        """SHA-256 of what the sources hold by name: the same for the same pictures in the same order."""
        held = hashlib.sha256()
        for source in self.sources:
            held.update(repr((source.kind, source.names, source.table, source.void)).encode('utf-8', 'surrogatepass'))
            for picture in source.pictures:
                held.update(repr((picture.name, picture.regions, picture.captions)).encode('utf-8', 'surrogatepass'))
        return held.hexdigest()

    def picture(self, index: int) -> tuple[Source, Picture]:
        """The picture with this number, and its source."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        for source in self.sources:
            if index < len(source.pictures):
                break
            index -= len(source.pictures)
        return source, source.pictures[index]

    def example(self, index: int, rng: np.random.Generator, view: View) -> Example:
        """Read a picture and cut an example from it: the same for the same number, state of the generator and view.

        Raises ImageError or UnreadableLabels with the file and the reason.
        """
        source, picture = self.picture(index)
        annotator, caption, top, left, turn = rng.random(5)  # always five, so that what follows does not depend on the picture
        image = read_image(source, picture)
        size = image.shape[0], image.shape[1]
        regions = read_regions(source, picture, size, int(annotator * len(picture.truths)))
        window = window_of(size, view, (top, left), bool(view.flip and turn < 0.5))
        masks, names = masks_of(regions, source.names, window, view)
        captions = picture.captions
        return Example(
            torch.from_numpy(cut_image(image, window, view.side)).permute(2, 0, 1).float() / 255,
            torch.from_numpy(masks),
            names,
            captions[int(caption * len(captions))] if captions else '',
        )


class Window(NamedTuple):
    """A crop: resize the picture to `size`, cut a square of `side` pixels at (top, left), mirror it or not."""

    size: Size
    top: int
    left: int
    side: int
    mirrored: bool


def window_of(size: Size, view: View, at: tuple[float, float], mirrored: bool) -> Window:
    """The crop of a picture of size (H, W). at: where the square is, each from 0 (top or left) to below 1."""
    if view.crop not in CROPS:
        raise UsageError(f'crop is one of {", ".join(CROPS)}; got {view.crop}')
    side = view.side
    if view.crop == 'whole':
        return Window((side, side), 0, 0, side, mirrored)
    scale = side / min(size)
    height, width = (max(side, round(length * scale)) for length in size)
    top, left = (int(share * (length - side + 1)) for share, length in zip(at, (height, width), strict=True))
    if view.crop == 'random':
        return Window((height, width), top, left, side, mirrored)
    part = max(1, round(side * RELEASED))  # the square is mirrored first, so its top left is the top right of the picture's
    return Window((height, width), top, left + side - part if mirrored else left, part, mirrored)


def cut(pixels: Array, window: Window, interpolation: int) -> Array:
    """Cut a window out of an array (H, W, …)."""
    height, width = window.size
    if pixels.shape[:2] != window.size:
        pixels = cv2.resize(pixels, (width, height), interpolation=interpolation)
    part = pixels[window.top : window.top + window.side, window.left : window.left + window.side]
    return np.ascontiguousarray(part[:, ::-1] if window.mirrored else part)


def cut_image(image: Array, window: Window, side: int) -> Array:
    """Cut a window out of a picture and resize it to (side, side, 3)."""
    smaller = window.size[0] < image.shape[0] or window.size[1] < image.shape[1]
    part = cut(image, window, cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    return part if window.side == side else cv2.resize(part, (side, side), interpolation=cv2.INTER_LINEAR)


def masks_of(regions: Regions, names: Sequence[str], window: Window, view: View) -> tuple[Array, tuple[str, ...]]:
    """The masks of a window, (M, side, side) bool, largest first, with the names of their classes."""
    least = view.least_area * window.side**2
    if regions.labels is not None:
        masks, classes = masks_in(regions.labels, regions.classes, window, view, least)
    else:
        masks, classes = masks_from(regions, window, view, least)
    if not masks:
        return np.zeros((0, window.side, window.side), bool), ()
    return np.stack(masks), tuple(names[one] for one in classes)


def masks_in(labels: Array, classes: Sequence[int], window: Window, view: View, least: float) -> tuple[list[Array], list[int]]:
    """Masks from a label map."""
    if view.merge and classes:
        labels = np.array([*classes, VOID], np.int32)[labels]  # VOID reads the last entry
    part = cut(labels, window, cv2.INTER_NEAREST_EXACT)
    values, areas = np.unique(part[part >= 0], return_counts=True)
    order = [place for place in np.argsort(-areas, kind='stable') if areas[place] > least][: view.most]
    chosen = values[order].tolist()
    masks = [part == value for value in chosen]
    return masks, (chosen if view.merge else [classes[value] for value in chosen]) if classes else []


def masks_from(regions: Regions, window: Window, view: View, least: float) -> tuple[list[Array], list[int]]:
    """Masks from run lengths."""
    from pycocotools import mask

    groups = [[runs] for runs in regions.masks]
    classes = list(regions.classes)
    if view.merge and classes:
        together: dict[int, list[dict[str, object]]] = {}
        for one, runs in zip(regions.classes, regions.masks, strict=True):
            together.setdefault(one, []).append(runs)
        groups, classes = list(together.values()), list(together)
    scale = window.size[0] * window.size[1] / (regions.size[0] * regions.size[1])
    found = []
    for place, group in enumerate(groups):
        runs = mask.merge(group) if len(group) > 1 else group[0]
        if float(mask.area(runs)) * scale <= least / 2:  # what resizing cannot make up for; decoding takes longer
            continue
        part = cut(mask.decode(runs), window, cv2.INTER_NEAREST_EXACT).astype(bool)
        area = np.count_nonzero(part)
        if area > least:
            found.append((-area, place, part))
    found = sorted(found, key=lambda one: one[:2])[: view.most]
    return [part for _, _, part in found], [classes[place] for _, place, _ in found] if classes else []


def open_annotated(sources: Sequence[str], captions: Path | None = None, looks: int | None = LOOKS, leave_out: bool = False) -> Annotated:
    """Find the pictures of all sources, as padseg.train.sources describes them, and look at some of them.

    captions: a file of captions for all sources, see `read_captions`. looks: number of pictures of a source to read, spread evenly; None
    for all. leave_out: go on without pictures that cannot be used, which otherwise raise UsageError with their names. Raises NoImages,
    UsageError, UnreadableLabels or OutputConflict, in one line.
    """
    if not sources:
        raise UsageError('name at least one source of annotated pictures')
    opened = [open_source(source) for source in sources]
    if captions is not None:
        texts = read_captions(captions)
        opened = [with_captions(source, texts) for source in opened]
        if not any(picture.captions for source in opened for picture in source.pictures):
            raise UsageError(f'{captions} describes none of the pictures: it has {some(texts)}')
    opened = [with_sentences(source) if source.kind == 'sa1b' else source for source in opened]
    checks = [check(source, looks) for source in opened]
    for source, checked in zip(opened, checks, strict=True):
        if checked.bad and not leave_out:
            reasons = '; '.join(list(checked.bad.values())[:3])
            raise UsageError(f'{source.title}: {len(checked.bad)} of {checked.looked} pictures cannot be used: {reasons}')
    kept = [without(source, checked.bad) for source, checked in zip(opened, checks, strict=True)]
    for source in kept:
        if not source.pictures:
            raise UsageError(f'{source.title}: no picture can be used')
    return Annotated(tuple(kept), tuple(checks))


def with_sentences(source: Source) -> Source:
    pictures = (picture._replace(captions=tuple(map(first_sentences, picture.captions))) for picture in source.pictures)
    return source._replace(pictures=tuple(pictures))


def first_sentences(caption: str, count: int = SENTENCES) -> str:
    """A caption up to its second full stop, or all of it."""
    parts = caption.split('.')
    return caption if len(parts) <= count else '.'.join(parts[:count]) + '.'


def without(source: Source, bad: Iterable[str]) -> Source:
    names = set(bad)
    return source._replace(pictures=tuple(picture for picture in source.pictures if picture.name not in names)) if names else source


def check(source: Source, looks: int | None) -> Checked:
    """Read pictures of a source, at most `looks`, spread evenly."""
    count = len(source.pictures) if looks is None else min(looks, len(source.pictures))
    chosen = [source.pictures[i * len(source.pictures) // count] for i in range(count)]
    sizes: Counter[Size] = Counter()
    classes: Counter[str] = Counter()
    covered = pixels = maps = regions = 0
    empty, bad = [], {}
    for picture in chosen:
        try:
            height, width, _ = read_image(source, picture).shape
            truths = [read_regions(source, picture, (height, width), annotator) for annotator in range(max(1, len(picture.truths)))]
        except (ImageError, UnreadableLabels) as error:
            bad[picture.name] = str(error)
            continue
        sizes[height, width] += 1
        shown = [shown_in(truth) for truth in truths]
        classes.update(
            {source.names[truth.classes[one]] for truth, (_, some) in zip(truths, shown, strict=True) if truth.classes for one in some}
        )
        maps += len(truths)
        regions += sum(len(some) for _, some in shown)
        covered += sum(area for area, _ in shown)
        pixels += height * width * len(truths)
        if not any(some for _, some in shown):
            empty.append(picture.name)
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size)) or [(0, 0)]
    order = {name: classes[name] for name in source.names if classes[name]}
    void = 1 - covered / pixels if pixels else 0.0
    return Checked(count, void, maps, regions, by_area[0], by_area[-1], len(sizes), order, tuple(empty), bad)


def shown_in(regions: Regions) -> tuple[int, list[int]]:
    """Number of pixels in any region, and the regions that have pixels."""
    if regions.labels is not None:
        inside = regions.labels[regions.labels >= 0]
        return inside.size, np.unique(inside).tolist()
    from pycocotools import mask

    if not regions.masks:
        return 0, []
    areas = mask.area(list(regions.masks))
    return int(mask.area(mask.merge(list(regions.masks)))), np.flatnonzero(areas).tolist()


def summary(data: Annotated) -> list[str]:
    """Describe the pictures in a few lines: numbers, sizes, void, classes, captions, and what is left out."""
    return [line for source, checked in zip(data.sources, data.checks, strict=True) for line in described(source, checked)]


def described(source: Source, checked: Checked) -> list[str]:
    usable = checked.looked - len(checked.bad)
    total = len(source.pictures)
    of = f'of {checked.looked} looked at' if checked.looked < total else 'of all'
    lines = [f'{source.title}: {source.layout}, {total} pictures' + ''.join(f', left out: {what}' for what in source.left_out)]
    if usable:
        (least_high, least_wide), (most_high, most_wide) = checked.smallest, checked.largest
        sizes = f'{least_wide}x{least_high}' + (f' to {most_wide}x{most_high} ({checked.sizes} sizes)' if checked.sizes > 1 else '')
        lines.append(f'  {of}: {sizes}; {checked.regions / checked.maps:.1f} regions a picture; {checked.void:.1%} void')
    if source.names:
        most = sorted(checked.classes.items(), key=lambda pair: -pair[1])
        shown = ', '.join(f'{name} {count}' for name, count in most[:8])
        lines.append(
            f'  {len(checked.classes)} of {len(source.names)} classes seen, pictures with them: {shown}{", …" if len(most) > 8 else ""}'
        )
    else:
        lines.append('  regions without classes')
    captioned = sum(bool(picture.captions) for picture in source.pictures)
    lines.append(f'  captions for {captioned} of {total} pictures' if captioned else '  no captions')
    if checked.empty:
        lines.append(f'  {len(checked.empty)} without regions: {some(checked.empty)}')
    if checked.bad:
        lines.append(f'  {len(checked.bad)} left out, which cannot be used: {"; ".join(list(checked.bad.values())[:3])}')
    return lines
