"""Label maps and ground truth that do harm, one among good ones; names that are code for a terminal, Markdown or a spreadsheet."""

from __future__ import annotations

import csv
import json
import os
import struct
import unicodedata
import zlib

import numpy as np
import PIL.Image
import pytest

from padseg.commands import main
from padseg.evaluation.evaluate import evaluate

LABELS = np.array([[0, 0, 1, 1], [0, 0, 1, 2]], np.uint8)


def chunk(kind, body):
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def header(width, height, bits=8, colour=0):
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0))


def small_of(size):
    """A PNG of black pixels, a thousandth of their size."""
    lines = zlib.compress((b'\0' + bytes(size)) * size, 9)
    return header(size, size) + chunk(b'IDAT', lines) + chunk(b'IEND', b'')


def text_of(size):
    return header(4, 2) + chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(size), 9)) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')


DAMAGED = {
    'empty': lambda path: path.touch(),
    'folder': lambda path: path.mkdir(),
    'pipe': os.mkfifo,
    'loop': lambda path: path.symlink_to(path.name),
    'dangling': lambda path: path.symlink_to('nothing.png'),
    'device': lambda path: path.symlink_to('/dev/zero'),
    'text': lambda path: path.write_text('no picture'),
    'truncated': lambda path: path.write_bytes(small_of(500)[:60]),
    'huge header': lambda path: path.write_bytes(header(2**31 - 1, 2**31 - 1) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')),
    'wide header': lambda path: path.write_bytes(header(100_000_000, 2) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')),
    'no pixels': lambda path: path.write_bytes(header(4, 2) + chunk(b'IEND', b'')),
    'zero width': lambda path: path.write_bytes(header(0, 2) + chunk(b'IEND', b'')),
    'much text': lambda path: path.write_bytes(text_of(1 << 26)),
    'colours': lambda path: PIL.Image.new('RGB', (4, 2)).save(path),
    'colours of 16 bits': lambda path: path.write_bytes(
        header(4, 2, 16, 2) + chunk(b'IDAT', zlib.compress((b'\0' + bytes(24)) * 2)) + chunk(b'IEND', b'')
    ),
    'transparent': lambda path: PIL.Image.new('LA', (4, 2)).save(path),
    'JPEG': lambda path: PIL.Image.new('L', (4, 2)).save(path, 'JPEG'),
    'float': lambda path: PIL.Image.new('F', (4, 2)).save(path, 'TIFF'),
}


def put(path, labels=LABELS):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(labels).save(path, 'PNG')


@pytest.fixture
def folders(tmp_path):
    for folder in ('truth', 'pred'):
        for name in 'ab':
            put(tmp_path / folder / f'{name}.png')
    return tmp_path / 'pred', tmp_path / 'truth'


@pytest.mark.parametrize('kind', DAMAGED)
def test_one_bad_file_on_either_side_fails_its_picture_alone(folders, kind, capsys):
    for which, folder in enumerate(folders):
        put(folders[1 - which] / 'bad.png')
        (folder / 'bad.png').unlink(missing_ok=True)
        DAMAGED[kind](folder / 'bad.png')
        for ground in (['--num-classes', '3'], ['--regions']):
            words = ['eval', '--pred', folders[0], '--labels', folders[1], *ground, '--allow-missing', '-q', '--json']
            assert main(list(map(str, words))) == 3, ground
            report = json.loads(capsys.readouterr().out)
            assert report['counts'] == {'pictures': 2, 'ignored': 0, 'failed': 1, 'missing': 0}
            assert list(report['failed']) == ['bad'] and 'bad.png' in report['failed']['bad']
            assert report['scores']['accuracy' if ground[1:] else 'covering'] == 1.0
        (folder / 'bad.png').rmdir() if kind == 'folder' else (folder / 'bad.png').unlink()


def test_what_does_not_fit_together_fails_its_picture_where_some_may_be_missing(folders, capsys):
    pred, truth = folders
    put(pred / 'size.png', LABELS[:1])
    put(truth / 'size.png')
    put(pred / 'value.png')
    put(truth / 'value.png', LABELS + np.uint8(7))
    words = ['eval', '--pred', str(pred), '--labels', str(truth), '--num-classes', '3', '-q', '--json']
    assert main(words) == 2
    capsys.readouterr()
    assert main([*words, '--allow-missing']) == 3
    report = json.loads(capsys.readouterr().out)
    assert report['counts']['failed'] == 2 and report['scores']['accuracy'] == 1.0
    assert '--resize' in report['failed']['size'] and '7: 4, 8: 3, 9: 1' in report['failed']['value']
    scores = evaluate(pred, truth, 3, allow_missing=True)
    assert (scores.pictures, scores.failed, scores.accuracy) == (2, 2, 1.0)


def test_many_numbers_on_either_side_take_no_memory_for_all_pairs(folders, capsys):
    many = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    put(folders[0] / 'many.png', many)
    put(folders[1] / 'many.png', many.T.copy())
    words = ['eval', '--pred', str(folders[0]), '--labels', str(folders[1]), '-q', '--json']
    assert main([*words, '--regions']) == 0
    scores = json.loads(capsys.readouterr().out)['scores']
    assert (scores['covering'], scores['vi']) == (1.0, pytest.approx(0, abs=1e-9))
    assert main([*words, '--num-classes', '65536', '--ignore', '65535']) == 3
    report = json.loads(capsys.readouterr().out)
    assert 'make a table of more than' in report['failed']['many']


# ---- finding files, and text that others wrote


def test_files_are_found_by_one_rule_on_both_sides(tmp_path, capsys):
    for folder in ('pred', 'truth'):
        for name in ('a.PNG', 'b.Png', 'sub/c.png', '.hidden/d.png', '.e.png', 'sub/.f/g.png'):
            put(tmp_path / folder / name)
    words = ['eval', '--pred', tmp_path / 'pred', '--labels', tmp_path / 'truth', '--num-classes', '3', '-q', '--json']
    assert main(list(map(str, words))) == 0
    assert json.loads(capsys.readouterr().out)['counts'] == {'pictures': 3, 'ignored': 0, 'failed': 0, 'missing': 0}
    put(tmp_path / 'pred' / 'folder.png' / 'x.jpg.png')  # a folder with the name of a label map is one
    put(tmp_path / 'truth' / 'folder.png' / 'x.png')
    assert main(list(map(str, words))) == 0
    assert json.loads(capsys.readouterr().out)['counts']['pictures'] == 4


ODD = (
    '=HYPERLINK("http:||evil","x")',
    '+1+1',
    '-1',
    '@SUM(A1)',
    '\tx',
    '\rx',
    'a\nb',
    'a\x1b[2Jb',
    '| c | <b>d</b> [e](f)',
    'g\u202eh',
    "'i",
)


@pytest.mark.parametrize('failed', [False, True])
def test_names_are_no_code(tmp_path, capsys, failed):
    for name in ODD:
        put(tmp_path / 'truth' / f'{name}.png')
        put(tmp_path / 'pred' / f'{name}.png')
        if failed:
            (tmp_path / 'pred' / f'{name}.png').write_bytes(b'')
    words = ['eval', '--pred', tmp_path / 'pred', '--labels', tmp_path / 'truth', '--num-classes', '3', '-q', '--out', tmp_path / 'out']
    assert main(list(map(str, words))) == (3 if failed else 0)
    shown = capsys.readouterr()
    texts = [shown.out, shown.err, *((tmp_path / 'out' / name).read_text() for name in ('per_image.csv', 'scores.md'))]
    for text in texts:
        assert not [letter for letter in text if unicodedata.category(letter) in ('Cc', 'Cf') and letter != '\n']
    assert shown.err.count('\n') == (len(ODD) if failed else 0)
    with (tmp_path / 'out/per_image.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(ODD) and {row['status'] for row in rows} == {'failed' if failed else 'done'}
    assert not [row for row in rows if row['name'][0] in '=+-@\t\r\n' or row['reason'][:1] in '=+-@\t\r\n' and row['reason']]
    assert {'\'=HYPERLINK("http:||evil","x")', "'-1", 'a\\x1b[2Jb'} <= {row['name'] for row in rows}
    assert failed or {row['miou'] for row in rows} == {'1.0'}
    words_of = texts[3].splitlines()
    assert all(line.startswith(('|', '#', '- **', 'And ')) or not line for line in words_of)
    if failed:
        assert any(line.startswith(r'| \| c \| \<b>d\</b> \[e](f) | ') for line in words_of)


def test_names_of_classes_are_no_code(tmp_path, capsys):
    put(tmp_path / 'set/labels/a.png')
    PIL.Image.new('RGB', (4, 2)).save(tmp_path / 'set/a.png')
    (tmp_path / 'set/images').mkdir()
    (tmp_path / 'set/a.png').rename(tmp_path / 'set/images/a.png')
    (tmp_path / 'set/padseg.toml').write_text('classes = ["a\\nb", "c\\u001b[2J", "<i> | $x^2$"]\n')
    words = ['eval', 'folder', '--root', tmp_path / 'set', '--pred', tmp_path / 'set/labels', '-q', '--out', tmp_path / 'out']
    assert main(list(map(str, words))) == 0
    out = capsys.readouterr().out
    assert 'a\\nb' in out and '\x1b' not in out
    text = (tmp_path / 'out/scores.md').read_text()
    assert '\x1b' not in text and r'| \<i> \| $x^2$ | 1.0000 |' in text
    assert main(list(map(str, ['eval', 'folder', '--root', tmp_path / 'set', '--check']))) == 0
    assert '\x1b' not in capsys.readouterr().out


def many_scans(path):
    PIL.Image.new('L', (16, 16), 128).save(path, 'JPEG', progressive=True)
    data = path.read_bytes()
    path.write_bytes(data[:-2] + data[data.rindex(b'\xff\xda') : -2] * 600 + data[-2:])


def sparse(path):
    with path.open('wb') as file:
        file.write(b'\xff\xd8\xff')
        file.truncate(1_000_000_001)


def many_tiles(path):
    """A TIFF of 4000 x 4000 pixels whose tiles are of one pixel: seconds and memory for their places alone, and no data."""
    entries = [(256, 4, 1, 4000), (257, 4, 1, 4000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (322, 4, 1, 1), (323, 4, 1, 1)]
    fields = b''.join(struct.pack('<HHII', *entry) for entry in entries)
    path.write_bytes(struct.pack('<2sHIH', b'II', 42, 8, len(entries)) + fields + bytes(4))


BOMBS = {  # pictures, and what is said of them
    'pixels.png': (
        lambda path: path.write_bytes(header(30_000, 30_000) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')),
        'exceeds 89000000 pixels',
    ),
    'scans.jpg': (many_scans, 'more than 500 scans'),
    'bytes.jpg': (sparse, 'exceeds 1000000000'),
    'tiles.tif': (many_tiles, ''),
}


def test_pictures_that_are_bombs_fail_alone(tmp_path, capsys):
    (tmp_path / 'img').mkdir()
    for name, (write, _) in BOMBS.items():
        write(tmp_path / 'img' / name)
        put(tmp_path / 'gt' / f'{name[:-4]}.png')
    PIL.Image.new('RGB', LABELS.shape[::-1]).save(tmp_path / 'img' / 'good.png')
    put(tmp_path / 'gt' / 'good.png')
    (tmp_path / 'padseg.toml').write_text('images = "img"\nlabels = "gt"\nnum_classes = 3\n')
    assert main(['eval', 'folder', '--root', str(tmp_path), '--method', 'grid', '-q', '--json']) == 3
    report = json.loads(capsys.readouterr().out)
    assert report['counts']['pictures'] == 1 and report['counts']['failed'] == len(BOMBS)
    for name, (_, words) in BOMBS.items():
        assert words in report['failed'][name[:-4]]


def test_label_maps_that_are_bombs_fail_alone(tmp_path, capsys):
    for folder in ('pred', 'truth'):
        put(tmp_path / folder / 'good.png')
        put(tmp_path / folder / 'bomb.png')
    (tmp_path / 'pred' / 'bomb.png').write_bytes(small_of(9000))
    words = ['eval', '--pred', str(tmp_path / 'pred'), '--labels', str(tmp_path / 'truth'), '--num-classes', '3', '-q', '--json']
    assert main([*words, '--allow-missing']) == 3
    assert 'size' in json.loads(capsys.readouterr().out)['failed']['bomb']
