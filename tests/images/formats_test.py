"""PNG, BMP, JPEG, WebP, GIF and PPM of every kind against what was put into them, and OpenCV; missing data are an error."""

from __future__ import annotations

import io
import itertools
import re
import struct
import zlib

import cv2
import numpy as np
import PIL.Image
import pytest

from padseg.images import DECODERS, ImageError, Reading, decode, decode_with_notes, find

NOISE = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
KINDS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # of PNG: depths by type of colour
BANDS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
SHORT = 'truncated or damaged'


def encoded(picture: PIL.Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def rows(samples: np.ndarray, depth: int) -> bytes:
    if depth == 16:
        packed = samples.astype('>u2').reshape(len(samples), -1).view(np.uint8)
    else:
        bits = np.unpackbits(samples.astype(np.uint8).reshape(len(samples), -1, 1), axis=2)[..., 8 - depth :]
        packed = np.packbits(bits.reshape(len(samples), -1), axis=1)
    return b''.join(b'\0' + row.tobytes() for row in packed)


def png(samples: np.ndarray, colours: int, depth: int, interlaced: bool = False, before: bytes = b'', drop: int = 0) -> bytes:
    """A PNG of samples (H, W, bands), without the last so many bytes of its rows."""
    height, width, _ = samples.shape
    parts = [samples[top::down, left::across] for left, top, across, down in PASSES] if interlaced else [samples]
    data = b''.join(rows(part, depth) for part in parts if part.size)
    header = struct.pack('>IIBBBBB', width, height, depth, colours, 0, 0, interlaced)
    body = zlib.compress(data[: len(data) - drop])
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + before + chunk(b'IDAT', body) + chunk(b'IEND', b'')


PALETTE = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
PNGS = [
    (colours, depth, interlaced, clear)
    for colours, depths in KINDS.items()
    for depth, interlaced, clear in itertools.product(depths, (False, True), (False, True))
    if not (clear and colours in (4, 6))
]


@pytest.mark.parametrize(('colours', 'depth', 'interlaced', 'clear'), PNGS)
def test_png_of_every_kind(colours, depth, interlaced, clear):
    """Each with samples that are near the transparent colour but are not."""
    samples = np.random.default_rng(depth).integers(0, 2**depth, (11, 13, BANDS[colours]))
    key = samples[3, 4].copy()
    samples[5, 5] = key
    samples[5, 6] = key ^ 1  # another colour, by a bit that Pillow drops of 16
    palette = PALETTE[: 2**depth]
    before = chunk(b'PLTE', palette.tobytes()) if colours == 3 else b''
    if clear:
        before += chunk(b'tRNS', bytes([255] * int(key[0]) + [0]) if colours == 3 else struct.pack(f'>{len(key)}H', *key))
    data = png(samples, colours, depth, interlaced, before)
    decoded = decode_with_notes(data, Reading(void=True, background=(10, 200, 30)))
    share = samples / (2**depth - 1)
    shown = palette[samples[..., 0]] if colours == 3 else np.broadcast_to(share[..., : 3 if colours in (2, 6) else 1] * 255, (11, 13, 3))
    alpha = share[..., -1:] if colours in (4, 6) else np.ones((11, 13, 1))
    if clear:
        alpha = (samples != key).any(-1, keepdims=True).astype(float)
    right = shown * alpha + np.array([10, 200, 30]) * (1 - alpha)
    assert np.abs(decoded.image - right).max() <= (2.01 if colours in (4, 6) else 1.01)
    assert np.array_equal(np.zeros((11, 13), bool) if decoded.void is None else decoded.void, np.floor(alpha[..., 0] * 255 + 1e-9) == 0)
    seen = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]  # which leaves transparency out
    opaque = (alpha == 1)[..., 0]
    assert np.abs(decoded.image[opaque].astype(int) - seen[opaque]).max(initial=0) <= 1


@pytest.mark.parametrize(('colours', 'depth', 'interlaced', 'clear'), PNGS)
def test_a_png_of_fewer_rows_than_its_header_says(colours, depth, interlaced, clear):
    samples = np.zeros((8, 8, BANDS[colours]), int)
    samples[0] = 1
    before = chunk(b'PLTE', PALETTE[: 2**depth].tobytes()) if colours == 3 else b''
    row = 1 + -(-8 * depth * BANDS[colours] // 8)
    assert decode(png(samples, colours, depth, interlaced, before)).shape == (8, 8, 3)
    with pytest.raises(ImageError, match=SHORT):
        decode(png(samples, colours, depth, interlaced, before, drop=row))


TEXT = b'Comment\0' + b'a' * 3_000_000
ITEXT = b'Comment\0\1\0\0\0' + zlib.compress(bytes(3_000_000))
PROFILE = b'icc\0\0' + zlib.compress(bytes(3_000_000))


@pytest.mark.parametrize(
    ('name', 'body', 'notes'),
    [
        (b'tEXt', TEXT, ()),
        (b'zTXt', b'Comment\0\0' + zlib.compress(TEXT), ()),
        (b'iTXt', ITEXT, ()),
        (b'iTXt', ITEXT.replace(b'Comment', b'XML:com.adobe.xmp'), ()),
        (b'zTXt', b'Raw profile type exif\0\0' + zlib.compress(bytes(3_000_000)), ()),
        (b'iCCP', PROFILE, ('colour profile not used',)),
    ],
)
@pytest.mark.parametrize('behind', [False, True])
def test_png_with_a_lot_beside_the_picture(name, body, notes, behind):
    plain = png(NOISE, 2, 8)
    place = plain.index(b'IEND') - 4 if behind else plain.index(b'IDAT') - 4
    if behind and name == b'iCCP':
        return
    decoded = decode_with_notes(plain[:place] + chunk(name, body) + plain[place:])
    assert np.array_equal(decoded.image, NOISE) and decoded.notes == notes


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
def test_orientation_by_xmp_is_applied_and_noted(format):
    picture = PIL.Image.new('RGB', (8, 4), 'red')
    options = {'xmp': XMP.encode()} if format != 'TIFF' else {'tiffinfo': {700: XMP.encode()}}
    data = encoded(picture, format, **options)
    if format == 'PNG':
        plain = encoded(picture, format)
        place = plain.index(b'IDAT') - 4
        data = plain[:place] + chunk(b'iTXt', b'XML:com.adobe.xmp\0\0\0\0\0' + XMP.encode()) + plain[place:]
    decoded = decode_with_notes(data)
    assert decoded.image.shape == (8, 4, 3) and decoded.notes == ('turned as its XMP data say',)
    ignored = decode_with_notes(data, Reading(exif='ignore'))
    assert ignored.image.shape == (4, 8, 3) and ignored.notes == ()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    assert decode_with_notes(encoded(picture, format, exif=exif)).notes == ()


def bmp(alpha: list[int]) -> bytes:
    """A BMP of one row with a fourth byte in each pixel, which its header says is alpha."""
    pixels = b''.join(bytes((30, 20, 10, value)) for value in alpha)
    masks = struct.pack('<4I', 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack('<IiiHHIIiiII', 108, len(alpha), 1, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks
    return b'BM' + struct.pack('<IHHI', 122 + len(pixels), 0, 0, 122) + header.ljust(108, b'\0') + pixels


def test_alpha_of_bmp_counts_unless_it_is_nowhere():
    assert decode(bmp([0, 0])).tolist() == [[[10, 20, 30]] * 2]
    assert decode(bmp([255, 0])).tolist() == [[[10, 20, 30], [255] * 3]]
    assert decode_with_notes(bmp([0, 0]), Reading(void=True)).void is None


@pytest.mark.parametrize('format', ['PNG', 'TIFF', 'WEBP', 'GIF'])
def test_a_wholly_transparent_picture_is_noted(format):
    if format == 'GIF':
        picture, options = PIL.Image.new('P', (4, 4), 0), {'transparency': 0}
    else:
        picture, options = PIL.Image.new('RGBA', (4, 4), (9, 9, 9, 0)), {'lossless': True, 'exact': True} if format == 'WEBP' else {}
    decoded = decode_with_notes(encoded(picture, format, **options))
    assert decoded.notes == ('wholly transparent',) and (decoded.image == 255).all()


@pytest.mark.skipif('AVIF' not in DECODERS, reason='Pillow was built without AVIF')
def test_avif_is_read(tmp_path):
    picture = PIL.Image.fromarray(NOISE)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture, 'AVIF', quality=100, subsampling='4:4:4', exif=exif)
    right = np.rot90(NOISE, -1).astype(int)
    assert np.abs(decode(data) - right).max() <= 4
    seen = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert seen is None or np.abs(seen[..., ::-1].astype(int) - NOISE).max() <= 4  # which does not turn it
    for tenth in range(1, 10):
        with pytest.raises(ImageError):
            decode(data[: len(data) * tenth // 10])
    (tmp_path / 'a.avif').write_bytes(data)
    assert [found.name for found in find(tmp_path)] == ['a.avif']


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA'])
@pytest.mark.parametrize('format', ['BMP', 'WEBP', 'GIF', 'PPM', 'JPEG'])
def test_opencv_reads_the_same(format, mode):
    picture = PIL.Image.fromarray(NOISE).convert('RGB').convert(mode)
    if (format, mode) in {('JPEG', 'P'), ('JPEG', 'RGBA'), ('PPM', 'P'), ('PPM', 'RGBA')}:
        picture = picture.convert('L')
    if format == 'GIF' and mode in ('RGB', 'RGBA'):
        picture = picture.convert('P')
    data = encoded(picture, format, **({'lossless': True} if format == 'WEBP' else {}))
    image = decode(data)
    seen = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(image.astype(int) - seen[..., ::-1]).max() <= (4 if format == 'JPEG' else 0)
    if format != 'JPEG':
        assert np.array_equal(image, np.asarray(picture.convert('RGB')))


def resized(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header says another size than its data have."""
    start = re.search(rb'\xff[\xc0-\xc2]', jpeg).start()
    return jpeg[: start + 5] + struct.pack('>HH', height, width) + jpeg[start + 9 :]


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
@pytest.mark.parametrize('options', [{}, {'progressive': True}, {'subsampling': 0}, {'restart_marker_blocks': 2}], ids=str)
def test_a_jpeg_whose_header_promises_more(mode, options):
    data = encoded(PIL.Image.fromarray(NOISE).convert(mode), 'JPEG', **options)
    assert decode(data).shape == (48, 48, 3)
    for width, height in ((48, 96), (48, 64), (96, 48), (640, 640)):
        for reading in (Reading(), Reading(shrink=200)):
            with pytest.raises(ImageError, match=SHORT):
                decode(resized(data, width, height), reading)
    if 'progressive' not in options:
        with pytest.raises(ImageError, match=SHORT):
            decode(data[: len(data) // 2] + b'\xff\xd9')


def test_an_even_grey_jpeg_is_not_short():
    for mode, colour in (('L', 128), ('RGB', (128, 128, 128)), ('CMYK', (127, 127, 127, 127))):
        for options in ({}, {'progressive': True}, {'restart_marker_blocks': 1}):
            assert decode(encoded(PIL.Image.new(mode, (40, 40), colour), 'JPEG', **options)).shape == (40, 40, 3)


def test_a_jpeg_with_more_behind_it():
    data = encoded(PIL.Image.fromarray(NOISE), 'JPEG')
    assert np.array_equal(decode(data + bytes(5000) + data), decode(data))


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
@pytest.mark.parametrize('height', [16, 200])
def test_a_jpeg_in_a_tiff_that_ends_early(mode, height):
    """In its last strip, and with the shared tables beside it; whole, it is read, whatever its colour."""
    grey = PIL.Image.new(mode, (64, height), (128,) * len(mode) if len(mode) > 1 else 128)
    assert decode(encoded(grey, 'TIFF', compression='jpeg')).shape == (height, 64, 3)
    noise = np.random.default_rng(0).integers(0, 255, (height, 64, 3), np.uint8)
    data = encoded(PIL.Image.fromarray(noise).convert(mode), 'TIFF', compression='jpeg')
    assert decode(data).shape == (height, 64, 3)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        start, size = opened.tag_v2[273][-1], opened.tag_v2[279][-1]
    short = bytearray(data)
    half = size // 2
    short[start + half : start + size] = b'\xff\xd9' + bytes(size - half - 2)
    with pytest.raises(ImageError, match=SHORT):
        decode(bytes(short))


@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
def test_a_progressive_jpeg_without_its_last_scans_is_noted(mode):
    """Legal, and less than was encoded: at every number of scans but the last, and never for a whole file of either kind."""
    picture = PIL.Image.fromarray(NOISE).convert(mode)
    data = encoded(picture, 'JPEG', progressive=True)
    plain = decode_with_notes(encoded(picture, 'JPEG')).notes
    assert decode_with_notes(data).notes == plain
    begins = [place for place in range(len(data)) if data[place : place + 2] == b'\xff\xda']
    assert len(begins) > 4
    noted = [decode_with_notes(data[:place] + b'\xff\xd9').notes for place in begins[4:]]
    assert set(noted) == {('progressive, without its last scans', *plain)}


def test_a_jpeg_of_too_many_scans():
    data = encoded(PIL.Image.new('L', (16, 16), 100), 'JPEG', progressive=True)
    last = data[data.rindex(b'\xff\xda') : -2]
    assert decode(data[:-2] + last * 400 + data[-2:]).shape == (16, 16, 3)
    with pytest.raises(ImageError, match='more than 500 scans'):
        decode(data[:-2] + last * 600 + data[-2:])


@pytest.mark.parametrize(
    'data', [b'\xff\xd8\xff' + bytes(10_000_000), b'\xff\xd8\xff\xd9', b'\xff\xd8' + b'\xff\xe0\0\2' * 30_000 + b'\xff\xd9']
)
def test_a_jpeg_without_a_picture(data):
    with pytest.raises(ImageError, match=SHORT):
        decode(data)


def test_a_gif_whose_first_frame_is_short():
    frames = [PIL.Image.fromarray(NOISE).quantize(16), PIL.Image.fromarray(NOISE).quantize(16).rotate(90)]
    for more in ([], frames[1:]):
        data = encoded(frames[0], 'GIF', save_all=True, append_images=more)
        assert decode(data).shape == (48, 48, 3)
        place = data.index(b',')
        taller = data[:6] + struct.pack('<HH', 48, 96) + data[10 : place + 5] + struct.pack('<HH', 48, 96) + data[place + 9 :]
        with pytest.raises(ImageError, match=SHORT):
            decode(taller)
