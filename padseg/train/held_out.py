"""Scenes on disk that training never uses, as a data set with class names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image

from padseg.train.scenes import CLASSES, Scene, scene

HELD_OUT = 1_000_000
SIZES = ((256, 256), (208, 320), (320, 208))  # (height, width), used in turn


def held_out_scene(number: int, seed: int = 0, size: tuple[int, int] | None = None) -> Scene:
    """The scene with this number, made with the seed (HELD_OUT + seed, number); training has much smaller ones. size: (height, width)."""
    return scene(np.random.default_rng((HELD_OUT + seed, number)), *(size or SIZES[number % len(SIZES)]))


def prepare_scenes(folder: Path, count: int, seed: int = 0, size: tuple[int, int] | None = None) -> Path:
    """Make a data set of scenes: images/, labels/, a padseg.toml for `padseg eval folder`, and classes.txt for `padseg label`.

    seed, size: as of `held_out_scene`.
    """
    for name in ('images', 'labels'):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / 'padseg.toml').write_text(f'classes = {json.dumps(CLASSES)}\n', encoding='utf-8')
    (folder / 'classes.txt').write_text('\n'.join(CLASSES) + '\n', encoding='utf-8')
    for number in range(count):
        made = held_out_scene(number, seed, size)
        classes = np.array([CLASSES.index(name) for name in made.names], np.uint8)
        for name, pixels in (('images', made.image), ('labels', classes[made.labels])):
            PIL.Image.fromarray(pixels).save(folder / name / f'{number:05}.png')
    return folder
