"""Picture -> noised latent: geometry, VAE encoding, noise. The only place that knows the VAE's shift and scale."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor

from padseg.attention import by_rows
from padseg.backbones import Backbone
from padseg.options import Resolved
from padseg.options import ResolvedLabels
from padseg.options import require
from padseg.types import Array
from padseg.types import Frame
from padseg.types import Image
from padseg.types import Latent

SHORT_EDGE, LONG_CAP, DIVISIBLE = 640, 2560, 32  # Seg4Diff's release: detectron2's test resize and its padding, pixels


def encode(image: Image, backbone: Backbone, options: Resolved) -> Latent:
    """Noised latent of an RGB picture (H, W, 3) uint8: posterior mean, shifted and scaled, mixed with noise at the chosen step."""
    return encode_steps(image, backbone, options, (options.step,))[0]


def encode_steps(image: Image, backbone: Backbone, options: Resolved | ResolvedLabels, steps: Sequence[int]) -> list[Latent]:
    """The same at several steps with one noise, for which the VAE works once."""
    pixels, frame = view(image, options.geometry, options.side, backbone.multiple, backbone.limit)
    clean = encode_pixels(pixels, backbone)  # (1, C, H', W')
    noise = content_noise(image, options.seed, clean.shape).to(clean)
    levels = [noise_level(backbone, step, clean.shape[2] * clean.shape[3] // backbone.patch**2) for step in steps]
    return [Latent((1 - sigma) * clean + sigma * noise, sigma, timestep, frame) for sigma, timestep in levels]


@torch.no_grad()
def encode_pixels(pixels: Tensor, backbone: Backbone) -> Tensor:
    """(B, 3, H, W) in -1..1 -> (B, C, H', W') in the units that the transformer was trained on."""
    config = backbone.vae.config
    pixels = pixels.to(backbone.device, backbone.vae.dtype, memory_format=torch.channels_last)
    with by_rows():
        encoded = backbone.vae.encode(pixels)
    mean = encoded.latent_dist.mean if 'latent_dist' in encoded else encoded.latents  # a small VAE has no posterior
    return (mean - (config.shift_factor or 0.0)) * config.scaling_factor


def noise_level(backbone: Backbone, step: int, image_tokens: int) -> tuple[float, float]:
    """Sigma in 0..1 and the model's timestep of the step-th step from the end of the schedule (step 1 is the least noise)."""
    backbone.family.set_timesteps(backbone.scheduler, backbone.spec.steps, image_tokens)
    # the schedule's sigmas end with a zero that belongs to no step
    return float(backbone.scheduler.sigmas[-1 - step]), float(backbone.scheduler.timesteps[-step])


def content_noise(image: Image, seed: int, shape: torch.Size) -> Tensor:
    """Standard normal noise that depends on the seed and the picture's pixels only: float32, drawn on the CPU."""
    digest = hashlib.sha256(f'{seed} {image.shape}'.encode() + np.ascontiguousarray(image).tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], 'big') >> 1)
    return torch.randn(shape, generator=generator)


def view(image: Image, geometry: str, side: int, multiple: int, limit: int) -> tuple[Tensor, Frame]:
    """What the model sees, and the part of the picture it shows: (1, 3, h, w) float32 in -1..1.

    `whole` keeps the aspect ratio, with the area near side² and sides that are multiples of `multiple` up to `limit`; every preset
    is side x side: `stretch` squashes the picture (GoCA), `diffseg`, `diffcut` and `seg4diff-paper` cut a square from its centre,
    `seg4diff-release` resizes and pads the picture as detectron2 does and then squashes it, padding included; `seg4diff-ovss` does
    the same without padding.
    """
    size = height, width = image.shape[:2]
    target = (side, side)
    short = min(size)
    require(
        geometry == 'whole' or (multiple <= side <= limit and side % multiple == 0),
        f'side is a multiple of {multiple} in {multiple}..{limit} for {geometry} with this model; got {side}',
    )
    if geometry == 'whole':
        target = whole_size(size, side, multiple, limit)
        shrinks = target[0] * target[1] < height * width
        seen, box = resize(image, target, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR), (0, 0, height, width)
    elif geometry == 'stretch':
        squashed = PillowImage.fromarray(image).resize((side, side), PillowImage.Resampling.BICUBIC)
        seen, box = np.asarray(squashed, np.float32), (0, 0, height, width)
    elif geometry == 'seg4diff-release':
        seen, box = resize(padded(detectron_resized(image)), target, cv2.INTER_LINEAR), (0, 0, height, width)
    elif geometry == 'seg4diff-ovss':
        seen, box = resize(detectron_resized(image), target, cv2.INTER_LINEAR), (0, 0, height, width)
    else:
        short = max(1, short - 1) if geometry == 'diffcut' else short
        # DiffCut's crop rounds half to even, the others round down
        top, left = (round((whole - short) / 2) if geometry == 'diffcut' else (whole - short) // 2 for whole in size)
        box = (top, left, short, short)
        cut = image[top : top + short, left : left + short]
        # DiffSeg and DiffCut resize without antialiasing; Seg4Diff's paper does not say
        smooth = geometry == 'seg4diff-paper' and side < short
        seen = resize(cut, target, cv2.INTER_AREA if smooth else cv2.INTER_LINEAR)
    pixels = torch.from_numpy(seen / np.float32(127.5) - 1).permute(2, 0, 1)[None].contiguous()  # (1, 3, h, w)
    return pixels, Frame(size, box)


def whole_size(size: tuple[int, int], side: int, multiple: int, limit: int) -> tuple[int, int]:
    """Height and width near the picture's aspect ratio with an area near side², multiples of `multiple` in multiple..limit."""
    scale = side / math.sqrt(size[0] * size[1])
    height, width = (max(multiple, min(limit, round(length * scale / multiple) * multiple)) for length in size)
    return height, width


def resize(image: Array, size: tuple[int, int], interpolation: int) -> Array:
    return cv2.resize(image.astype(np.float32), size[::-1], interpolation=interpolation)


def detectron_resized(image: Image) -> Image:
    """Short edge to 640 with the long edge at most 2560."""
    scale = SHORT_EDGE / min(image.shape[:2])
    scale = min(scale, LONG_CAP / max(image.shape[:2]))
    height, width = (max(1, int(length * scale + 0.5)) for length in image.shape[:2])
    return np.asarray(PillowImage.fromarray(image).resize((width, height), PillowImage.Resampling.BILINEAR))


def padded(image: Image) -> Image:
    """Black to the right and below up to a multiple of 32."""
    height, width = image.shape[:2]
    return np.pad(image, ((0, -height % DIVISIBLE), (0, -width % DIVISIBLE), (0, 0)))
