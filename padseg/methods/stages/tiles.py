"""Pictures much larger than the model's view -> token maps: windows at several scales, whose tokens are brought into agreement.

The 77 pads do not mean the same in every window: each window deals its things out to them anew. So every window's tokens are renamed, one
to one, to agree with what is known of the same place: the maps of the next coarser scale, and those of the windows before it where they
overlap. The coarsest scale is the usual view of the whole picture. One set of maps for the whole picture results: there are no labels to
stitch. Where regions are joined superpixels, those of the usual view are divided by these maps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from padseg.backbones import Backbone
from padseg.methods.options import TiledOptions
from padseg.methods.stages.enlarging import enlarged_labels, upsample
from padseg.methods.stages.forwards import batched
from padseg.methods.stages.geometry import whole_frame
from padseg.methods.stages.guided_filter import at_most
from padseg.methods.stages.join import owners
from padseg.methods.stages.labels import join_order, label_map
from padseg.methods.stages.latents import encode, encode_window
from padseg.methods.stages.superpixels import SUPERPIXEL_AREA, superpixels_of
from padseg.methods.stages.token_maps import latent_token_maps
from padseg.types import Array, Image, LabelMap, Proposals, TokenMaps

FINER = 1 / 3  # weight of a scale against the mean of the coarser ones
TOGETHER = 4  # windows in a forward pass, where batches save time
AREA = 2_000_000  # pixels; label maps of larger pictures are made on a reduced copy: superpixels take 280 bytes for each
Grid = tuple[int, int]  # image tokens down and across


class Window(NamedTuple):
    """A window in image tokens: first row and column, rows and columns."""

    top: int
    left: int
    rows: int
    columns: int


def tiled_token_maps(image: Image, backbone: Backbone, options: TiledOptions, size: tuple[int, int]) -> TokenMaps:
    """Token maps (T, h, w) of a whole picture (H, W, 3) from windows of `options.tiles` pixels, `options.overlap` of which they share.

    size: (H, W) of the picture in whose pixels these are; `image` may be a reduced copy. A picture that fits in one window gets the maps
    that it gets without windows.
    """
    whole = latent_token_maps([encode(image, backbone, options)], backbone, options)[0]
    maps = whole.maps.cpu().numpy()
    pixels = math.sqrt(math.prod(size))  # the side of a square of the picture's area
    across = pixels / options.tiles  # in windows
    side = max(1, round(options.side / backbone.multiple))
    shared = max(1, min(side - 1, round(options.overlap / options.tiles * side)))
    for share in scales(across):
        factor = options.side * across * share / math.sqrt(math.prod(image.shape[:2]))  # pixels of the view for one of `image`
        grid = grid_of(image.shape[:2], factor, backbone.multiple)
        finer = level_maps(image, grid, side, shared, backbone, options, maps)
        coarse = enlarged(maps, grid)
        maps = coarse + np.float32(FINER) * (finer - coarse)
    return whole._replace(maps=torch.from_numpy(maps), frame=whole_frame(size), whole=whole.maps.cpu() if across > 1 else None)


def scales(across: float) -> list[float]:
    """The scales between the view of the whole picture and that of windows, coarse to fine, as shares of the latter's.

    across: how many windows the picture is wide, as a square. Each scale has twice the pixels of the one before along a side.
    """
    steps = math.floor(math.log2(across)) if across > 1 else -1
    return [2.0**-step for step in range(steps, -1, -1) if across * 2.0**-step > 1]


def grid_of(size: tuple[int, ...], factor: float, multiple: int) -> Grid:
    """Image tokens of a picture (H, W), of `multiple` pixels of a view that is larger by a factor."""
    height, width = (max(1, round(length * factor / multiple)) for length in size)
    return height, width


def starts(length: int, side: int, shared: int) -> list[int]:
    """Where windows of `side` tokens begin that cover `length` tokens evenly and share at least `shared` with the next one."""
    if length <= side:
        return [0]
    count = math.ceil((length - shared) / (side - shared))
    return np.linspace(0, length - side, count).round().astype(int).tolist()


def windows(grid: Grid, side: int, shared: int) -> list[Window]:
    rows, columns = (min(side, length) for length in grid)
    return [Window(top, left, rows, columns) for top in starts(grid[0], side, shared) for left in starts(grid[1], side, shared)]


def level_maps(image: Image, grid: Grid, side: int, shared: int, backbone: Backbone, options: TiledOptions, known: Array) -> Array:
    """Token maps of the picture at one scale, (T, h, w). known: those of the next coarser scale, (T, h', w')."""
    reference = enlarged(known, grid)
    total, weights = np.zeros_like(reference), np.zeros(grid, np.float32)
    for window, found in window_maps(image, grid, windows(grid, side, shared), backbone, options):
        part = np.s_[..., window.top : window.top + window.rows, window.left : window.left + window.columns]
        before = weights[part] > 0
        here = reference[part].copy()
        here[:, before] += total[part][:, before] / weights[part][before]
        weight = ramp(window, grid, shared)
        total[part] += weight * agreeing(found, here)
        weights[part] += weight
    return total / weights


def window_maps(
    image: Image, grid: Grid, places: list[Window], backbone: Backbone, options: TiledOptions
) -> Iterator[tuple[Window, Array]]:
    """Yield every window with its token maps, (T, rows, columns)."""
    height, width = image.shape[:2]
    size = grid[0] * backbone.multiple, grid[1] * backbone.multiple
    # so that no window of a coarse scale needs a large part of the picture in float32
    seen = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA) if 4 * size[0] * size[1] < height * width else image
    height, width = seen.shape[:2]
    for some in (places[first : first + TOGETHER] for first in range(0, len(places), TOGETHER)):
        latents = []
        for window in some:
            top, bottom = (round(row * height / grid[0]) for row in (window.top, window.top + window.rows))
            left, right = (round(column * width / grid[1]) for column in (window.left, window.left + window.columns))
            view = window.rows * backbone.multiple, window.columns * backbone.multiple
            latents.append(encode_window(np.ascontiguousarray(seen[top:bottom, left:right]), view, backbone, options))
        found = batched(latents, backbone, partial(latent_token_maps, backbone=backbone, options=options))
        for window, maps in zip(some, found, strict=True):
            yield window, maps.maps.cpu().numpy()


def agreeing(maps: Array, reference: Array) -> Array:
    """Token maps (T, h, w) in the order in which they agree best with other maps of the same place: the sum over tokens of what the shares
    of the two have in common is largest (an assignment problem)."""
    ours, theirs = (shares(each).reshape(len(each), -1) for each in (maps, reference))
    _, order = linear_sum_assignment(theirs @ ours.T, maximize=True)
    return maps[order]


def shares(maps: Array) -> Array:
    """Each token's share of the attention that goes to all tokens, per pixel: (T, h, w) -> (T, h, w)."""
    return maps / np.maximum(maps.sum(0, keepdims=True), 1e-12)


def ramp(window: Window, grid: Grid, shared: int) -> Array:
    """Weights of a window (rows, columns): 1, falling towards sides where another window goes on."""
    ends = []
    for first, length, whole in ((window.top, window.rows, grid[0]), (window.left, window.columns, grid[1])):
        edge = (np.arange(length, dtype=np.float32) + 0.5) / shared
        before = np.ones_like(edge) if first == 0 else edge
        after = np.ones_like(edge) if first + length == whole else edge[::-1]
        ends.append(np.minimum(np.minimum(before, after), 1))
    return np.outer(*ends)


def enlarged(maps: Array, grid: Grid) -> Array:
    return np.stack([upsample(each, grid) for each in maps])


def tiled_label_map(image: Image, proposals: Proposals, options: TiledOptions, whole: Proposals | None = None) -> LabelMap:
    """As `label_map`, for proposals from windows; regions may be as small as in a picture of one window's size.

    image: (H, W, 3), the picture or a reduced copy, and so is the result. That of a large one is made on a reduced copy and enlarged.
    whole: proposals from the view of the whole picture, if it has more pixels than a window. Where superpixels are joined, the regions that
    these give are only divided, and the less the picture exceeds a window, the more of a difference that takes.
    """
    across = max(1.0, math.sqrt(math.prod(proposals.frame.size)) / options.tiles)  # in windows
    unit, join, order = across**-2, options.join, None
    small, area = (at_most(image, AREA), AREA) if across > 1 else (image, SUPERPIXEL_AREA)
    proposals = proposals._replace(frame=whole_frame(small.shape[:2]))
    inside = superpixels_of(small, options.superpixels, area) if options.superpixels else None
    if whole is not None and inside is not None and join:
        coarse = join_order(whole._replace(frame=proposals.frame), inside, small, options.refine, join, graph_area=area)
        regions = owners(coarse.steps, len(coarse.means), join)
        join /= min(1.0, math.log2(across)) ** 2
        order = join_order(proposals, inside, small, options.refine, join, unit, area, regions)
    rules = options.components, options.min_area * unit, small, options.refine
    found = label_map(proposals, inside, *rules, join, order, unit, area, options.regroup)
    return found if small is image else enlarged_labels(found, image.shape[:2])
