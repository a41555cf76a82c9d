"""Token maps on disk: they come back as they were, and a damaged or crafted file is refused before it is unpacked."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import resource
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from support.runs import HAND_MADE, put_run

from padseg.commands import main
from padseg.images import ImageError
from padseg.methods.stages.geometry import view
from padseg.methods.stages.saved_maps import maps_of_picture, read_maps, write_maps
from padseg.types import Frame, TokenMaps

SIZE = (48, 80)
MAPS = np.random.default_rng(0).uniform(0, 0.1, (5, 4, 6)).astype(np.float32)  # which 16 pixels a token make of SIZE


class Seen(NamedTuple):
    geometry: str = 'whole'
    side: int = 80
    seed: int = 0


def token_maps(maps: np.ndarray = MAPS, size: tuple[int, int] = SIZE, box: tuple[int, ...] | None = None) -> TokenMaps:
    names = tuple(f'[pad {number}]' for number in range(len(maps)))
    return TokenMaps(torch.from_numpy(maps), names, Frame(size, box or (0, 0, *size)))


@pytest.fixture
def path(tmp_path):
    write_maps(token_maps(), tmp_path / 'a.npz')
    return tmp_path / 'a.npz'


def same(one: TokenMaps, other: TokenMaps) -> bool:
    return torch.equal(one.maps, other.maps) and one[1:] == other[1:]


@pytest.mark.parametrize('order', ['C', 'F'])
def test_they_come_back_as_they_were(tmp_path, order):
    kept = TokenMaps(torch.from_numpy(np.array(MAPS, order=order)), token_maps().names, token_maps().frame)
    write_maps(kept, tmp_path / 'a.npz')
    assert same(maps_of_picture(tmp_path / 'a.npz', SIZE, Seen()), kept)
    write_maps(kept, tmp_path / 'b.npz', 'these settings')
    assert same(read_maps(tmp_path / 'b.npz', 'these settings'), kept)
    assert read_maps(tmp_path / 'b.npz', 'others') is None and read_maps(tmp_path / 'c.npz') is None
    with pytest.raises(ImageError, match='not kept by a run'):
        maps_of_picture(tmp_path / 'b.npz', SIZE, Seen())


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array, allow_pickle=True)
    return data.getvalue()


def with_header(text: str, data: bytes = b'', version: int = 1) -> bytes:
    """An array whose description is this text."""
    return b'\x93NUMPY' + bytes([version, 0]) + struct.pack('<H' if version == 1 else '<I', len(text)) + text.encode('latin-1') + data


GOOD = {
    'maps': npy(MAPS),
    'names': npy(np.array(token_maps().names)),
    'size': npy(np.array(SIZE)),
    'box': npy(np.array((0, 0, *SIZE))),
    'made_by': npy(np.array('')),
}
BOX = (0, 0, *SIZE)


def zipped(members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED, comment: bytes = b'') -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, 'w', how) as archive:
        archive.comment = comment
        for name, content in members.items():
            archive.writestr(f'{name}.npy', content)
    return data.getvalue()


def having(**members: bytes | np.ndarray) -> bytes:
    return zipped(GOOD | {name: value if isinstance(value, bytes) else npy(value) for name, value in members.items()})


def without(name: str) -> bytes:
    return zipped({key: value for key, value in GOOD.items() if key != name})


def twice(name: str) -> bytes:
    data = io.BytesIO(without('made_by'))
    with zipfile.ZipFile(data, 'a') as archive, pytest.warns(UserWarning, match='Duplicate'):
        archive.writestr(f'{name}.npy', GOOD[name])
    return data.getvalue()


def central(field: int, form: str, value: int) -> bytes:
    """A good file in whose list of entries a field of the first, the maps, is another."""
    data = bytearray(zipped(GOOD))
    struct.pack_into(form, data, data.index(b'PK\1\2') + field, value)
    return bytes(data)


def spoiled(value: float) -> np.ndarray:
    maps = MAPS.copy()
    maps[2, 1, 3] = value
    return maps


CRAFTED: dict[str, Callable[[], bytes]] = {
    'empty': lambda: b'',
    'text': lambda: b'maps',
    'an array alone': lambda: GOOD['maps'],
    'half': lambda: zipped(GOOD)[:700],
    'without its end': lambda: zipped(GOOD)[:-1],
    'something before': lambda: b'x' * 100 + zipped(GOOD)[50:],
    'a comment': lambda: zipped(GOOD, comment=b'hello'),
    'bzip2': lambda: zipped(GOOD, zipfile.ZIP_BZIP2),
    'lzma': lambda: zipped(GOOD, zipfile.ZIP_LZMA),
    'encrypted': lambda: central(8, '<H', 1),
    'a later version of zip': lambda: central(6, '<H', 255),
    'an unknown packing': lambda: central(10, '<H', 99),
    'another check sum': lambda: central(16, '<I', 1),
    'packed as nothing': lambda: central(20, '<I', 0),
    'unpacked as nothing': lambda: central(24, '<I', 0),
    'unpacked as 4 GB': lambda: central(24, '<I', 2**32 - 2),
    'elsewhere': lambda: central(42, '<I', 2**31),
    'no maps': lambda: without('maps'),
    'no box': lambda: without('box'),
    'one more': lambda: zipped(GOOD | {'more': npy(MAPS)}),
    'another name': lambda: zipped({f'{name}x': value for name, value in GOOD.items()}),
    'two boxes': lambda: twice('box'),
    'pickled': lambda: having(maps=np.array([{}, None], object)),
    'pickled names': lambda: having(names=np.array(['a'] * 5, object)),
    'doubles': lambda: having(maps=MAPS.astype(np.float64)),
    'halves': lambda: having(maps=MAPS.astype(np.float16)),
    'the other byte order': lambda: having(maps=MAPS.astype('>f4')),
    'whole numbers': lambda: having(maps=MAPS.astype(np.int32)),
    'complex': lambda: having(maps=MAPS.astype(np.complex64)),
    'records': lambda: having(maps=np.zeros((5, 4, 6), [('a', np.float32)])),
    'one map': lambda: having(maps=MAPS[0]),
    'four dimensions': lambda: having(maps=MAPS[None]),
    'no token': lambda: having(maps=MAPS[:0], names=np.array([], '<U3')),
    'no width': lambda: having(maps=MAPS[..., :0]),
    'fewer names': lambda: having(names=np.array(['a'] * 4)),
    'names are numbers': lambda: having(names=np.arange(5)),
    'long names': lambda: having(names=np.array(['x' * 100_000] * 5)),
    'size of three': lambda: having(size=np.array((*SIZE, 3))),
    'size in fractions': lambda: having(size=np.array(SIZE, float)),
    'box of three': lambda: having(box=np.array(BOX[:3])),
    'settings are numbers': lambda: having(made_by=np.array(5)),
    'NaN': lambda: having(maps=spoiled(float('nan'))),
    'infinite': lambda: having(maps=spoiled(float('inf'))),
    'more data': lambda: having(maps=GOOD['maps'] + b'x'),
    'less data': lambda: having(maps=GOOD['maps'][:-1]),
    'shape of billions': lambda: having(maps=with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (77, 1000000, 1000000)}")),
    'shape negative': lambda: having(maps=with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-5, -4, 6)}", MAPS.tobytes())),
    'shape huge': lambda: having(maps=with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + '9' * 400 + ', 4, 6)}')),
    'shape fraction': lambda: having(maps=with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (5.0, 4, 6)}", MAPS.tobytes())),
    'shape of Python 2': lambda: having(maps=with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (5L, 4L, 7L)}")),
    'a long description': lambda: having(maps=with_header("{'descr': '<f4'" + ' ' * 60_000 + '}')),
    'a very long description': lambda: having(maps=with_header(' ' * 10**6, version=2)),
    'brackets without end': lambda: having(maps=with_header('(' * 900)),
    'a quotation without end': lambda: having(maps=with_header("{'descr': '''")),
    'a call': lambda: having(maps=with_header("__import__('os').abort()")),
    'a strange type': lambda: having(maps=with_header("{'descr': 'x99', 'fortran_order': False, 'shape': (5, 4, 6)}")),
    'types without end': lambda: having(maps=with_header("{'descr': " + '[' * 300 + ", 'fortran_order': False, 'shape': ()}")),
    'a version to come': lambda: having(maps=with_header('{}', version=9)),
}
# Good files, but not of this picture.
OTHERS: dict[str, Callable[[], bytes]] = {
    'of another size': lambda: having(size=np.array((80, 48)), box=np.array((0, 0, 80, 48))),
    'of a huge size': lambda: having(size=np.array((2**62, 2**62)), box=np.array((0, 0, 2**62, 2**62))),
    'another box': lambda: having(box=np.array((0, 16, 48, 48))),
    'a box outside': lambda: having(box=np.array((-1, -1, 100, 100))),
    'too many tokens': lambda: having(maps=np.zeros((5, 90, 150), np.float32)),
    'a column too many': lambda: having(maps=np.zeros((5, 4, 7), np.float32)),
    'turned': lambda: having(maps=MAPS.transpose(0, 2, 1)),
    'negative': lambda: having(maps=spoiled(-0.001)),
    'more than one': lambda: having(maps=spoiled(1.01)),
    'largest float': lambda: having(maps=spoiled(3e38)),
}


def test_the_file_that_is_changed_below_is_good(path):
    path.write_bytes(zipped(GOOD))
    assert same(maps_of_picture(path, SIZE, Seen()), token_maps())
    path.write_bytes(zipped(GOOD, zipfile.ZIP_STORED))
    assert same(maps_of_picture(path, SIZE, Seen()), token_maps())


@pytest.mark.parametrize('make', CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_file_is_refused_and_takes_no_memory(path, make):
    path.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match='its token maps are damaged'):
            maps_of_picture(path, SIZE, Seen())
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()
    assert read_maps(path) is None


@pytest.mark.parametrize('make', OTHERS.values(), ids=OTHERS)
def test_maps_that_are_not_of_the_picture_are_refused(path, make):
    path.write_bytes(make())
    with pytest.raises(ImageError, match='another picture|which no model makes|values are outside'):
        maps_of_picture(path, SIZE, Seen())


def test_a_bomb_is_not_unpacked(path):
    """16 MB of zeros in 16 kB, where a picture of this size has 480 bytes; the limit holds for what the file says of itself too."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in GOOD.items():
            with archive.open(f'{name}.npy', 'w', force_zip64=True) as member:
                member.write(content)
                if name == 'maps':
                    for _ in range(16):
                        member.write(bytes(2**20))
    assert path.stat().st_size < 10**5
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match='damaged: ValueError: maps is float32 of shape'):
        maps_of_picture(path, SIZE, Seen())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000  # kB


def test_what_is_no_file_is_refused(path):
    kept = path.rename(path.with_name('kept'))
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(kept)):
        make()
        with pytest.raises(ImageError, match='not a regular file|a link, which is not followed'):
            maps_of_picture(path, SIZE, Seen())
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(ImageError, match='there are no token maps for this picture: run the model with --save-maps'):
        maps_of_picture(path, SIZE, Seen())


def test_any_bit_that_flips_is_noticed_or_makes_no_difference(path):
    whole = path.read_bytes()
    chance, refused = random.Random(0), 0
    for bit in chance.sample(range(8 * len(whole)), 500):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            back = maps_of_picture(path, SIZE, Seen())
        except ImageError:
            refused += 1
        else:
            assert same(back, token_maps()), bit
    assert refused > 250


def test_any_cut_is_noticed(path):
    whole = path.read_bytes()
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError, match='damaged'):
            maps_of_picture(path, SIZE, Seen())


@pytest.mark.parametrize('geometry', ['whole', 'stretch', 'diffseg', 'diffcut', 'seg4diff-paper', 'seg4diff-release', 'seg4diff-ovss'])
def test_maps_that_a_model_makes_are_taken(path, geometry):
    """For pictures of many shapes, squares of pixels for a token, and limits: what `view` gives is what is expected."""
    for size, side, multiple, limit in itertools.product([(48, 80), (1, 1), (3, 200)], [64], [8, 16], [64, 4096]):
        if geometry != 'whole' and side > limit:
            continue
        pixels, frame = view(np.zeros((*size, 3), np.uint8), geometry, side, multiple, limit)
        height, width = (length // multiple for length in pixels.shape[2:])
        write_maps(TokenMaps(torch.zeros(2, height, width), ('a', 'b'), frame), path)
        assert maps_of_picture(path, size, Seen(geometry, side)).frame == frame, (size, side, multiple, limit)


def test_merge_fails_the_one_picture_and_goes_on(tmp_path, capsys):
    """Beside it are a good one, one with a link in place of its maps, and one without."""
    out = put_run(tmp_path, dict.fromkeys(('good.png', 'nan.png', 'link.png', 'none.png'), np.ones(SIZE, np.int32)))
    record = json.loads((out / 'run.json').read_text())
    record['settings'] = {
        'layer': 1, 'step': 8, 'tokens': 'all', 'normalisation': 'sum', 'threshold': 0.1, 'geometry': 'whole', 'side': 80, 'refine': 'none',
        'superpixels': 0.0, 'join': 0.0, 'components': False, 'min_area': 0.0, 'seed': 0,
    }  # fmt: skip
    (out / 'run.json').write_text(json.dumps(record))
    records = [json.loads(text) for text in (out / 'manifest.jsonl').read_text().splitlines()]
    for entry in records[:4]:
        entry['outputs']['maps'] = f'maps/{entry["input"]}.npz'
    (out / 'manifest.jsonl').write_text(''.join(json.dumps(entry) + '\n' for entry in records))
    write_maps(token_maps(), out / 'maps/good.png.npz')
    (out / 'maps/link.png.npz').symlink_to('good.png.npz')
    (out / 'maps/nan.png.npz').write_bytes(CRAFTED['NaN']())
    assert main(['merge', str(out), '--out', str(tmp_path / 'merged'), '--json']) == 3
    counts = json.loads(capsys.readouterr().out)
    assert (counts['done'], counts['failed']) == (1, 3)
    failures = [json.loads(text) for text in (tmp_path / 'merged/failures.jsonl').read_text().splitlines()]
    reasons = {failure['input']: failure['reason'] for failure in failures}
    assert reasons['nan.png'] == 'its token maps are damaged: ValueError: some values are not finite'
    assert 'is a link, which is not followed' in reasons['link.png']
    assert reasons['none.png'] == 'there are no token maps for this picture: run the model with --save-maps'
    assert sorted(path.name for path in (tmp_path / 'merged/labels').iterdir()) == ['good.png.png']


def test_merge_does_not_follow_a_link_to_a_folder_of_maps(tmp_path, capsys):
    out = put_run(tmp_path, {'a.png': HAND_MADE})
    Path(tmp_path / 'elsewhere').mkdir()
    (out / 'maps').symlink_to('../elsewhere')
    assert main(['merge', str(out), '--out', str(tmp_path / 'merged')]) == 6
    assert 'is a link' in capsys.readouterr().err and not (tmp_path / 'merged/labels').exists()
