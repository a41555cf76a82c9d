"""Scenes on disk that training never uses, as a data set with class names."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from padseg.train.scenes import CLASSES, Scene, scene
from padseg.types import Array

HELD_OUT = 1_000_000
SIZES = ((256, 256), (208, 320), (320, 208))  # (height, width), used in turn


def held_out_scene(number: int, seed: int = 0, size: tuple[int, int] | None = None) -> Scene:
    """The scene with this number, made with the seed (HELD_OUT + seed, number); training has much smaller ones. size: (height, width)."""
    return scene(np.random.default_rng((HELD_OUT + seed, number)), *(size or SIZES[number % len(SIZES)]))


def prepare_scenes(folder: Path, count: int, seed: int = 0) -> Path:
    """Make a data set of scenes: images/, labels/, a padseg.toml for `padseg eval folder`, and classes.txt for `padseg label`."""
    for name in ('images', 'labels'):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / 'padseg.toml').write_text(f'classes = {json.dumps(CLASSES)}\n', encoding='utf-8')
    (folder / 'classes.txt').write_text('\n'.join(CLASSES) + '\n', encoding='utf-8')
    for number in range(count):
        made = held_out_scene(number, seed)
        classes = np.array([CLASSES.index(name) for name in made.names], np.uint8)
        write_image(folder / 'images' / f'{number:05}.png', made.image)
        write_image(folder / 'labels' / f'{number:05}.png', classes[made.labels])
    return folder


def write_image(path: Path, image: Array) -> None:
    """Write RGB (H, W, 3) or grey (H, W)."""
    cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)
