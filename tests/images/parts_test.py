"""Large PNG and TIFF files that are decoded in parts give what they give whole, in less memory."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
import tifffile

from padseg.images import ImageError, Reading, decode_apart, decode_with_notes
from padseg.images.complete import unpacked
from padseg.images.parts import is_plain_png, png_pieces, tiff_pieces
from padseg.images.tiff import Tiff

TURNED = b'Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0'
CODECS = {'raw': 'raw', 'deflate': 'tiff_adobe_deflate', 'lzw': 'tiff_lzw', 'jpeg': 'jpeg', 'packbits': 'packbits'}
BANDS = {'L': 1, 'LA': 2, 'RGB': 3, 'RGBA': 4}


def picture(mode: str, height: int = 45, width: int = 37) -> PIL.Image.Image:
    """Smooth in one direction and noisy in the other, so that a PNG's rows have filters of every kind."""
    rng = np.random.default_rng(0)
    samples = np.arange(height)[:, None, None] * 5 + rng.integers(0, 256, (width, BANDS.get(mode, 3))) + rng.integers(0, 3, (height, 1, 1))
    array = samples.astype(np.uint8)
    return (
        PIL.Image.fromarray(array[..., 0])
        if mode == 'L'
        else PIL.Image.fromarray(array).quantize(90)
        if mode == 'P'
        else PIL.Image.fromarray(array)
    )


def saved(image: PIL.Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize('rows', [1, 7, 45, 100])
@pytest.mark.parametrize('mode', ['L', 'LA', 'RGB', 'RGBA', 'P'])
def test_a_png_in_parts(mode, rows):
    image = picture(mode)
    data = saved(image, 'PNG')
    size = 37 * BANDS.get(mode, 1) + 1
    assert mode == 'P' or 2 in b''.join(unpacked(data))[::size]  # a filter that refers to the row above
    pieces = list(png_pieces(data, rows))
    assert [piece.height for piece in pieces] == [min(rows, 45 - top) for top in range(0, 45, rows)]
    np.testing.assert_array_equal(np.concatenate(list(map(np.asarray, pieces))), np.asarray(image))
    assert {piece.mode for piece in pieces} == {mode} and all(piece.getpalette() == image.getpalette() for piece in pieces)


def test_other_pngs_are_not_read_in_parts():
    whole = saved(picture('RGB'), 'PNG')
    assert is_plain_png(whole) and not is_plain_png(saved(picture('L').convert('1'), 'PNG'))
    assert not is_plain_png(saved(picture('RGB'), 'PNG', save_all=True, append_images=[picture('RGB').rotate(180)]))
    assert not is_plain_png(whole[:28] + b'\1' + whole[29:])  # interlaced


@pytest.mark.parametrize(
    ('mode', 'codec'), [(mode, codec) for mode in BANDS for codec in CODECS if codec != 'jpeg' or mode in ('L', 'RGB')]
)
@pytest.mark.parametrize('rows', [8, 45])
def test_a_tiff_in_strips(mode, codec, rows):
    data = saved(picture(mode), 'TIFF', compression=CODECS[codec], tiffinfo={278: rows})
    pieces = list(tiff_pieces(Tiff(io.BytesIO(data)), 3, 37 * 24) or ())
    assert [piece.height for piece in pieces] == ([24, 21] if rows == 8 or codec == 'raw' else [45])
    np.testing.assert_array_equal(np.concatenate(list(map(np.asarray, pieces))), np.asarray(PIL.Image.open(io.BytesIO(data))))


@pytest.mark.parametrize('bigtiff', [False, True])
@pytest.mark.parametrize('codec', [None, 'zlib'])
def test_a_tiff_in_tiles(codec, bigtiff):
    file = io.BytesIO()
    samples = np.asarray(picture('RGB'))
    tifffile.imwrite(file, samples, compression=codec, predictor=codec == 'zlib', tile=(16, 32), photometric='rgb', bigtiff=bigtiff)
    pieces = list(tiff_pieces(Tiff(io.BytesIO(file.getvalue())), 4, 1) or ())
    assert [piece.height for piece in pieces] == [16, 16, 13]
    np.testing.assert_array_equal(np.concatenate(list(map(np.asarray, pieces))), samples)


@pytest.mark.parametrize('format', ['PNG', 'TIFF'])
def test_a_picture_is_reduced_and_turned_as_if_decoded_whole(format):
    image = picture('RGB', 48, 36)
    alpha = np.random.default_rng(1).choice(np.array([0, 90, 255], np.uint8), (16, 12)).repeat(3, 0).repeat(3, 1)
    image.putalpha(PIL.Image.fromarray(alpha))
    data = saved(image, format, **({'exif': TURNED} if format == 'PNG' else {'tiffinfo': {274: 6, 278: 8}}))
    decoded = decode_with_notes(data, Reading(shrink=3 * 36 * 48 // 24, void=True))
    over = PIL.Image.alpha_composite(PIL.Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    np.testing.assert_array_equal(decoded.image, np.rot90(np.asarray(over.reduce(3)), -1))
    assert decoded.size == (36, 48) and decoded.notes == ('reduced from 48x36',)
    np.testing.assert_array_equal(decoded.void, np.rot90(alpha[::3, ::3] == 0, -1))


@pytest.mark.parametrize('format', ['PNG', 'TIFF'])
def test_a_truncated_file_says_so(format):
    data = saved(picture('RGB', 300, 200), format)
    with pytest.raises(ImageError, match='^truncated or damaged: '):
        decode_with_notes(data[: len(data) // 2] + (data[-12:] if format == 'PNG' else b''), Reading(shrink=10_000))


@pytest.mark.parametrize(('format', 'options'), [('PNG', {'compress_level': 1}), ('TIFF', {'compression': 'tiff_lzw'})])
def test_a_large_picture_takes_little_memory(tmp_path, format, options):
    path = tmp_path / 'large'
    PIL.Image.new('RGB', (7000, 6000), (10, 20, 30)).save(path, format, **options)
    reading = Reading(reduce=3, max_memory=140_000_000)  # whole, it would take 168 million
    decoded = decode_apart(path, reading)
    assert decoded.image.shape == (2000, 2334, 3) and decoded.size == (6000, 7000)
    assert (decoded.image == (10, 20, 30)).all()
