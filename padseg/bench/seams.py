"""What windows make of pictures a few windows wide, and whether borders of regions lie where windows end: bin/bench seams."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

import padseg
from padseg.backbones import Backbone, load
from padseg.bench.measure import finish_bench, measured_on, output_flags, surroundings
from padseg.datasets import Dataset, open_dataset
from padseg.evaluation.metrics import region_scores
from padseg.methods.seg4diff import Options, prepare
from padseg.methods.stages.tiles import grid_of, scales, starts
from padseg.types import Array, Image

NEAR = 4  # pixels from where a window ends
SHAPE = 321, 481  # of the pictures that are put together
WAYS = 'whole', 'tiled'


class Picture(NamedTuple):
    """truths: of each annotator."""

    image: Image
    truths: tuple[Array, ...]


class Shares(NamedTuple):
    """covering: of the truth; regions: their number; near: share of the borders that are near the end of a window."""

    covering: float
    regions: float
    near: float


@click.command('seams')
@click.option('--root', type=click.Path(path_type=Path, exists=True), required=True, help='the folder that BSDS500 is in')
@click.option('--along', type=click.IntRange(1), default=2, show_default=True, help='photographs along a side of a picture')
@click.option('--tiles', type=click.IntRange(1), default=400, show_default=True, help='as in padseg run')
@click.option('--overlap', type=click.IntRange(1), default=80, show_default=True, help='as in padseg run')
@click.option('--limit', type=click.IntRange(1), help='only so many pictures')
@output_flags
def command(root: Path, along: int, tiles: int, overlap: int, limit: int | None, record: bool, as_json: bool) -> None:
    """Segment pictures with and without windows by the embedded model.

    A picture is put together from photographs of BSDS500's validation split that are wider than high, in the order of their names.
    """
    dataset, backbone = open_dataset('bsds500', root), load('tiny')
    rows, agreement, area = [], [], []
    for number, picture in enumerate(put_together(dataset, along)):
        if number == limit:
            break
        options = Options(tiles=tiles, overlap=overlap)
        near = near_ends(picture.image, backbone, options)
        whole, tiled = (padseg.segment(picture.image, backbone, each).labels for each in (Options(), options))
        rows.append([shares(labels, picture.truths, near) for labels in (whole, tiled)])
        agreement.append([region_scores(*pair).covering for pair in ((tiled, whole), (whole, tiled))])
        area.append(float(near.mean()))
    if not rows:
        raise click.ClickException('there are not enough pictures')
    means = {way: Shares(*map(float, np.mean([row[at] for row in rows], 0)))._asdict() for at, way in enumerate(WAYS)}
    height, width = (along * length for length in SHAPE)
    measured = {
        'pictures': len(rows),
        'width': width,
        'height': height,
        'tiles': tiles,
        'overlap': overlap,
        'across': math.sqrt(width * height) / tiles,
        **means,
        **dict(zip(('tiled_by_whole', 'whole_by_tiled'), np.mean(agreement, 0).tolist(), strict=True)),
        'near_area': float(np.mean(area)),
        **surroundings(),
    }
    finish_bench('seams', f'{width}x{height} {tiles}', measured, record, as_json, in_words)


def put_together(dataset: Dataset, along: int) -> Iterator[Picture]:
    """Yield pictures of `along` x `along` photographs; as many truths as the photograph with the fewest annotators has."""
    some: list[Picture] = []
    for sample in dataset.samples:
        image = dataset.picture(sample)
        if image.shape[:2] != SHAPE:
            continue
        some.append(Picture(image, dataset.read(sample)))
        if len(some) == along**2:
            truths = zip(*(each.truths for each in some), strict=False)
            yield Picture(joined([each.image for each in some], along), tuple(joined(apart(truth), along) for truth in truths))
            some = []


def joined(parts: list[Array], along: int) -> Array:
    return np.concatenate([np.concatenate(parts[first : first + along], 1) for first in range(0, len(parts), along)])


def apart(truths: tuple[Array, ...]) -> list[Array]:
    """Label maps with numbers that no other one of them has."""
    found, most = [], 0
    for truth in truths:
        found.append(truth.astype(np.int32) + most)
        most = int(found[-1].max()) + 1
    return found


def shares(labels: Array, truths: tuple[Array, ...], near: Array) -> Shares:
    covering = np.mean([region_scores(truth, labels).covering for truth in truths])
    borders = np.zeros(labels.shape, bool)
    borders[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    borders[:-1] |= labels[:-1] != labels[1:]
    return Shares(float(covering), len(np.unique(labels)), float(near[borders].mean()) if borders.any() else 0.0)


def near_ends(image: Image, backbone: Backbone, options: Options) -> Array:
    """Which pixels (H, W) are near the end of a window of any scale, but for the ends of the picture."""
    options = prepare(backbone, options).options
    size = image.shape[:2]
    across = math.sqrt(math.prod(size)) / options.tiles
    side = round(options.side / backbone.multiple)
    shared = round(options.overlap / options.tiles * side)
    near = np.zeros(size, bool)
    for share in scales(across):
        grid = grid_of(size, options.side * across * share / math.sqrt(math.prod(size)), backbone.multiple)
        for axis, (length, whole) in enumerate(zip(size, grid, strict=True)):
            for start in starts(whole, side, shared):
                for end in (start, start + side):
                    if 0 < end < whole:
                        place = round(end * length / whole)
                        np.moveaxis(near, axis, 0)[place - NEAR : place + NEAR] = True
    return near


def in_words(measured: dict[str, Any]) -> str:
    whole, tiled = (measured[way] for way in WAYS)
    return '\n'.join(
        (
            f'{measured["pictures"]} pictures of {measured["width"]} x {measured["height"]}; {measured_on(measured)}',
            f'--tiles {measured["tiles"]} --overlap {measured["overlap"]}: {measured["across"]:.2f} windows wide',
            f'covering of the truth: whole {whole["covering"]:.3f}, tiled {tiled["covering"]:.3f}',
            f'covering of tiled by whole {measured["tiled_by_whole"]:.3f}, of whole by tiled {measured["whole_by_tiled"]:.3f}',
            f'regions: whole {whole["regions"]:.1f}, tiled {tiled["regions"]:.1f}',
            f'borders within {NEAR} pixels of the end of a window: whole {whole["near"]:.1%}, tiled {tiled["near"]:.1%}, '
            f'of the area {measured["near_area"]:.1%}',
        )
    )
