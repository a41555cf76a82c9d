"""Surfaces in synthetic scenes: textures and their colours.

A texture is a function (rng, height, width) -> field (height, width) float32 in 0..1, which a palette turns into colours.
To add a class, write such a function and add it to TEXTURES.
"""

from __future__ import annotations

import colorsys
import math
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.random import Generator as Random

    from padseg.types import Array


class Style(NamedTuple):
    """Texture and colours of a region. palette: (K, 3) float RGB in 0..255, looked up with the texture's field."""

    texture: str
    palette: Array


def octaves(rng: Random, height: int, width: int, cells: float, slope: float, stretch: float = 1.0) -> Array:
    """Fractal noise in 0..1: octaves that start with `cells` along the longer side, each twice as fine and 2**-slope times as strong.

    stretch: elongation along x.
    """
    total = np.zeros((height, width), np.float32)
    side, strength = max(height, width), 1.0
    while cells < max(side, 4) and strength > 0.03:
        grid = rng.random((max(2, round(cells * height / side)), max(2, round(cells * width / side / stretch))), dtype=np.float32)
        total += strength * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        cells, strength = 2 * cells, strength * 2.0**-slope
    mean, deviation = cv2.meanStdDev(total)
    return np.clip((total - mean.item()) / (4.5 * deviation.item() + 1e-6) + 0.5, 0, 1)


def bend(rng: Random, field: Array, amount: float, cells: float = 2.0) -> Array:
    """Warp the field smoothly by up to `amount` of its longer side and rotate it by a random angle."""
    height, width = field.shape
    reach = amount * max(height, width)
    dx, dy = (reach * (octaves(rng, height, width, cells, 2.0) - 0.5) for _ in range(2))
    angle = rng.uniform(0, math.tau)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32) - width / 2, np.arange(height, dtype=np.float32) - height / 2)
    u = (x * math.cos(angle) + y * math.sin(angle) + dx + width / 2).astype(np.float32)
    v = (y * math.cos(angle) - x * math.sin(angle) + dy + height / 2).astype(np.float32)
    return cv2.remap(field, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def periods(rng: Random, height: int, width: int, turn: float = math.tau) -> tuple[Array, Array]:
    """Rotated coordinates u, v (height, width) in units of a random period, sometimes distorted by waves."""
    period = max(4.0, max(height, width) * math.exp(rng.uniform(math.log(0.04), math.log(0.3))))
    angle = rng.uniform(-turn / 2, turn / 2)
    x, y = np.arange(width, dtype=np.float32)[None] / period, np.arange(height, dtype=np.float32)[:, None] / period
    shift = rng.random(2, dtype=np.float32)
    u, v = x * math.cos(angle) + y * math.sin(angle) + shift[0], y * math.cos(angle) - x * math.sin(angle) + shift[1]
    if rng.random() < 0.35:
        wave = octaves(rng, height, width, 2.0, 2.0) * rng.uniform(0.5, 3)
        u, v = u + wave, v + wave[::-1, ::-1]
    return u, v


def plain_surface(rng: Random, height: int, width: int) -> Array:
    return 0.5 + rng.uniform(0, 0.25) * (octaves(rng, height, width, 2.0, 1.5) - 0.5)


def gradient(rng: Random, height: int, width: int) -> Array:
    x, y = np.linspace(-1, 1, width, dtype=np.float32)[None], np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    if rng.random() < 0.35:
        return np.clip(np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)) / 2, 0, 1)
    angle = rng.normal(math.tau / 4, 0.6)
    return np.clip(0.5 + 0.45 * (x * math.cos(angle) + y * math.sin(angle)), 0, 1)


def stripes(rng: Random, height: int, width: int) -> Array:
    u, _ = periods(rng, height, width)
    return np.clip(0.5 + rng.uniform(-0.3, 0.3) + rng.uniform(0.5, 4) * np.sin(math.tau * u), 0, 1)


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
    'plain': plain_surface,
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

# Natural colours of a texture, in palette order. They are used half of the time.
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
    """Make 2 to 4 colours of related hue, from dark to light or back, around a base colour if given: (K, 3) float32 in 0..255."""
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
    """Choose a texture, plain or a gradient with probability `plainness`, and a palette, around the colour `near` (3,) if given."""
    calm = ('plain', 'gradient')
    texture = calm[rng.integers(2)] if rng.random() < plainness else tuple(TEXTURES)[rng.integers(2, len(TEXTURES))]
    if near is None and texture in NATURAL and rng.random() < 0.5:
        return Style(texture, np.clip(np.array(NATURAL[texture]) * rng.uniform(0.65, 1.15, 3) * rng.uniform(0.8, 1.1), 0, 255))
    return Style(texture, invent_palette(rng, near))


def paint(rng: Random, style: Style, height: int, width: int) -> Array:
    """Paint a surface in this style: (height, width, 3) float32 in 0..255."""
    field = TEXTURES[style.texture](rng, height, width)
    knots = np.linspace(40, 215, len(style.palette))
    table = np.stack([np.interp(np.arange(256), knots, channel) for channel in style.palette.T], -1).astype(np.float32)
    return np.take(table, (field * 255).astype(np.uint8), axis=0)
