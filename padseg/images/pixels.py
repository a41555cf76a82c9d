"""Convert samples of any kind to upright 8-bit sRGB: deep greys, transparency, inks, colour profiles; in strips, to limit memory."""

from __future__ import annotations

import io
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageCms

from padseg.types import Array, Image

STRIP = 2**22  # pixels converted at a time
TIFF_BITS_PER_SAMPLE = 258
CONVENTIONS = ('CMYK', 'YCbCr', 'LAB')  # modes whose conversion to RGB is a convention, unless a profile defines it
SPACES = {'RGB ': 'RGB', 'GRAY': 'L', 'CMYK': 'CMYK'}  # a colour profile's space and the Pillow mode it applies to
GREYS = ('1', 'L', 'LA')
SAME = 2  # levels out of 255 by which a profile may differ and still count as sRGB
# How to turn a stored picture upright, by EXIF orientation.
TURNS: dict[int, Callable[[Array], Array]] = {
    1: lambda array: array,
    2: np.fliplr,
    3: lambda array: np.rot90(array, 2),
    4: np.flipud,
    5: lambda array: array.swapaxes(0, 1),
    6: lambda array: np.rot90(array, -1),
    7: lambda array: np.rot90(array.swapaxes(0, 1), 2),
    8: lambda array: np.rot90(array, 1),
}

Transform = PIL.ImageCms.ImageCmsTransform
Range = tuple[float, float]  # the sample values that become 0 and 255


class Profile(NamedTuple):
    """A colour profile. mode: the pixel mode it applies to, None if unusable; transform: to sRGB, None if no conversion is needed."""

    mode: str | None = None
    transform: Transform | None = None


class Colours(NamedTuple):
    """How to convert samples to sRGB. bounds: range of deep samples, else None; background: RGB behind transparent parts."""

    bounds: Range | None
    profile: Profile
    background: tuple[int, int, int]


def is_deep(picture: PIL.Image.Image) -> bool:
    """Return whether samples have more than 8 bits."""
    return picture.mode == 'F' or picture.mode.startswith('I')


def own_bounds(picture: PIL.Image.Image) -> Range | None:
    """Range of deep samples, from their bit depth; None for floats and 32-bit integers, which have no fixed range."""
    if picture.mode == 'F' or (picture.mode == 'I' and picture.format == 'TIFF'):
        return None
    bits: tuple[int, ...] = getattr(picture, 'tag_v2', {}).get(TIFF_BITS_PER_SAMPLE, (16,))
    return 0, 2 ** bits[0] - 1


def factor(size: tuple[int, int], pixels: int) -> int:
    """Smallest integer factor that reduces both sides, rounded up, to at most `pixels` pixels in all."""
    width, height = size
    candidates = range(1, max(size) + 1)
    return candidates[bisect_left(candidates, True, key=lambda by: math.ceil(width / by) * math.ceil(height / by) <= pixels)]


def to_rgb(picture: PIL.Image.Image, colours: Colours, by: int = 1) -> Image:
    """Convert a loaded picture of any mode to (H, W, 3) uint8 sRGB; each square of `by` x `by` pixels becomes one, their mean."""
    rows = max(1, STRIP // (picture.width * by)) * by
    image = np.empty((*reduced(picture, by), 3), np.uint8)
    for top, strip in strips(picture, rows):
        rgb = strip_to_rgb(strip, colours)
        image[top // by : (top + rows) // by] = np.asarray(rgb if by == 1 else rgb.reduce(by))
    return image


def to_void(picture: PIL.Image.Image, by: int = 1) -> Array | None:
    """Fully transparent pixels, (H, W) bool, with each square of `by` x `by` pixels as one; None if there are none."""
    rows = max(1, STRIP // (picture.width * by)) * by
    void = np.zeros(reduced(picture, by), bool)
    for top, strip in strips(picture, rows):
        if strip.has_transparency_data:
            clear = np.asarray(strip.convert('RGBA').getchannel('A')) == 0
            clear = np.pad(clear, [(0, -side % by) for side in clear.shape], constant_values=True)
            squares = clear.reshape(clear.shape[0] // by, by, clear.shape[1] // by, by)
            void[top // by : (top + rows) // by] = squares.all((1, 3))
    return void if void.any() else None


def reduced(picture: PIL.Image.Image, by: int) -> tuple[int, int]:
    """Size (H, W) of a picture reduced by an integer factor."""
    return math.ceil(picture.height / by), math.ceil(picture.width / by)


def strips(picture: PIL.Image.Image, rows: int) -> Iterator[tuple[int, PIL.Image.Image]]:
    """Yield a picture in strips of `rows` rows, each with the number of its first row."""
    for top in range(0, picture.height, rows):
        yield top, picture.crop((0, top, picture.width, min(top + rows, picture.height)))


def strip_to_rgb(picture: PIL.Image.Image, colours: Colours) -> PIL.Image.Image:
    if is_deep(picture):
        assert colours.bounds is not None
        picture = PIL.Image.fromarray(to_bytes(np.asarray(picture), colours.bounds))
    alpha = picture.convert('RGBA').getchannel('A') if picture.has_transparency_data else None
    if colours.profile.transform:
        picture = colours.profile.transform.apply(picture.convert(colours.profile.mode))
    picture = picture.convert('RGB')
    if alpha is None:
        return picture
    picture.putalpha(alpha)
    return PIL.Image.alpha_composite(PIL.Image.new('RGBA', picture.size, colours.background), picture).convert('RGB')


def to_bytes(samples: Array, bounds: Range) -> Array:
    """Scale samples in a range to 0..255, uint8; values outside are clipped, and NaN becomes 0."""
    lowest, highest = bounds
    share = (samples.astype(np.float64) - lowest) / (highest - lowest)
    return (np.clip(np.nan_to_num(share, nan=0.0), 0, 1) * 255 + 0.5).astype(np.uint8)


@lru_cache(maxsize=8)  # pictures in a folder often share a profile, and preparing it takes longer than reading a small picture
def profile_of(data: bytes) -> Profile:
    """Parse an embedded colour profile. Its mode is None if it is damaged or not for pixels."""
    try:
        profile = PIL.ImageCms.ImageCmsProfile(io.BytesIO(data))
        mode = SPACES[profile.profile.xcolor_space]
        transform = PIL.ImageCms.buildTransform(
            profile,
            PIL.ImageCms.createProfile('sRGB'),
            mode,
            'RGB',
            PIL.ImageCms.Intent.RELATIVE_COLORIMETRIC,
            PIL.ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (KeyError, OSError, ValueError, PIL.ImageCms.PyCMSError):
        return Profile()
    return Profile(mode, None if mode != 'CMYK' and is_srgb(transform, mode) else transform)


def is_srgb(transform: Transform, mode: str) -> bool:
    """Return whether a transform of L or RGB changes colours by no more than rounding."""
    side = 256 if mode == 'L' else 9
    levels = np.linspace(0, 255, side).astype(np.uint8)
    colours = levels[None] if mode == 'L' else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    plain = PIL.Image.fromarray(colours)
    difference = np.asarray(transform.apply(plain)).astype(int) - np.asarray(plain.convert('RGB'))
    return int(np.abs(difference).max()) <= SAME


def fits_range(profile: Profile, picture: PIL.Image.Image) -> bool:
    """Return whether the profile applies to the picture's pixels. Grey pictures with an RGB profile are common."""
    if profile.mode == 'RGB':
        return picture.mode not in CONVENTIONS
    return picture.mode in GREYS or is_deep(picture) if profile.mode == 'L' else picture.mode == profile.mode
