"""Exports: what is written can be read back, holds nothing else, and is there completely or not at all."""

from __future__ import annotations

import csv

import cv2
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, strategies
from hypothesis.extra import numpy as arrays

from padseg.errors import UnreadableLabels, UsageError
from padseg.exports import export, read_label_map, read_masks, write_label_map, write_masks
from padseg.exports.colours import voc_colours
from padseg.exports.overlay import inner_boundaries, overlay
from padseg.exports.png import encoded
from padseg.images import ImageError
from padseg.methods.stages.enlarging import enlarged_labels
from padseg.system.files import atomic, sweep
from padseg.types import LabelMap

HAND_MADE = LabelMap(np.array([[0, 1, 1, 2], [3, 1, 2, 2]], np.int32), ((0, 5), (7,), ()))


@strategies.composite
def label_maps(draw):
    """Any label map whose regions are 1..K, with at least one region."""
    shape = draw(strategies.tuples(strategies.integers(1, 9), strategies.integers(1, 9)))
    labels = draw(arrays.arrays(np.int32, shape, elements=strategies.integers(0, 5)))
    labels.flat[0] = 1
    ids = np.unique(labels[labels > 0])
    return LabelMap(np.where(labels > 0, np.searchsorted(ids, labels) + 1, 0).astype(np.int32), ((),) * len(ids))


@given(label_maps(), strategies.tuples(strategies.integers(0, 200), strategies.integers(0, 30)))
def test_files_in_a_larger_size_are_those_of_the_enlarged_label_map(tmp_path_factory, labels, more):
    folder = tmp_path_factory.mktemp('larger')
    size = tuple(length + own for length, own in zip(labels.labels.shape, more, strict=True))
    large = enlarged_labels(labels, size)
    write_label_map(labels, folder / 'a.png', size)
    assert np.array_equal(read_label_map(folder / 'a.png'), large.labels)
    write_masks(labels, folder / 'a', size)
    write_masks(large, folder / 'b')
    for path in (folder / 'b').iterdir():
        if path.suffix == '.csv':
            assert (folder / 'a' / path.name).read_bytes() == path.read_bytes()
        else:
            with PIL.Image.open(folder / 'a' / path.name) as one, PIL.Image.open(path) as other:
                assert one.mode == other.mode == 'L' and np.array_equal(np.asarray(one), np.asarray(other))
            assert np.array_equal(
                cv2.imread(str(folder / 'a' / path.name), cv2.IMREAD_UNCHANGED), np.where(large.labels == int(path.stem) + 1, 255, 0)
            )


def test_a_large_label_map_of_many_regions(tmp_path):
    labels = LabelMap(np.arange(1, 301, dtype=np.int32).reshape(10, 30), ((),) * 300)
    write_label_map(labels, tmp_path / 'a.png', (1500, 900))
    assert np.array_equal(read_label_map(tmp_path / 'a.png'), labels.labels.repeat(150, 0).repeat(30, 1))
    with PIL.Image.open(tmp_path / 'a.png') as picture:
        assert picture.mode == 'I;16'
    write_label_map(labels._replace(labels=labels.labels % 200 + 1), tmp_path / 'b.png', (1500, 900))
    with PIL.Image.open(tmp_path / 'b.png') as picture:
        assert picture.mode == 'P' and picture.getpalette() == voc_colours().ravel().tolist()


def test_a_label_map_of_more_pixels_than_pillow_opens_is_read_if_its_size_is_known(tmp_path):
    size = (9_000, 20_000)
    write_label_map(LabelMap(np.array([[1, 2], [3, 4]], np.int32), ((),) * 4), tmp_path / 'a.png', size)
    labels = read_label_map(tmp_path / 'a.png', size)
    assert labels.shape == size and labels[::4_500, ::10_000].tolist() == [[1, 2], [3, 4]]
    with pytest.raises(UnreadableLabels):
        read_label_map(tmp_path / 'a.png')


def test_voc_colours():
    colours = voc_colours().tolist()
    assert colours[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert colours[15] == [192, 128, 128]  # person
    assert colours[255] == [224, 224, 192]  # the border
    assert len({tuple(colour) for colour in colours}) == 256


def test_label_map_is_a_palette_png_with_the_ids_as_they_are(tmp_path):
    write_label_map(HAND_MADE, tmp_path / 'a.png')
    with PIL.Image.open(tmp_path / 'a.png') as picture:
        assert picture.mode == 'P'
        assert np.array_equal(np.asarray(picture), HAND_MADE.labels)
        assert picture.convert('RGB').getpixel((3, 0)) == (0, 128, 0)
        assert not picture.info


@pytest.mark.parametrize(('regions', 'mode'), [(255, 'P'), (256, 'I;16'), (65535, 'I;16')])
def test_many_regions_go_to_sixteen_bits(tmp_path, regions, mode):
    labels = np.arange(1, regions + 1, dtype=np.int32).reshape(1, -1)
    write_label_map(LabelMap(labels, ()), tmp_path / 'a.png')
    with PIL.Image.open(tmp_path / 'a.png') as picture:
        assert picture.mode == mode
    assert np.array_equal(read_label_map(tmp_path / 'a.png'), labels)


def test_more_regions_than_a_png_holds_are_refused(tmp_path):
    with pytest.raises(ValueError, match='65536'):
        write_label_map(LabelMap(np.array([[65536]], np.int32), ()), tmp_path / 'a.png')
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_fails_the_picture_alone(tmp_path):
    """These are errors of a picture, after which a run goes on: OpenCV writes no PNG of a million pixels a side, and says so by False."""
    with pytest.raises(ImageError, match='65536'):
        write_label_map(LabelMap(np.array([[65536]], np.int32), ()), tmp_path / 'a.png')
    long = np.ones((1, 1_000_001), np.int32)
    with pytest.raises(ImageError, match='1000001x1 pixels are too long or too wide for a .png file'):
        write_masks(LabelMap(long, ((),)), tmp_path / 'a')
    with pytest.raises(ImageError, match='cannot be written as .png'):
        encoded('.png', np.zeros((0, 0), np.uint8))
    with pytest.raises(ImageError, match='too long or too wide for a .jpg file'):
        encoded('.jpg', np.zeros((1, 70_000, 3), np.uint8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['=HYPERLINK("http:||evil","x")', 'a\n=1+1', '@SUM(A1)', '\x1b[2Jcat', 'plain'])
def test_names_of_classes_do_nothing_in_a_table_or_on_a_picture(tmp_path, name):
    labels = LabelMap(np.ones((40, 300), np.int32), (), (name,))
    write_masks(labels, tmp_path / 'masks')
    with (tmp_path / 'masks/metadata.csv').open(newline='', encoding='utf-8') as file:
        (row,) = csv.DictReader(file)
    assert row['name'][0] not in '=+-@' and row['name'].isprintable() and (row['name'] == name) is (name == 'plain')
    export(labels, tmp_path / 'a.jpg', np.zeros((40, 300, 3), np.uint8))
    assert (tmp_path / 'a.jpg').is_file()


@given(label_maps())
def test_round_trips(tmp_path_factory, labels):
    folder = tmp_path_factory.mktemp('trip')
    write_label_map(labels, folder / 'a.png')
    write_masks(labels, folder / 'a')
    assert np.array_equal(read_label_map(folder / 'a.png'), labels.labels)
    assert np.array_equal(read_masks(folder / 'a'), labels.labels)
    assert read_masks(folder / 'a').dtype == np.int32


def test_masks_and_their_table(tmp_path):
    write_masks(HAND_MADE, tmp_path / 'masks')
    assert sorted(path.name for path in (tmp_path / 'masks').iterdir()) == ['0.png', '1.png', '2.png', 'metadata.csv']
    with PIL.Image.open(tmp_path / 'masks' / '0.png') as picture:
        assert picture.mode == 'L'
        assert np.asarray(picture).tolist() == [[0, 255, 255, 0], [0, 255, 0, 0]]
    with (tmp_path / 'masks' / 'metadata.csv').open(newline='', encoding='utf-8') as file:
        rows = list(csv.reader(file))
    assert ','.join(rows[0]) == (
        'id,area,bbox_x0,bbox_y0,bbox_w,bbox_h,point_input_x,point_input_y,predicted_iou,stability_score,'
        'crop_box_x0,crop_box_y0,crop_box_w,crop_box_h,region,tokens'
    )
    assert rows[1:] == [
        ['0', '3', '1', '0', '2', '2', '', '', '', '', '0', '0', '4', '2', '1', '0 5'],
        ['1', '3', '2', '0', '2', '2', '', '', '', '', '0', '0', '4', '2', '2', '7'],
        ['2', '1', '0', '1', '1', '1', '', '', '', '', '0', '0', '4', '2', '3', ''],
    ]


def test_more_than_ten_masks_keep_their_numbers(tmp_path):
    labels = np.arange(1, 13, dtype=np.int32).reshape(3, 4)
    write_masks(LabelMap(labels, ()), tmp_path / 'masks')
    assert np.array_equal(read_masks(tmp_path / 'masks'), labels)


def test_masks_replace_those_of_another_label_map(tmp_path):
    write_masks(HAND_MADE, tmp_path / 'masks')
    write_masks(LabelMap(np.ones((2, 2), np.int32), ((),)), tmp_path / 'masks')
    assert sorted(path.name for path in (tmp_path / 'masks').iterdir()) == ['0.png', 'metadata.csv']
    assert [path.name for path in tmp_path.iterdir()] == ['masks']


def test_overlapping_masks_are_no_label_map(tmp_path):
    for name in ('0.png', '1.png'):
        PIL.Image.new('L', (3, 2), 255).save(tmp_path / name)
    with pytest.raises(UsageError, match='overlap'):
        read_masks(tmp_path)


def test_reading_what_is_no_label_map(tmp_path):
    PIL.Image.new('RGB', (3, 2)).save(tmp_path / 'colour.png')
    (tmp_path / 'words.png').write_bytes(b'words')
    with pytest.raises(UnreadableLabels, match='one channel'):
        read_label_map(tmp_path / 'colour.png')
    with pytest.raises(UnreadableLabels, match='not a PNG'):
        read_label_map(tmp_path / 'words.png')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UsageError, match='no mask'):
        read_masks(tmp_path / 'empty')


def test_the_same_labels_give_the_same_bytes(tmp_path):
    image = np.full((2, 4, 3), 90, np.uint8)
    for name in ('a', 'b'):
        export(HAND_MADE, tmp_path / f'{name}.png')
        export(HAND_MADE, tmp_path / f'{name}.jpg', image)
        export(HAND_MADE, tmp_path / name)
    for name in ('.png', '.jpg', '/0.png', '/metadata.csv'):
        assert (tmp_path / f'a{name}').read_bytes() == (tmp_path / f'b{name}').read_bytes()


def test_overlay_blends_regions_and_leaves_the_rest(tmp_path):
    image = np.full((8, 8, 3), 100, np.uint8)
    labels = np.zeros((8, 8), np.int32)
    labels[4:] = 1
    drawn = overlay(image, labels)
    assert drawn[0, 0].tolist() == [100, 100, 100]
    assert drawn[7, 7].tolist() == [114, 50, 50]  # half of (128, 0, 0)
    assert drawn[3].tolist() == [[255] * 3] * 8
    export(LabelMap(labels, ((),)), tmp_path / 'a.jpg', image)
    with PIL.Image.open(tmp_path / 'a.jpg') as picture:
        assert (picture.format, picture.size) == ('JPEG', (8, 8))
        assert not picture.getexif()


def test_boundaries():
    edges = inner_boundaries(np.array([[1, 1, 2], [1, 1, 2], [3, 3, 3]]))
    assert edges.astype(int).tolist() == [[0, 1, 0], [1, 1, 1], [0, 0, 0]]


def test_overlay_of_regions_beyond_the_palette_is_coloured():
    image = np.zeros((1, 600, 3), np.uint8)
    drawn = overlay(image, np.repeat(np.arange(1, 301, dtype=np.int32), 2)[None])
    assert (drawn.max(-1) > 0).all()


def test_overlay_refuses_no_picture_another_size_and_too_long_ones(tmp_path):
    with pytest.raises(UsageError, match='needs the picture'):
        export(HAND_MADE, tmp_path / 'a.jpg')
    with pytest.raises(ValueError, match='differ in size'):
        export(HAND_MADE, tmp_path / 'a.jpg', np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(ImageError, match='70000x1'):
        export(LabelMap(np.ones((1, 70000), np.int32), ((),)), tmp_path / 'a.jpg', np.zeros((1, 70000, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_export_chooses_by_suffix_or_by_name(tmp_path):
    export(HAND_MADE, tmp_path / 'folder')
    assert (tmp_path / 'folder' / 'metadata.csv').is_file()
    export(HAND_MADE, str(tmp_path / 'anything.dat'), format='labels')
    assert np.array_equal(read_label_map(tmp_path / 'anything.dat'), HAND_MADE.labels)
    with pytest.raises(UsageError, match=r'unknown format \.bmp; known: labels \(\.png\), masks \(a folder\), overlays \(\.jpg\)'):
        export(HAND_MADE, tmp_path / 'a.bmp')
    with pytest.raises(UsageError, match='unknown format sketch'):
        export(HAND_MADE, tmp_path / 'a.png', format='sketch')


def test_atomic_leaves_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / 'sub' / 'a.txt'
    with atomic(path) as temporary:
        temporary.write_text('old')
        assert temporary.parent == path.parent
        assert not path.exists()

    def broken() -> None:
        with atomic(path) as temporary:
            temporary.write_text('half')
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert path.read_text() == 'old'
    assert list(path.parent.iterdir()) == [path]


def test_atomic_takes_names_as_long_as_the_file_system(tmp_path):
    with atomic(tmp_path / ('n' * 255)) as temporary:
        temporary.write_text('long')
    assert (tmp_path / ('n' * 255)).read_text() == 'long'


def test_sweep_removes_what_a_killed_run_left(tmp_path):
    block = atomic(tmp_path / 'masks')
    temporary = block.__enter__()
    temporary.mkdir()
    (temporary / '0.png').write_bytes(b'half')
    (tmp_path / 'kept.png').write_bytes(b'')
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['kept.png']
