"""How much maps change when the VAE's latents are not quite those that the transformer was trained on: bin/bench vae."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.utils.logging import set_verbosity_error
from torch import Tensor

from padseg.backbones import Backbone, load
from padseg.bench.measure import CHECKOUT, finish_bench, in_place, output_flags, surroundings
from padseg.evaluation.metrics import region_scores
from padseg.images import find, read
from padseg.methods.seg4diff import Options, regions, token_maps
from padseg.types import Array, Image

ERRORS = (0.05, 0.1, 0.2, 0.5, 1.0)  # standard deviations, in those of the latents
PLAIN = Options(superpixels=0.0, components=False, min_area=0.0, refine='none')  # refinements would hide what maps do
WIDTH = 16  # channels of the small encoder


class Inexact:
    """A VAE whose latents are wrong by normal noise of `error` standard deviations."""

    def __init__(self, vae: Any, error: float) -> None:
        self.vae, self.error, self.config, self.dtype = vae, error, vae.config, vae.dtype

    def encode(self, pixels: Tensor) -> AutoencoderTinyOutput:
        mean = self.vae.encode(pixels).latent_dist.mean  # (B, C, H', W')
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)).to(mean)
        return AutoencoderTinyOutput(latents=mean + self.error * mean.std() * noise)


@click.command('vae')
@click.option('--dir', 'source', type=click.Path(exists=True, path_type=Path), default=CHECKOUT / 'data/images', help='pictures')
@output_flags
def command(source: Path, record: bool, as_json: bool) -> None:
    """How much the embedded model's maps and regions change with latents that are not its own encoder's.

    They are wrong by noise of several strengths, or from an AutoencoderTiny with random weights. For comparison: another seed of the
    noise that is part of the method. Regions are compared by covering, without refinements.
    """
    set_verbosity_error()  # AutoencoderTiny warns of its own configuration
    images = [read(picture.path) for picture in find(source)]
    with tempfile.TemporaryDirectory(prefix='padseg-bench-') as folder:
        backbone = load(device='cpu')
        untrained = load(device='cpu', vae=str(random_vae(Path(folder) / 'vae', backbone)))
        own = found(images, backbone, PLAIN)
        cases = {'another seed': found(images, backbone, dataclasses.replace(PLAIN, seed=1))}
        for error in ERRORS:
            cases[f'latents off by {error}'] = found(images, dataclasses.replace(backbone, vae=Inexact(backbone.vae, error)), PLAIN)
        cases['random encoder'] = found(images, untrained, PLAIN)
    measured = {
        'pictures': len(images),
        **surroundings(),
        'cases': {name: alikeness(own, other) for name, other in cases.items()},
    }
    finish_bench('vae', f'{len(images)}-pictures', measured, record, as_json, in_words)


def random_vae(folder: Path, backbone: Backbone) -> Path:
    """An AutoencoderTiny for the model's latents, as its constructor leaves it."""
    torch.manual_seed(0)
    widths = (WIDTH,) * len(backbone.vae.config.block_out_channels)
    channels = backbone.vae.config.latent_channels
    AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths, latent_channels=channels).save_pretrained(folder)
    return folder


def found(images: Iterable[Image], backbone: Backbone, options: Options) -> list[tuple[Array, Array]]:
    """Token maps (T, h, w) and label map (H, W) of each picture."""
    results = []
    for image in images:
        maps = token_maps(image, backbone, options)
        results.append((maps.maps.numpy(), regions(image, maps, options).labels))
    return results


def alikeness(own: list[tuple[Array, Array]], other: list[tuple[Array, Array]]) -> dict[str, float]:
    """Means over pictures. correlation: of the same token's maps; covering: of the own regions by the others."""
    correlations = [np.mean([correlation(a, b) for a, b in zip(one[0], two[0], strict=True)]) for one, two in zip(own, other, strict=True)]
    coverings = [region_scores(one[1], two[1]).covering for one, two in zip(own, other, strict=True)]
    return {'correlation': float(np.mean(correlations)), 'covering': float(np.mean(coverings))}


def correlation(a: Array, b: Array) -> float:
    """Pearson's, of two maps of one shape; 0 if one of them is flat."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale else 0.0


def in_words(measured: dict[str, Any]) -> str:
    """One line per case."""
    lines = [f'{measured["pictures"]} pictures, tiny; {in_place(measured)}', f'{"":22}{"correlation of maps":>22}{"covering":>12}']
    return '\n'.join(
        [*lines, *(f'{name:22}{case["correlation"]:22.3f}{case["covering"]:12.3f}' for name, case in measured['cases'].items())]
    )
