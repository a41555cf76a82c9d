"""ImageNet-Segmentation: pictures, masks and names in one file of MATLAB 7.3, and files that are something else."""

from __future__ import annotations

import json
import os

import h5py
import numpy as np
import pytest

from padseg.commands import main
from padseg.datasets import open_dataset
from padseg.datasets.base import LayoutError
from padseg.errors import UnreadableLabels

NAME = 'imagenet-segmentation'
TENCH, CRANES, OTHER = 'n01440764', ('n02012849', 'n03126707'), 'n99999999'


def write(path, pictures, change=lambda file: None):
    """A file as MATLAB writes it: columns first, cells by reference. pictures: (id, synset, picture (H, W, 3), mask (H, W))."""
    with h5py.File(path, 'w') as file:
        cells = file.create_group('#refs#')
        value = file.create_group('value')

        def cell(data):
            return cells.create_dataset(str(len(cells)), data=data).ref

        def letters(text):
            return cell(np.array([[ord(letter)] for letter in text], np.uint16))

        def mask_of(mask):
            own = cells.create_dataset(str(len(cells)), (1, 1), h5py.ref_dtype)
            own[0, 0] = cell(np.asarray(mask, np.uint8).T)
            return own.ref

        fields = {
            'id': [letters(row[0]) for row in pictures],
            'target': [letters(row[1]) for row in pictures],
            'img': [cell(np.asarray(row[2], np.uint8).T) for row in pictures],
            'gt': [mask_of(row[3]) for row in pictures],
        }
        for name, references in fields.items():
            value.create_dataset(name, data=np.array(references, h5py.ref_dtype)[:, None], dtype=h5py.ref_dtype)
        change(file)


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    made = [(f'{synset}_{number}', synset, rng.integers(0, 256, (5, 7, 3)), np.eye(5, 7)) for number, synset in enumerate((TENCH, *CRANES))]
    return [*made, ('n.last', OTHER, rng.integers(0, 256, (6, 4, 3)), np.ones((6, 4)))]


def test_pictures_masks_and_names(pictures, tmp_path, capsys):
    write(tmp_path / 'gtsegs_ijcv.mat', pictures)
    with pytest.raises(LayoutError, match='no name for n99999999: give names in .*names.json, such as'):
        open_dataset(NAME, tmp_path)
    (tmp_path / 'names.json').write_text(json.dumps({OTHER: 'zebu', TENCH: 'fish'}))
    dataset = open_dataset(NAME, tmp_path)
    assert dataset.classes == ('crane', 'fish', 'zebu', 'background') and dataset.background == 3 and dataset.pictures == 4276
    assert [sample.name for sample in dataset.samples] == [row[0] for row in pictures]
    for sample, (_, _, image, mask), number in zip(dataset.samples, pictures, (1, 0, 0, 2), strict=True):
        assert np.array_equal(dataset.picture(sample), image)
        (raw,) = dataset.read(sample)
        assert np.array_equal(dataset.to_classes(raw), np.where(mask > 0, number, 3))
    assert main(['eval', NAME, '--root', str(tmp_path), '--check', '--json']) == 0
    checked = json.loads(capsys.readouterr().out)
    assert (checked['pictures'], checked['good'], checked['sizes']) == (4, True, 2)


def external(file):
    value = file.pop('value')
    file['value'] = h5py.ExternalLink('elsewhere.mat', '/value')
    del value


def outside(file):
    """The numbers of the first picture are in another file."""
    file['value/img'][0, 0] = file['#refs#'].create_dataset('x', (3, 7, 5), np.uint8, external=[('/etc/passwd', 0, 105)]).ref


def huge(file):
    file['value/img'][0, 0] = file['#refs#'].create_dataset('x', (3, 1 << 20, 1 << 20), np.uint8, chunks=(1, 64, 64), compression=1).ref


def numbers(file):
    file['value/img'][0, 0] = file['#refs#'].create_dataset('x', data=np.full((3, 7, 5), 0.5)).ref


def two(file):
    file['value/gt'][0, 0] = file['#refs#'].create_dataset('x', data=np.zeros((2, 2))).ref


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (external, 'holds no structure `value` with the field id'),
        (outside, 'takes numbers from another file'),
        (huge, r'a matrix of 3298534883328 bytes, of at most 268435456'),
        (numbers, 'a picture must be a matrix of bytes in three channels, not float64'),
        (two, 'a cell holds no matrix'),
    ],
)
def test_strange_files_are_refused(change, reason, pictures, tmp_path):
    write(tmp_path / 'gtsegs_ijcv.mat', pictures[:1], change)

    def everything():
        dataset = open_dataset(NAME, tmp_path)
        dataset.picture(dataset.samples[0])
        dataset.read(dataset.samples[0])

    with pytest.raises(UnreadableLabels, match=reason):
        everything()


@pytest.mark.parametrize('name', ['../a', '.hidden', 'a b', 'a/b', 'a\n'])
def test_names_that_lead_elsewhere_are_refused(name, pictures, tmp_path):
    write(tmp_path / 'gtsegs_ijcv.mat', [(name, *pictures[0][1:])])
    with pytest.raises(UnreadableLabels, match='names of pictures and classes are not distinct words'):
        open_dataset(NAME, tmp_path)


def test_what_is_no_such_file(pictures, tmp_path):
    with pytest.raises(LayoutError, match='holds no gtsegs_ijcv.mat'):
        open_dataset(NAME, tmp_path)
    os.mkfifo(tmp_path / 'gtsegs_ijcv.mat')
    with pytest.raises(LayoutError, match='holds no gtsegs_ijcv.mat'):
        open_dataset(NAME, tmp_path)
    (tmp_path / 'gtsegs_ijcv.mat').unlink()
    (tmp_path / 'gtsegs_ijcv.mat').write_bytes(bytes(4096))
    with pytest.raises(UnreadableLabels, match='not a MATLAB file, or a damaged one'):
        open_dataset(NAME, tmp_path)
    write(tmp_path / 'gtsegs_ijcv.mat', pictures[:2] + pictures[:1])
    with pytest.raises(UnreadableLabels, match='not distinct words'):
        open_dataset(NAME, tmp_path)
    for text in ('[]', '{"n01440764": "=1"}', '{"n01440764": 5}', '{"n01440764": "background"}', '{'):
        (tmp_path / 'names.json').write_text(text)
        write(tmp_path / 'gtsegs_ijcv.mat', pictures[:1])
        with pytest.raises((LayoutError, UnreadableLabels), match='names of classes|distinct'):
            open_dataset(NAME, tmp_path)
