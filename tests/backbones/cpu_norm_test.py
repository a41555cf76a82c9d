"""Group normalisation with channels last, and a whole VAE, against float64; and the same bits with any number of threads."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from padseg.backbones.cpu_norm import exact_norms, group_norm_by_parts
from padseg.methods.stages.latents import encode_pixels


def channels_last(*shape: int, mean: float = 0.0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean
    return values.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ('shape', 'groups', 'mean', 'of_torch'),
    [((1, 32, 256, 256), 8, 3.0, 1e-5), ((1, 32, 128, 128), 8, 30.0, 1e-3), ((2, 64, 9, 11), 32, 0.0, 0.0), ((1, 8, 1, 1), 4, 1.0, 0.0)],
)
def test_it_is_exact(shape, groups, mean, of_torch):
    """of_torch: the least error that torch's own has there, without which nothing of this would be needed."""
    values = channels_last(*shape, mean=mean)
    norm = nn.GroupNorm(groups, shape[1]).requires_grad_(False)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    exact = copy.deepcopy(norm).double()(values.double())
    with exact_norms():
        found = norm(values)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    assert (found - exact).abs().max() < 1e-5
    assert (norm(values) - exact).abs().max() >= of_torch
    with exact_norms():
        plain = norm(values.contiguous())
        half = norm.bfloat16()(values.bfloat16())
    assert (plain - exact).abs().max() < 1e-5 and half.dtype == torch.bfloat16  # left to torch


def test_parts_of_any_size_give_the_same_but_for_rounding():
    values = channels_last(2, 12, 17, 5, mean=4)
    whole = nn.functional.group_norm(values.double(), 3).float()
    for size in (1, 12, 100, 10_000):
        torch.testing.assert_close(group_norm_by_parts(values, 3, values=size), whole, atol=1e-6, rtol=1e-5)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_nothing(threads):
    values = channels_last(1, 32, 208, 320, mean=2)
    found = []
    for number in (1, 2, 3, 4):
        threads(number)
        found.append(group_norm_by_parts(values, 8))
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_vae_is_as_exact_as_float32_is():
    """One of four levels: 5e-6 standard deviations, as torch's own has for contiguous tensors; with channels last that has 4e-5."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=8,
        latent_channels=4,
    )
    vae = vae.eval().requires_grad_(False)
    pixels = torch.rand((1, 3, 256, 384), generator=torch.Generator().manual_seed(1)) * 2 - 1
    exact = copy.deepcopy(vae).double().encode(pixels.double()).latent_dist.mean
    vae = vae.to(memory_format=torch.channels_last)
    with exact_norms():
        found = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mean
    assert (found - exact).abs().max() < 1.5e-5 * exact.std()


def test_pictures_are_encoded_that_way(backbone):
    """A picture with little contrast: 2e-5 standard deviations, where torch's own is 9e-3 off."""
    pixels = torch.rand((1, 3, 256, 384), generator=torch.Generator().manual_seed(1)) * 0.1 + 0.5
    with torch.no_grad():
        exact = (copy.deepcopy(backbone.vae).double().encode(pixels.double()).latent_dist.mean - 0.1) * 1.5
    assert (encode_pixels(pixels, backbone) - exact).abs().max() < 1e-4 * exact.std()
