"""What the model sees of a picture, and the part of the picture that this is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image as PillowImage

from padseg.methods.options import require
from padseg.types import Array, Frame, Image

if TYPE_CHECKING:
    from torch import Tensor

SHORT_EDGE, LONG_CAP, DIVISIBLE = 640, 2560, 32  # Seg4Diff's release: detectron2's test resize and its padding, pixels
Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def view(image: Image, geometry: str, side: int, multiple: int, limit: int) -> tuple[Tensor, Frame]:
    """What the model sees, and the part of the picture it shows: (1, 3, h, w) float32 in -1..1.

    `whole` keeps the aspect ratio, with the area near side² and sides that are multiples of `multiple` up to `limit`; every preset
    is side x side: `stretch` squashes the picture (GoCA), `diffseg`, `diffcut` and `seg4diff-paper` cut a square from its centre,
    `seg4diff-release` resizes and pads the picture as detectron2 does and then squashes it, padding included; `seg4diff-ovss` does
    the same without padding.
    """
    import torch  # evaluation takes the rules below, and scores stored label maps without it

    size = height, width = image.shape[:2]
    target, box = (side, side), seen_box(size, geometry)
    require(
        geometry == 'whole' or (multiple <= side <= limit and side % multiple == 0),
        f'side is a multiple of {multiple} in {multiple}..{limit} for {geometry} with this model; got {side}',
    )
    if geometry == 'whole':
        target = whole_size(size, side, multiple, limit)
        shrinks = target[0] * target[1] < height * width
        seen = resize(image, target, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    elif geometry == 'stretch':
        squashed = PillowImage.fromarray(image).resize((side, side), PillowImage.Resampling.BICUBIC)
        seen = np.asarray(squashed, np.float32)
    elif geometry == 'seg4diff-release':
        seen = resize(padded(detectron_resized(image)), target, cv2.INTER_LINEAR)
    elif geometry == 'seg4diff-ovss':
        seen = resize(detectron_resized(image), target, cv2.INTER_LINEAR)
    else:
        top, left, short, _ = box
        cut = image[top : top + short, left : left + short]
        # DiffSeg and DiffCut resize without antialiasing; Seg4Diff's paper does not say
        smooth = geometry == 'seg4diff-paper' and side < short
        seen = resize(cut, target, cv2.INTER_AREA if smooth else cv2.INTER_LINEAR)
    pixels = torch.from_numpy(seen / np.float32(127.5) - 1).permute(2, 0, 1)[None].contiguous()  # (1, 3, h, w)
    return pixels, Frame(size, box)


def seen_box(size: tuple[int, int], geometry: str) -> Box:
    """The part of a picture (height, width) that `view` shows."""
    if geometry == 'diffcut':
        return diffcut_square(size)
    return centre_square(size) if geometry in ('diffseg', 'seg4diff-paper') else (0, 0, *size)


def whole_size(size: tuple[int, int], side: int, multiple: int, limit: int) -> tuple[int, int]:
    """Height and width near the picture's aspect ratio with an area near side², multiples of `multiple` in multiple..limit."""
    scale = side / math.sqrt(size[0] * size[1])
    height, width = (max(multiple, min(limit, round(length * scale / multiple) * multiple)) for length in size)
    return height, width


def centre_square(size: tuple[int, int]) -> Box:
    """The square in the centre of a picture (height, width), as large as its shorter edge (DiffSeg, Seg4Diff's paper)."""
    short = min(size)
    top, left = ((whole - short) // 2 for whole in size)
    return top, left, short, short


def diffcut_square(size: tuple[int, int]) -> Box:
    """The square that DiffCut cuts: one pixel smaller than the shorter edge, its place rounded half to even as torchvision does."""
    short = max(1, min(size) - 1)
    top, left = (round((whole - short) / 2) for whole in size)
    return top, left, short, short


def detectron_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width after detectron2's test resize: the short edge 640 pixels, the long one at most 2560."""
    scale = min(SHORT_EDGE / min(size), LONG_CAP / max(size))
    height, width = (max(1, int(length * scale + 0.5)) for length in size)
    return height, width


def resize(image: Array, size: tuple[int, int], interpolation: int) -> Array:
    return cv2.resize(image.astype(np.float32), size[::-1], interpolation=interpolation)


def detectron_resized(image: Image) -> Image:
    """The picture (H, W, 3) at its `detectron_size`."""
    size = detectron_size(image.shape[:2])
    return np.asarray(PillowImage.fromarray(image).resize(size[::-1], PillowImage.Resampling.BILINEAR))


def padded(image: Image) -> Image:
    """Black to the right and below up to a multiple of 32."""
    height, width = image.shape[:2]
    return np.pad(image, ((0, -height % DIVISIBLE), (0, -width % DIVISIBLE), (0, 0)))
