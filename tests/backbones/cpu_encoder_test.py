"""The encoder of VAEs on CPUs against diffusers' own modules, both against float64; and its convolution against torch's."""

from __future__ import annotations

import copy
import json
import shutil

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import Encoder
from torch.nn import functional

from padseg.backbones import cpu_encoder, load, winograd
from padseg.backbones.cpu_encoder import CpuEncoder, halved, is_known
from padseg.methods.stages.latents import encode_pixels


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS of the error in standard deviations."""
    return float((found - exact).square().mean().sqrt() / exact.std())


@pytest.mark.parametrize(
    ('height', 'width', 'channels', 'outputs', 'values', 'add'),
    [(8, 12, 8, 4, 1 << 20, False), (21, 38, 128, 160, 1, True), (21, 38, 128, 128, 200_000, False), (3, 2, 6, 8, 1, True)],
)
def test_a_convolution_is_nearly_as_exact_as_torchs(height, width, channels, outputs, values, add):
    pixels, scale, shift = random(height, width, channels), random(channels), random(channels)
    weight, bias, before = random(outputs, channels, 3, 3) / channels**0.5, random(outputs), random(height, width, outputs)

    def by_torch(kind: torch.dtype) -> torch.Tensor:
        active = functional.silu(pixels.to(kind) * scale.to(kind) + shift.to(kind)).permute(2, 0, 1)[None]
        found = functional.conv2d(active, weight.to(kind), bias.to(kind), padding=1)[0].permute(1, 2, 0)
        return found + before.to(kind) if add else found

    out = before.clone() if add else torch.full_like(before, torch.nan)
    parts = list(winograd.convolved(pixels, scale, shift, weight, bias, out, add, values))
    assert torch.equal(torch.cat(parts), out)
    exact = by_torch(torch.float64)
    of_torch = error(by_torch(torch.float32), exact)
    assert error(out, exact) < (max(2 * of_torch, 8e-7) if channels >= winograd.LEAST else 5e-7) and of_torch < 2e-6


def vae_of(widths: tuple[int, ...], kind: str = 'AutoencoderKL', **settings: object) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    levels = len(widths)
    settings |= {'down_block_types': ('DownEncoderBlock2D',) * levels, 'up_block_types': ('UpDecoderBlock2D',) * levels}
    vae = getattr(diffusers, kind)(block_out_channels=widths, norm_num_groups=8, **settings)
    vae.decoder = vae.post_quant_conv = None
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ('widths', 'kind', 'settings', 'size'),
    [
        ((128, 128), 'AutoencoderKL', {}, (34, 40)),
        ((16, 32, 32), 'AutoencoderKL', {'mid_block_add_attention': False, 'layers_per_block': 2}, (48, 40)),
        ((128, 16), 'AutoencoderKLFlux2', {'layers_per_block': 1}, (33, 35)),
    ],
)
def test_it_is_as_exact_as_the_modules(widths, kind, settings, size):
    vae = vae_of(widths, kind, **settings)
    pixels = random(2, 3, *size).clamp(-1, 1).contiguous(memory_format=torch.channels_last)
    assert is_known(vae.encoder)
    exact = copy.deepcopy(vae).double().encoder(pixels.double())
    with torch.no_grad():
        known = vae.encoder(pixels)
        vae.encoder = CpuEncoder(vae.encoder)
        found = vae.encoder(pixels)
        assert torch.equal(vae.encode(pixels).latent_dist.mean[1:], vae.encode(pixels[1:]).latent_dist.mean)
    assert found.dtype == torch.float32 and found.shape == known.shape
    assert error(found, exact) < max(1.5 * error(known, exact), 2e-6)


def test_the_picture_stays_as_it_is():
    encoder = CpuEncoder(vae_of((8, 16)).encoder)
    pixels = random(1, 3, 16, 16)
    with torch.no_grad():
        encoder(before := pixels.clone())
    assert torch.equal(before, pixels)


def test_with_gradients_and_in_other_types_the_modules_themselves_run():
    vae = vae_of((8, 16))
    pixels = random(1, 3, 16, 24).requires_grad_()
    encoder = CpuEncoder(vae.encoder)
    encoder(pixels).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0
    with torch.no_grad():
        for dtype in (torch.float64, torch.bfloat16):
            assert torch.equal(encoder.to(dtype)(pixels.to(dtype)), vae.encoder(pixels.to(dtype)))


def test_halving_in_strips_is_halving(monkeypatch):
    layer = diffusers.models.downsampling.Downsample2D(8, use_conv=True, padding=0).requires_grad_(False)
    for height, width in ((12, 10), (9, 7)):
        pixels = random(height, width, 8)
        whole = layer(pixels.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        for strip in (1, 2 * 2 * width * 8, 1 << 20):
            monkeypatch.setattr(cpu_encoder, 'STRIP', strip)
            torch.testing.assert_close(halved(layer.conv, pixels), whole)


def test_other_networks_are_left_alone():
    for change in (
        lambda encoder: setattr(encoder.down_blocks[0].resnets[0], 'output_scale_factor', 2.0),
        lambda encoder: setattr(encoder.down_blocks[0].downsamplers[0], 'padding', 1),
        lambda encoder: setattr(encoder, 'conv_act', torch.nn.ReLU()),
        lambda encoder: setattr(encoder.mid_block.attentions[0], 'rescale_output_factor', 2.0),
        lambda encoder: setattr(encoder.mid_block.resnets[0], 'conv1', torch.nn.Identity()),
    ):
        encoder = vae_of((8, 16)).encoder
        assert is_known(encoder)
        change(encoder)
        assert not is_known(encoder)
    assert not is_known(diffusers.AutoencoderTiny().encoder) and not is_known(None)


def test_a_loaded_model_has_it_if_it_is_wide(sd3_folder, tmp_path):
    """By the same names as before, and with the same latents but for rounding."""
    narrow = load(str(sd3_folder), device='cpu')
    assert type(narrow.vae.encoder) is Encoder
    settings = dict(json.loads((sd3_folder / 'vae/config.json').read_text())) | {'block_out_channels': (128, 128), 'norm_num_groups': 32}
    folder = shutil.copytree(sd3_folder, tmp_path / 'wide')
    levels = {'down_block_types': ('DownEncoderBlock2D',) * 2, 'up_block_types': ('UpDecoderBlock2D',) * 2}
    torch.manual_seed(0)
    wide = diffusers.AutoencoderKL(**{name: value for name, value in settings.items() if name[0] != '_'} | levels)
    shutil.rmtree(folder / 'vae')
    wide.save_pretrained(folder / 'vae')
    loaded = load(str(folder), device='cpu', whole=True)
    assert isinstance(loaded.vae.encoder, CpuEncoder) and set(loaded.vae.state_dict()) == set(wide.state_dict())
    pixels = random(2, 3, 48, 64).clamp(-1, 1)
    with torch.no_grad():
        mean = wide.eval().encode(pixels).latent_dist.mean
    expected = (mean - settings['shift_factor']) * settings['scaling_factor']
    torch.testing.assert_close(encode_pixels(pixels, loaded), expected, atol=2e-5, rtol=0)
