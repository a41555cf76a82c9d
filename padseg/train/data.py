"""Training examples with soft masks of regions or named classes: synthetic scenes, and annotated photographs with pasted-in regions."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from padseg.errors import NoImages
from padseg.train.scenes import CLASSES, Scene, compressed, scene, surfaces
from padseg.train.settings import Mixture
from padseg.train.vocabulary import SLOTS
from padseg.types import Array

VIEWS = ((256, 256), (208, 320), (320, 208))  # height, width in pixels: all near 256 x 256 in area
VIEW_SHARES = (0.3, 0.5, 0.2)
CELL = 8  # side of a mask cell in pixels: half an image token
MAX_MASKS = 24  # only the largest regions enter the loss
ROWS = max(MAX_MASKS, len(CLASSES))  # masks per example, padding included
VOID = 255  # the usual ignore label in 8-bit class maps


class Photographs(NamedTuple):
    """A folder of annotated photographs.

    pairs: each image file with its label maps, one per annotator; weight: relative sampling frequency; void: label to ignore.
    """

    pairs: tuple[tuple[pathlib.Path, tuple[pathlib.Path, ...]], ...]
    weight: float
    void: int | None


class Batch(NamedTuple):
    """images: (B, H, W, 3) uint8 RGB; masks: (B, ROWS, H/CELL, W/CELL) uint8, covered pixels per cell, 0..64; counts: (B,) masks in use.

    prompts: B texts. The words of a non-empty prompt name the masks, and words (B, ROWS, SLOTS) holds, for each mask, the weights that
    average the maps of its tokens. captions: B descriptions of the scenes, empty for photographs.
    """

    images: Tensor
    masks: Tensor
    counts: Tensor
    captions: list[str]
    prompts: list[str]
    words: Tensor


class Example(NamedTuple):
    """image: (H, W, 3) uint8; masks: (M, H/CELL, W/CELL) uint8; caption: a description; names: the classes of the masks, if named."""

    image: Array
    masks: Array
    caption: str = ''
    names: tuple[str, ...] = ()


def photographs(argument: str) -> Photographs:
    """List the photographs of FOLDER[=WEIGHT[=VOID]]. Raises NoImages if there are none.

    Each FOLDER/images[/train]/x.jpg needs FOLDER/labels[/train]/x.png, or x_0.png, x_1.png, ... from several annotators.
    """
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


def batch(seed: int, index: int, size: int, folders: Sequence[Photographs], mixture: Mixture) -> Batch:
    """Make batch number `index` of a training run. The result depends on the arguments alone; all its examples have the same size."""
    rng = np.random.default_rng((seed, index))
    view = VIEWS[rng.choice(len(VIEWS), p=VIEW_SHARES)]
    examples = []
    for _ in range(size):
        if folders and rng.random() >= mixture.synthetic:
            image, labels = photograph(rng, folders, view, mixture.varied)
            examples.append(Example(image, soft_masks(labels)))
            continue
        drawn = surfaces(rng, *view) if mixture.surfaces and rng.random() < mixture.surfaces else scene(rng, *view)
        if rng.random() < mixture.named:
            alone = mixture.alone and rng.random() < mixture.alone
            names = prompt_names(rng, drawn, 0 if alone else mixture.others)
            examples.append(Example(drawn.image, class_masks(drawn, names), drawn.caption, names))
        else:
            examples.append(Example(drawn.image, soft_masks(drawn.labels), drawn.caption))
    pixels = np.stack([example.image for example in examples])
    masks = np.stack([np.pad(example.masks, ((0, ROWS - len(example.masks)), (0, 0), (0, 0))) for example in examples])
    return Batch(
        torch.from_numpy(pixels),
        torch.from_numpy(masks),
        torch.tensor([len(example.masks) for example in examples]),
        [example.caption for example in examples],
        [' '.join(example.names) for example in examples],
        torch.from_numpy(np.stack([word_weights(example.names) for example in examples])),
    )


def prompt_names(rng: np.random.Generator, drawn: Scene, others: int) -> tuple[str, ...]:
    """Return the classes in a scene and up to `others` absent ones, in random order."""
    shown = list(dict.fromkeys(drawn.names))
    absent = [name for name in CLASSES if name not in shown]
    names = shown + [absent[i] for i in rng.permutation(len(absent))[: rng.integers(others + 1)]]
    return tuple(names[i] for i in rng.permutation(len(names)))


def word_weights(names: Sequence[str]) -> Array:
    """Weights of the prompt's tokens for each name: (ROWS, SLOTS) float32. Every word is one token; the row of a name sums to 1."""
    weights = np.zeros((ROWS, SLOTS), np.float32)
    slot = 1  # after the start token
    for row, name in enumerate(names):
        count = len(name.split())
        weights[row, slot : slot + count] = 1 / count
        slot += count
    return weights


def photograph(
    rng: np.random.Generator, folders: Sequence[Photographs], view: tuple[int, int], varied: bool = False
) -> tuple[Array, Array]:
    """Crop a random photograph, often pasting in a region of another: (H, W, 3) uint8 and labels (H, W), -1 = ignore.

    varied: see `Mixture`.
    """

    def part() -> tuple[Array, Array]:
        cut = turned_crop if varied and rng.random() < 0.4 else crop
        return cut(rng, *read_pair(rng, folders), view)

    image, labels = part()
    while rng.random() < 0.35:
        image, labels = paste(rng, image, labels, *part())
        if not varied:
            break
    image = recolour(rng, image)
    return (worn(rng, image) if varied else image), labels


def read_pair(rng: np.random.Generator, folders: Sequence[Photographs]) -> tuple[Array, Array]:
    weights = np.array([folder.weight for folder in folders])
    folder = folders[rng.choice(len(folders), p=weights / weights.sum())]
    path, maps = folder.pairs[rng.integers(len(folder.pairs))]
    image = cv2.cvtColor(decode_array(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    labels = decode_array(maps[rng.integers(len(maps))], cv2.IMREAD_UNCHANGED).astype(np.int32)
    if folder.void is not None:
        labels[labels == folder.void] = -1
    return image, labels


def decode_array(path: pathlib.Path, flag: int) -> Array:
    decoded = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), flag)
    if decoded is None:
        raise NoImages(f'{path} cannot be decoded')
    return decoded


def crop(rng: np.random.Generator, image: Array, labels: Array, view: tuple[int, int]) -> tuple[Array, Array]:
    """Crop to the view's aspect ratio and resize to the view; the crop has 40 to 100 % of the largest area and is flipped half the time."""
    height, width = labels.shape
    scale = min(height / view[0], width / view[1]) * rng.uniform(0.4, 1) ** 0.5
    size = max(1, round(view[0] * scale)), max(1, round(view[1] * scale))
    top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip((height, width), size, strict=True))
    part = np.s_[top : top + size[0], left : left + size[1]]
    image = cv2.resize(image[part], view[::-1], interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR)
    labels = cv2.resize(labels[part], view[::-1], interpolation=cv2.INTER_NEAREST)
    return (image[:, ::-1], labels[:, ::-1]) if rng.random() < 0.5 else (image, labels)


def turned_crop(rng: np.random.Generator, image: Array, labels: Array, view: tuple[int, int]) -> tuple[Array, Array]:
    """Like `crop`, of a part that is turned by up to 20 degrees and stretched by up to 20 %, mirrored where it reaches beyond the edge."""
    height, width = labels.shape
    scale = min(height / view[0], width / view[1]) * rng.uniform(0.3, 1) ** 0.5
    angle, stretch, flip = rng.uniform(-0.35, 0.35), math.exp(rng.uniform(-0.18, 0.18)), 1 if rng.random() < 0.5 else -1
    cos, sin = math.cos(angle), math.sin(angle)
    to_picture = scale * np.array([[cos * stretch * flip, -sin], [sin * stretch * flip, cos]])
    size = np.array([view[1], view[0]])
    reach = np.abs(to_picture) @ (size / 2)
    centre = [rng.uniform(min(part, whole / 2), max(whole - part, whole / 2)) for part, whole in zip(reach, (width, height), strict=True)]
    matrix = np.concatenate([to_picture, (np.array(centre) - to_picture @ (size / 2))[:, None]], 1)
    edge = cv2.BORDER_REFLECT
    image = cv2.warpAffine(image, matrix, view[::-1], flags=cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR, borderMode=edge)
    numbers: Array = labels.astype(np.float32)  # OpenCV warps no int32
    numbers = cv2.warpAffine(numbers, matrix, view[::-1], flags=cv2.WARP_INVERSE_MAP | cv2.INTER_NEAREST, borderMode=edge)
    return image, numbers.astype(np.int32)


def worn(rng: np.random.Generator, image: Array) -> Array:
    """Blur one image in ten, add noise to 15 % and compress 10 %: (H, W, 3) uint8 -> the same."""
    chance = rng.random()
    if chance < 0.1:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.1)))
    if chance < 0.25:
        noise = rng.standard_normal(image.shape, dtype=np.float32) * min(rng.exponential(4), 12.0)
        return np.asarray(np.clip(image + noise, 0, 255).astype(np.uint8))
    return compressed(np.ascontiguousarray(image), int(rng.integers(30, 90))) if chance < 0.35 else image


def paste(rng: np.random.Generator, image: Array, labels: Array, source: Array, regions: Array) -> tuple[Array, Array]:
    """Paste one region of the source, 3 to 50 % of its area, at a random place in the image, as a new region."""
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
    """Apply a random gain and gamma, mostly the same for all channels; turn one image in twenty grey."""
    values = np.arange(256) / 255
    curves = [values ** rng.uniform(0.75, 1.33) * rng.uniform(0.8, 1.2) for _ in range(3)]
    if rng.random() < 0.7:  # mostly one curve for all channels, so that the white balance stays realistic
        curves = [curves[0] * rng.uniform(0.95, 1.05) for _ in range(3)]
    table = (np.clip(np.stack(curves, -1), 0, 1) * 255).astype(np.uint8)  # (256, 3)
    image = cv2.LUT(np.ascontiguousarray(image), table[None])
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) if rng.random() < 0.05 else image


def soft_masks(labels: Array) -> Array:
    """Count the pixels of each region in each cell: (H, W) -> (M, H/CELL, W/CELL) uint8 in 0..CELL², largest regions first.

    Labels below 0 and all but the MAX_MASKS largest regions are left out.
    """
    names, areas = np.unique(labels[labels >= 0], return_counts=True)
    kept = names[np.argsort(-areas, kind='stable')[:MAX_MASKS]]
    order = np.full(int(max(labels.max(), 0)) + 2, len(kept))  # label -1 reads the last entry
    order[kept] = np.arange(len(kept))
    return covered(order[labels], len(kept))


def class_masks(drawn: Scene, names: Sequence[str]) -> Array:
    """Count the pixels of each class in each cell: (len(names), H/CELL, W/CELL) uint8 in 0..CELL²."""
    order = np.array([names.index(name) if name in names else len(names) for name in drawn.names])
    return covered(order[drawn.labels], len(names))


def covered(numbers: Array, count: int) -> Array:
    """Count the pixels with each number 0..count-1 in each cell: (H, W) -> (count, H/CELL, W/CELL) uint8. `count` marks ignored pixels."""
    rows, columns = numbers.shape[0] // CELL, numbers.shape[1] // CELL
    cells = np.arange(rows * columns).reshape(rows, columns).repeat(CELL, 0).repeat(CELL, 1)
    counts = np.bincount((numbers * rows * columns + cells).ravel(), minlength=(count + 1) * rows * columns)
    return counts.reshape(-1, rows, columns)[:count].astype(np.uint8)
