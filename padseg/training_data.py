"""Training examples with soft region masks: synthetic scenes, and crops of annotated photographs with foreign regions pasted in."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from padseg.errors import NoImages
from padseg.scenes import scene
from padseg.types import Array

VIEWS = ((256, 256), (208, 320), (320, 208))  # height, width in pixels: all near 256 x 256 in area
VIEW_SHARES = (0.3, 0.5, 0.2)
CELL = 8  # pixels a side of one cell of the masks: half an image token
MAX_MASKS = 24  # the largest regions; the rest is left out of the loss
VOID = 255  # ignored by convention in 8-bit label maps with classes


class Photographs(NamedTuple):
    """A folder of annotated photographs: each file with its label maps (one an annotator), and how often it is drawn."""

    pairs: tuple[tuple[pathlib.Path, tuple[pathlib.Path, ...]], ...]
    weight: float
    void: int | None


class Batch(NamedTuple):
    """images: (B, 3, H, W) in -1..1; masks: (B, MAX_MASKS, H/CELL, W/CELL) uint8, share of a cell in 0..64; counts: (B,) masks in use."""

    images: Tensor
    masks: Tensor
    counts: Tensor
    captions: list[str]


def photographs(argument: str) -> Photographs:
    """The pictures of FOLDER[=WEIGHT[=VOID]]: FOLDER/images[/train]/x.jpg with FOLDER/labels[/train]/x.png or x_0.png, x_1.png, ..."""
    name, *rest = argument.split('=')
    images, labels = pathlib.Path(name) / 'images', pathlib.Path(name) / 'labels'
    if (images / 'train').is_dir():
        images, labels = images / 'train', labels / 'train'
    pairs = []
    for path in sorted(images.glob('*.jpg')):
        maps = sorted([*labels.glob(f'{path.stem}.png'), *labels.glob(f'{path.stem}_[0-9]*.png')])
        if maps:
            pairs.append((path, tuple(maps)))
    if not pairs:
        raise NoImages(f'no x.jpg with x.png or x_0.png, x_1.png, ... in {images} and {labels}')
    return Photographs(tuple(pairs), float(rest[0]) if rest else 1.0, int(rest[1]) if len(rest) > 1 else None)


def batch(seed: int, index: int, size: int, folders: Sequence[Photographs], synthetic: float) -> Batch:
    """The examples number `index` of a training run, a pure function of its arguments; all have one view."""
    rng = np.random.default_rng((seed, index))
    view = VIEWS[rng.choice(len(VIEWS), p=VIEW_SHARES)]
    images, masks, counts, captions = [], [], [], []
    for _ in range(size):
        if not folders or rng.random() < synthetic:
            drawn = scene(rng, *view)
            image, labels, caption = drawn.image, drawn.labels, drawn.caption
        else:
            image, labels, caption = *photograph(rng, folders, view), ''
        soft = soft_masks(labels)
        images.append(image)
        counts.append(len(soft))
        masks.append(np.pad(soft, ((0, MAX_MASKS - len(soft)), (0, 0), (0, 0))))
        captions.append(caption)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
    return Batch(pixels, torch.from_numpy(np.stack(masks)), torch.tensor(counts), captions)


def photograph(rng: np.random.Generator, folders: Sequence[Photographs], view: tuple[int, int]) -> tuple[Array, Array]:
    """A crop of a random photograph, often with a region of another pasted in: (H, W, 3) uint8 and labels (H, W), -1 = ignore."""
    image, labels = crop(rng, *read_pair(rng, folders), view)
    if rng.random() < 0.35:
        image, labels = paste(rng, image, labels, *crop(rng, *read_pair(rng, folders), view))
    return recolour(rng, image), labels


def read_pair(rng: np.random.Generator, folders: Sequence[Photographs]) -> tuple[Array, Array]:
    weights = np.array([folder.weight for folder in folders])
    folder = folders[rng.choice(len(folders), p=weights / weights.sum())]
    path, maps = folder.pairs[rng.integers(len(folder.pairs))]
    image = cv2.cvtColor(decode(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    labels = decode(maps[rng.integers(len(maps))], cv2.IMREAD_UNCHANGED).astype(np.int32)
    if folder.void is not None:
        labels[labels == folder.void] = -1
    return image, labels


def decode(path: pathlib.Path, flag: int) -> Array:
    decoded = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), flag)
    if decoded is None:
        raise NoImages(f'{path} cannot be decoded')
    return decoded


def crop(rng: np.random.Generator, image: Array, labels: Array, view: tuple[int, int]) -> tuple[Array, Array]:
    """A random part of the picture with the view's aspect ratio, 40 to 100 % of the largest such part, flipped half the time."""
    height, width = labels.shape
    scale = min(height / view[0], width / view[1]) * rng.uniform(0.4, 1) ** 0.5
    size = max(1, round(view[0] * scale)), max(1, round(view[1] * scale))
    top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip((height, width), size, strict=True))
    part = np.s_[top : top + size[0], left : left + size[1]]
    image = cv2.resize(image[part], view[::-1], interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR)
    labels = cv2.resize(labels[part], view[::-1], interpolation=cv2.INTER_NEAREST)
    return (image[:, ::-1], labels[:, ::-1]) if rng.random() < 0.5 else (image, labels)


def paste(rng: np.random.Generator, image: Array, labels: Array, source: Array, regions: Array) -> tuple[Array, Array]:
    """Move one region of the source, 3 to 50 % of the view, to a random place of the picture, where it becomes a region of its own."""
    names, areas = np.unique(regions[regions >= 0], return_counts=True)
    fit = names[(areas > 0.03 * regions.size) & (areas < 0.5 * regions.size)]
    if not len(fit):
        return image, labels
    mask = (regions == rng.choice(fit)).astype(np.float32)
    height, width = labels.shape
    move = np.array([[1, 0, rng.uniform(-0.4, 0.4) * width], [0, 1, rng.uniform(-0.4, 0.4) * height]])
    mask, source = (cv2.warpAffine(array, move, (width, height)) for array in (cv2.GaussianBlur(mask, (0, 0), 0.7), source))
    mixed = image + mask[..., None] * (source.astype(np.float32) - image)
    labels = np.where(mask > 0.5, labels.max() + 1, labels)
    return mixed.astype(np.uint8), labels


def recolour(rng: np.random.Generator, image: Array) -> Array:
    """Random gain a channel, contrast and gamma; grey one time in twenty."""
    values = np.arange(256) / 255
    curves = [values ** rng.uniform(0.75, 1.33) * rng.uniform(0.8, 1.2) for _ in range(3)]
    if rng.random() < 0.7:  # mostly one curve for all channels: white balance stays near what cameras give
        curves = [curves[0] * rng.uniform(0.95, 1.05) for _ in range(3)]
    table = (np.clip(np.stack(curves, -1), 0, 1) * 255).astype(np.uint8)  # (256, 3)
    image = cv2.LUT(np.ascontiguousarray(image), table[None])
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) if rng.random() < 0.05 else image


def soft_masks(labels: Array) -> Array:
    """How much of each cell every region covers: (H, W) -> (M, H/CELL, W/CELL) uint8 in 0..CELL², largest regions first, < 0 left out."""
    rows, columns = labels.shape[0] // CELL, labels.shape[1] // CELL
    names, areas = np.unique(labels[labels >= 0], return_counts=True)
    kept = names[np.argsort(-areas, kind='stable')[:MAX_MASKS]]
    order = np.full(int(max(labels.max(), 0)) + 2, len(kept))  # the last place of the table also serves -1
    order[kept] = np.arange(len(kept))
    cells = np.arange(rows * columns).reshape(rows, columns).repeat(CELL, 0).repeat(CELL, 1)
    counts = np.bincount((order[labels] * rows * columns + cells).ravel(), minlength=(len(kept) + 1) * rows * columns)
    return counts.reshape(-1, rows, columns)[: len(kept)].astype(np.uint8)
