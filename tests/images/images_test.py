"""Decoding: every kind of file either gives the picture that was put in, or a reason."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
from hypothesis import given, settings, strategies

from padseg.errors import NoImages
from padseg.images import (
    MAX_FRAMES,
    Found,
    ImageError,
    Reading,
    as_image,
    collisions,
    contents,
    decode,
    decode_with_notes,
    find,
    frames_of,
    ignores_case,
    pixels as pixels_module,
    read,
)

GREY = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
COLOURS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2
ORIENTATION = 0x0112
GPS = 0x8825
ALL = Reading(frames='all')


def encoded(picture: PIL.Image.Image, format: str = 'PNG', **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def noise(side: int = 40) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def grey_png(width: int, height: int, rows: int) -> bytes:
    """An even grey PNG with so many rows of pixels, made without ever holding them."""
    packer = zlib.compressobj(1)
    data = b''.join(packer.compress(b'\0' + b'\x64' * width) for _ in range(rows)) + packer.flush()
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', data) + chunk(b'IEND', b'')


def gif(frames: int) -> bytes:
    """So many frames of one pixel."""
    frame = b',' + struct.pack('<HHHHB', 0, 0, 1, 1, 0) + b'\2\2\x44\1\0'
    return b'GIF89a' + struct.pack('<HHBBB', 1, 1, 0, 0, 0) + frame * frames + b';'


def pages(number: int, width: int = 1, height: int = 1) -> bytes:
    """A TIFF of so many pages, each with the data of one pixel."""
    tags = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (279, 1))
    entries = b''.join(struct.pack('<HHII', tag, 3, 1, value) for tag, value in tags)
    size = 2 + len(entries) + 4
    links = (12 + size * (page + 1) if page + 1 < number else 0 for page in range(number))
    return (
        b'II*\0'
        + struct.pack('<I', 12)
        + bytes(4)
        + b''.join(struct.pack('<H', len(tags)) + entries + struct.pack('<I', link) for link in links)
    )


def twelve_bit_tiff(values: list[int]) -> bytes:
    """One row of two 12-bit samples in three bytes."""
    packed = bytes([values[0] >> 4, (values[0] & 15) << 4 | values[1] >> 8, values[1] & 255])
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    directory = b''.join(struct.pack('<HHII', tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b'II*\0' + struct.pack('<I', 12) + packed + b'\0' + struct.pack('<H', len(tags)) + directory + b'\0\0\0\0'


def tagged(orientation: int) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    exif.get_ifd(GPS)[1] = 'N'
    exif.get_ifd(GPS)[2] = (52.0, 22.0, 12.0)
    return exif


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A colour profile: what kind of pixels, XYZ or Lab, and its tables."""
    directory, data = struct.pack('>I', len(tags)), b''
    for name, value in tags.items():
        directory += struct.pack('>4sII', name, 128 + 4 + 12 * len(tags) + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    white = struct.pack('>3i', *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))
    kind = b'prtr' if space == b'CMYK' else b'mntr'
    head = struct.pack('>I4sI4s4s4s12s4s', 128 + len(directory + data), b'', 0x02400000, kind, space, connection, b'', b'acsp')
    return head + bytes(28) + white + bytes(48) + directory + data


def xyz(*values: float) -> bytes:
    return b'XYZ \0\0\0\0' + struct.pack('>3i', *(round(value * 65536) for value in values))


def swapped() -> bytes:
    """A profile of pixels whose red and green are sRGB's green and red."""
    curve = b'para\0\0\0\0' + struct.pack('>HH5i', 3, 0, *(round(v * 65536) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    colorants = {b'gXYZ': xyz(0.4361, 0.2225, 0.0139), b'rXYZ': xyz(0.3851, 0.7169, 0.0971), b'bXYZ': xyz(0.1431, 0.0606, 0.7141)}
    white = {b'wtpt': xyz(0.9642, 1.0, 0.8249)}
    return profile(b'RGB ', b'XYZ ', white | colorants | dict.fromkeys((b'rTRC', b'gTRC', b'bTRC'), curve))


def linear_grey() -> bytes:
    return profile(b'GRAY', b'XYZ ', {b'wtpt': xyz(0.9642, 1.0, 0.8249), b'kTRC': b'curv' + bytes(8)})


def odd_inks() -> bytes:
    """A profile of a press whose cyan is red; black is black; all other inks leave the paper white."""
    red, black, white = bytes((138, 209, 198)), bytes((0, 128, 128)), bytes((255, 128, 128))  # L*a*b*
    corners = [black if k else red if c else white for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    unit = struct.pack('>9i', 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b'mft1\0\0\0\0' + bytes((4, 3, 2, 0)) + unit + bytes(range(256)) * 4 + b''.join(corners) + bytes(range(256)) * 3
    return profile(b'CMYK', b'Lab ', {b'wtpt': xyz(0.9642, 1.0, 0.8249), b'A2B0': table})


@pytest.mark.parametrize('format', ['PNG', 'BMP', 'TIFF', 'PPM'])
def test_lossless_formats_give_the_pixels_that_were_written(format):
    assert np.array_equal(decode(encoded(PIL.Image.fromarray(COLOURS), format)), COLOURS)


def test_webp_is_read():
    assert np.array_equal(decode(encoded(PIL.Image.fromarray(COLOURS), 'WEBP', lossless=True)), COLOURS)


TURNED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 3),
}


@pytest.mark.parametrize('format', ['PNG', 'TIFF', 'JPEG', 'WEBP'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_undone_or_ignored(format, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8, 0] = 255  # one red corner
    stored = np.ascontiguousarray(TURNED[orientation](upright))
    options = {'JPEG': {'quality': 100, 'subsampling': 0}, 'WEBP': {'lossless': True}}.get(format, {})
    data = encoded(PIL.Image.fromarray(stored), format, exif=tagged(orientation), **options)
    for reading, expected in ((Reading(), upright), (Reading(exif='ignore'), stored)):
        image, _, size, notes = decode_with_notes(data, reading)
        assert image.shape == expected.shape and size == expected.shape[:2] and notes == ()
        assert np.abs(image.astype(int) - expected).max() <= 8
    image, _, size, notes = decode_with_notes(data, Reading(shrink=8))
    assert image.shape == (2, 4, 3) and size == (16, 32) and notes == ('reduced from 32x16',)
    assert np.abs(image.astype(int) - upright[4::8, 4::8]).max() <= 8


@pytest.mark.parametrize('orientation', [5, 6])
def test_void_is_turned_with_the_picture(orientation):
    upright = np.full((2, 3, 4), 255, np.uint8)
    upright[0, 0, 3] = 0
    data = encoded(PIL.Image.fromarray(np.ascontiguousarray(TURNED[orientation](upright))), exif=tagged(orientation))
    assert np.array_equal(decode_with_notes(data, Reading(void=True)).void, upright[..., 3] == 0)


@pytest.mark.parametrize('format', ['JPEG', 'WEBP'])
def test_damaged_exif_data_are_noted(format):
    whole = encoded(noise(), format, exif=tagged(6))
    header = tagged(6).tobytes()[6:14]  # of the TIFF that EXIF data are, after 'Exif'
    decoded = decode_with_notes(whole.replace(header, b'no TIFF '))
    assert decoded.notes == ('EXIF data not readable',)
    assert np.array_equal(decoded.image, decode(whole, Reading(exif='ignore')))


def test_grey_one_bit_and_palette():
    assert np.array_equal(decode(encoded(PIL.Image.fromarray(GREY))), np.repeat(GREY[..., None], 3, 2))
    assert np.array_equal(decode(encoded(PIL.Image.fromarray(GREY > 100)))[..., 0], (GREY > 100) * 255)
    palette = PIL.Image.fromarray(np.array([[0, 1]], np.uint8), 'L').convert('P')
    palette.putpalette([1, 2, 3, 40, 50, 60])
    assert decode(encoded(palette)).tolist() == [[[1, 2, 3], [40, 50, 60]]]


def test_transparency_is_laid_on_white():
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [255, 0, 0, 128]]], np.uint8)
    assert decode(encoded(PIL.Image.fromarray(rgba))).tolist() == [[[200, 100, 0], [255, 255, 255], [255, 127, 127]]]
    assert decode(encoded(PIL.Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8)))).tolist() == [[[9] * 3, [255] * 3]]
    palette = PIL.Image.fromarray(np.array([[0, 1]], np.uint8)).convert('P')
    palette.putpalette([1, 2, 3, 40, 50, 60])
    assert decode(encoded(palette, transparency=1)).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    assert decode(encoded(PIL.Image.fromarray(COLOURS), transparency=(0, 2, 4)))[0, 0].tolist() == [255] * 3


def test_transparency_is_laid_on_the_background():
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [255, 0, 0, 128]]], np.uint8)
    image, void, _, _ = decode_with_notes(encoded(PIL.Image.fromarray(rgba)), Reading(background=(0, 9, 255), void=True))
    assert image.tolist() == [[[200, 100, 0], [0, 9, 255], [128, 4, 127]]]
    assert void is not None and void.tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ('data', 'expected'),
    [
        (encoded(PIL.Image.fromarray(np.array([[[9, 255], [9, 0], [9, 1]]], np.uint8))), [[False, True, False]]),
        (encoded(PIL.Image.fromarray(COLOURS[:1, :2]), transparency=(0, 2, 4)), [[True, False]]),
        (encoded(PIL.Image.fromarray(GREY[:1]).quantize(3), 'GIF', transparency=1), None),
        (encoded(PIL.Image.fromarray(np.full((2, 2, 4), 255, np.uint8))), None),
        (encoded(noise(), 'JPEG'), None),
    ],
)
def test_void_is_what_is_fully_transparent(data, expected):
    void = decode_with_notes(data, Reading(void=True)).void
    image = decode(data, Reading(background=(1, 77, 3)))
    if expected is None:
        expected = (image == (1, 77, 3)).all(-1).tolist()
    assert (np.zeros(image.shape[:2], bool) if void is None else void).tolist() == expected
    assert decode_with_notes(data).void is None


def inks() -> PIL.Image.Image:
    """White paper on the left, full magenta and yellow on the right: red."""
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, 8:] = (0, 255, 255, 0)
    return PIL.Image.frombytes('CMYK', (16, 16), inks.tobytes())


def without_adobe_marker(data: bytes) -> bytes:
    start = data.index(b'\xff\xee\0\x0eAdobe')
    return data[:start] + data[start + 16 :]


@pytest.mark.parametrize(
    'data',
    [
        encoded(inks(), 'TIFF'),
        encoded(inks(), 'JPEG'),  # Adobe's way: 0 is full ink
        without_adobe_marker(encoded(PIL.Image.frombytes('CMYK', (16, 16), bytes(255 - v for v in inks().tobytes())), 'JPEG')),
    ],
    ids=['TIFF', 'JPEG of Adobe', 'plain JPEG'],
)
def test_cmyk(data):
    image, _, _, notes = decode_with_notes(data)
    assert np.abs(image[:, :8].astype(int) - 255).max() <= 3
    assert np.abs(image[:, 8:].astype(int) - (255, 0, 0)).max() <= 3
    assert notes == ('converted from CMYK',)


def test_lab():
    lab = PIL.Image.frombytes('LAB', (2, 1), bytes((255, 0, 0, 138, 81, 70)))  # white, and sRGB's red; a and b are signed
    image, _, _, notes = decode_with_notes(encoded(lab, 'TIFF'))
    assert np.abs(image.astype(int) - [[[255, 255, 255], [255, 0, 0]]]).max() <= 6
    assert notes == ('converted from LAB',)


@pytest.mark.parametrize('format', ['PNG', 'TIFF', 'WEBP'])
def test_a_colour_profile_is_applied(format):
    options = {'lossless': True} if format == 'WEBP' else {}
    picture = PIL.Image.fromarray(COLOURS)
    image, _, _, notes = decode_with_notes(encoded(picture, format, icc_profile=swapped(), **options))
    assert np.abs(image.astype(int) - COLOURS[..., [1, 0, 2]]).max() <= 2
    assert notes == ('converted by its colour profile',)


def test_a_colour_profile_is_applied_to_palettes_and_below_transparency():
    expected = COLOURS[..., [1, 0, 2]].astype(int)
    palette = encoded(PIL.Image.fromarray(COLOURS).quantize(256), icc_profile=swapped())
    assert np.abs(decode(palette) - expected).max() <= 2
    alpha = np.where(np.arange(7) == 3, 0, 255).astype(np.uint8) * np.ones((5, 1), np.uint8)
    image = decode(encoded(PIL.Image.fromarray(np.dstack([COLOURS, alpha])), icc_profile=swapped()))
    assert (image[:, 3] == 255).all()
    assert np.abs(np.delete(image, 3, 1) - np.delete(expected, 3, 1)).max() <= 2


def test_a_profile_of_greys_is_applied_to_greys():
    image, _, _, notes = decode_with_notes(encoded(PIL.Image.fromarray(np.array([[0, 55, 255]], np.uint8)), icc_profile=linear_grey()))
    assert np.abs(image[0].astype(int) - [[0] * 3, [128] * 3, [255] * 3]).max() <= 1
    assert notes == ('converted by its colour profile',)


@pytest.mark.parametrize('format', ['JPEG', 'TIFF'])
def test_a_profile_of_inks_is_applied_to_inks(format):
    full = PIL.Image.new('CMYK', (48, 16))
    full.paste((255, 0, 0, 0), (16, 0, 32, 16))
    full.paste((0, 0, 0, 255), (32, 0, 48, 16))
    image, _, _, notes = decode_with_notes(encoded(full, format, icc_profile=odd_inks()))
    assert np.abs(image[8, [8, 24, 40]].astype(int) - [[255] * 3, [255, 0, 0], [0] * 3]).max() <= 6
    assert notes == ('converted by its colour profile',)


def test_a_profile_of_srgb_changes_nothing():
    srgb = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile('sRGB')).tobytes()
    image, _, _, notes = decode_with_notes(encoded(PIL.Image.fromarray(COLOURS), icc_profile=srgb))
    assert np.array_equal(image, COLOURS) and notes == ()


@pytest.mark.parametrize('data', [b'no profile at all', swapped()[:200], odd_inks(), linear_grey()])
def test_a_profile_that_cannot_be_used_is_noted(data):
    image, _, _, notes = decode_with_notes(encoded(PIL.Image.fromarray(COLOURS), icc_profile=data))
    assert np.array_equal(image, COLOURS) and notes == ('colour profile not used',)


@pytest.mark.parametrize(('format', 'dtype'), [('PNG', '<u2'), ('TIFF', '<u2'), ('TIFF', '>u2'), ('PPM', '<u2')])
def test_sixteen_bits_are_scaled(format, dtype):
    ramp = (np.arange(256) * 257).astype(dtype).reshape(16, 16)
    assert np.array_equal(decode(encoded(PIL.Image.fromarray(ramp), format))[..., 0].ravel(), np.arange(256))


def test_twelve_bits_are_scaled_by_their_own_depth():
    assert decode(twelve_bit_tiff([4095, 2048]))[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_samples_without_a_range_are_refused(dtype):
    with pytest.raises(ImageError, match='range is not known'):
        decode(encoded(PIL.Image.fromarray(GREY.astype(dtype)), 'TIFF'))


def test_samples_are_scaled_from_a_given_range():
    floats = np.array([[-9, 0, 0.5, 1, 7, np.nan, -np.inf, np.inf]], np.float32)
    data = encoded(PIL.Image.fromarray(floats), 'TIFF')
    assert decode(data, Reading(value_range=(0, 1)))[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0, 0, 255]
    data = encoded(PIL.Image.fromarray(np.array([[-10, 0, 10]], np.int32)), 'TIFF')
    assert decode(data, Reading(value_range=(-10, 10)))[0, :, 0].tolist() == [0, 128, 255]
    deep = encoded(PIL.Image.fromarray(np.array([[0, 257, 65535]], np.uint16)))  # has a range of its own
    assert decode(deep, Reading(value_range=(0, 1)))[0, :, 0].tolist() == [0, 1, 255]


def test_a_portable_float_map_is_scaled():
    data = b'Pf\n2 1\n-1.0\n' + np.array([0.5, 1], '<f4').tobytes()
    assert decode(data, Reading(value_range=(0, 1)))[0, :, 0].tolist() == [128, 255]


def test_the_factor_is_found_at_once():
    assert pixels_module.factor((1, 10**9), 1) == 10**9


@given(strategies.integers(1, 300), strategies.integers(1, 300), strategies.integers(1, 500))
def test_the_factor_is_the_smallest_that_fits(width, height, pixels):
    slow = next(by for by in range(1, 301) if math.ceil(width / by) * math.ceil(height / by) <= pixels)
    assert pixels_module.factor((width, height), pixels) == slow


def test_shrunk_pixels_are_means_of_squares():
    stored = np.array([[0, 10, 100, 200, 7], [20, 30, 100, 200, 9], [50, 60, 1, 1, 4]], np.uint8)
    image, _, size, notes = decode_with_notes(encoded(PIL.Image.fromarray(stored)), Reading(shrink=6))
    assert image[..., 0].tolist() == [[15, 150, 8], [55, 1, 4]]
    assert size == (3, 5) and notes == ('reduced from 5x3',)
    whole = decode_with_notes(encoded(PIL.Image.fromarray(stored)), Reading(shrink=15))
    assert whole.image[..., 0].tolist() == stored.tolist() and whole.notes == ()


def test_a_shrunk_pixel_is_void_if_all_of_its_square_is():
    alpha = np.array([[0, 0, 0, 255, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 255]], np.uint8)
    data = encoded(PIL.Image.fromarray(np.dstack([np.zeros((3, 5, 3), np.uint8), alpha])))
    void = decode_with_notes(data, Reading(shrink=6, void=True)).void
    assert void is not None and void.tolist() == [[True, False, True], [False, True, False]]


@pytest.mark.parametrize(('shrink', 'shape'), [(3071, (24, 32)), (700, (12, 16)), (10, (2, 3)), (1, (1, 1))])
def test_a_jpeg_is_shrunk_while_it_is_decoded(shrink, shape):
    picture = PIL.Image.linear_gradient('L').resize((64, 48))
    image, _, size, notes = decode_with_notes(encoded(picture, 'JPEG', quality=100), Reading(shrink=shrink))
    assert image.shape[:2] == shape and size == (48, 64) and notes == ('reduced from 64x48',)
    if shape[0] > 2:
        assert np.abs(image[..., 0].astype(int) - np.asarray(picture.resize(shape[::-1], PIL.Image.Resampling.BOX))).max() <= 3


@pytest.mark.parametrize('size', [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'TIFF', 'WEBP', 'GIF'])
def test_thin_pictures(format, size):
    data = encoded(PIL.Image.new('RGB', size, 'red'), format)
    assert np.abs(decode(data).astype(int) - (255, 0, 0)).max() <= 3
    image, _, whole, _ = decode_with_notes(data, Reading(shrink=50))
    assert whole == size[::-1] and image.shape[0] * image.shape[1] <= 50


STRIPED = {
    'RGBA': encoded(noise(40).convert('RGBA').rotate(30)),
    'palette': encoded(noise(40).quantize(16), transparency=3),
    'deep': encoded(PIL.Image.fromarray((np.arange(1600).reshape(40, 40) * 40).astype('>u2')), 'TIFF'),
    'profile': encoded(noise(40), icc_profile=swapped()),
    'bits': encoded(noise(40).convert('1')),
}


@pytest.mark.parametrize('kind', sorted(STRIPED))
@pytest.mark.parametrize('reading', [Reading(void=True), Reading(void=True, shrink=200)])
def test_strips_change_nothing(kind, reading, monkeypatch):
    whole = decode_with_notes(STRIPED[kind], reading)
    monkeypatch.setattr(pixels_module, 'STRIP', 130)
    image, void, _, _ = decode_with_notes(STRIPED[kind], reading)
    assert np.array_equal(image, whole.image)
    assert np.array_equal(void, whole.void) if whole.void is not None else void is None


def three_frames(format: str) -> bytes:
    frames = [PIL.Image.new('RGB', (8, 8), colour) for colour in ('red', 'lime', 'blue')]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize('format', ['GIF', 'TIFF', 'WEBP', 'PNG'])
def test_frames(format, tmp_path):
    (tmp_path / 'a.gif').write_bytes(three_frames(format))
    (found,) = find(tmp_path)
    first = decode_with_notes(three_frames(format))
    assert first.notes == ('first of 3 frames',)
    assert np.abs(first.image.astype(int) - (255, 0, 0)).max() <= 2
    assert frames_of(found, Reading()) == [found]
    frames = frames_of(found, ALL)
    assert frames == [Found(found.path, f'a.gif.f000{number}', number) for number in range(3)]
    for frame, colour in zip(frames, np.eye(3) * 255, strict=True):
        decoded = decode_with_notes(frame.path.read_bytes(), ALL, frame.frame)
        assert np.abs(decoded.image - colour).max() <= 2 and decoded.notes == ()
    with pytest.raises(ImageError):
        decode(three_frames(format), ALL, 3)


def test_the_second_picture_of_a_phone_is_no_frame(tmp_path):
    data = encoded(noise(), 'MPO', save_all=True, append_images=[PIL.Image.new('RGB', (8, 8))])
    (tmp_path / 'a.jpg').write_bytes(data)
    found = Found(tmp_path / 'a.jpg', 'a.jpg')
    assert frames_of(found, ALL) == [found]
    assert np.array_equal(decode(data), decode(encoded(noise(), 'JPEG'))) and decode_with_notes(data).notes == ()


def test_what_is_no_animation_stays_one_file(tmp_path):
    for format in ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM'):
        (tmp_path / f'{format}.png').write_bytes(encoded(noise(), format))
    (tmp_path / 'bad.gif').write_bytes(b'GIF89a')
    (tmp_path / 'words.gif').write_bytes(b'words')
    (tmp_path / 'gone.gif').symlink_to('nowhere')
    for found in find(tmp_path):
        assert frames_of(found, ALL) == [found]
    assert len(find(tmp_path)) == 10


@pytest.mark.parametrize('data', [gif(MAX_FRAMES + 1), pages(MAX_FRAMES + 1), pages(40_000)], ids=['GIF', 'TIFF', 'huge TIFF'])
def test_too_many_frames(data, tmp_path):
    (tmp_path / 'a.gif').write_bytes(data)
    found = Found(tmp_path / 'a.gif', 'a.gif')
    assert frames_of(found, ALL) == [found]
    assert decode_with_notes(data).notes == (f'first of more than {MAX_FRAMES} frames',)
    with pytest.raises(ImageError, match=f'more than {MAX_FRAMES} frames'):
        decode(data, ALL)


def test_as_many_frames_as_allowed(tmp_path):
    for name, data in (('a.gif', gif(MAX_FRAMES)), ('a.tif', pages(MAX_FRAMES))):
        (tmp_path / name).write_bytes(data)
        assert len(frames_of(Found(tmp_path / name, name), ALL)) == MAX_FRAMES
        assert decode(data, ALL, MAX_FRAMES - 1).shape == (1, 1, 3)


def test_each_page_is_judged_and_turned_by_itself():
    other = PIL.Image.fromarray(COLOURS)
    other.encoderinfo = {'tiffinfo': {ORIENTATION: 6}}
    data = encoded(PIL.Image.fromarray(GREY), 'TIFF', save_all=True, append_images=[other])
    assert decode(data, ALL, 1).shape == (7, 5, 3)
    assert decode(data, ALL._replace(exif='ignore'), 1).shape == COLOURS.shape
    assert decode(data, ALL._replace(max_pixels=6)).shape == (2, 3, 3)
    with pytest.raises(ImageError, match='exceeds 34 pixels'):
        decode(data, ALL._replace(max_pixels=34), 1)


@pytest.mark.parametrize('data', [pages(3)[:-20], gif(3)[:-9]], ids=['TIFF', 'GIF'])
def test_a_damaged_frame_is_one_that_fails(data, tmp_path):
    (tmp_path / 'a').write_bytes(data)
    frames = frames_of(Found(tmp_path / 'a', 'a'), ALL)
    assert len(frames) == 3
    assert decode(data, ALL, 1).shape == (1, 1, 3)
    with pytest.raises(ImageError, match='truncated or damaged'):
        decode(data, ALL, 2)
    assert decode_with_notes(data).notes == ('first of 3 frames',)


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM'])
@pytest.mark.parametrize('tenth', range(1, 10))
def test_a_cut_file_is_an_error(format, tenth):
    data = encoded(noise(), format)
    with pytest.raises(ImageError):
        decode(data[: len(data) * tenth // 10])


def test_reasons():
    with pytest.raises(ImageError, match='empty file'):
        decode(b'')
    with pytest.raises(ImageError, match='not a picture that padseg reads'):
        decode(b'just words\n' * 20)
    with pytest.raises(ImageError, match='not a picture that padseg reads'):
        decode(encoded(noise(), 'PCX'))  # Pillow could, but it is not on the list
    with pytest.raises(ImageError, match='truncated'):
        decode(encoded(noise())[:-2000])


@pytest.mark.parametrize('size', [(60000, 60000), (9434, 9434)])
def test_a_size_beyond_the_limit_is_refused_by_its_header(size):
    with pytest.raises(ImageError, match=f'size {size[0]}x{size[1]} exceeds 89000000 pixels'):
        decode(grey_png(*size, rows=1))


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM'])
def test_the_limit_can_be_lowered(format):
    data = encoded(noise(20), format)
    assert decode(data, Reading(max_pixels=400)).shape == (20, 20, 3)
    with pytest.raises(ImageError, match='size 20x20 exceeds 399 pixels'):
        decode(data, Reading(max_pixels=399))


LIMITED = """
import json, resource, sys
from pathlib import Path
from padseg.images import ImageError, Reading, decode_with_notes
data = Path(sys.argv[1]).read_bytes()
limit = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize() + int(sys.argv[2]) * 1_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    decoded = decode_with_notes(data, Reading(**json.loads(sys.argv[3])))
except ImageError as error:
    print(json.dumps(str(error)))
else:
    print(json.dumps([decoded.image.shape, int(decoded.image.min()), int(decoded.image.max()), decoded.size, decoded.notes]))
"""


def decoded_within(megabytes: int, path: Path, **reading: int) -> object:
    """What a process that may take so much more memory says of a picture: shape, range of values, size and notes; or the reason why not."""
    command = (sys.executable, '-c', LIMITED, str(path), str(megabytes), json.dumps(reading))
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


needs_proc = pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='the memory limit is set by /proc')


@needs_proc
def test_a_bomb_is_refused_before_it_takes_memory(tmp_path):
    (tmp_path / 'bomb.png').write_bytes(grey_png(12000, 12000, rows=12000))
    assert (tmp_path / 'bomb.png').stat().st_size < 1_000_000
    assert decoded_within(20, tmp_path / 'bomb.png') == 'size 12000x12000 exceeds 89000000 pixels'
    reason = decoded_within(20, tmp_path / 'bomb.png', max_pixels=200_000_000)
    assert isinstance(reason, str) and reason.startswith('not enough memory')


@needs_proc
@pytest.mark.parametrize(('format', 'megabytes'), [('PNG', 450), ('JPEG', 150)])
def test_a_huge_picture_is_shrunk_in_bounded_memory(tmp_path, format, megabytes):
    path = tmp_path / 'huge'
    if format == 'PNG':
        path.write_bytes(grey_png(20000, 15000, rows=15000))
    else:
        PIL.Image.new('L', (20000, 15000), 100).save(path, format)
    expected = [[3750, 5000, 3], 100, 100, [15000, 20000], ['reduced from 20000x15000']]
    assert decoded_within(megabytes, path, max_pixels=400_000_000, shrink=25_000_000) == expected


def test_where_pillow_itself_sets_the_limit():
    with pytest.raises(ImageError, match='more pixels than Pillow reads'):
        decode(pages(1, 20000, 10000), Reading(max_pixels=400_000_000))


def test_a_large_file_is_refused_unread(tmp_path):
    path = tmp_path / 'large.png'
    path.write_bytes(encoded(noise()))
    size = path.stat().st_size
    assert contents(path, Reading(max_bytes=size)) == path.read_bytes()
    with pytest.raises(ImageError, match=f'file of {size} bytes exceeds {size - 1}'):
        read(path, Reading(max_bytes=size - 1))
    with path.open('r+b') as file:
        file.truncate(2_000_000_000)  # takes no room on disk
    with pytest.raises(ImageError, match='exceeds 1000000000'):
        read(path)


@given(strategies.binary(max_size=300))
def test_any_bytes_give_a_picture_or_a_reason(data):
    with pytest.raises(ImageError):
        decode(data)


SAMPLES = {
    **{format: encoded(noise(12), format) for format in ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM')},
    **{
        f'{format} with metadata': encoded(noise(12), format, exif=tagged(6), icc_profile=swapped())
        for format in ('JPEG', 'PNG', 'WEBP', 'TIFF')
    },
    **{
        f'{format} frames': encoded(noise(12), format, save_all=True, append_images=[noise(12).rotate(90)])
        for format in ('PNG', 'WEBP', 'TIFF', 'GIF')
    },
    'transparent palette': encoded(noise(12).quantize(8), transparency=3),
    'deep': encoded(PIL.Image.fromarray(np.arange(144, dtype='u2').reshape(12, 12) * 400)),
    'floats': encoded(PIL.Image.fromarray(np.arange(144, dtype='f4').reshape(12, 12)), 'TIFF'),
    'inks': encoded(noise(12).convert('CMYK'), 'JPEG'),
}
READINGS = (Reading(), Reading(exif='ignore', void=True, shrink=40, value_range=(0, 99)), Reading(frames='all', max_pixels=10_000))


@settings(max_examples=500)
@given(strategies.sampled_from(sorted(SAMPLES)), strategies.sampled_from(READINGS), strategies.integers(0, 2), strategies.data())
def test_a_damaged_file_gives_a_picture_or_a_reason(sample, reading, frame, draw):
    data = bytearray(SAMPLES[sample])
    last = draw.draw(strategies.sampled_from([len(data), min(len(data), 120)])) - 1  # headers are where it matters
    for place in draw.draw(strategies.lists(strategies.integers(0, last), max_size=4)):
        data[place] = draw.draw(strategies.integers(0, 255))
    if draw.draw(strategies.booleans()):
        del data[draw.draw(strategies.integers(0, last)) :]
    decoded = decoded_or_reason(bytes(data), reading, frame)
    if isinstance(decoded, str):
        assert decoded
        return
    image, void, size, _ = decoded
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
    assert void is None or (void.dtype == bool and void.shape == image.shape[:2])
    assert image.shape[:2] == size or reading.shrink


def decoded_or_reason(data, reading, frame):
    try:
        return decode_with_notes(data, reading, frame)
    except ImageError as error:
        return str(error)


def test_read_opens_any_name(tmp_path):
    names = [
        'é.png',
        'e\u0301.png',
        '漢字 🐈.png',
        '-leading.png',
        'new\nline.png',
        'CON.png',
        ' .png',
        'n' * 251 + '.png',
        os.fsdecode(b'\xe9.png'),
    ]
    for name in names:
        (tmp_path / name).write_bytes(encoded(PIL.Image.fromarray(COLOURS)))
        assert np.array_equal(read(tmp_path / name), COLOURS)
    assert [picture.name for picture in find(tmp_path)] == sorted(names)


def test_a_picture_tagged_with_a_place_is_read_like_another():
    assert np.array_equal(decode(encoded(noise(), 'JPEG', exif=tagged(1))), decode(encoded(noise(), 'JPEG')))


def test_special_files_are_neither_found_nor_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo('pipe.png')
    with socket.socket(socket.AF_UNIX) as server:
        server.bind('socket.png')
        Path('loop.png').symlink_to('loop.png')
        Path('folder.jpg').mkdir()
        assert [picture.name for picture in find(tmp_path)] == ['loop.png']
        for name in ('pipe.png', 'socket.png', 'folder.jpg'):
            with pytest.raises(ImageError, match='not a regular file'):
                read(name)
            assert frames_of(Found(Path(name), name), ALL) == [Found(Path(name), name)]
        with pytest.raises(OSError, match='symbolic links'):
            read('loop.png')


def test_collisions():
    names = ['b.jpg', 'a.jpg', 'A.jpg', 'a.png', 'x/É.png', 'X/e\u0301.png', 'x/é.png', 'y/é.png', 'A.JPG', os.fsdecode(b'\xff.png')]
    assert collisions(names) == [('A.JPG', 'A.jpg'), ('A.JPG', 'a.jpg'), ('X/e\u0301.png', 'x/É.png'), ('X/e\u0301.png', 'x/é.png')]
    assert collisions(['a.jpg', 'a.png', 'sub/a.jpg', 'Sub/b.jpg']) == []
    assert collisions([]) == []


def test_ignores_case_tries_it_and_leaves_nothing(tmp_path):
    assert ignores_case(tmp_path) == (tmp_path.with_name(tmp_path.name.upper()).exists())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        ignores_case(tmp_path / 'nowhere')


@pytest.fixture
def tree(tmp_path):
    for name in ('b.jpg', 'A.PNG', 'sub/c.tif', 'sub/.hidden.png', '.git/d.png', 'notes.txt', 'album.jpg/e.webp', 'out/labels/b.jpg.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    (tmp_path / 'loop').symlink_to(tmp_path)
    (tmp_path / 'link.png').symlink_to('b.jpg')
    (tmp_path / 'dangling.png').symlink_to('nowhere')
    os.mkfifo(tmp_path / 'pipe.png')
    return tmp_path


def test_find_lists_the_pictures_of_a_tree(tree):
    names = ['A.PNG', 'album.jpg/e.webp', 'b.jpg', 'dangling.png', 'link.png', 'sub/c.tif']
    assert [picture.name for picture in find(tree, skip=tree / 'out')] == names
    assert [picture.path for picture in find(tree, skip=tree / 'out')] == [tree / name for name in names]
    assert 'out/labels/b.jpg.png' in [picture.name for picture in find(tree)]


def test_find_takes_a_single_file_whatever_its_suffix(tree):
    assert find(tree / 'notes.txt') == [Found(tree / 'notes.txt', 'notes.txt')]
    assert find(tree / 'link.png') == [Found(tree / 'link.png', 'link.png')]


@pytest.mark.parametrize('name', ['nowhere', 'pipe.png'])
def test_find_refuses_what_is_neither_folder_nor_file(tree, name):
    with pytest.raises(NoImages, match=name):
        find(tree / name)


def test_as_image_takes_pictures_and_paths(tmp_path):
    (tmp_path / 'a.png').write_bytes(encoded(PIL.Image.fromarray(COLOURS)))
    assert as_image(COLOURS) is COLOURS
    assert np.array_equal(as_image(tmp_path / 'a.png'), COLOURS)
    assert np.array_equal(as_image(str(tmp_path / 'a.png')), COLOURS)
