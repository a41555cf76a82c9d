"""TIFF files of every layout, written by hand."""

from __future__ import annotations

import struct
import zlib

import numpy as np

KINDS = {'u': 1, 'i': 2, 'f': 3}  # SampleFormat by numpy's letter
SHORT, LONG = 3, 4


def tiff(
    samples: np.ndarray,
    photometric: int,
    bits: int | None = None,
    planar: bool = False,
    extra: tuple[int, ...] = (),
    colours: np.ndarray | None = None,
    packing: int = 1,
    predictor: int = 1,
    order: str = '<',
    fill: int = 1,
    rows: int | None = None,
    tile: int | None = None,
    more: tuple[tuple[int, int, tuple[int, ...]], ...] = (),
) -> bytes:
    """A TIFF of samples (H, W, S); bits: fewer than their type has; packing: Compression 1, 5 (LZW), 8 (deflate) or 32773 (PackBits)."""
    height, width, count = samples.shape
    bits = bits or samples.dtype.itemsize * 8
    planes = [samples[..., band : band + 1] for band in range(count)] if planar else [samples]
    parts = []
    for plane in planes:
        if tile:
            padded = np.pad(plane, [(0, -height % tile), (0, -width % tile), (0, 0)])
            for top in range(0, height, tile):
                parts += [padded[top : top + tile, left : left + tile] for left in range(0, width, tile)]
        else:
            step = rows or height
            parts += [plane[top : top + step] for top in range(0, height, step)]
    data = [reversed_bits(packed(stored(part, bits, predictor, order), packing), fill) for part in parts]
    tags = {
        256: (LONG, (width,)),
        257: (LONG, (height,)),
        258: (SHORT, (bits,) * count),
        259: (SHORT, (packing,)),
        262: (SHORT, (photometric,)),
        277: (SHORT, (count,)),
        284: (SHORT, (2 if planar else 1,)),
        339: (SHORT, (KINDS[samples.dtype.kind],) * count),
    }
    if fill != 1:
        tags[266] = (SHORT, (fill,))
    if extra:
        tags[338] = (SHORT, extra)
    if colours is not None:
        tags[320] = (SHORT, tuple(int(value) for value in colours.T.ravel()))
    if predictor != 1:
        tags[317] = (SHORT, (predictor,))
    places = (324, 325) if tile else (273, 279)
    if tile:
        tags |= {322: (LONG, (tile,)), 323: (LONG, (tile,))}
    else:
        tags[278] = (LONG, (rows or height,))
    starts = np.cumsum([8, *map(len, data)])[:-1]
    tags |= {places[0]: (LONG, tuple(map(int, starts))), places[1]: (LONG, tuple(map(len, data)))}
    tags |= {tag: (kind, values) for tag, kind, values in more}
    return assembled(b''.join(data), tags, order)


def assembled(body: bytes, tags: dict[int, tuple[int, tuple[int, ...]]], order: str) -> bytes:
    body += bytes(len(body) % 2)
    start = 8 + len(body)
    beyond = start + 2 + 12 * len(tags) + 4
    entries, values = b'', b''
    for tag, (kind, numbers) in sorted(tags.items()):
        value = struct.pack(f'{order}{len(numbers)}{"H" if kind == SHORT else "I"}', *numbers)
        if len(value) > 4:
            entries += struct.pack(f'{order}HHII', tag, kind, len(numbers), beyond + len(values))
            values += value
        else:
            entries += struct.pack(f'{order}HHI', tag, kind, len(numbers)) + value.ljust(4, b'\0')
    head = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(f'{order}I', start)
    return head + body + struct.pack(f'{order}H', len(tags)) + entries + bytes(4) + values


def stored(part: np.ndarray, bits: int, predictor: int, order: str) -> bytes:
    """Rows of samples as bytes."""
    if predictor == 2:
        part = part.copy()
        part[:, 1:] -= part[:, :-1].copy()
    elif predictor == 3:
        flat = part.astype('>f4').reshape(len(part), -1)
        planes = flat.view(np.uint8).reshape(len(part), -1, 4).transpose(0, 2, 1).reshape(len(part), -1).copy()
        step = part.shape[2]
        planes[:, step:] -= planes[:, :-step].copy()
        return planes.tobytes()
    if bits < 8:
        rows = part.reshape(len(part), -1).astype(np.uint8)
        single = np.unpackbits(rows[..., None], axis=-1)[..., 8 - bits :].reshape(len(rows), -1)
        data = np.packbits(single, axis=-1)
    elif bits == 12:
        single = ((part.reshape(len(part), -1, 1) >> np.arange(11, -1, -1)) & 1).astype(np.uint8)
        data = np.packbits(single.reshape(len(part), -1), axis=-1)
    else:
        data = np.frombuffer(part.astype(part.dtype.newbyteorder(order)).tobytes(), np.uint8)
    return data.tobytes()


def reversed_bits(data: bytes, fill: int) -> bytes:
    return data if fill == 1 else np.packbits(np.unpackbits(np.frombuffer(data, np.uint8)), bitorder='little').tobytes()


def packed(data: bytes, packing: int) -> bytes:
    if packing == 8:
        return zlib.compress(data)
    if packing == 5:  # codes of 9 bits, begun anew before they would need more
        codes = [
            256 if place == -1 else data[place]
            for start in range(0, len(data), 250)
            for place in (-1, *range(start, min(start + 250, len(data))))
        ]
        text = ''.join(f'{code:09b}' for code in [*codes, 257])
        return int(text.ljust(-(-len(text) // 8) * 8, '0'), 2).to_bytes(-(-len(text) // 8), 'big')
    if packing == 32773:
        return b''.join(bytes((len(data[start : start + 128]) - 1,)) + data[start : start + 128] for start in range(0, len(data), 128))
    return data
