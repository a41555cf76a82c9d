"""Which part of a picture the model sees, and at what size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image as PillowImage

from padseg.methods.options import require
from padseg.methods.stages.enlarging import LARGE
from padseg.methods.stages.runs import parts
from padseg.types import Array, Frame, Image

if TYPE_CHECKING:
    from torch import Tensor

SHORT_EDGE, LONG_CAP, DIVISIBLE = 640, 2560, 32  # pixels; detectron2's test resize and padding, as in Seg4Diff's release
Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def view(image: Image, geometry: str, side: int, multiple: int, limit: int) -> tuple[Tensor, Frame]:
    """Return the model's input (1, 3, h, w) float32 in -1..1, and the part of the picture that it shows.

    `whole` keeps the aspect ratio, with an area near side² and sides that are multiples of `multiple` up to `limit`. Every preset is side x
    side: `stretch` squashes the picture (GoCA); `diffseg`, `diffcut` and `seg4diff-paper` crop a centre square; `seg4diff-release` resizes
    and pads the picture as detectron2 does and then squashes it, padding included; `seg4diff-ovss` does the same without padding.
    """
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
    return as_input(seen), Frame(size, box)


def as_input(seen: Array) -> Tensor:
    """The model's input (1, 3, h, w) float32 in -1..1 from a view (h, w, 3) in 0..255."""
    import torch  # imported here, because evaluation of stored label maps uses other functions of this file without torch

    return torch.from_numpy(seen / np.float32(127.5) - 1).permute(2, 0, 1)[None].contiguous()


def whole_frame(size: tuple[int, ...]) -> Frame:
    """The frame of a view of a whole picture (H, W)."""
    height, width = size
    return Frame((height, width), (0, 0, height, width))


def seen_box(size: tuple[int, int], geometry: str) -> Box:
    """The part of a picture (height, width) that `view` shows."""
    if geometry == 'diffcut':
        return diffcut_square(size)
    return centre_square(size) if geometry in ('diffseg', 'seg4diff-paper') else (0, 0, *size)


def whole_size(size: tuple[int, int], side: int, multiple: int, limit: int) -> tuple[int, int]:
    """Height and width near the picture's aspect ratio with area near side², both multiples of `multiple` in multiple..limit."""
    scale = side / math.sqrt(size[0] * size[1])
    height, width = (max(multiple, min(limit, round(length * scale / multiple) * multiple)) for length in size)
    return height, width


def centre_square(size: tuple[int, int]) -> Box:
    """Centre square of a picture (height, width), with its shorter edge as side (DiffSeg, Seg4Diff's paper)."""
    short = min(size)
    top, left = ((whole - short) // 2 for whole in size)
    return top, left, short, short


def diffcut_square(size: tuple[int, int]) -> Box:
    """DiffCut's centre square: one pixel smaller than the shorter edge, its position rounded half to even as in torchvision."""
    short = max(1, min(size) - 1)
    top, left = (round((whole - short) / 2) for whole in size)
    return top, left, short, short


def detectron_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width after detectron2's test resize: short edge 640 pixels, long edge at most 2560."""
    scale = min(SHORT_EDGE / min(size), LONG_CAP / max(size))
    height, width = (max(1, int(length * scale + 0.5)) for length in size)
    return height, width


def resize(image: Array, size: tuple[int, int], interpolation: int) -> Array:
    """Resize a picture (H, W, 3), in float32. Of a large one, only a part or a channel is in float32 at any time."""
    height, width = image.shape[:2]
    if height * width > LARGE and interpolation == cv2.INTER_AREA:
        channels = [cv2.resize(image[..., channel].astype(np.float32), size[::-1], interpolation=interpolation) for channel in range(3)]
        return np.stack(channels, -1)
    if height * width > LARGE and 1 < size[1] <= width:  # bilinear: row by row across, and then down
        rows = parts(height, width)
        image = np.concatenate([cv2.resize(image[some].astype(np.float32), (size[1], some.stop - some.start)) for some in rows])
    return cv2.resize(image.astype(np.float32, copy=False), size[::-1], interpolation=interpolation)


def detectron_resized(image: Image) -> Image:
    """Resize a picture (H, W, 3) to its `detectron_size`."""
    size = detectron_size(image.shape[:2])
    return np.asarray(PillowImage.fromarray(image).resize(size[::-1], PillowImage.Resampling.BILINEAR))


def padded(image: Image) -> Image:
    """Pad with black on the right and below to multiples of 32."""
    height, width = image.shape[:2]
    return np.pad(image, ((0, -height % DIVISIBLE), (0, -width % DIVISIBLE), (0, 0)))
