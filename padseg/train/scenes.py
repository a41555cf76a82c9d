"""Synthetic training scenes: textured surfaces and objects with shading, shadows and camera artefacts, exact masks and class names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from padseg.train.shapes import SHAPES, UPRIGHT, fill, turned
from padseg.train.textures import TEXTURES, Style, choose_style, gradient, invent_palette, octaves, paint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.random import Generator as Random

    from padseg.types import Array

SMALLEST_SIDE = 8
CLASSES = (*SHAPES, *TEXTURES)


class Scene(NamedTuple):
    """image: (H, W, 3) uint8 RGB; labels: (H, W) int32, regions 0..M-1; names: class of each region; caption: a description in words."""

    image: Array
    labels: Array
    names: tuple[str, ...]
    caption: str


# ---- light


def flat_ground(rng: Random, mask: Array) -> Array:
    return np.ones(mask.shape, np.float32)


def slanted(rng: Random, mask: Array) -> Array:
    angle, depth = rng.uniform(0, math.tau), rng.uniform(0.1, 0.5)
    x, y = np.linspace(-1, 1, mask.shape[1], dtype=np.float32)[None], np.linspace(-1, 1, mask.shape[0], dtype=np.float32)[:, None]
    return 1 + depth * (x * math.cos(angle) + y * math.sin(angle))


def round_(rng: Random, mask: Array) -> Array:
    """Shade the shape as a ball lit by a point light, sometimes with a highlight."""
    x, y = np.linspace(-1, 1, mask.shape[1], dtype=np.float32)[None], np.linspace(-1, 1, mask.shape[0], dtype=np.float32)[:, None]
    distance = (x - rng.uniform(-0.6, 0.6)) ** 2 + (y - rng.uniform(-0.7, 0.3)) ** 2
    return 1.2 - rng.uniform(0.1, 0.35) * distance + rng.uniform(0, 1) * (rng.random() < 0.3) * np.exp(-distance * 25)


def cushion(rng: Random, mask: Array) -> Array:
    """Shade the shape as a cushion lit from the side."""
    height = np.sqrt(cv2.distanceTransform((mask > 127).astype(np.uint8), cv2.DIST_L2, 3))
    blur = max(3, round(max(mask.shape) * rng.uniform(0.02, 0.08)) * 2 + 1)
    height = cv2.blur(cv2.blur(height, (blur, blur)), (blur, blur))
    angle = rng.uniform(0, math.tau)
    slope = math.cos(angle) * cv2.Sobel(height, cv2.CV_32F, 1, 0) + math.sin(angle) * cv2.Sobel(height, cv2.CV_32F, 0, 1)
    return 1 + rng.uniform(0.15, 0.6) * slope / (np.abs(slope).max() + 1e-6)


SHADINGS = (flat_ground, slanted, round_, cushion)


def cast_shadow(rng: Random, image: Array, mask: Array) -> Array:
    """Darken the image (H, W, 3) by a soft, shifted copy of the mask (H, W)."""
    height, width = mask.shape
    shift = rng.normal(0, 0.04, 2) * (width, height) / 4
    small = cv2.resize(mask, (width // 4 + 1, height // 4 + 1), interpolation=cv2.INTER_AREA).astype(np.float32)
    moved = cv2.warpAffine(small, np.array([[1, 0, shift[0]], [0, 1, shift[1]]]), small.shape[::-1])
    soft = cv2.resize(cv2.GaussianBlur(moved, (0, 0), rng.uniform(0.5, 4)), (width, height))
    return image * (1 - rng.uniform(0.2, 0.7) / 255 * soft)[..., None]


# ---- composition


def patch(rng: Random, contours: Sequence[Array], height: int, width: int) -> Array:
    """Soft mask of an object's second tone, (height, width) float32 in 0..1: some of its parts, spots, or one side."""
    if len(contours) > 1 and rng.random() < 0.6:
        parts = [contour for contour in contours if rng.random() < 0.5]
        return fill(parts, height, width).astype(np.float32) / 255
    if rng.random() < 0.6:
        return np.clip((octaves(rng, height, width, rng.uniform(2, 6), 1.5) - rng.uniform(0.4, 0.65)) * 20, 0, 1)
    return np.clip((gradient(rng, height, width) - rng.uniform(0.3, 0.7)) * rng.uniform(5, 100), 0, 1)


def cover(rng: Random, style: Style, contours: Sequence[Array], height: int, width: int, two_tone: float) -> Array:
    """Colours of one region, (height, width, 3) float32, in two tones with probability `two_tone`.

    The second tone of an object may have another texture. That of a surface (no contours) keeps the texture, like a stain or a patch of
    light on the ground.
    """
    colours = paint(rng, style, height, width)
    if rng.random() >= two_tone:
        return colours
    second = choose_style(rng, 0.6) if contours else Style(style.texture, invent_palette(rng, style.palette.mean(0)))
    share = patch(rng, contours, height, width)[..., None]
    return colours + share * (paint(rng, second, height, width) - colours)


def seen_from_above(rng: Random, colours: Array) -> Array:
    """Warp the colours onto a plane that recedes towards the top."""
    height, width = colours.shape[:2]
    near = rng.uniform(0.1, 0.4)
    corners = np.array([(0, 0), (width, 0), (width * (1 - near), height), (width * near, height)], np.float32)
    matrix = cv2.getPerspectiveTransform(corners, np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32))
    return cv2.warpPerspective(colours, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def half_plane(rng: Random, height: int, width: int) -> Array:
    """Contour, in pixels, of everything on one side of a rough, wavy or straight line: mostly a horizon, sometimes a wall."""
    reach = height + width
    x = np.linspace(-reach, reach, 240)
    waves = np.arange(1, 60)
    rough = rng.choice((0, 0, 0.05, 0.15, 0.4)) * rng.normal(0, 1, 59) / waves ** rng.uniform(1.0, 2.0)
    y = min(height, width) * (rough * np.sin(x[:, None] / reach * math.tau * waves + rng.uniform(0, math.tau, 59))).sum(1)
    line = np.concatenate([np.stack([x, y], -1), [(reach, 2 * reach), (-reach, 2 * reach)]])
    angle = rng.normal(0, 0.08) if rng.random() < 0.65 else rng.uniform(0, math.tau)
    return turned(line, angle) + (rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height)


def background(rng: Random, height: int, width: int) -> tuple[Array, Array, list[str]]:
    """Draw 1 to 3 surfaces: colours (H, W, 3) float32, labels (H, W) int32, and the names of the surfaces."""
    labels = np.zeros((height, width), np.int32)
    style = choose_style(rng, 0.3)
    image, names = cover(rng, style, (), height, width, 0.1), [style.texture]
    for region in range(1, rng.choice((1, 2, 3), p=(0.4, 0.42, 0.18))):
        contour = half_plane(rng, height, width)
        mask = fill([contour], height, width)
        style = contrasting_style(rng, 0.2, mean_colour(image, mask))
        colours = cover(rng, style, (), height, width, 0.1)
        if rng.random() < 0.4:
            colours = seen_from_above(rng, colours)
        image += (mask.astype(np.float32) / 255)[..., None] * (colours * slanted(rng, mask)[..., None] - image)
        labels[mask > 127] = region
        names.append(style.texture)
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.7, 3.5))
    return image, labels, names


def mean_colour(image: Array, mask: Array) -> Array:
    """Mean colour (3,) of the image (H, W, 3) inside the mask; black for an empty mask."""
    return np.array(cv2.mean(image, mask)[:3])


def contrasting_style(rng: Random, plainness: float, under: Array) -> Style:
    """Choose a style whose mean colour stands out from the colour `under` it (3,); after a few attempts take the last."""
    for _ in range(4):
        style = choose_style(rng, plainness)
        if np.abs(style.palette.mean(0) - under).max() > 30:
            break
    return style


def object_contours(rng: Random, shape: str, size: float, height: int, width: int) -> list[Array]:
    """Contours, in pixels, of a shape at a random position, rotated and stretched. size: as a share of the shorter side."""
    angle = rng.normal(0, 0.15) if shape in UPRIGHT else rng.uniform(0, math.tau)
    stretch = np.exp(rng.normal(0, 0.15, 2)) * (rng.choice((-1, 1)), 1) * size * min(height, width) / 2
    place = rng.uniform(-0.03, 1.03, 2) if rng.random() < 0.5 else rng.normal(0.5, 0.17, 2)
    return [turned(contour * stretch, angle) + place * (width, height) for contour in SHAPES[shape](rng)]


def object_sizes(rng: Random) -> Array:
    """Sizes of 0 to 8 objects, as shares of the shorter side in 0.05..0.8, usually in descending order."""
    count = rng.choice(9, p=(0.05, 0.2, 0.22, 0.18, 0.12, 0.09, 0.06, 0.04, 0.04))
    sizes = np.where(rng.random(count) < 0.4, rng.uniform(0.3, 0.8, count), np.exp(rng.uniform(math.log(0.05), math.log(0.8), count)))
    return np.sort(sizes)[::-1] if rng.random() < 0.7 else sizes


def place(rng: Random, image: Array, mask: Array, contours: Sequence[Array], style: Style, shading: Callable[..., Array]) -> Array:
    """Return the image with an object drawn into it; mask: the object's coverage (H, W)."""
    left, top, width, height = cv2.boundingRect(mask)
    window = np.s_[top : top + height, left : left + width]
    local = [contour - (left, top) for contour in contours]
    colours = cover(rng, style, local, height, width, 0.3) * shading(rng, mask[window])[..., None]
    image = cast_shadow(rng, image, mask) if rng.random() < 0.4 else image.copy()
    image[window] += (mask[window].astype(np.float32) / 255)[..., None] * (colours - image[window])
    return image


def develop(rng: Random, image: Array) -> Array:
    """Simulate light and camera, (H, W, 3) float32 -> uint8: uneven light, colour cast, contrast, blur, noise and compression."""
    height, width = image.shape[:2]
    x, y = np.linspace(-1, 1, width, dtype=np.float32)[None], np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    vignette = rng.uniform(0, 0.25) if rng.random() < 0.5 else 0.0
    light = 1 + x * rng.normal(0, 0.12) + y * rng.normal(0, 0.12) - (x * x + y * y) * vignette
    gain = (rng.uniform(0.85, 1.25) * rng.uniform(0.92, 1.08, 3)).astype(np.float32)
    picture = cv2.multiply(image, cv2.merge([light * channel for channel in gain]))
    if rng.random() < 0.08:
        picture[:] = picture.mean(2, keepdims=True)
    if rng.random() < 0.5:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 1.1))
    if rng.random() < 0.75:
        picture = picture + rng.standard_normal(picture.shape, dtype=np.float32) * min(rng.exponential(5), 16.0)
    table = np.linspace(0, 1, 256) ** math.exp(rng.normal(0, 0.25))
    table = 255 * np.clip(0.5 + (table - 0.5) * rng.uniform(0.7, 1.25), 0, 1)
    developed = cv2.LUT(cv2.convertScaleAbs(np.maximum(picture, 0)), table.astype(np.uint8))
    return compressed(developed, int(rng.integers(30, 96))) if rng.random() < 0.35 else developed


def compressed(image: Array, quality: int) -> Array:
    _, data = cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1].copy()


def describe(names: Sequence[str]) -> str:
    """Write a caption that names each class once: objects, then the surfaces they are on."""
    things = [f'{"an" if name[0] in "aeiou" else "a"} {name}' for name in dict.fromkeys(names) if name in SHAPES]
    surfaces = [name for name in dict.fromkeys(names) if name in TEXTURES]
    return ' on '.join(enumeration(words) for words in (things, surfaces) if words)


def enumeration(words: Sequence[str]) -> str:
    return ' and '.join(part for part in (', '.join(words[:-1]), words[-1]) if part)


def renumbered(labels: Array, names: Sequence[str]) -> tuple[Array, tuple[str, ...]]:
    """Drop hidden regions from labels and names, and renumber the rest."""
    shown = np.bincount(labels.ravel(), minlength=len(names)) > 0
    numbers = np.cumsum(shown) - 1
    return numbers[labels].astype(np.int32), tuple(name for name, is_shown in zip(names, shown, strict=True) if is_shown)


def scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Draw a random scene of this size in pixels, determined by the state of rng. Raises ValueError for a side below SMALLEST_SIDE."""
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f'height and width must be at least {SMALLEST_SIDE} pixels; got {height} and {width}')
    image, labels, names = background(rng, height, width)
    herd = rng.random() < 0.2
    shape, style, shading = '', Style('', np.empty((0, 3))), flat_ground
    for size in object_sizes(rng):
        if not (herd and shape):
            shape = tuple(SHAPES)[rng.integers(len(SHAPES))]
            shading = SHADINGS[rng.integers(len(SHADINGS))]
        contours = object_contours(rng, shape, size, height, width)
        mask = fill(contours, height, width)
        inside = mask > 127
        if not inside.any():
            continue
        if not (herd and style.texture):
            # A camouflaged object has the mean colour of what it covers and differs only in texture.
            camouflaged = rng.random() < 0.12
            under = mean_colour(image, mask)
            style = choose_style(rng, 0, under) if camouflaged else contrasting_style(rng, 0.45, under)
        image = place(rng, image, mask, contours, style, shading)
        labels[inside] = len(names)
        names.append(shape)
    labels, shown = renumbered(labels, names)
    return Scene(develop(rng, image), labels, shown, describe(shown))


def surfaces(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Draw a scene without objects: one surface, or in about a quarter of the cases two."""
    most = 1 if rng.random() < 0.5 else 2
    while True:
        image, labels, names = background(rng, height, width)
        if len(names) <= most:
            break
    labels, shown = renumbered(labels, names)
    return Scene(develop(rng, image), labels, shown, describe(shown))
