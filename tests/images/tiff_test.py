"""TIFF files of every layout against what was put into them, and against tifffile; none may be read wrongly."""

from __future__ import annotations

import io
import itertools

import numpy as np
import PIL.Image
import pytest
import tifffile
from support.tiffs import tiff

from padseg.images import ImageError, Reading, decode, decode_with_notes

GREY_WHITE, GREY, RGB, PALETTE = range(4)
NO, UNKNOWN, MULTIPLIED, ALPHA = (), (0,), (1,), (2,)
SIZE = (9, 20)
DEPTHS = [
    ('u', 1),
    ('u', 2),
    ('u', 4),
    ('u', 8),
    ('u', 12),
    ('u', 16),
    ('u', 32),
    ('i', 8),
    ('i', 16),
    ('i', 32),
    ('f', 16),
    ('f', 32),
    ('f', 64),
]
TYPES = {1: 1, 2: 1, 4: 1, 8: 1, 12: 2, 16: 2, 32: 4, 64: 8}
REFUSED_DEPTHS = [('u', 12), ('f', 16), ('f', 64)]


def layouts():
    """Every photometric interpretation with the depths, extra samples and orders of planes that make sense with it."""
    for photometric, (kind, bits), planar, extra in itertools.product(
        range(4), DEPTHS, (False, True), (NO, UNKNOWN, MULTIPLIED, ALPHA, (0, 0))
    ):
        if photometric == PALETTE and (bits > 8 or kind != 'u' or planar or extra):
            continue
        if bits < 8 and (extra or photometric == RGB):
            continue
        bands = (3 if photometric == RGB else 1) + len(extra)
        if planar and bands == 1:
            continue
        yield photometric, kind, bits, planar, extra, bands


def ways(kind, bits, number):
    """Some of the ways to pack and order the same samples, others for every layout."""
    all_ways = [
        {'packing': packing, 'predictor': predictor, 'order': order, 'fill': fill, **parts}
        for packing, predictor, order, fill, parts in itertools.product(
            (1, 5, 8, 32773), (1, 2, 3), '<>', (1, 2), ({}, {'rows': 4}, {'tile': 16})
        )
        if (predictor == 1 or packing in (5, 8))
        and (predictor != 2 or (bits in (8, 16, 32) and kind != 'f'))
        and (predictor != 3 or (kind, bits) == ('f', 32))
        and (fill == 1 or bits <= 8)
    ]
    return [all_ways[(number * 7 + place) % len(all_ways)] for place in range(0, len(all_ways), max(1, len(all_ways) // 4))]


def samples_of(kind, bits, bands, extra, seed):
    rng = np.random.default_rng(seed)
    dtype = f'{kind}{TYPES[bits]}'
    if kind == 'f':
        values = (rng.random((*SIZE, bands)) * 1000).astype(dtype)
    else:
        lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if kind == 'i' else (0, 2**bits)
        values = rng.integers(lowest, highest, (*SIZE, bands)).astype(dtype)
    return np.sort(values, axis=2) if extra == MULTIPLIED else values  # colours are no larger than what they were multiplied by


def range_of(kind, bits):
    return {'f': (0.0, 1000.0), 'i': (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1), 'u': (0.0, 2.0**bits - 1)}[kind]


def expected(samples, photometric, bounds, extra, colours):
    """RGB in 0..255 on white, by the TIFF specification."""
    if photometric == PALETTE:
        return colours[samples[..., 0]] / 257
    share = np.clip((samples.astype(float) - bounds[0]) / (bounds[1] - bounds[0]), 0, 1)
    count = 3 if photometric == RGB else 1
    shown = 1 - share[..., :count] if photometric == GREY_WHITE else share[..., :count]
    if extra in (MULTIPLIED, ALPHA):
        alpha = share[..., count : count + 1]
        shown = (shown * alpha if extra == ALPHA else shown) + 1 - alpha
    return np.broadcast_to(shown * 255, (*SIZE, 3))


CASES = [(number, *layout) for number, layout in enumerate(layouts())]


def files():
    for number, photometric, kind, bits, planar, extra, bands in CASES:
        samples = samples_of(kind, bits, bands, extra, number)
        colours = np.random.default_rng(number).integers(0, 256, (2**bits, 3)) * 257 if photometric == PALETTE else None
        for way in ways(kind, bits, number):
            data = tiff(samples, photometric, bits=bits, planar=planar, extra=extra, colours=colours, **way)
            yield (photometric, kind, bits, planar, extra, way), samples, colours, data


def test_no_layout_is_read_wrongly():
    read, refused, reasons = 0, [], set()
    for key, samples, colours, data in files():
        photometric, kind, bits, _, extra, _ = key
        bounds = range_of(kind, bits)
        right = expected(samples, photometric, bounds, extra, colours)
        try:
            image = decode(data, Reading(value_range=bounds))
        except ImageError as error:
            reasons.add(str(error)[:15])
            refused.append(key)
            continue
        # 16-bit colours lose their lower byte, and multiplied ones come back with what rounding left of them
        tolerance = {MULTIPLIED: 4, ALPHA: 3}.get(extra, 1) + 0.01
        assert np.abs(image - right).max() <= tolerance, key
        read += 1
    assert read >= 250 and len(refused) < read and reasons == {'not supported: '}
    common = [
        key
        for key in refused
        if key[0] != GREY_WHITE and key[1] == 'u' and key[2] in (1, 2, 4, 8, 16) and not key[3] and key[4] in (NO, ALPHA)
    ]
    assert all(way['packing'] == 5 or way['fill'] == 2 for *_, way in common), common
    print(f'{read} read, {len(refused)} refused')


def test_tifffile_agrees_on_what_was_written():
    """Of the layouts that it reads without other libraries."""
    agreed = 0
    for (_, kind, bits, planar, _, way), samples, _, data in files():
        if way['packing'] == 5 or way['predictor'] == 3 or bits not in (1, 8, 16, 32, 64) or (bits == 1 and way.get('tile')):
            continue
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            planes, _, height, width, bands = file.pages[0].shaped
            seen = np.moveaxis(file.pages[0].asarray().reshape(planes, height, width, bands), 0, 2).reshape(height, width, -1)
        assert np.array_equal(seen.astype(samples.dtype), samples), (kind, bits, planar, way)
        agreed += 1
    assert agreed >= 250


def grey(values: list[int], dtype: str) -> np.ndarray:
    return np.array([values], dtype)[..., None]


def test_white_is_zero_at_every_depth():
    assert decode(tiff(grey([0, 0x8080, 0xFFFF], 'u2'), GREY_WHITE))[0, :, 0].tolist() == [255, 127, 0]
    floats = tiff(grey([0, 1], 'f4'), GREY_WHITE)
    assert decode(floats, Reading(value_range=(0, 1)))[0, :, 0].tolist() == [255, 0]


def test_a_palette_of_bytes():
    colours = np.array([[1, 2, 3], [40, 250, 60]])
    for factor in (1, 257):
        data = tiff(grey([0, 1], 'u1'), PALETTE, colours=np.resize(colours * factor, (256, 3)))
        assert decode(data).tolist() == [[[1, 2, 3], [40, 250, 60]]]


def test_whole_numbers_above_two_to_the_31():
    for order in '<>':
        data = tiff(grey([0, 2**31, 2**32 - 1], 'u4'), GREY, order=order)
        assert decode(data, Reading(value_range=(0, 2**32 - 1)))[0, :, 0].tolist() == [0, 128, 255]
        with pytest.raises(ImageError, match='range is not known'):
            decode(data)


def test_planes_of_sixteen_bits():
    values = np.array([[[0, 0x1234, 0xFFFF], [0x8000, 0xFF00, 1]]], np.uint16)
    assert decode(tiff(values, RGB, planar=True)).tolist() == (values >> 8).tolist()


@pytest.mark.parametrize(
    ('bands', 'photometric', 'bits', 'reason'),
    [(5, RGB, 16, '5 bands of 16 bits'), (3, GREY, 16, '3 bands of 16 bits'), (1, 34892, 16, '1 band of 16 bits'), (1, GREY, 64, None)],
)
def test_what_is_not_read_is_named(bands, photometric, bits, reason):
    data = tiff(np.zeros((2, 2, bands), f'u{bits // 8}'), photometric)
    with pytest.raises(ImageError, match=f'not supported: {reason}' if reason else 'range is not known'):
        decode(data)


def test_the_orientation_and_the_pages_of_what_tifffile_reads():
    values = np.arange(6, dtype=np.uint16).reshape(2, 3, 1) * 0x2000
    data = tiff(values, GREY_WHITE, more=((274, 3, (6,)),))
    turned = np.rot90(255 - decode(tiff(values, GREY))[..., 0], -1)
    image, _, size, _ = decode_with_notes(data)
    assert size == (3, 2) and np.abs(image[..., 0].astype(int) - turned).max() <= 1
    assert decode(data, Reading(exif='ignore')).shape == (2, 3, 3)


@pytest.mark.parametrize('photometric', [GREY, GREY_WHITE])
@pytest.mark.parametrize('packing', [1, 8, 32773])
def test_parts_that_are_missing_are_an_error(photometric, packing):
    values = np.random.default_rng(0).integers(0, 65536, (16, 16, 1)).astype(np.uint16)
    whole = tiff(values, photometric, packing=packing, rows=4)
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        offset, count = file.pages[0].tags['StripByteCounts'].valueoffset, file.pages[0].databytecounts[-1]
    assert count and decode(whole).shape == (16, 16, 3)
    short = tiff(values, photometric, packing=packing, rows=4, more=((257, 4, (32,)),))  # a header that promises twice the rows
    empty = whole[: offset + 12] + bytes(4) + whole[offset + 16 :]
    for data in (short, empty) if packing != 1 or photometric == GREY_WHITE else (short,):
        with pytest.raises(ImageError, match='truncated or damaged'):
            decode(data)


INKS, YCBCR, LAB = 5, 6, 8
OTHERS = [
    *((INKS, 'u1', planar, extra, packing) for planar in (False, True) for extra in (NO, UNKNOWN, (0, 0)) for packing in (1, 5, 8)),
    *((INKS, 'u2', planar, NO, packing) for planar in (False, True) for packing in (1, 5, 8)),
    *((photometric, 'u1', planar, NO, packing) for photometric in (YCBCR, LAB) for planar in (False, True) for packing in (1, 5, 8, 32773)),
]


@pytest.mark.parametrize(('photometric', 'dtype', 'planar', 'extra', 'packing'), OTHERS, ids=str)
def test_inks_and_other_colours(photometric, dtype, planar, extra, packing):
    """Either the picture that Pillow has of the same bytes, or a reason."""
    mode = {INKS: 'CMYK', YCBCR: 'YCbCr', LAB: 'LAB'}[photometric]
    values = np.random.default_rng(0).integers(0, 256, (*SIZE, 4 if photometric == INKS else 3), dtype=np.uint8)
    file = io.BytesIO()
    if photometric == YCBCR:
        right = np.asarray(PIL.Image.fromarray(values, mode).convert('RGB'))
    else:
        PIL.Image.frombytes(mode, SIZE[::-1], values.tobytes()).save(file, 'TIFF')
        right = decode(file.getvalue())
    stored = np.dstack([values, *[values[..., :1]] * len(extra)]).astype(dtype)
    stored = stored * 257 if dtype == 'u2' else stored
    more = ((530, 3, (1, 1)),) if photometric == YCBCR else ()
    try:
        image = decode(tiff(stored, photometric, planar=planar, extra=extra, packing=packing, rows=4, more=more))
    except ImageError as error:
        reason = str(error)
        assert planar and reason.startswith('not supported: ')
    else:
        assert np.abs(image.astype(int) - right).max() <= 3


def test_pillow_writes_what_is_read_alike():
    for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'LAB', 'I;16'):
        picture = (
            PIL.Image.linear_gradient('L').convert('RGB').convert(mode) if mode not in ('LAB', 'I;16') else PIL.Image.new(mode, (4, 4), 7)
        )
        file = io.BytesIO()
        picture.save(file, 'TIFF')
        assert decode(file.getvalue()).shape == (picture.height, picture.width, 3)
