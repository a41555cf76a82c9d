"""Synthetic training scenes: textured surfaces and objects with light, shadow and camera faults, exact masks and class names.

A texture is a function (rng, height, width) -> field (height, width) float32 in 0..1, which a palette turns into colours.
A shape is a function rng -> contours [(N, 2), ...] in about -1..1 (x right, y down); the object is their union.
To add a class, write one such function and name it in TEXTURES or SHAPES.
"""

from __future__ import annotations

import colorsys
import math
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Random = np.random.Generator

SMALLEST_SIDE = 8
TURN = 2 * math.pi


class Scene(NamedTuple):
    """image: (H, W, 3) uint8 RGB; labels: (H, W) int32, region 0..M-1 of each pixel; names: class of each region; caption: plain words."""

    image: Array
    labels: Array
    names: tuple[str, ...]
    caption: str


class Style(NamedTuple):
    """What a region is covered with. palette: (K, 3) float RGB 0..255, mapped through the texture's field."""

    texture: str
    palette: Array


# ---- textures: (rng, height, width) -> (height, width) float32 in 0..1


def octaves(rng: Random, height: int, width: int, cells: float, slope: float, stretch: float = 1.0) -> Array:
    """1/f noise: octaves from `cells` on the longer side, each twice as fine and 2**-slope as strong; stretch lengthens it along x."""
    total = np.zeros((height, width), np.float32)
    side, strength = max(height, width), 1.0
    while cells < max(side, 4) and strength > 0.03:
        grid = rng.random((max(2, round(cells * height / side)), max(2, round(cells * width / side / stretch))), dtype=np.float32)
        total += strength * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        cells, strength = 2 * cells, strength * 2.0**-slope
    mean, deviation = cv2.meanStdDev(total)
    return np.clip((total - mean.item()) / (4.5 * deviation.item() + 1e-6) + 0.5, 0, 1)


def bend(rng: Random, field: Array, amount: float, cells: float = 2.0) -> Array:
    """The field with its points moved smoothly by up to `amount` of its longer side, then turned by a random angle."""
    height, width = field.shape
    reach = amount * max(height, width)
    dx, dy = (reach * (octaves(rng, height, width, cells, 2.0) - 0.5) for _ in range(2))
    angle = rng.uniform(0, TURN)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32) - width / 2, np.arange(height, dtype=np.float32) - height / 2)
    u = (x * math.cos(angle) + y * math.sin(angle) + dx + width / 2).astype(np.float32)
    v = (y * math.cos(angle) - x * math.sin(angle) + dy + height / 2).astype(np.float32)
    return cv2.remap(field, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def periods(rng: Random, height: int, width: int, turn: float = TURN) -> tuple[Array, Array]:
    """Turned coordinates u, v (height, width) in periods of a random length, now and then on a wavy ground."""
    period = max(4.0, max(height, width) * math.exp(rng.uniform(math.log(0.04), math.log(0.3))))
    angle = rng.uniform(-turn / 2, turn / 2)
    x, y = np.arange(width, dtype=np.float32)[None] / period, np.arange(height, dtype=np.float32)[:, None] / period
    shift = rng.random(2, dtype=np.float32)
    u, v = x * math.cos(angle) + y * math.sin(angle) + shift[0], y * math.cos(angle) - x * math.sin(angle) + shift[1]
    if rng.random() < 0.35:
        wave = octaves(rng, height, width, 2.0, 2.0) * rng.uniform(0.5, 3)
        u, v = u + wave, v + wave[::-1, ::-1]
    return u, v


def plain(rng: Random, height: int, width: int) -> Array:
    return 0.5 + rng.uniform(0, 0.25) * (octaves(rng, height, width, 2.0, 1.5) - 0.5)


def gradient(rng: Random, height: int, width: int) -> Array:
    x, y = np.linspace(-1, 1, width, dtype=np.float32)[None], np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    if rng.random() < 0.35:
        return np.clip(np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)) / 2, 0, 1)
    angle = rng.normal(TURN / 4, 0.6)
    return np.clip(0.5 + 0.45 * (x * math.cos(angle) + y * math.sin(angle)), 0, 1)


def stripes(rng: Random, height: int, width: int) -> Array:
    u, _ = periods(rng, height, width)
    return np.clip(0.5 + rng.uniform(-0.3, 0.3) + rng.uniform(0.5, 4) * np.sin(TURN * u), 0, 1)


def checker(rng: Random, height: int, width: int) -> Array:
    u, v = periods(rng, height, width)
    return ((np.floor(u) + np.floor(v * rng.uniform(0.6, 1.6))) % 2).astype(np.float32)


def dots(rng: Random, height: int, width: int) -> Array:
    u, v = periods(rng, height, width)
    row = np.floor(v)
    distance = np.hypot((u + row * float(rng.choice((0.0, 0.5)))) % 1 - 0.5, v - row - 0.5)
    return np.clip((rng.uniform(0.2, 0.42) - distance) * 12 + 0.5, 0, 1)


def bricks(rng: Random, height: int, width: int) -> Array:
    u, v = periods(rng, height, width, 0.3)
    row = np.floor(v * 2)
    column = np.floor(u + row % 2 / 2)
    tone = rng.uniform(0.4, 1, (16, 16)).astype(np.float32)[row.astype(int) % 16, column.astype(int) % 16]
    gap = rng.uniform(0.03, 0.1)
    stone = ((u + row % 2 / 2 - column > gap) & (v * 2 - row > 2 * gap)).astype(np.float32)
    return stone * (tone * 0.8 + 0.2 * octaves(rng, height, width, 16.0, 0.5))


def clouds(rng: Random, height: int, width: int) -> Array:
    return octaves(rng, height, width, rng.uniform(2, 4), rng.uniform(1.1, 1.6), rng.uniform(1, 2.5))


def rock(rng: Random, height: int, width: int) -> Array:
    ridges = 1 - np.abs(2 * octaves(rng, height, width, rng.uniform(3, 8), 0.9) - 1)
    return 0.6 * ridges + 0.4 * octaves(rng, height, width, rng.uniform(2, 4), 0.7)


def foliage(rng: Random, height: int, width: int) -> Array:
    clumps = octaves(rng, height, width, rng.uniform(2, 5), 1.0)
    return np.clip(0.45 * clumps + 0.75 * octaves(rng, height, width, rng.uniform(16, 50), 0.3) - 0.1, 0, 1)


def water(rng: Random, height: int, width: int) -> Array:
    return octaves(rng, height, width, rng.uniform(8, 24), rng.uniform(0.4, 1), rng.uniform(4, 9))


def wood(rng: Random, height: int, width: int) -> Array:
    rings = octaves(rng, height, width, 2.0, 1.8, 4.0) * rng.uniform(6, 25)
    return bend(rng, 0.7 * (rings % 1) + 0.3 * octaves(rng, height, width, 32.0, 0.3, 8.0), 0.1)


def fur(rng: Random, height: int, width: int) -> Array:
    hair = octaves(rng, height, width, rng.uniform(16, 50), rng.uniform(0.1, 0.6), rng.uniform(4, 8))
    return bend(rng, hair, rng.uniform(0.2, 0.8), 2.0)


def grass(rng: Random, height: int, width: int) -> Array:
    blades = octaves(rng, width, height, rng.uniform(16, 60), 0.3, rng.uniform(2, 5)).T
    return 0.75 * blades + 0.25 * octaves(rng, height, width, 3.0, 1.0)


def speckle(rng: Random, height: int, width: int) -> Array:
    field = octaves(rng, height, width, max(height, width) / rng.uniform(2, 6), 1.0)
    return np.clip((field - rng.uniform(0.45, 0.7)) * 8, 0, 1)


def sand(rng: Random, height: int, width: int) -> Array:
    ripples = octaves(rng, height, width, rng.uniform(2, 10), 1.0, rng.uniform(1, 5))
    return 0.5 * ripples + 0.5 * rng.random((height, width), dtype=np.float32)


TEXTURES: dict[str, Callable[[Random, int, int], Array]] = {
    'plain': plain,
    'gradient': gradient,
    'stripes': stripes,
    'checker': checker,
    'dots': dots,
    'bricks': bricks,
    'clouds': clouds,
    'rock': rock,
    'foliage': foliage,
    'water': water,
    'wood': wood,
    'fur': fur,
    'grass': grass,
    'speckle': speckle,
    'sand': sand,
}

# Colours that a texture has in nature, dark to light; half of the time they are used.
NATURAL = {
    'gradient': ((225, 235, 245), (160, 195, 230), (70, 120, 190)),
    'clouds': ((80, 130, 195), (140, 180, 225), (200, 210, 225), (245, 245, 245)),
    'rock': ((50, 45, 42), (110, 102, 95), (165, 155, 140), (205, 195, 180)),
    'foliage': ((15, 25, 12), (45, 75, 25), (90, 120, 45), (165, 180, 90)),
    'water': ((20, 45, 70), (45, 90, 115), (95, 140, 155), (190, 210, 215)),
    'wood': ((80, 48, 25), (135, 90, 50), (185, 135, 85)),
    'fur': ((45, 30, 20), (120, 85, 55), (190, 155, 115), (230, 215, 190)),
    'grass': ((35, 55, 20), (85, 110, 40), (145, 155, 75)),
    'sand': ((150, 125, 90), (200, 175, 135), (230, 210, 175)),
    'bricks': ((190, 180, 170), (110, 50, 40), (150, 75, 55), (180, 105, 80)),
}


def invent_palette(rng: Random, base: Array | None = None) -> Array:
    """2 to 4 colours (K, 3) float32 0..255 of related hue, from dark to light or back, around a base colour if given."""
    hue, saturation, value = rng.random(), rng.beta(1.3, 2.2), rng.uniform(0.12, 0.95)
    if base is not None:
        hue, saturation, value = colorsys.rgb_to_hsv(*(float(channel) / 255 for channel in base))
    steps = np.linspace(-0.5, 0.5, rng.integers(2, 5)) * rng.uniform(0.2, 0.65) * rng.choice((-1, 1))
    drift = 0.3 if base is None and rng.random() < 0.25 else 0.04
    hues = (hue + rng.normal(0, drift, len(steps))) % 1
    saturations = np.clip(saturation + rng.normal(0, 0.1, len(steps)), 0, 1)
    values = np.clip(value + steps, 0, 1)
    return np.array([colorsys.hsv_to_rgb(*colour) for colour in zip(hues, saturations, values, strict=True)], np.float32) * 255


def choose_style(rng: Random, plainness: float, near: Array | None = None) -> Style:
    """A texture, which is plain or a gradient with probability `plainness`, and its palette, mixed from `near` (3,) if given."""
    calm = ('plain', 'gradient')
    texture = calm[rng.integers(2)] if rng.random() < plainness else tuple(TEXTURES)[rng.integers(2, len(TEXTURES))]
    if near is None and texture in NATURAL and rng.random() < 0.5:
        return Style(texture, np.clip(np.array(NATURAL[texture]) * rng.uniform(0.65, 1.15, 3) * rng.uniform(0.8, 1.1), 0, 255))
    return Style(texture, invent_palette(rng, near))


def paint(rng: Random, style: Style, height: int, width: int) -> Array:
    """(height, width, 3) float32 colours 0..255 of a surface in the style."""
    field = TEXTURES[style.texture](rng, height, width)
    knots = np.linspace(40, 215, len(style.palette))
    table = np.stack([np.interp(np.arange(256), knots, channel) for channel in style.palette.T], -1).astype(np.float32)
    return np.take(table, (field * 255).astype(np.uint8), axis=0)


# ---- shapes: rng -> contours in -1..1


def oval(x: float, y: float, across: float, down: float, angle: float = 0.0, points: int = 40) -> Array:
    t = np.linspace(0, TURN, points, endpoint=False)
    return turned(np.stack([across * np.cos(t), down * np.sin(t)], -1), angle) + (x, y)


def box(left: float, top: float, right: float, bottom: float) -> Array:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def limb(start: tuple[float, float], end: tuple[float, float], thick: float) -> Array:
    """A bar from start to end that thins out a little."""
    along = np.subtract(end, start)
    side = np.array([-along[1], along[0]]) / (np.hypot(*along) + 1e-9) * thick / 2
    return np.array([start + side, start - side, end - 0.7 * side, end + 0.7 * side])


def turned(points: Array, angle: float) -> Array:
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    return points @ turn


def polar(radius: Array, angle: Array) -> Array:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def disk(rng: Random) -> list[Array]:
    return [oval(0, 0, 1, 1, points=64)]


def ellipse(rng: Random) -> list[Array]:
    return [oval(0, 0, 1, rng.uniform(0.35, 0.75), points=64)]


def square(rng: Random) -> list[Array]:
    return [box(-0.85, -0.85, 0.85, 0.85)]


def rectangle(rng: Random) -> list[Array]:
    half = rng.uniform(0.25, 0.65)
    return [box(-1, -half, 1, half)]


def triangle(rng: Random) -> list[Array]:
    return [polar(np.ones(3), np.arange(3) * TURN / 3 + rng.uniform(-0.35, 0.35, 3))]


def star(rng: Random) -> list[Array]:
    tips = rng.integers(5, 9)
    return [polar(np.tile([1, rng.uniform(0.35, 0.6)], tips), np.arange(2 * tips) * TURN / (2 * tips))]


def ring(rng: Random) -> list[Array]:
    outer = oval(0, 0, 1, 1, points=64)
    outer = np.concatenate([outer, outer[:1]])
    return [np.concatenate([outer, outer[::-1] * rng.uniform(0.45, 0.8)])]


def cross(rng: Random) -> list[Array]:
    arm = rng.uniform(0.2, 0.4)
    return [box(-1, -arm, 1, arm), box(-arm, -1, arm, 1)]


def polygon(rng: Random) -> list[Array]:
    corners = rng.integers(5, 9)
    return [polar(rng.uniform(0.65, 1, corners), (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * TURN / corners)]


def blob(rng: Random) -> list[Array]:
    t, waves = np.linspace(0, TURN, 96, endpoint=False), np.arange(1, 8)
    size = rng.normal(0, 0.45, 7) / waves**1.1
    radius = np.exp((size * np.cos(t[:, None] * waves + rng.uniform(0, TURN, 7))).sum(1))
    return [polar(radius / radius.max(), t)]


def leaf(rng: Random) -> list[Array]:
    x = np.linspace(-1, 1, 30)
    half = rng.uniform(0.3, 0.6) * (1 - x**2) * (1 - rng.uniform(0, 0.5) * x)
    return [np.concatenate([np.stack([x, half], -1), np.stack([x, -half], -1)[::-1]]), limb((-1.3, 0.1), (-0.8, 0), 0.07)]


def bar(rng: Random) -> list[Array]:
    half = rng.uniform(0.04, 0.12)
    return [box(-1.4, -half, 1.4, half)]


def wire(rng: Random) -> list[Array]:
    x = np.linspace(-1.5, 1.5, 60)
    y = rng.uniform(0.1, 0.4) * np.sin(x * rng.uniform(1, 5) + rng.uniform(0, TURN))
    return [np.concatenate([np.stack([x, y], -1), np.stack([x, y + rng.uniform(0.04, 0.1)], -1)[::-1]])]


def moon(rng: Random) -> list[Array]:
    t = np.linspace(-TURN / 4, TURN / 4, 40)
    bow = rng.uniform(-0.1, 0.7)
    return [np.concatenate([np.stack([np.cos(t), np.sin(t)], -1), np.stack([bow * np.cos(t), np.sin(t)], -1)[::-1]])]


def heart(rng: Random) -> list[Array]:
    t = np.linspace(0, TURN, 60, endpoint=False)
    return [np.stack([16 * np.sin(t) ** 3, -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)], -1) / 16]


def arrow(rng: Random) -> list[Array]:
    neck, shaft = rng.uniform(-0.1, 0.5), rng.uniform(0.1, 0.3)
    return [box(-1, -shaft, neck, shaft), np.array([(neck, -0.7), (1, 0), (neck, 0.7)])]


def animal(rng: Random) -> list[Array]:
    leg, neck = rng.uniform(0.35, 0.7), rng.uniform(-0.6, 0)
    legs = [limb((x, 0.1), (x + rng.uniform(-0.15, 0.15), 0.25 + leg), 0.2) for x in (-0.55, -0.35, 0.3, 0.5)]
    head = [limb((0.45, -0.05), (0.85, neck), 0.35), oval(0.95, neck, 0.32, 0.2, 0.3), oval(0.78, neck - 0.2, 0.07, 0.15)]
    return [oval(0, 0, 0.75, rng.uniform(0.28, 0.42)), *legs, *head, limb((-0.65, -0.1), (-1.1, rng.uniform(-0.5, 0.4)), 0.12)]


def fish(rng: Random) -> list[Array]:
    tall = rng.uniform(0.3, 0.55)
    fins = [
        np.array([(0.6, 0), (1.1, -0.45), (1, 0), (1.1, 0.45)]),
        np.array([(-0.3, -tall * 0.8), (0.2, -tall - 0.3), (0.4, -tall * 0.6)]),
    ]
    return [oval(-0.1, 0, 0.85, tall), *fins]


def bird(rng: Random) -> list[Array]:
    wing = np.array([(-0.3, 0), (rng.uniform(-0.5, 0.3), -rng.uniform(0.6, 1.1)), (0.35, 0)])
    parts = [np.array([(-0.4, -0.1), (-1.1, rng.uniform(-0.3, 0.3)), (-0.5, 0.2)]), np.array([(0.75, -0.3), (1.05, -0.2), (0.75, -0.12)])]
    return [oval(0, 0, 0.6, 0.28, -0.2), oval(0.6, -0.22, 0.22, 0.2), wing, *parts]


def flower(rng: Random) -> list[Array]:
    petals = rng.integers(5, 10)
    angles = np.arange(petals) * TURN / petals
    return [*(oval(0.6 * math.cos(a), 0.6 * math.sin(a), 0.42, 0.9 / petals + 0.1, a) for a in angles), oval(0, 0, 0.3, 0.3)]


def tree(rng: Random) -> list[Array]:
    if rng.random() < 0.4:
        return [
            limb((0, 1.1), (0, 0), 0.25),
            *(np.array([(-w, y), (0, y - 0.8), (w, y)]) for w, y in ((0.7, 0.7), (0.55, 0.2), (0.4, -0.3))),
        ]
    crowns = [oval(*rng.uniform((-0.4, -0.8), (0.4, 0.1)), *rng.uniform(0.3, 0.55, 2)) for _ in range(rng.integers(3, 7))]
    return [limb((rng.uniform(-0.1, 0.1), 1.1), (0, -0.3), 0.25), *crowns]


def house(rng: Random) -> list[Array]:
    top = rng.uniform(-0.3, 0.2)
    return [box(-0.8, top, 0.8, 0.9), np.array([(-1, top), (rng.uniform(-0.5, 0.5), -1), (1, top)]), box(0.4, -0.8, 0.6, top)]


def person(rng: Random) -> list[Array]:
    arms = [limb((s * 0.22, -0.5), (s * rng.uniform(0.3, 0.7), rng.uniform(-0.9, 0.15)), 0.15) for s in (-1, 1)]
    legs = [limb((s * 0.13, 0.1), (s * rng.uniform(0.1, 0.4), 1.1), 0.25) for s in (-1, 1)]
    return [oval(0, -0.85, 0.18, 0.22), oval(0, -0.2, rng.uniform(0.25, 0.38), 0.48), *arms, *legs]


def bottle(rng: Random) -> list[Array]:
    y = np.linspace(-1, 1, 40)
    half = rng.uniform(0.1, 0.2) + rng.uniform(0.15, 0.4) / (1 + np.exp(-(y - rng.uniform(-0.6, 0.1)) * rng.uniform(5, 20)))
    return [np.concatenate([np.stack([half, y], -1), np.stack([-half, y], -1)[::-1]])]


def car(rng: Random) -> list[Array]:
    cabin = np.array([(-0.65, -0.1), (-0.4, -0.5), (rng.uniform(0.1, 0.4), -0.5), (0.65, -0.1)])
    return [box(-1, -0.15, 1, 0.3), cabin, oval(-0.55, 0.3, 0.22, 0.22), oval(0.55, 0.3, 0.22, 0.22)]


SHAPES: dict[str, Callable[[Random], list[Array]]] = {
    'disk': disk,
    'ellipse': ellipse,
    'square': square,
    'rectangle': rectangle,
    'triangle': triangle,
    'star': star,
    'ring': ring,
    'cross': cross,
    'polygon': polygon,
    'blob': blob,
    'leaf': leaf,
    'bar': bar,
    'wire': wire,
    'moon': moon,
    'heart': heart,
    'arrow': arrow,
    'animal': animal,
    'fish': fish,
    'bird': bird,
    'flower': flower,
    'tree': tree,
    'house': house,
    'person': person,
    'bottle': bottle,
    'car': car,
}
UPRIGHT = {'animal', 'bird', 'tree', 'house', 'person', 'bottle', 'car'}
CLASSES = (*SHAPES, *TEXTURES)


# ---- light


def flat(rng: Random, mask: Array) -> Array:
    return np.ones(mask.shape, np.float32)


def slanted(rng: Random, mask: Array) -> Array:
    angle, depth = rng.uniform(0, TURN), rng.uniform(0.1, 0.5)
    x, y = np.linspace(-1, 1, mask.shape[1], dtype=np.float32)[None], np.linspace(-1, 1, mask.shape[0], dtype=np.float32)[:, None]
    return 1 + depth * (x * math.cos(angle) + y * math.sin(angle))


def round_(rng: Random, mask: Array) -> Array:
    """A ball lit from a point, with a highlight now and then."""
    x, y = np.linspace(-1, 1, mask.shape[1], dtype=np.float32)[None], np.linspace(-1, 1, mask.shape[0], dtype=np.float32)[:, None]
    distance = (x - rng.uniform(-0.6, 0.6)) ** 2 + (y - rng.uniform(-0.7, 0.3)) ** 2
    return 1.2 - rng.uniform(0.1, 0.35) * distance + rng.uniform(0, 1) * (rng.random() < 0.3) * np.exp(-distance * 25)


def cushion(rng: Random, mask: Array) -> Array:
    """The shape blown up like a cushion and lit from the side."""
    height = np.sqrt(cv2.distanceTransform((mask > 127).astype(np.uint8), cv2.DIST_L2, 3))
    blur = max(3, round(max(mask.shape) * rng.uniform(0.02, 0.08)) * 2 + 1)
    height = cv2.blur(cv2.blur(height, (blur, blur)), (blur, blur))
    angle = rng.uniform(0, TURN)
    slope = math.cos(angle) * cv2.Sobel(height, cv2.CV_32F, 1, 0) + math.sin(angle) * cv2.Sobel(height, cv2.CV_32F, 0, 1)
    return 1 + rng.uniform(0.15, 0.6) * slope / (np.abs(slope).max() + 1e-6)


SHADINGS = (flat, slanted, round_, cushion)


def cast_shadow(rng: Random, image: Array, mask: Array) -> Array:
    """The image darkened by a soft, shifted copy of the mask, both at full size."""
    height, width = mask.shape
    shift = rng.normal(0, 0.04, 2) * (width, height) / 4
    small = cv2.resize(mask, (width // 4 + 1, height // 4 + 1), interpolation=cv2.INTER_AREA).astype(np.float32)
    moved = cv2.warpAffine(small, np.array([[1, 0, shift[0]], [0, 1, shift[1]]]), small.shape[::-1])
    soft = cv2.resize(cv2.GaussianBlur(moved, (0, 0), rng.uniform(0.5, 4)), (width, height))
    return image * (1 - rng.uniform(0.2, 0.7) / 255 * soft)[..., None]


# ---- composition


def fill(contours: Sequence[Array], height: int, width: int) -> Array:
    """(height, width) uint8 coverage 0..255 of the union of contours in pixels, with smooth edges."""
    mask = np.zeros((height, width), np.uint8)
    for contour in contours:
        cv2.fillPoly(mask, [np.round(contour * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return mask


def patch(rng: Random, contours: Sequence[Array], height: int, width: int) -> Array:
    """(height, width) float32 0..1: where a thing of two tones has its second tone: some of its parts, spots, or one side."""
    if len(contours) > 1 and rng.random() < 0.6:
        parts = [contour for contour in contours if rng.random() < 0.5]
        return fill(parts, height, width).astype(np.float32) / 255
    if rng.random() < 0.6:
        return np.clip((octaves(rng, height, width, rng.uniform(2, 6), 1.5) - rng.uniform(0.4, 0.65)) * 20, 0, 1)
    return np.clip((gradient(rng, height, width) - rng.uniform(0.3, 0.7)) * rng.uniform(5, 100), 0, 1)


def cover(rng: Random, style: Style, contours: Sequence[Array], height: int, width: int, two_tone: float) -> Array:
    """(height, width, 3) float32 colours of one region, of two tones with probability `two_tone`.

    An object may change texture with the tone; a surface (no contours) keeps it, as stains and light on a ground do.
    """
    colours = paint(rng, style, height, width)
    if rng.random() >= two_tone:
        return colours
    second = choose_style(rng, 0.6) if contours else Style(style.texture, invent_palette(rng, style.palette.mean(0)))
    share = patch(rng, contours, height, width)[..., None]
    return colours + share * (paint(rng, second, height, width) - colours)


def seen_from_above(rng: Random, colours: Array) -> Array:
    """The colours laid on a plane that recedes upwards."""
    height, width = colours.shape[:2]
    near = rng.uniform(0.1, 0.4)
    corners = np.array([(0, 0), (width, 0), (width * (1 - near), height), (width * near, height)], np.float32)
    matrix = cv2.getPerspectiveTransform(corners, np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32))
    return cv2.warpPerspective(colours, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def half_plane(rng: Random, height: int, width: int) -> Array:
    """Contour in pixels of all that lies beyond a rough, wavy or straight line: mostly a horizon, sometimes a wall."""
    reach = height + width
    x = np.linspace(-reach, reach, 240)
    waves = np.arange(1, 60)
    rough = rng.choice((0, 0, 0.05, 0.15, 0.4)) * rng.normal(0, 1, 59) / waves ** rng.uniform(1.0, 2.0)
    y = min(height, width) * (rough * np.sin(x[:, None] / reach * TURN * waves + rng.uniform(0, TURN, 59))).sum(1)
    line = np.concatenate([np.stack([x, y], -1), [(reach, 2 * reach), (-reach, 2 * reach)]])
    angle = rng.normal(0, 0.08) if rng.random() < 0.65 else rng.uniform(0, TURN)
    return turned(line, angle) + (rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height)


def background(rng: Random, height: int, width: int) -> tuple[Array, Array, list[str]]:
    """Colours (H, W, 3) float32, labels (H, W) int32 and names of 1 to 3 surfaces."""
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
    """(3,) mean of the image (H, W, 3) where the mask is set; black for an empty mask."""
    return np.array(cv2.mean(image, mask)[:3])


def contrasting_style(rng: Random, plainness: float, under: Array) -> Style:
    """A style whose mean colour stands out from the colour under it (3,); the last of a few tries where none does."""
    for _ in range(4):
        style = choose_style(rng, plainness)
        if np.abs(style.palette.mean(0) - under).max() > 30:
            break
    return style


def object_contours(rng: Random, shape: str, size: float, height: int, width: int) -> list[Array]:
    """Contours in pixels of a shape of the size (share of the shorter side), turned, stretched and put at a random place."""
    angle = rng.normal(0, 0.15) if shape in UPRIGHT else rng.uniform(0, TURN)
    stretch = np.exp(rng.normal(0, 0.15, 2)) * (rng.choice((-1, 1)), 1) * size * min(height, width) / 2
    place = rng.uniform(-0.03, 1.03, 2) if rng.random() < 0.5 else rng.normal(0.5, 0.17, 2)
    return [turned(contour * stretch, angle) + place * (width, height) for contour in SHAPES[shape](rng)]


def object_sizes(rng: Random) -> Array:
    """Sizes of 0 to 8 objects as shares of the shorter side, 0.05..0.8, mostly large ones first."""
    count = rng.choice(9, p=(0.05, 0.2, 0.22, 0.18, 0.12, 0.09, 0.06, 0.04, 0.04))
    sizes = np.where(rng.random(count) < 0.4, rng.uniform(0.3, 0.8, count), np.exp(rng.uniform(math.log(0.05), math.log(0.8), count)))
    return np.sort(sizes)[::-1] if rng.random() < 0.7 else sizes


def place(rng: Random, image: Array, mask: Array, contours: Sequence[Array], style: Style, shading: Callable[..., Array]) -> Array:
    """The image with an object of the coverage mask (H, W) drawn into it."""
    left, top, width, height = cv2.boundingRect(mask)
    window = np.s_[top : top + height, left : left + width]
    local = [contour - (left, top) for contour in contours]
    colours = cover(rng, style, local, height, width, 0.3) * shading(rng, mask[window])[..., None]
    image = cast_shadow(rng, image, mask) if rng.random() < 0.4 else image.copy()
    image[window] += (mask[window].astype(np.float32) / 255)[..., None] * (colours - image[window])
    return image


def develop(rng: Random, image: Array) -> Array:
    """What light and camera do: (H, W, 3) float32 to uint8, with uneven light, colour cast, contrast, blur, noise, compression."""
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
    """A caption that names each class once: objects, then the surfaces they are on."""
    things = [f'{"an" if name[0] in "aeiou" else "a"} {name}' for name in dict.fromkeys(names) if name in SHAPES]
    surfaces = [name for name in dict.fromkeys(names) if name in TEXTURES]
    return ' on '.join(listed(words) for words in (things, surfaces) if words)


def listed(words: Sequence[str]) -> str:
    return ' and '.join(part for part in (', '.join(words[:-1]), words[-1]) if part)


def compact(labels: Array, names: Sequence[str]) -> tuple[Array, tuple[str, ...]]:
    """Labels and names without the regions that no pixel shows."""
    shown = np.bincount(labels.ravel(), minlength=len(names)) > 0
    numbers = np.cumsum(shown) - 1
    return numbers[labels].astype(np.int32), tuple(name for name, is_shown in zip(names, shown, strict=True) if is_shown)


def scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    """A random scene of the size in pixels, the same for the same state of rng. Raises ValueError for a side below SMALLEST_SIDE."""
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f'height and width must be at least {SMALLEST_SIDE} pixels; got {height} and {width}')
    image, labels, names = background(rng, height, width)
    herd = rng.random() < 0.2
    shape, style, shading = '', Style('', np.empty((0, 3))), flat
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
            # A camouflaged object shares the mean colour of what it hides and differs in texture only.
            camouflaged = rng.random() < 0.12
            under = mean_colour(image, mask)
            style = choose_style(rng, 0, under) if camouflaged else contrasting_style(rng, 0.45, under)
        image = place(rng, image, mask, contours, style, shading)
        labels[inside] = len(names)
        names.append(shape)
    labels, shown = compact(labels, names)
    return Scene(develop(rng, image), labels, shown, describe(shown))
