"""What the model sees of a picture, against slow re-statements; and the noised latent against the formula."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import example, given, strategies as st
from torch.nn import functional

from padseg.errors import UsageError
from padseg.methods.options import GEOMETRIES
from padseg.methods.seg4diff import Options
from padseg.methods.stages.geometry import view, whole_size
from padseg.methods.stages.latents import content_noise, encode, encode_pixels

LIMIT = 96
SIZES = [(48, 80), (81, 48), (33, 47), (64, 64), (7, 90), (130, 101)]


def noise_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def seen(image: np.ndarray, geometry: str, side: int) -> np.ndarray:
    """(h, w, 3) on the scale of the picture."""
    pixels, _ = view(image, geometry, side, 4, 4096)
    assert pixels.dtype == torch.float32 and pixels.shape[:2] == (1, 3) and pixels.is_contiguous()
    return (pixels[0].permute(1, 2, 0).numpy() + 1) * 127.5


def bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """torch's interpolation without antialiasing."""
    planes = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    return functional.interpolate(planes, size, mode='bilinear', align_corners=False, antialias=False)[0].permute(1, 2, 0).numpy()


def overlaps(long: int, short: int) -> np.ndarray:
    """(short, long): how much of each of `short` equal parts of a line lies in each of `long` equal parts."""
    edges = np.arange(short + 1) * long / short
    starts = np.arange(long)
    inside = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return inside.clip(0) * short / long


def area_mean(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Each pixel the mean of the rectangle that it covers."""
    rows, columns = (overlaps(*lengths) for lengths in zip(image.shape[:2], size, strict=True))
    return np.einsum('yY,xX,YXc->yxc', rows, columns, image.astype(np.float64))


@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.integers(1, 2048),
    st.sampled_from([4, 8, 16]),
    st.integers(1, 200),
)
@example((1, 1), 1024, 16, 192)
@example((1, 5000), 1024, 16, 192)
@example((5000, 1), 1024, 16, 192)
@example((480, 640), 1024, 16, 192)
def test_whole_sizes_are_near_in_area_and_aspect(size, side, multiple, tokens):
    limit = tokens * multiple
    found = whole_size(size, side, multiple, limit)
    assert found == whole_size(size[::-1], side, multiple, limit)[::-1]
    scale = side / math.sqrt(size[0] * size[1])
    exact = [length * scale for length in size]
    for length, wanted in zip(found, exact, strict=True):
        assert length % multiple == 0 and multiple <= length <= limit
        # rounding moves a side by half a step at most, and only the bounds move it further
        clamped = min(max(wanted, multiple), limit)
        assert abs(length - clamped) <= multiple / 2 * (1 + 1e-9)
    if all(multiple <= wanted <= limit for wanted in exact):
        low, high = (
            (1 - multiple / 2 / exact[0]) * (1 - multiple / 2 / exact[1]),
            (1 + multiple / 2 / exact[0]) * (1 + multiple / 2 / exact[1]),
        )
        assert low - 1e-9 <= found[0] * found[1] / side**2 <= high + 1e-9
        worst = -math.log(1 - multiple / 2 / exact[0]) - math.log(1 - multiple / 2 / exact[1])
        assert abs(math.log(found[0] / found[1]) - math.log(size[0] / size[1])) <= worst + 1e-9


@pytest.mark.parametrize(
    ('size', 'side', 'expected'),
    [
        ((480, 640), 1024, (880, 1184)),
        ((640, 480), 1024, (1184, 880)),
        ((1, 1), 1024, (1024, 1024)),
        ((1, 5000), 1024, (16, 3072)),  # 14.5 and 72408 before the bounds
        ((321, 481), 256, (208, 320)),
    ],
)
def test_whole_sizes_by_hand(size, side, expected):
    assert whole_size(size, side, 16, 3072) == expected


@pytest.mark.parametrize(('geometry', 'size', 'side'), [('whole', (32, 128), 64), *((name, (64, 64), 64) for name in GEOMETRIES[:3])])
def test_a_picture_of_the_size_seen_is_only_rescaled(geometry, size, side):
    image = noise_picture(*size)
    pixels, frame = view(image, geometry, side, 4, 128)
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), image.astype(np.float32) / np.float32(127.5) - 1)
    assert frame.size == size and frame.box == (0, 0, *size)
    assert pixels.min() == -1 and pixels.max() == 1


def test_the_presets_too_are_exact_at_their_own_size():
    image = noise_picture(641, 641)
    exact = image.astype(np.float32) / np.float32(127.5) - 1
    for geometry in ('diffcut', 'seg4diff-paper', 'seg4diff-release', 'seg4diff-ovss'):
        picture = image if geometry == 'diffcut' else np.ascontiguousarray(image[:640, :640])
        pixels, _ = view(picture, geometry, 640, 16, 640)
        assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), exact[:640, :640]), geometry


@pytest.mark.parametrize('size', SIZES)
def test_whole_shrinks_by_area_means_and_enlarges_bilinearly(size):
    image = noise_picture(*size)
    small = whole_size(size, 32, 4, 4096)
    if max(small[0] - size[0], small[1] - size[1]) <= 0:
        np.testing.assert_allclose(seen(image, 'whole', 32), area_mean(image, small), atol=2e-3)
    np.testing.assert_allclose(seen(image, 'whole', 300), bilinear(image, whole_size(size, 300, 4, 4096)), atol=0.0127)


@pytest.mark.parametrize('size', [*SIZES, (1, 5000), (1, 1)])
@pytest.mark.parametrize('side', [16, 64, 200])
def test_stretch_is_pillows_bicubic(size, side):
    image = noise_picture(*size)
    expected = np.asarray(PIL.Image.fromarray(image).resize((side, side), PIL.Image.Resampling.BICUBIC))
    np.testing.assert_allclose(seen(image, 'stretch', side), expected, atol=2e-5)
    assert view(image, 'stretch', side, 4, 200)[1].box == (0, 0, *size)


@pytest.mark.parametrize('size', [*SIZES, (1, 5000), (1, 1)])
@pytest.mark.parametrize('side', [16, 64, 200])
def test_diffseg_is_the_central_square_bilinearly_without_antialiasing(size, side):
    image = noise_picture(*size)
    height, width = size
    if height > width:
        crop, box = image[(height - width) // 2 :][:width], ((height - width) // 2, 0, width, width)
    else:
        crop, box = image[:, (width - height) // 2 :][:, :height], (0, (width - height) // 2, height, height)
    pixels, frame = view(image, 'diffseg', side, 4, 200)
    expected = bilinear(crop, (side, side)) / 127.5 - 1
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), expected, atol=1e-4)
    assert frame.size == size and frame.box == box


@pytest.mark.parametrize(
    ('size', 'box'),
    [
        ((100, 100), (0, 0, 99, 99)),  # 0.5 to even: 0
        ((101, 101), (0, 0, 100, 100)),
        ((100, 102), (0, 2, 99, 99)),  # 1.5 to even: 2
        ((100, 104), (0, 2, 99, 99)),  # 2.5 to even: 2
        ((106, 100), (4, 0, 99, 99)),  # 3.5 to even: 4
        ((50, 81), (0, 16, 49, 49)),
        ((81, 50), (16, 0, 49, 49)),
        ((1, 1), (0, 0, 1, 1)),
        ((1, 9), (0, 4, 1, 1)),
        ((2, 9), (0, 4, 1, 1)),
    ],
)
def test_diffcut_cuts_a_square_one_pixel_short_of_the_short_side(size, box):
    image = noise_picture(*size)
    top, left, height, width = box
    pixels, frame = view(image, 'diffcut', 32, 4, 96)
    assert frame == (size, box)
    expected = bilinear(image[top : top + height, left : left + width], (32, 32)) / 127.5 - 1
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize('size', SIZES)
def test_the_paper_of_seg4diff_cuts_the_central_square(size):
    image = noise_picture(*size)
    height, width = size
    short = min(size)
    top, left = (height - short) // 2, (width - short) // 2
    crop = image[top : top + short, left : left + short]
    np.testing.assert_allclose(seen(image, 'seg4diff-paper', 200), bilinear(crop, (200, 200)), atol=0.0127)
    if short > 16:
        np.testing.assert_allclose(seen(image, 'seg4diff-paper', 16), area_mean(crop, (16, 16)), atol=2e-3)
    assert view(image, 'seg4diff-paper', 32, 4, 96)[1] == (size, (top, left, short, short))


def shortest_edge_640(height: int, width: int) -> tuple[int, int]:
    """Detectron2's resize for testing, step by step."""
    if height < width:
        new_height, new_width = 640.0, width * (640 / height)
    else:
        new_height, new_width = height * (640 / width), 640.0
    if max(new_height, new_width) > 2560:
        shrink = 2560 / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    return max(1, math.floor(new_height + 0.5)), max(1, math.floor(new_width + 0.5))


DETECTRON = [  # a picture's size, resized, and padded
    ((480, 640), (640, 853), (640, 864)),
    ((333, 500), (640, 961), (640, 992)),
    ((500, 375), (853, 640), (864, 640)),
    ((64, 64), (640, 640), (640, 640)),
    ((100, 1000), (256, 2560), (256, 2560)),
    ((1, 5000), (1, 2560), (32, 2560)),
]


@pytest.mark.parametrize(('size', 'resized', 'padded'), DETECTRON)
def test_the_release_of_seg4diff_pads_with_black_and_squashes(size, resized, padded):
    image = noise_picture(*size)
    assert shortest_edge_640(*size) == resized
    canvas = np.zeros((*padded, 3), np.uint8)
    canvas[: resized[0], : resized[1]] = PIL.Image.fromarray(image).resize(resized[::-1], PIL.Image.Resampling.BILINEAR)
    pixels, frame = view(image, 'seg4diff-release', 64, 4, 96)
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), bilinear(canvas, (64, 64)) / 127.5 - 1, atol=1e-4)
    assert frame == (size, (0, 0, *size))


@pytest.mark.parametrize(('size', 'resized', 'padded'), DETECTRON)
def test_open_vocabulary_of_seg4diff_squashes_without_padding(size, resized, padded):
    image = noise_picture(*size)
    enlarged = np.asarray(PIL.Image.fromarray(image).resize(resized[::-1], PIL.Image.Resampling.BILINEAR))
    pixels, frame = view(image, 'seg4diff-ovss', 64, 4, 96)
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), bilinear(enlarged, (64, 64)) / 127.5 - 1, atol=1e-4)
    assert frame == (size, (0, 0, *size))
    assert torch.equal(pixels, view(image, 'seg4diff-release', 64, 4, 96)[0]) == (resized == padded)


def test_what_is_padded_is_seen_as_black_and_only_in_the_release():
    white = np.full((480, 640, 3), 255, np.uint8)  # 640 x 853 of 640 x 864 pixels
    released, _ = view(white, 'seg4diff-release', 64, 4, 96)
    assert (released[..., :-1] == 1).all() and (released[..., -1] == -1).all()
    assert (view(white, 'seg4diff-ovss', 64, 4, 96)[0] == 1).all()


@pytest.mark.parametrize('geometry', [name for name in GEOMETRIES if name != 'whole'])
@pytest.mark.parametrize('side', [2, 30, 100])
def test_a_preset_refuses_a_side_that_the_model_cannot_take(geometry, side):
    with pytest.raises(UsageError, match=rf'side is a multiple of 4 in 4\.\.96 for {geometry} with this model; got {side}'):
        view(noise_picture(48, 80), geometry, side, 4, LIMIT)


@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_every_geometry_takes_pictures_of_a_few_pixels(geometry, size):
    pixels, frame = view(noise_picture(*size), geometry, 32, 4, LIMIT)
    assert pixels.isfinite().all() and pixels.abs().max() <= 1
    assert all(length % 4 == 0 and 4 <= length <= LIMIT for length in pixels.shape[2:])
    top, left, height, width = frame.box
    assert 0 <= top and 0 <= left and height >= 1 and width >= 1
    assert top + height <= size[0] and left + width <= size[1]


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_strides_do_not_matter(geometry):
    image = noise_picture(48, 80)[:, ::-1, ::-1]
    pixels, frame = view(image, geometry, 32, 4, LIMIT)
    copied, same = view(image.copy(), geometry, 32, 4, LIMIT)
    assert torch.equal(pixels, copied) and frame == same
    assert torch.equal(content_noise(image, 0, torch.Size((1, 4, 8, 8))), content_noise(image.copy(), 0, torch.Size((1, 4, 8, 8))))


def test_the_posterior_mean_is_shifted_and_scaled(backbone, picture):
    pixels, _ = view(picture, 'whole', 32, backbone.multiple, backbone.limit)
    with torch.no_grad():
        posterior = backbone.vae.encode(pixels).latent_dist
    assert posterior.std.min() > 1e-3  # else a sample would be as good
    torch.testing.assert_close(encode_pixels(pixels, backbone), (posterior.mean - 0.1) * 1.5, rtol=0, atol=1e-6)
    assert torch.equal(encode_pixels(pixels, backbone), encode_pixels(pixels, backbone))


def test_a_vae_without_a_shift(backbone, picture):
    pixels, _ = view(picture, 'whole', 32, backbone.multiple, backbone.limit)
    shifted = encode_pixels(pixels, backbone)
    before = backbone.vae.config.shift_factor
    backbone.vae.register_to_config(shift_factor=None)
    try:
        torch.testing.assert_close(encode_pixels(pixels, backbone), shifted + 0.1 * 1.5)
    finally:
        backbone.vae.register_to_config(shift_factor=before)


@pytest.mark.parametrize(('step', 'sigma'), [(1, 0.009), (2, 0.111), (4, 0.278), (8, 0.515), (28, 1.0)])
def test_noise_levels_of_28_steps_with_shift_3(backbone, step, sigma):
    level = backbone.noise_level(step, 96)
    assert (level.sigma, level.signal) == pytest.approx((sigma, 1 - sigma), abs=5e-4)
    assert level.timestep == pytest.approx(1000 * sigma, abs=0.5)


def test_the_published_timestep(backbone):
    assert backbone.noise_level(8, 96).timestep == pytest.approx(515.07, abs=0.005)
    levels = [backbone.noise_level(step, 96) for step in range(1, 29)]
    sigmas = [level.sigma for level in levels]
    assert sigmas == sorted(sigmas) and len(set(sigmas)) == 28
    for level in levels:
        assert level.timestep == pytest.approx(1000 * level.sigma, rel=1e-5)


def test_noise_comes_from_seed_and_content_only(picture):
    shape = torch.Size((1, 4, 16, 24))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    noise = content_noise(picture, 0, shape)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(content_noise(picture.copy(), 0, shape), noise)
    assert noise.dtype == torch.float32 and noise.device.type == 'cpu'
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    other = picture.copy()
    other[-1, -1, -1] ^= 1
    others = [
        content_noise(picture, 1, shape),
        content_noise(picture, -1, shape),
        content_noise(other, 0, shape),
        content_noise(picture.reshape(80, 48, 3), 0, shape),
    ]
    for drawn in others:
        assert abs(np.corrcoef(drawn.ravel(), noise.ravel())[0, 1]) < 0.2


@pytest.mark.parametrize('step', [1, 8, 28])
@pytest.mark.parametrize('geometry', ['whole', 'diffcut'])
def test_the_latent_is_a_mixture_of_picture_and_noise(backbone, picture, step, geometry):
    options = Options(step=step, geometry=geometry, seed=3).resolve(backbone.spec)
    latent = encode(picture, backbone, options)
    pixels, frame = view(picture, geometry, 32, backbone.multiple, backbone.limit)
    clean = encode_pixels(pixels, backbone)
    _, sigma, timestep = backbone.noise_level(step, 96)
    noise = content_noise(picture, 3, clean.shape)
    torch.testing.assert_close(latent.z, (1 - sigma) * clean + sigma * noise, rtol=0, atol=1e-6)
    assert latent[1:] == (sigma, timestep, frame)
    assert torch.equal(latent.z, encode(picture, backbone, options).z)
    if step == 28:
        assert torch.equal(latent.z, noise)


def test_the_seed_changes_the_noise_and_nothing_else(backbone, picture):
    options = Options(step=8).resolve(backbone.spec)
    first, second = (encode(picture, backbone, dataclasses.replace(options, seed=seed)) for seed in (0, 1))
    assert first[1:] == second[1:]
    shape = first.z.shape
    expected = first.sigma * (content_noise(picture, 0, shape) - content_noise(picture, 1, shape))
    torch.testing.assert_close(first.z - second.z, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(('geometry', 'way'), [('whole', cv2.INTER_AREA), ('diffseg', cv2.INTER_LINEAR)])
def test_a_large_picture_is_resized_in_parts_to_the_same_bits(geometry, way):
    image = noise_picture(40, 820_000) if geometry == 'whole' else noise_picture(5700, 5700)
    pixels, (_, (top, left, height, width)) = view(image, geometry, 64, 4, 4096)
    seen = image[top : top + height, left : left + width].astype(np.float32)
    expected = cv2.resize(seen, pixels.shape[:1:-1], interpolation=way)
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), expected / np.float32(127.5) - 1)
