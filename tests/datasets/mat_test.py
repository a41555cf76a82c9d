"""MATLAB files that crash their reader, unpack to anything, or are none: that file is refused, and the next one is read."""

from __future__ import annotations

import os
import signal
import struct
import zlib

import numpy as np
import pytest
import scipy.io

from padseg.datasets import mat
from padseg.datasets.mat import mat_matrices
from padseg.datasets.mat_child import LARGEST
from padseg.errors import UnreadableLabels

HEADER = b'MATLAB 5.0 MAT-file'.ljust(124) + b'\0\x01IM'
LABELS = [[1, 2, 300], [0, 0, 65535]]


@pytest.fixture
def good(tmp_path):
    """A file that can be read, as BSDS500 has them but not compressed, so that no checksum guards it."""
    cells = np.empty((1, 2), object)
    for number, labels in enumerate((LABELS, np.array(LABELS) // 2)):
        cells[0, number] = {'Segmentation': np.array(labels, np.uint16)}
    scipy.io.savemat(tmp_path / 'good.mat', {'groundTruth': cells})
    return tmp_path / 'good.mat'


def read(path):
    return [labels.tolist() for labels in mat_matrices(path, 'groundTruth', 'Segmentation')]


def refused(path):
    with pytest.raises(UnreadableLabels) as caught:
        read(path)
    assert caught.value.path == path
    return caught.value.reason


def element(kind, data):
    return struct.pack('<II', kind, len(data)) + data


def matrix(size, length):
    """The beginning of a matrix of bytes `groundTruth` that claims a size (H, W) and so many bytes of data."""
    parts = [element(6, struct.pack('<II', 9, 0)), element(5, struct.pack('<ii', *size)), element(1, b'groundTruth'), b'\0' * 5]
    head = b''.join(parts) + struct.pack('<II', 2, length)
    return struct.pack('<II', 14, len(head) + length) + head


def test_a_crash_is_that_file_s_fault(good):
    """Some of these bytes end scipy with a segmentation fault or a bus error, whichever they are in its version."""
    expected, data = read(good), good.read_bytes()
    assert expected == [LABELS, (np.array(LABELS) // 2).tolist()]
    damaged = good.with_name('damaged.mat')
    reasons = []
    for place in range(200, len(data), 5):
        damaged.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            read(damaged)
        except UnreadableLabels as error:
            reasons.append(error.reason)
    assert len(reasons) > 5 and any('crashed (SIG' in reason for reason in reasons)
    assert read(good) == expected


def test_an_earlier_file_s_harm_to_the_reader_does_not_count(good):
    expected = read(good)
    os.kill(mat.reader(os.getpid()).pid, signal.SIGKILL)
    assert read(good) == expected


def test_a_file_that_takes_too_long(good, monkeypatch):
    monkeypatch.setattr(mat, 'SECONDS', 1)
    mat.reader.cache_clear()  # for another process, with another limit
    slow = good.with_name('slow.mat')
    slow.write_bytes(HEADER)
    os.truncate(slow, LARGEST)  # elements without content
    assert refused(slow) == 'takes more than 1 s to read'
    monkeypatch.undo()
    assert len(read(good)) == 2


def test_a_small_file_does_not_become_a_large_one(tmp_path):
    packer, zeros = zlib.compressobj(1), bytes(1 << 20)
    packed = packer.compress(matrix((1 << 14, 1 << 15), 1 << 29))
    packed += b''.join(packer.compress(zeros) for _ in range(300)) + packer.flush()
    (tmp_path / 'bomb.mat').write_bytes(HEADER + element(15, packed))
    assert refused(tmp_path / 'bomb.mat') == f'unpacks to more than {LARGEST} bytes'
    (tmp_path / 'claim.mat').write_bytes(HEADER + matrix((1 << 30, 1 << 30), 100) + bytes(100))
    assert refused(tmp_path / 'claim.mat').startswith('not a MATLAB file, or a damaged one: ')
    cells = matrix((1 << 30, 1), 0).replace(struct.pack('<II', 9, 0), struct.pack('<II', 1, 0))  # a cell array
    (tmp_path / 'cells.mat').write_bytes(HEADER + cells)
    assert refused(tmp_path / 'cells.mat') == f'takes more than {1 << 30} bytes of memory to read'
    (tmp_path / 'large.mat').write_bytes(HEADER)
    os.truncate(tmp_path / 'large.mat', LARGEST + 1)
    assert refused(tmp_path / 'large.mat') == f'file of {LARGEST + 1} bytes exceeds {LARGEST}'


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / 'pipe.mat')
    (tmp_path / 'folder.mat').mkdir()
    (tmp_path / 'loop.mat').symlink_to('loop.mat')
    (tmp_path / 'empty.mat').touch()
    assert refused(tmp_path / 'pipe.mat') == refused(tmp_path / 'folder.mat') == 'not a regular file'
    for name, words in (('loop', 'symbolic links'), ('gone', 'No such file'), ('empty', 'truncated')):
        assert words in refused(tmp_path / f'{name}.mat')


def test_a_name_that_is_no_utf8(good):
    odd = good.with_name(os.fsdecode(b'caf\xe9 \n.mat'))
    good.rename(odd)
    assert read(odd)[0] == LABELS
