"""Sensitivity of the maps to latents that differ from those the transformer was trained on: bin/bench vae."""

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
from padseg.bench.measure import CHECKOUT, finish_bench, measured_on, output_flags, surroundings
from padseg.evaluation.metrics import region_scores
from padseg.images import find, read
from padseg.methods.seg4diff import Options, regions, token_maps
from padseg.types import Array, Image

ERRORS = (0.05, 0.1, 0.2, 0.5, 1.0)  # in standard deviations of the latents
PLAIN = Options(superpixels=0.0, components=False, min_area=0.0, refine='none')  # refinements would hide changes of the maps
WIDTH = 16  # channels of the small encoder


class Inexact:
    """A VAE that adds normal noise of `error` standard deviations to its latents."""

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
    """Measure how much the embedded model's maps and regions change when its latents are inexact.

    The latents carry noise of several strengths, or come from an AutoencoderTiny with random weights. For comparison, the method's own
    noise gets another seed. Regions are compared by covering, without refinements.
    """
    set_verbosity_error()  # AutoencoderTiny warns about its own configuration
    images = [read(picture.path) for picture in find(source)]
    with tempfile.TemporaryDirectory(prefix='padseg-bench-') as folder:
        backbone = load(device='cpu')
        untrained = load(device='cpu', vae=str(random_vae(Path(folder) / 'vae', backbone)))
        own = segment_each(images, backbone, PLAIN)
        cases = {'another seed': segment_each(images, backbone, dataclasses.replace(PLAIN, seed=1))}
        for error in ERRORS:
            cases[f'latents off by {error}'] = segment_each(images, dataclasses.replace(backbone, vae=Inexact(backbone.vae, error)), PLAIN)
        cases['random encoder'] = segment_each(images, untrained, PLAIN)
    measured = {
        'pictures': len(images),
        **surroundings(),
        'cases': {name: similarity(own, other) for name, other in cases.items()},
    }
    finish_bench('vae', f'{len(images)}-pictures', measured, record, as_json, in_words)


def random_vae(folder: Path, backbone: Backbone) -> Path:
    """Save a randomly initialised AutoencoderTiny for the model's latents and return the folder."""
    torch.manual_seed(0)
    widths = (WIDTH,) * len(backbone.vae.config.block_out_channels)
    channels = backbone.vae.config.latent_channels
    AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths, latent_channels=channels).save_pretrained(folder)
    return folder


def segment_each(images: Iterable[Image], backbone: Backbone, options: Options) -> list[tuple[Array, Array]]:
    """Return the token maps (T, h, w) and the label map (H, W) of each picture."""
    results = []
    for image in images:
        maps = token_maps(image, backbone, options)
        results.append((maps.maps.numpy(), regions(image, maps, options).labels))
    return results


def similarity(own: list[tuple[Array, Array]], other: list[tuple[Array, Array]]) -> dict[str, float]:
    """Compare two sets of results, averaged over pictures.

    correlation: between maps of the same token; covering: of the regions of `own` by those of `other`.
    """
    correlations = [np.mean([correlation(a, b) for a, b in zip(one[0], two[0], strict=True)]) for one, two in zip(own, other, strict=True)]
    coverings = [region_scores(one[1], two[1]).covering for one, two in zip(own, other, strict=True)]
    return {'correlation': float(np.mean(correlations)), 'covering': float(np.mean(coverings))}


def correlation(a: Array, b: Array) -> float:
    """Pearson correlation of two maps of equal shape; 0 if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale else 0.0


def in_words(measured: dict[str, Any]) -> str:
    """Format the figures, one line per case."""
    lines = [f'{measured["pictures"]} pictures, tiny; {measured_on(measured)}', f'{"":22}{"correlation of maps":>22}{"covering":>12}']
    return '\n'.join(
        [*lines, *(f'{name:22}{case["correlation"]:22.3f}{case["covering"]:12.3f}' for name, case in measured['cases'].items())]
    )
