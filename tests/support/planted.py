"""A small random model of Stable Diffusion 3's class in which one block looks at the picture, while the others only see places."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

LAYER = 2  # of 4 blocks, the one that looks
CONTENT = 12  # channels of an image token that hold the picture; the others hold its place
SIDE = 96
COLOURS = np.array([[30, 30, 40], [230, 40, 30], [40, 200, 60], [240, 240, 220]])


def planted(folder: Path, make: Callable[..., Path]) -> Path:
    """Make a model and plant a block into it. Blocks add nothing to the tokens, so that all see the same."""
    import torch
    from safetensors.torch import load_file, save_file

    make(folder, qk_norm=None)
    (folder / 'padseg.json').write_text(json.dumps({'layer': 0, 'side': SIDE, 'seg4diff': {'step': 25}}))
    path = folder / 'transformer' / 'diffusion_pytorch_model.safetensors'
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if '.norm1' in name:
            weight.zero_()  # neither gates nor shifts
        elif name.startswith('pos_embed.proj'):
            weight[CONTENT:] = 0
        elif name == 'pos_embed.pos_embed':
            weight[..., :CONTENT] = 0
        elif name.endswith(('attn.to_q.weight', 'attn.add_k_proj.weight')):
            weight.copy_(torch.randn(weight.shape, generator=generator))
            if 'to_q' in name:
                looks = name.split('.')[1] == str(LAYER)
                weight[:, slice(CONTENT, None) if looks else slice(0, CONTENT)] = 0
    save_file(tensors, path, {'format': 'pt'})
    return folder


def pictures(folder: Path, count: int) -> tuple[Path, Path]:
    """Make pictures of rectangles in plain colours with little noise, and their labels: the two folders."""
    rng = np.random.default_rng(0)
    for name in ('images', 'labels'):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        truth = np.zeros((SIDE, SIDE), np.uint8)
        for region in range(1, len(COLOURS)):
            (top, left), (height, width) = rng.integers(4, 60, 2), rng.integers(24, 36, 2)
            truth[top : top + height, left : left + width] = region
        image = (COLOURS[rng.permutation(len(COLOURS))][truth] + rng.normal(0, 6, (SIDE, SIDE, 3))).clip(0, 255)
        cv2.imwrite(str(folder / 'images' / f'{number}.png'), image.astype(np.uint8))
        cv2.imwrite(str(folder / 'labels' / f'{number}.png'), truth)
    return folder / 'images', folder / 'labels'
