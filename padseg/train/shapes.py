"""Outlines of the objects in synthetic scenes.

A shape is a function rng -> contours [(N, 2), ...] in about -1..1 (x right, y down); the object is their union.
To add a class, write such a function and add it to SHAPES.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.random import Generator as Random

    from padseg.types import Array


def oval(x: float, y: float, across: float, down: float, angle: float = 0.0, points: int = 40) -> Array:
    t = np.linspace(0, math.tau, points, endpoint=False)
    return turned(np.stack([across * np.cos(t), down * np.sin(t)], -1), angle) + (x, y)


def box(left: float, top: float, right: float, bottom: float) -> Array:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def limb(start: tuple[float, float], end: tuple[float, float], thick: float) -> Array:
    """A bar from start to end, slightly tapered."""
    along = np.subtract(end, start)
    side = np.array([-along[1], along[0]]) / (np.hypot(*along) + 1e-9) * thick / 2
    return np.array([start + side, start - side, end - 0.7 * side, end + 0.7 * side])


def turned(points: Array, angle: float) -> Array:
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    return points @ turn


def polar(radius: Array, angle: Array) -> Array:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)


def fill(contours: Sequence[Array], height: int, width: int) -> Array:
    """Rasterise the union of contours given in pixels: (height, width) uint8 coverage in 0..255, anti-aliased."""
    mask = np.zeros((height, width), np.uint8)
    for contour in contours:
        cv2.fillPoly(mask, [np.round(contour * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return mask


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
    return [polar(np.ones(3), np.arange(3) * math.tau / 3 + rng.uniform(-0.35, 0.35, 3))]


def star(rng: Random) -> list[Array]:
    tips = rng.integers(5, 9)
    return [polar(np.tile([1, rng.uniform(0.35, 0.6)], tips), np.arange(2 * tips) * math.tau / (2 * tips))]


def ring(rng: Random) -> list[Array]:
    outer = oval(0, 0, 1, 1, points=64)
    outer = np.concatenate([outer, outer[:1]])
    return [np.concatenate([outer, outer[::-1] * rng.uniform(0.45, 0.8)])]


def cross(rng: Random) -> list[Array]:
    arm = rng.uniform(0.2, 0.4)
    return [box(-1, -arm, 1, arm), box(-arm, -1, arm, 1)]


def polygon(rng: Random) -> list[Array]:
    corners = rng.integers(5, 9)
    return [polar(rng.uniform(0.65, 1, corners), (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * math.tau / corners)]


def blob(rng: Random) -> list[Array]:
    t, waves = np.linspace(0, math.tau, 96, endpoint=False), np.arange(1, 8)
    size = rng.normal(0, 0.45, 7) / waves**1.1
    radius = np.exp((size * np.cos(t[:, None] * waves + rng.uniform(0, math.tau, 7))).sum(1))
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
    y = rng.uniform(0.1, 0.4) * np.sin(x * rng.uniform(1, 5) + rng.uniform(0, math.tau))
    return [np.concatenate([np.stack([x, y], -1), np.stack([x, y + rng.uniform(0.04, 0.1)], -1)[::-1]])]


def moon(rng: Random) -> list[Array]:
    t = np.linspace(-math.tau / 4, math.tau / 4, 40)
    bow = rng.uniform(-0.1, 0.7)
    return [np.concatenate([np.stack([np.cos(t), np.sin(t)], -1), np.stack([bow * np.cos(t), np.sin(t)], -1)[::-1]])]


def heart(rng: Random) -> list[Array]:
    t = np.linspace(0, math.tau, 60, endpoint=False)
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
    angles = np.arange(petals) * math.tau / petals
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
