"""Decoding: every kind of file either gives the picture that was put in, or a reason."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies

from padseg.errors import NoImages
from padseg.images import ImageError
from padseg.images import as_image
from padseg.images import decode
from padseg.images import find
from padseg.images import read

GREY = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
COLOURS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2
ORIENTATION = 0x0112


def encoded(picture: PIL.Image.Image, format: str = 'PNG', **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def noise(side: int = 40) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG up to the first byte of its pixels."""
    body = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + body + struct.pack('>I', zlib.crc32(body)) + struct.pack('>I', 9) + b'IDAT'


def twelve_bit_tiff(values: list[int]) -> bytes:
    """One row of two 12-bit samples in three bytes."""
    packed = bytes([values[0] >> 4, (values[0] & 15) << 4 | values[1] >> 8, values[1] & 255])
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    directory = b''.join(struct.pack('<HHII', tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b'II*\0' + struct.pack('<I', 12) + packed + b'\0' + struct.pack('<H', len(tags)) + directory + b'\0\0\0\0'


@pytest.mark.parametrize('format', ['PNG', 'BMP', 'TIFF', 'PPM'])
def test_lossless_formats_give_the_pixels_that_were_written(format):
    assert np.array_equal(decode(encoded(PIL.Image.fromarray(COLOURS), format)), COLOURS)


def test_webp_is_read():
    assert np.array_equal(decode(encoded(PIL.Image.fromarray(COLOURS), 'WEBP', lossless=True)), COLOURS)


@pytest.mark.parametrize('format', ['PNG', 'TIFF', 'JPEG'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_undone(format, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8, 0] = 255  # one red corner
    turn = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 3),
    }
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    options = {'quality': 100, 'subsampling': 0} if format == 'JPEG' else {}
    stored = PIL.Image.fromarray(np.ascontiguousarray(turn[orientation](upright)))
    image = decode(encoded(stored, format, exif=exif, **options))
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).max() <= 8


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


@pytest.mark.parametrize('format', ['JPEG', 'TIFF'])
def test_cmyk(format):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, 8:] = (0, 255, 255, 0)  # no cyan, full magenta and yellow: red
    image = decode(encoded(PIL.Image.fromarray(inks, 'CMYK'), format)).astype(int)
    assert np.abs(image[:, :8] - 255).max() <= 3
    assert np.abs(image[:, 8:] - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize('format, dtype', [('PNG', '<u2'), ('TIFF', '<u2'), ('TIFF', '>u2'), ('PPM', '<u2')])
def test_sixteen_bits_are_scaled(format, dtype):
    ramp = (np.arange(256) * 257).astype(dtype).reshape(16, 16)
    assert np.array_equal(decode(encoded(PIL.Image.fromarray(ramp), format))[..., 0].ravel(), np.arange(256))


def test_twelve_bits_are_scaled_by_their_own_depth():
    assert decode(twelve_bit_tiff([4095, 2048]))[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize('dtype', [np.float32, np.int32])
def test_samples_without_a_range_are_refused(dtype):
    with pytest.raises(ImageError, match='range is not known'):
        decode(encoded(PIL.Image.fromarray(GREY.astype(dtype)), 'TIFF'))


@pytest.mark.parametrize('format', ['GIF', 'TIFF', 'WEBP', 'PNG'])
def test_first_of_several_frames(format):
    frames = [PIL.Image.new('RGB', (8, 8), colour) for colour in ('red', 'lime', 'blue')]
    image = decode(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
    assert np.abs(image.astype(int) - (255, 0, 0)).max() <= 2


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


@pytest.mark.parametrize('size', [(60000, 60000), (13350, 13350)])
def test_a_size_beyond_the_limit_is_refused_by_its_header(size):
    with pytest.raises(ImageError, match='size .*exceeds 178000000'):
        decode(png_header(*size))


@given(strategies.binary(max_size=300))
def test_any_bytes_give_a_picture_or_a_reason(data):
    with pytest.raises(ImageError):
        decode(data)


@settings(max_examples=300, deadline=None)
@given(strategies.sampled_from(['JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM']), strategies.data())
def test_flipped_bytes_give_a_picture_or_a_reason(format, draw):
    data = bytearray(encoded(noise(12), format))
    for place in draw.draw(strategies.lists(strategies.integers(0, min(len(data), 120) - 1), min_size=1, max_size=4)):
        data[place] = draw.draw(strategies.integers(0, 255))
    try:
        image = decode(bytes(data))
    except ImageError as error:
        assert str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def test_read_opens_any_name(tmp_path):
    for name in ('é.png', 'e\u0301.png', '漢字 🐈.png', '-leading.png', 'new\nline.png'):
        (tmp_path / name).write_bytes(encoded(PIL.Image.fromarray(COLOURS)))
        assert np.array_equal(read(tmp_path / name), COLOURS)
    assert len(find(tmp_path)) == 5


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
    assert find(tree / 'notes.txt') == [(tree / 'notes.txt', 'notes.txt')]
    assert find(tree / 'link.png') == [(tree / 'link.png', 'link.png')]


@pytest.mark.parametrize('name', ['nowhere', 'pipe.png'])
def test_find_refuses_what_is_neither_folder_nor_file(tree, name):
    with pytest.raises(NoImages, match=name):
        find(tree / name)


def test_as_image_takes_pictures_and_paths(tmp_path):
    (tmp_path / 'a.png').write_bytes(encoded(PIL.Image.fromarray(COLOURS)))
    assert as_image(COLOURS) is COLOURS
    assert np.array_equal(as_image(tmp_path / 'a.png'), COLOURS)
    assert np.array_equal(as_image(str(tmp_path / 'a.png')), COLOURS)


@pytest.mark.parametrize('array', [COLOURS[..., 0], COLOURS[..., :2], COLOURS / 255, COLOURS[:0]])
def test_as_image_refuses_other_arrays(array):
    with pytest.raises(ValueError, match=r'expected a picture \(H, W, 3\) uint8; got shape'):
        as_image(array)
