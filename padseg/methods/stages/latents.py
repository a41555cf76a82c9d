"""Picture -> noised latent: geometry, VAE encoding, noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from padseg.backbones import Backbone
from padseg.backbones.cpu_attention import by_rows
from padseg.backbones.cpu_norm import exact_norms
from padseg.backbones.latent_scale import scaled
from padseg.backbones.noise import NoiseLevel, noised
from padseg.methods.options import ForwardOptions, ViewOptions
from padseg.methods.stages.geometry import as_input, resize, view, whole_frame
from padseg.types import Frame, Image, Latent


def encode(image: Image, backbone: Backbone, options: ForwardOptions) -> Latent:
    """Encode an RGB picture (H, W, 3) uint8 to a noised latent: posterior mean, shifted and scaled, mixed with noise at the chosen step."""
    return encode_steps(image, backbone, options, (options.step,))[0]


def encode_steps(
    image: Image, backbone: Backbone, options: ViewOptions, steps: Sequence[int], seeds: Sequence[int] | None = None
) -> list[Latent]:
    """As `encode`, at several steps with the same noise, or with that of each of several seeds in turn; the VAE runs once."""
    return encode_levels(image, backbone, options, lambda tokens: [backbone.noise_level(step, tokens) for step in steps], seeds)


def encode_levels(
    image: Image,
    backbone: Backbone,
    options: ViewOptions,
    levels: Callable[[int], Sequence[NoiseLevel]],
    seeds: Sequence[int] | None = None,
) -> list[Latent]:
    """As `encode_steps`, at the levels that follow from the number of image tokens."""
    pixels, frame = view(image, options.geometry, options.side, backbone.multiple, backbone.limit)
    return noised_levels(image, pixels, frame, backbone, options, levels, seeds)


def noised_levels(
    image: Image,
    pixels: Tensor,
    frame: Frame,
    backbone: Backbone,
    options: ViewOptions,
    levels: Callable[[int], Sequence[NoiseLevel]],
    seeds: Sequence[int] | None = None,
) -> list[Latent]:
    """Encode the model's view (1, 3, h, w) of a picture; the noise depends on the picture's content."""
    clean = encode_pixels(pixels, backbone)  # (1, C, H', W')
    noises = [content_noise(image, seed, clean.shape).to(clean) for seed in ((options.seed,) if seeds is None else seeds)]
    tokens = clean.shape[2] * clean.shape[3] // backbone.patch**2
    return [Latent(noised(clean, noise, level), level.sigma, level.timestep, frame) for noise in noises for level in levels(tokens)]


def encode_window(image: Image, size: tuple[int, int], backbone: Backbone, options: ForwardOptions) -> Latent:
    """As `encode`, of a whole picture or part at this size (h, w) of the view."""
    smaller = size[0] * size[1] < image.shape[0] * image.shape[1]
    pixels = as_input(resize(image, size, cv2.INTER_AREA if smaller else cv2.INTER_LINEAR))
    return noised_levels(
        image, pixels, whole_frame(image.shape[:2]), backbone, options, lambda tokens: [backbone.noise_level(options.step, tokens)]
    )[0]


def encode_without_noise(image: Image, backbone: Backbone, options: ViewOptions, step: int) -> Latent:
    """As `encode`, but without noise, while the model is told of as much as the step has."""
    pixels, frame = view(image, options.geometry, options.side, backbone.multiple, backbone.limit)
    clean = encode_pixels(pixels, backbone)  # (1, C, H', W')
    level = backbone.noise_level(step, clean.shape[2] * clean.shape[3] // backbone.patch**2)
    return Latent(clean, 0.0, level.timestep, frame)


@torch.no_grad()
def encode_pixels(pixels: Tensor, backbone: Backbone) -> Tensor:
    """Encode (B, 3, H, W) in -1..1 -> (B, C, H', W'), scaled as in the transformer's training."""
    pixels = pixels.to(backbone.device, backbone.vae.dtype, memory_format=torch.channels_last)
    with by_rows(), exact_norms():
        encoded = backbone.vae.encode(pixels)
    mean = encoded.latent_dist.mean if 'latent_dist' in encoded else encoded.latents  # a small VAE has no posterior
    return scaled(backbone.vae, mean)


def content_noise(image: Image, seed: int, shape: torch.Size) -> Tensor:
    """Standard normal noise that depends only on the seed and the picture's pixels: float32, drawn on the CPU."""
    digest = hashlib.sha256(f'{seed} {image.shape}'.encode())
    digest.update(np.ascontiguousarray(image).reshape(-1).data)
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], 'big') >> 1)
    return torch.randn(shape, generator=generator)
