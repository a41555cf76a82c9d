"""Data sets: tables of every number a file can hold, small trees in each real layout and format, and what is refused."""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import scipy.io
from hypothesis import given, strategies as st
from pycocotools import mask as coco_mask

from padseg.datasets import (
    DATASETS,
    VOID,
    FolderSettings,
    LayoutError,
    Sample,
    UnreadableLabels,
    label_folder,
    open_dataset,
    open_folder,
    tables,
)
from padseg.datasets.base import Layout
from padseg.datasets.check import Problem, check_dataset
from padseg.datasets.dataset import Dataset
from padseg.datasets.layouts import homes, picture_name
from padseg.datasets.readers import run_lengths, whole_counts
from padseg.errors import UsageError
from padseg.exports.colours import voc_colours
from padseg.exports.png import read_label_map

NONE = tables.UNDECLARED
FACTS = sorted({row.facts for row in DATASETS.values() if row.facts})


# ---- writing small data sets


def palette(path, rows, colours=None, **options):
    """A palette PNG as VOC's are, whose colours say nothing of the index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = PIL.Image.fromarray(np.array(rows, np.uint8))
    picture.putpalette(voc_colours().tobytes() if colours is None else colours)
    picture.save(path, 'PNG', **options)


def grey(path, rows, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.array(rows, dtype)).save(path, 'PNG')


def picture(path, size=(2, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding='utf-8')


def mat(path, **variables):
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, variables, do_compression=True)


def groundtruth(*annotators):
    """BSDS500's cell array: a structure with Segmentation and Boundaries for each annotator."""
    cells = np.empty((1, len(annotators)), object)
    for number, rows in enumerate(annotators):
        labels = np.array(rows, np.uint16)
        cells[0, number] = {'Segmentation': labels, 'Boundaries': np.zeros(labels.shape, np.uint8)}
    return cells


def packed_grey(path, bits, rows):
    """A grey PNG of less than 8 bits a pixel, which Pillow reads but does not write; rows fill whole bytes."""
    lines = b''.join(b'\0' + bytes(int(''.join(f'{value:0{bits}b}' for value in row), 2).to_bytes(len(row) * bits // 8)) for row in rows)
    chunks = (
        (b'IHDR', struct.pack('>IIBBBBB', len(rows[0]), len(rows), bits, 0, 0, 0, 0)),
        (b'IDAT', zlib.compress(lines)),
        (b'IEND', b''),
    )
    data = b''.join(struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body)) for kind, body in chunks)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + data)


def runs(rows):
    """A region in pycocotools' compressed form, as JSON has it."""
    encoded = coco_mask.encode(np.asfortranarray(np.array(rows, np.uint8)))
    return {'size': encoded['size'], 'counts': encoded['counts'].decode()}


def truth(dataset, number=0):
    """The classes of one picture's only annotator, as lists."""
    (raw,) = dataset.read(dataset.samples[number])
    return dataset.to_classes(raw).tolist()


def names(dataset):
    return [sample.name for sample in dataset.samples]


# ---- tables


def table(name, values, size=256):
    """The class of every raw value of a row, by its own look-up, one value at a time."""
    row = DATASETS[name]
    numbers = tables.value_table(row, values)
    found = [tables.look_up(np.full((1, 1), value, np.int32), numbers) for value in range(size)]
    return [NONE if classes is None else int(classes[0, 0]) for classes in found]


THINGS = [value for value in range(91) if value not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]
CITY_19 = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
CONTEXT = {2: 'aeroplane', 9: 'bag', 23: 'bicycle', 59: 'car', 207: 'horse', 284: 'person', 360: 'sky', 397: 'diningtable'}
CONTEXT |= {415: 'track', 420: 'tree', 427: 'tvmonitor', 440: 'wall', 445: 'water', 454: 'window', 458: 'wood'}


@pytest.mark.parametrize(
    ('name', 'values', 'expected'),
    [
        ('voc21', 'index', [20, *range(20), *[NONE] * 234, VOID]),
        ('voc21', 'classes', [*range(21), *[NONE] * 234, VOID]),
        ('voc20', 'index', [VOID, *range(20), *[NONE] * 234, VOID]),
        ('voc20', 'classes', [*range(20), VOID, *[NONE] * 234, VOID]),
        ('context60', 'index', [59, *range(59), *[NONE] * 195, VOID]),
        ('context59', 'index', [VOID, *range(59), *[NONE] * 195, VOID]),
        ('context60', 'classes', [*range(59), *[NONE] * 196, 59]),
        ('context59', 'classes', [*range(59), *[NONE] * 196, VOID]),
        ('coco-object', 'train ids', [*range(1, 81), *[0] * 91, *[NONE] * 84, 0]),
        ('coco-object', 'objects', [*range(81), *[NONE] * 174, 0]),
        ('coco-object80', 'train ids', [*range(80), *[VOID] * 91, *[NONE] * 84, VOID]),
        ('coco-object80', 'objects', [VOID, *range(80), *[NONE] * 174, VOID]),
        ('cityscapes27', 'ids', [*[VOID] * 7, *range(27), *[NONE] * 221, VOID]),
        ('cityscapes19', 'train ids', [*range(19), *[NONE] * 236, VOID]),
        ('ade150', 'index', [VOID, *range(150), *[NONE] * 104, VOID]),
        ('ade150', 'raw', [*range(150), VOID, *[NONE] * 104, VOID]),
        ('ade150', 'classes', [*range(150), *[NONE] * 105, VOID]),
        ('camvid', 'index', [*range(11), VOID, *[NONE] * 243, VOID]),
    ],
)
def test_every_byte_of_a_simple_table(name, values, expected):
    assert table(name, values) == expected


def test_every_byte_of_cityscapes_with_19_classes():
    expected = [CITY_19.index(value) if value in CITY_19 else VOID if value < 34 or value == 255 else NONE for value in range(256)]
    assert table('cityscapes19', 'ids') == expected
    classes = tables.row_class_names(DATASETS['cityscapes19'])
    wide = tables.row_class_names(DATASETS['cityscapes27'])
    assert [wide[value - 7] for value in CITY_19] == list(classes)
    assert set(wide) - set(classes) == {'parking', 'rail track', 'guard rail', 'bridge', 'tunnel', 'polegroup', 'caravan', 'trailer'}


@pytest.mark.parametrize(('name', 'first', 'rest'), [('coco-object', 1, 0), ('coco-object80', 0, VOID)])
def test_every_byte_of_the_objects_of_coco(name, first, rest):
    expected = [first + THINGS.index(value) if value in THINGS else rest if value < 182 or value == 255 else NONE for value in range(256)]
    assert table(name, 'index') == expected
    # panoptic categories are counted from 1, and 0 is no segment
    assert table(name, 'categories') == [rest, *expected[:181], *[rest] * 19, *[NONE] * 55]


def test_every_id_of_context():
    classes = tables.row_class_names(DATASETS['context60'])
    found = table('context60', 'ids', 470)
    assert [found.count(number) for number in range(59)] == [1] * 59
    assert [number for number in found if number not in (59, NONE)] == list(range(59))  # in the order of the ids
    assert found[460:] == [NONE] * 10
    assert found[0] == found[255] == found[1] == found[459] == 59
    assert {value: classes[found[value]] for value in CONTEXT} == CONTEXT
    alphabetical = [name.replace('diningtable', 'table') for name in classes[:59]]  # the original name
    assert sorted(alphabetical) == alphabetical
    assert table('context59', 'ids', 470) == [VOID if number == 59 else number for number in found]


def test_every_byte_of_the_coarse_classes():
    found = table('coco-stuff27', 'index')
    runs_of_things = {9: (0, 0), 11: (1, 8), 8: (9, 14), 7: (15, 24), 6: (25, 32), 10: (33, 42), 5: (43, 50), 2: (51, 60)}
    runs_of_things |= {3: (61, 70), 0: (71, 76), 1: (77, 82), 4: (83, 90)}
    for number, (low, high) in runs_of_things.items():
        assert found[low : high + 1] == [number] * (high - low + 1)
    assert all(12 <= number < 27 for number in found[91:182])
    assert found[182:] == [NONE] * 73 + [VOID]
    # ceiling floor food furniture raw textile wall window building ground plant sky solid structural water
    assert [found[91:].count(number) for number in range(12, 27)] == [2, 6, 4, 11, 4, 11, 7, 2, 6, 11, 9, 2, 6, 5, 5]
    named = {91: 'textile', 105: 'sky', 123: 'plant', 148: 'ground', 154: 'water', 156: 'sky', 168: 'plant', 176: 'wall', 180: 'window'}
    classes = tables.row_class_names(DATASETS['coco-stuff27'])
    assert {value: classes[found[value]].removesuffix('-stuff') for value in named} == named


@pytest.mark.parametrize('name', ['coco-object', 'coco-object80', 'coco-stuff27'])
def test_the_171_classes_are_the_used_values_in_order(name):
    used = [*THINGS, *range(91, 182)]
    plain = table(name, 'index')
    assert table(name, 'train ids')[:171] == [plain[value] for value in used]
    assert table(name, 'train ids')[171:] == [*[NONE] * 84, plain[255]]


def test_the_171_classes_by_name():
    content = tables.facts('coco_stuff171')
    found = tables.expanded(content['values']['index'], 0, None)
    things = tables.facts('coco_object')['names']
    assert [content['names'][found[value]] for value in THINGS] == things
    assert [value for value in range(182) if found[value] == VOID] == [value for value in range(91) if value not in THINGS]
    stuff = content['names'][80:]
    assert stuff == sorted(stuff) and len(stuff) == 91 and found[91:182] == tuple(range(80, 171)) and found[255] == VOID
    named = {91: 'banner', 105: 'clouds', 123: 'grass', 148: 'road', 154: 'sea', 156: 'sky-other', 168: 'tree', 181: 'wood'}
    assert {value: content['names'][found[value]] for value in named} == named


@pytest.mark.parametrize('name', FACTS)
def test_each_table_reaches_each_class(name):
    content = tables.facts(name)
    assert all(word == word.strip() and word for word in content['names'])
    assert len(set(content['names'])) == len(content['names'])
    for ranges in content['values'].values():
        numbers = set(tables.expanded(ranges, 0, None)) - {VOID, NONE}
        assert numbers == set(range(len(content['names'])))


@pytest.mark.parametrize('name', [name for name, row in DATASETS.items() if row.facts])
def test_each_layout_of_a_row_has_a_table(name):
    row = DATASETS[name]
    for layout in row.layouts:
        numbers = set(tables.value_table(row, layout.values))
        assert numbers - {VOID, NONE} <= set(range(len(tables.row_class_names(row))))


def test_where_background_stands():
    ends = {name: (tables.row_class_names(row)[:1], tables.row_class_names(row)[-1:]) for name, row in DATASETS.items()}
    assert ends['voc21'] == (('aeroplane',), ('background',))
    assert ends['context60'] == (('aeroplane',), ('background',))
    assert ends['coco-object'] == (('background',), ('toothbrush',))
    sizes = {name: (len(tables.row_class_names(row)), tables.background_class(row)) for name, row in DATASETS.items()}
    assert sizes == {
        'voc21': (21, 20),
        'voc20': (20, None),
        'context60': (60, 59),
        'context59': (59, None),
        'coco-object': (81, 0),
        'coco-object80': (80, None),
        'coco-stuff27': (27, None),
        'cityscapes27': (27, None),
        'cityscapes19': (19, None),
        'ade150': (150, None),
        'bsds500': (0, None),
        'camvid': (11, None),
        'imagenet-segmentation': (0, None),
        'folder': (0, None),
    }


@pytest.mark.parametrize(
    ('ids', 'count', 'pattern', 'digest'),
    [
        ('coco_val_2175', 2175, r'\d{12}', '90cdc2116a1c2bef94bc1cefeb98a672444fddaa44b8370127016d98b16108a4'),
        ('context_val_5104', 5104, r'20(08|09|10)_\d{6}', '903abb826516974fc79730ae21495d8a577d4293b5fd517d738cfd21b6bd1969'),
    ],
)
def test_the_lists_of_pictures(ids, count, pattern, digest):
    listed = tables.listed_names(ids)
    assert len(set(listed)) == len(listed) == count
    assert all(re.fullmatch(pattern, name) for name in listed)
    assert hashlib.sha256('\n'.join(listed).encode()).hexdigest() == digest


@given(
    raw=st.lists(st.integers(0, 400), min_size=1, max_size=30),
    numbers=st.lists(st.integers(-2, 30), min_size=1, max_size=300),
    dtype=st.sampled_from([np.uint16, np.int32]),
)
def test_look_up_is_one_value_at_a_time(raw, numbers, dtype):
    found = tables.look_up(np.array([raw], dtype), tuple(numbers))
    slow = [numbers[value] if value < len(numbers) else NONE for value in raw]
    assert (found is None) == (NONE in slow)
    assert found is None or found.tolist() == [slow]


def test_a_byte_above_the_table_is_not_declared():
    assert tables.look_up(np.array([[3]], np.uint8), (0, 1)) is None
    assert tables.look_up(np.array([[1]], np.uint8), (0, 1)).tolist() == [[1]]
    assert tables.look_up(np.array([[-1]], np.int32), (0,) * 300) is None


def test_values_that_are_not_declared_are_shown_with_all_others(tmp_path):
    dataset = Dataset('toy', ('a', 'b'), None, 'val', 'none', tmp_path, (), (0, 1, 1, NONE, VOID))
    with pytest.raises(UsageError, match=re.escape('labels 3, 9 are not labels of toy (2 classes; declared: 0..2, 4)')) as caught:
        dataset.to_classes(np.array([[0, 0, 3], [9, 4, 9]], np.uint8))
    assert str(caught.value).endswith('pixels of each value: 0: 2, 3: 1, 4: 1, 9: 2')
    with pytest.raises(UsageError, match='and 80 more values'):
        dataset.to_classes(np.arange(100).reshape(10, 10))
    with pytest.raises(UsageError, match='labels -5 are not labels of toy'):
        dataset.to_classes(np.array([[-5, 1]], np.int32))
    with pytest.raises(UsageError, match='labels 1152921504606846976 are not labels of toy'):  # without a table of that length
        dataset.to_classes(np.array([[1, 2**60]]))
    assert dataset._replace(table=None).to_classes(np.array([[700]])).tolist() == [[700]]


# ---- layouts


def test_where_a_layout_may_be():
    layout = Layout('', ('VOCdevkit/VOC2012', 'voc'), (), ())
    assert homes(layout) == ['', 'VOC2012', 'VOCdevkit/VOC2012', 'voc']


def voc(home, labels='SegmentationClass'):
    for name in ('2007_000033', '2007_000042', '2007_000061'):
        picture(home / 'JPEGImages' / f'{name}.jpg')
    palette(home / labels / '2007_000033.png', [[0, 1, 20], [255, 15, 0]])
    palette(home / labels / '2007_000061.png', [[2, 2, 2], [2, 2, 2]])
    text(home / 'ImageSets' / 'Segmentation' / 'val.txt', '2007_000061\n2007_000033\n\n2007_000061\n')
    return home


@pytest.mark.parametrize('below', ['', 'VOC2012', 'VOCdevkit/VOC2012'])
@pytest.mark.parametrize('labels', ['SegmentationClass', 'SegmentationClassAug'])
def test_voc_from_the_folder_itself_or_above(tmp_path, below, labels):
    home = voc(tmp_path / below, labels)
    dataset = open_dataset('voc21', tmp_path)
    assert names(dataset) == ['2007_000033', '2007_000061']  # of the list, sorted; the third picture has no labels and is not in it
    assert dataset.samples[0] == Sample('2007_000033', home / 'JPEGImages' / '2007_000033.jpg', (home / labels / '2007_000033.png',))
    assert truth(dataset) == [[20, 0, 19], [VOID, 14, 20]]
    assert truth(open_dataset('voc20', tmp_path)) == [[VOID, 0, 19], [VOID, 14, VOID]]
    assert (dataset.split, dataset.background, dataset.pictures, dataset.missing) == ('val', 20, 1449, 0)
    assert dataset.layout == {'SegmentationClass': 'official download', 'SegmentationClassAug': 'augmented annotations'}[labels]


def test_the_original_annotations_of_voc_come_before_the_augmented(tmp_path):
    voc(tmp_path, 'SegmentationClassAug')
    voc(tmp_path)
    assert open_dataset('voc21', tmp_path).layout == 'official download'


def test_voc_prepared_for_detectron2(tmp_path):
    voc(tmp_path)
    (tmp_path / 'SegmentationClass').rename(tmp_path / 'other')
    for folder, background in (('annotations_detectron2', 255), ('annotations_detectron2_bg', 20)):
        grey(tmp_path / folder / 'val' / '2007_000033.png', [[background, 0, 19], [255, 14, background]])
        grey(tmp_path / folder / 'val' / '2007_000061.png', [[1, 1, 1], [1, 1, 1]])
    assert truth(open_dataset('voc21', tmp_path)) == [[20, 0, 19], [VOID, 14, 20]]
    assert truth(open_dataset('voc20', tmp_path)) == [[VOID, 0, 19], [VOID, 14, VOID]]


CONTEXT_PICTURES = ('2008_000002', '2008_000003')  # the first of the list


def context_pictures(home):
    for name in (*CONTEXT_PICTURES, '2008_000004'):
        picture(home / 'JPEGImages' / f'{name}.jpg', (2, 2))


def test_context_from_matlab_files(tmp_path):
    home = tmp_path / 'VOCdevkit' / 'VOC2010'
    context_pictures(home)
    for name in (*CONTEXT_PICTURES, '2008_000004'):
        mat(home / 'trainval' / f'{name}.mat', LabelMap=np.array([[2, 458], [255, 0]], np.uint16))
    with pytest.raises(LayoutError, match=r'no picture in .* for 5102 of the split: 2008_000007, .* and 5097 more'):
        open_dataset('context60', tmp_path)
    dataset = open_dataset('context60', tmp_path, allow_missing=True)
    assert names(dataset) == list(CONTEXT_PICTURES)  # 2008_000004 is not in the list
    assert truth(dataset) == [[0, 58], [59, 59]]
    assert truth(open_dataset('context59', tmp_path, allow_missing=True)) == [[0, 58], [VOID, VOID]]
    with pytest.raises(LayoutError, match='holds no context60'):
        open_dataset('context60', tmp_path, 'train')  # no list says which those are


def test_context_from_pascal_in_detail(tmp_path):
    context_pictures(tmp_path)
    regions = [
        {'image_id': 7, 'category_id': 440, 'segmentation': runs([[1, 1], [1, 0]])},
        {'image_id': 8, 'category_id': 2, 'segmentation': runs([[1, 1], [1, 1]])},
        {'image_id': 7, 'category_id': 2, 'segmentation': runs([[0, 1], [0, 0]])},  # painted on top
        {'image_id': 7, 'category_id': 255, 'segmentation': runs([[0, 0], [1, 0]])},
    ]
    listed = zip((7, 8, 9), ('2008_000002', '2008_000004', '2008_000003'), ('val', 'train', 'val'), strict=True)
    images = [{'image_id': n, 'file_name': f'{name}.jpg', 'phase': phase, 'height': 2, 'width': 2} for n, name, phase in listed]
    path = tmp_path / 'trainval_merged.json'
    text(path, json.dumps({'images': images, 'annos_segmentation': regions}))
    dataset = open_dataset('context60', tmp_path)
    assert dataset.layout == 'PASCAL in Detail'
    assert names(dataset) == ['2008_000002', '2008_000003']
    assert truth(dataset) == [[55, 0], [59, 59]]
    assert truth(dataset, 1) == [[59, 59], [59, 59]]
    assert names(open_dataset('context59', tmp_path, 'train')) == ['2008_000004']
    assert truth(open_dataset('context59', tmp_path, 'train')) == [[0, 0], [0, 0]]


def test_context_of_mmsegmentation(tmp_path):
    context_pictures(tmp_path / 'VOC2010')
    grey(tmp_path / 'VOC2010' / 'SegmentationClassContext' / '2008_000003.png', [[0, 1], [59, 14]])
    text(tmp_path / 'VOC2010' / 'ImageSets' / 'SegmentationContext' / 'val.txt', '2008_000003\n')
    dataset = open_dataset('context60', tmp_path)
    assert (dataset.layout, names(dataset)) == ('mmsegmentation', ['2008_000003'])
    assert truth(dataset) == [[59, 0], [58, 13]]


COCO_PICTURES = ('000000000139', '000000000285', '000000000724')  # the second is not among the 2175


def coco(home, images='val2017', labels='stuffthingmaps_trainval2017/val2017', end='.png', rows=((0, 89, 91), (181, 255, 11))):
    for name in COCO_PICTURES:
        picture(home / images / f'{name}.jpg')
        grey(home / labels / f'{name}{end}', rows)


@pytest.mark.parametrize(
    ('below', 'images', 'labels'),
    [
        ('', 'val2017', 'stuffthingmaps_trainval2017/val2017'),
        ('coco', 'val2017', 'annotation_val2017'),
        ('coco', 'images/val2017', 'annotations/val2017'),
        ('coco_stuff164k', 'images/val2017', 'annotations/val2017'),
    ],
)
def test_coco_maps_and_their_splits(tmp_path, below, images, labels):
    coco(tmp_path / below, images, labels)
    with pytest.raises(LayoutError, match='the split has 5000 pictures; .* has 3'):
        open_dataset('coco-object', tmp_path)
    with pytest.raises(LayoutError, match=r'no picture in .* for 2173 of the split: 000000000785, 000000000872, .* and 2168 more'):
        open_dataset('coco-stuff27', tmp_path)
    objects = open_dataset('coco-object', tmp_path, allow_missing=True)
    assert names(objects) == list(COCO_PICTURES)
    assert truth(objects) == [[1, 80, 0], [0, 0, 0]]
    assert truth(open_dataset('coco-object80', tmp_path, 'val-5000', allow_missing=True)) == [[0, 79, VOID], [VOID, VOID, VOID]]
    stuff = open_dataset('coco-stuff27', tmp_path, allow_missing=True)
    assert names(stuff) == names(open_dataset('coco-object', tmp_path, 'val-2175', allow_missing=True)) == list(COCO_PICTURES[::2])
    assert truth(stuff) == [[9, 4, 17], [24, VOID, 8]]
    assert names(open_dataset('coco-stuff27', tmp_path, 'val-5000', allow_missing=True)) == list(COCO_PICTURES)
    assert (objects.missing, stuff.missing) == (4997, 2173)


def test_coco_of_mmsegmentation(tmp_path):
    home = tmp_path / 'coco_stuff164k'
    coco(home, 'images/val2017', 'annotations/val2017', '_labelTrainIds.png', ((0, 79, 80), (170, 255, 11)))
    stuff = open_dataset('coco-stuff27', tmp_path, allow_missing=True)
    assert stuff.layout == 'mmsegmentation (171 classes)'
    assert truth(stuff) == [[9, 4, 17], [24, VOID, 8]]
    assert truth(open_dataset('coco-object', tmp_path, allow_missing=True)) == [[1, 80, 0], [0, 0, 12]]
    coco(home, 'images/val2017', 'annotations/val2017')  # the original files beside the converted ones
    both = open_dataset('coco-object', tmp_path, 'val-5000', allow_missing=True)
    assert both.layout == 'official download (stuffthingmaps)'
    assert names(both) == list(COCO_PICTURES)
    assert truth(both) == [[1, 80, 0], [0, 0, 0]]


@pytest.mark.parametrize(('labels', 'end'), [('annotations/val2017', '_instanceTrainIds.png'), ('annotations_object/val2017', '.png')])
def test_coco_as_object_classes(tmp_path, labels, end):
    coco(tmp_path, labels=labels, end=end, rows=((0, 1, 80), (0, 2, 79)))
    assert truth(open_dataset('coco-object', tmp_path, allow_missing=True)) == [[0, 1, 80], [0, 2, 79]]
    with pytest.raises(LayoutError, match='holds no coco-stuff27'):
        open_dataset('coco-stuff27', tmp_path)


def panoptic(home, colours, segments):
    picture(home / 'val2017' / '000000000139.jpg', (1, len(colours)))
    path = home / 'annotations' / 'panoptic_val2017' / '000000000139.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.array([colours], np.uint8)).save(path)
    info = [{'id': number, 'category_id': category, 'iscrowd': 0} for number, category in segments.items()]
    annotations = [{'image_id': 139, 'file_name': path.name, 'segments_info': info}]
    categories = [{'id': 1, 'isthing': 1, 'name': 'person'}, {'id': 90, 'isthing': 1}, {'id': 92, 'isthing': 0}, {'id': 200, 'isthing': 0}]
    text(home / 'annotations' / 'panoptic_val2017.json', json.dumps({'annotations': annotations, 'categories': categories}))


def test_objects_of_coco_from_panoptic_annotations(tmp_path):
    segments = {1 + 256 * 2 + 65536 * 3: 1, 5: 90, 256: 92, 65536: 200}
    panoptic(tmp_path, [(1, 2, 3), (5, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)], segments)
    dataset = open_dataset('coco-object', tmp_path, allow_missing=True)
    assert dataset.layout == 'panoptic annotations'
    assert truth(dataset) == [[1, 80, 0, 0, 0]]
    assert truth(open_dataset('coco-object80', tmp_path, allow_missing=True)) == [[0, 79, VOID, VOID, VOID]]


def test_a_segment_that_is_not_annotated_is_refused(tmp_path):
    panoptic(tmp_path, [(1, 0, 0), (7, 0, 0)], {1: 1, 9: 2})
    dataset = open_dataset('coco-object', tmp_path, allow_missing=True)
    with pytest.raises(UnreadableLabels, match='segment 7 is not in'):
        dataset.read(dataset.samples[0])


def cityscapes(home, kind, rows):
    for town, name in (('munster', 'munster_000001_000019'), ('frankfurt', 'frankfurt_000000_000294')):
        picture(home / 'leftImg8bit' / 'val' / town / f'{name}_leftImg8bit.png', (1, len(rows[0])))
        grey(home / 'gtFine' / 'val' / town / f'{name}_gtFine_{kind}.png', rows)
        PIL.Image.new('RGBA', (len(rows[0]), 1)).save(home / 'gtFine' / 'val' / town / f'{name}_gtFine_color.png')
        grey(home / 'gtFine' / 'val' / town / f'{name}_gtFine_instanceIds.png', [[26001] * len(rows[0])], np.uint16)


@pytest.mark.parametrize('below', ['', 'cityscapes'])
def test_cityscapes_with_its_towns(tmp_path, below):
    cityscapes(tmp_path / below, 'labelIds', [[0, 6, 7, 9, 16, 33]])
    dataset = open_dataset('cityscapes27', tmp_path)
    assert names(dataset) == ['frankfurt/frankfurt_000000_000294_leftImg8bit', 'munster/munster_000001_000019_leftImg8bit']
    assert dataset.samples[0].truths[0].name == 'frankfurt_000000_000294_gtFine_labelIds.png'
    assert truth(dataset) == [[VOID, VOID, 0, 2, 9, 26]]
    assert truth(open_dataset('cityscapes19', tmp_path)) == [[VOID, VOID, 0, VOID, VOID, 18]]


def test_cityscapes_with_train_ids_alone(tmp_path):
    cityscapes(tmp_path, 'labelTrainIds', [[0, 18, 255]])
    assert truth(open_dataset('cityscapes19', tmp_path)) == [[0, 18, VOID]]
    with pytest.raises(LayoutError, match=r'gtFine/val/\*_gtFine_labelIds.png +missing'):
        open_dataset('cityscapes27', tmp_path)


@pytest.mark.parametrize('below', ['', 'ADEChallengeData2016', 'ade/ADEChallengeData2016'])
def test_ade(tmp_path, below):
    home = tmp_path / below
    picture(home / 'images' / 'validation' / 'ADE_val_00000001.jpg')
    grey(home / 'annotations' / 'validation' / 'ADE_val_00000001.png', [[0, 1, 2], [149, 150, 0]])
    dataset = open_dataset('ade150', tmp_path)
    assert truth(dataset) == [[VOID, 0, 1], [148, 149, VOID]]
    assert (dataset.classes[0], dataset.classes[7], dataset.classes[149]) == ('wall', 'bed', 'flag')
    raw = open_dataset('ade150', tmp_path, raw_labels=True)
    assert truth(raw) == [[0, 1, 2], [149, VOID, 0]]
    assert raw.classes == dataset.classes


def test_raw_labels_change_no_other_data_set(tmp_path):
    voc(tmp_path)
    assert open_dataset('voc21', tmp_path, raw_labels=True) == open_dataset('voc21', tmp_path)


def test_raw_labels_need_the_files_as_they_were_published(tmp_path):
    picture(tmp_path / 'images' / 'validation' / 'a.jpg')
    grey(tmp_path / 'annotations_detectron2' / 'validation' / 'a.png', [[0, 149, 255], [1, 1, 1]])
    assert truth(open_dataset('ade150', tmp_path)) == [[0, 149, VOID], [1, 1, 1]]
    with pytest.raises(LayoutError):
        open_dataset('ade150', tmp_path, raw_labels=True)


@pytest.mark.parametrize('below', ['', 'data', 'BSDS500/data', 'BSR/BSDS500/data'])
def test_bsds_from_matlab_files(tmp_path, below):
    picture(tmp_path / below / 'images' / 'val' / '101085.jpg')
    first, second = [[1, 1, 2], [1, 3, 2]], [[1, 1, 1], [1, 1, 300]]
    mat(tmp_path / below / 'groundTruth' / 'val' / '101085.mat', groundTruth=groundtruth(first, second))
    dataset = open_dataset('bsds500', tmp_path)
    assert (dataset.classes, dataset.table, names(dataset), len(dataset.samples[0].truths)) == ((), None, ['101085'], 1)
    assert [labels.tolist() for labels in dataset.read(dataset.samples[0])] == [first, second]


def test_bsds_from_one_png_an_annotator(tmp_path):
    for name in ('8068', '8068_2'):
        picture(tmp_path / 'bsds500' / 'images' / 'val' / f'{name}.jpg')
    for number in (0, 2, 10):
        grey(tmp_path / 'bsds500' / 'labels' / 'val' / f'8068_{number}.png', [[number + 1, 300, 1], [1, 1, 1]], np.uint16)
    grey(tmp_path / 'bsds500' / 'labels' / 'val' / '8068_2_0.png', [[7, 7, 7], [7, 7, 7]])
    dataset = open_dataset('bsds500', tmp_path, allow_missing=True)
    # 8068_2.png is of the picture with that very name
    assert [(sample.name, [path.name for path in sample.truths]) for sample in dataset.samples] == [
        ('8068', ['8068_0.png', '8068_10.png']),
        ('8068_2', ['8068_2.png', '8068_2_0.png']),
    ]
    assert [labels[0, :2].tolist() for labels in dataset.read(dataset.samples[0])] == [[1, 300], [11, 300]]


@pytest.mark.parametrize(
    ('images', 'labels'),
    [('val', 'valannot'), ('CamVid/val', 'CamVid/valannot'), ('images/val', 'labels/val'), ('camvid/images/val', 'camvid/labels/val')],
)
def test_camvid(tmp_path, images, labels):
    picture(tmp_path / images / '0016E5_07959.png')
    grey(tmp_path / labels / '0016E5_07959.png', [[0, 1, 10], [11, 4, 9]])
    dataset = open_dataset('camvid', tmp_path)
    assert truth(dataset) == [[0, 1, 10], [VOID, 4, 9]]
    assert [dataset.classes[number] for number in (0, 4, 9, 10)] == ['sky', 'pavement', 'pedestrian', 'bicyclist']


# ---- what is missing or lies otherwise


def test_unknown_names_and_splits_list_the_known(tmp_path):
    with pytest.raises(UsageError, match=r'one of voc21, voc20, .*, folder; got voc'):
        open_dataset('voc', tmp_path)
    with pytest.raises(UsageError, match='split of voc21 is one of val, train, trainval; got test'):
        open_dataset('voc21', tmp_path, 'test')


def test_a_wrong_layout_is_told_with_what_is_there(tmp_path):
    voc(tmp_path / 'VOCdevkit' / 'VOC2012', 'labels')
    with pytest.raises(LayoutError) as caught:
        open_dataset('voc21', tmp_path)
    assert caught.value.exit_code == 5
    message = str(caught.value)
    assert 'holds no voc21 (val)' in message
    assert 'it holds VOCdevkit/.' in message
    assert re.search(
        r'official download \(there or in VOCdevkit/VOC2012\):\n +JPEGImages/\*\.jpg +found: .*VOCdevkit/VOC2012/JPEGImages\n', message
    )
    assert re.search(r'SegmentationClass/\*\.png +missing\n', message)
    with pytest.raises(LayoutError, match='there is no folder'):
        open_dataset('voc21', tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(LayoutError, match='it holds nothing'):
        open_dataset('voc21', tmp_path / 'empty')


def test_listed_pictures_that_are_missing_are_named(tmp_path):
    voc(tmp_path)
    listing = tmp_path / 'ImageSets' / 'Segmentation' / 'val.txt'
    text(listing, ''.join(f'2007_00003{number}\n' for number in range(8)))
    with pytest.raises(LayoutError, match=r'for 7 of the split: 2007_000030, .*, 2007_000035 and 2 more'):
        open_dataset('voc21', tmp_path)
    dataset = open_dataset('voc21', tmp_path, allow_missing=True)
    assert (names(dataset), dataset.missing) == (['2007_000033'], 7)
    text(listing, '2007_000033\n2007_000042\n')
    with pytest.raises(LayoutError, match=r'no labels in .*SegmentationClass for 1 of the split: 2007_000042 \(--allow-missing'):
        open_dataset('voc21', tmp_path)
    text(listing, '2007_000042\n')
    with pytest.raises(LayoutError, match='no labels'):  # nothing would be left
        open_dataset('voc21', tmp_path, allow_missing=True)
    text(listing, '\n')
    with pytest.raises(LayoutError, match='names no picture'):
        open_dataset('voc21', tmp_path)


@pytest.mark.parametrize('orphan', ['images/val/b.jpg', 'labels/val/b.png'])
def test_orphans_on_either_side_are_named(tmp_path, orphan):
    picture(tmp_path / 'images' / 'val' / 'a.jpg')
    grey(tmp_path / 'labels' / 'val' / 'a.png', [[0]])
    grey(tmp_path / 'labels' / 'val' / '.b.png', [[0]])  # hidden files do not count
    assert names(open_dataset('camvid', tmp_path)) == ['a']
    (picture if orphan.endswith('jpg') else grey)(tmp_path / orphan, *([] if orphan.endswith('jpg') else [[[0]]]))
    with pytest.raises(LayoutError, match='for 1 of the split: b'):
        open_dataset('camvid', tmp_path)
    dataset = open_dataset('camvid', tmp_path, allow_missing=True)
    assert (names(dataset), dataset.missing) == (['a'], 1)


def test_two_pictures_of_one_name_are_refused(tmp_path):
    picture(tmp_path / 'images' / 'val' / 'a.jpg')
    picture(tmp_path / 'images' / 'val' / 'a.PNG')
    grey(tmp_path / 'labels' / 'val' / 'a.png', [[0]])
    with pytest.raises(LayoutError, match='two files for a: '):
        open_dataset('camvid', tmp_path)


# ---- files


def test_a_palette_png_is_read_by_index(tmp_path):
    rows = np.arange(256).reshape(16, 16)
    alike = bytes(256 * 3)  # all colours black: any conversion would lose the index
    palette(tmp_path / 'a.png', rows, alike)
    assert read_label_map(tmp_path / 'a.png').tolist() == rows.tolist()
    assert read_label_map(tmp_path / 'a.png').dtype == np.uint8
    palette(tmp_path / 'b.png', rows % 16, alike[:48], bits=4)
    assert read_label_map(tmp_path / 'b.png').tolist() == (rows % 16).tolist()
    palette(tmp_path / 'c.png', rows, alike, transparency=0)
    assert read_label_map(tmp_path / 'c.png').tolist() == rows.tolist()


def test_grey_pngs_of_every_depth(tmp_path):
    path = tmp_path / 'a.png'
    grey(path, [[0, 65535], [256, 1]], np.uint16)
    assert read_label_map(path).tolist() == [[0, 65535], [256, 1]]
    for bits in (1, 2, 4):
        rows = [[value % 2**bits for value in range(start, start + 16)] for start in range(3)]
        packed_grey(path, bits, rows)
        labels = read_label_map(path)
        assert (labels.tolist(), labels.dtype) == (rows, np.uint8)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA'])
def test_a_png_with_colours_is_no_label_map(tmp_path, mode):
    PIL.Image.new(mode, (2, 2)).save(tmp_path / 'a.png')
    with pytest.raises(UnreadableLabels, match=f'a.png: a label map has one channel, grey or with a palette; this is {mode}') as caught:
        read_label_map(tmp_path / 'a.png')
    assert caught.value.exit_code == 3


def test_damaged_pngs_are_named(tmp_path):
    palette(tmp_path / 'good.png', np.random.default_rng(0).integers(0, 255, (9, 9)))
    data = (tmp_path / 'good.png').read_bytes()
    path = tmp_path / 'bad.png'
    idat = data.index(b'IDAT')
    for length in (0, 7, 8, 20, 100, idat, idat + 20):
        path.write_bytes(data[:length])
        with pytest.raises(UnreadableLabels, match='bad.png: (not a PNG|truncated or damaged)'):
            read_label_map(path)
    path.write_bytes(data[: idat + 8] + b'\xff' * 40 + data[idat + 48 :])
    with pytest.raises(UnreadableLabels, match='bad.png: truncated or damaged'):
        read_label_map(path)
    with pytest.raises(UnreadableLabels, match='nothing.png'):
        read_label_map(tmp_path / 'nothing.png')
    picture(tmp_path / 'photo.jpg')
    with pytest.raises(UnreadableLabels, match='photo.jpg: not a PNG'):
        read_label_map(tmp_path / 'photo.jpg')


@pytest.mark.parametrize(
    ('values', 'reason'),
    [
        (np.array([[1.5]]), 'whole numbers'),
        (np.array([[np.nan]]), 'whole numbers'),
        (np.array([[-1]], np.int16), 'whole numbers'),
        (np.array([[1e12]]), 'whole numbers'),
        (np.zeros((2, 2, 3), np.uint8), 'a matrix of numbers'),
        (np.zeros((0, 0), np.uint8), 'a matrix of numbers'),
        ('text', 'a matrix of numbers'),
    ],
)
def test_a_matlab_matrix_that_is_no_label_map(tmp_path, values, reason):
    dataset = Dataset('context60', (), None, 'val', '', tmp_path, (), None, 'context')
    path = tmp_path / 'a.mat'
    mat(path, LabelMap=np.array([[3.0, 458.0]]))  # numbers are often stored as doubles
    (labels,) = dataset.read(Sample('a', None, (path,)))
    assert (labels.tolist(), labels.dtype) == ([[3, 458]], np.int32)
    mat(path, LabelMap=values)
    with pytest.raises(UnreadableLabels, match=f'a.mat: labels must be {reason}'):
        dataset.read(Sample('a', None, (path,)))


@pytest.mark.parametrize('reader', ['context', 'bsds'])
def test_matlab_files_that_hold_something_else(tmp_path, reader):
    dataset = Dataset('toy', (), None, 'val', '', tmp_path, (), None, reader)
    path = tmp_path / 'a.mat'
    sample = Sample('a', None, (path,))
    mat(path, other=1)
    with pytest.raises(UnreadableLabels, match='holds no variable (LabelMap|groundTruth)'):
        dataset.read(sample)
    path.write_bytes(b'MATLAB 7.3 MAT-file'.ljust(124) + b'\0\x02IM' + bytes(400))
    with pytest.raises(UnreadableLabels, match='version 7.3'):
        dataset.read(sample)
    labels = np.arange(100).reshape(10, 10)
    mat(path, **({'LabelMap': labels} if reader == 'context' else {'groundTruth': groundtruth(labels)}))
    dataset.read(sample)
    data = path.read_bytes()
    for length in (0, 3, 100, 128, 150, len(data) - 20):
        path.write_bytes(data[:length])
        with pytest.raises(UnreadableLabels, match=r'a\.mat: '):
            dataset.read(sample)
    reasons = []
    # A few of these crash scipy, and some get past it; one of the last bits is padding, without which nothing is wrong.
    for place, flip in itertools.product(range(136, len(data)), (0x01, 0x55, 0x80)):
        path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
        try:
            assert dataset.read(sample)[0].tolist() == labels.tolist()
        except UnreadableLabels as error:
            reasons.append(error.reason)
    assert all(reason.startswith('not a MATLAB file, or a damaged one') for reason in reasons)
    assert len(reasons) >= 3 * (len(data) - 136) - 8


def test_matlab_files_of_version_4(tmp_path):
    scipy.io.savemat(tmp_path / 'a.mat', {'LabelMap': np.array([[3.0, 458.0]])}, format='4')
    dataset = Dataset('context60', (), None, 'val', '', tmp_path, (), None, 'context')
    assert dataset.read(Sample('a', None, (tmp_path / 'a.mat',)))[0].tolist() == [[3, 458]]


@pytest.mark.parametrize('cells', [np.array([[1, 2]]), np.empty((1, 0), object), {'Other': np.ones((2, 2))}])
def test_a_bsds_file_without_segmentations(tmp_path, cells):
    mat(tmp_path / 'a.mat', groundTruth=cells)
    dataset = Dataset('bsds500', (), None, 'val', '', tmp_path, (), None, 'bsds')
    with pytest.raises(UnreadableLabels, match='a.mat: groundTruth is'):
        dataset.read(Sample('a', None, (tmp_path / 'a.mat',)))


@pytest.mark.parametrize(
    'content',
    [
        '{',
        '[' * 100_000,
        '[]',
        '{"images": 3}',
        '{"images": [{"image_id": 1}], "annos_segmentation": []}',
        '{"images": [{"image_id": 1, "file_name": "a.jpg", "phase": "val", "height": Infinity, "width": 2}], "annos_segmentation": []}',
        '{"images": [{"image_id": [], "file_name": "a.jpg", "phase": "val", "height": 2, "width": 2}], "annos_segmentation": []}',
        '{"images": [{"image_id": 1, "file_name": 7, "phase": "val", "height": 2, "width": 2}], "annos_segmentation": []}',
    ],
)
def test_annotations_of_another_form(tmp_path, content):
    context_pictures(tmp_path)
    text(tmp_path / 'trainval_merged.json', content)
    with pytest.raises(UnreadableLabels, match='trainval_merged.json: not (valid JSON|annotations in the format)'):
        open_dataset('context60', tmp_path)


@pytest.mark.parametrize(
    ('segmentation', 'reason'),
    [
        (runs([[1, 1, 1]]), r'has size \(1, 3\), the picture \(2, 2\)'),
        ([[0, 0, 1, 1]], 'damaged region'),
        ({'size': [2, 2]}, 'damaged region'),
        ({'size': [2, 2], 'counts': runs([[1, 1, 1]])['counts']}, 'run lengths of 3 pixels in all for a mask of 4'),
        ({'size': [2, 2], 'counts': 'o' * 99 + '4'}, 'damaged region'),
        ({'size': [2, 2], 'counts': '2N'}, 'damaged region'),
    ],
)
def test_a_damaged_region(tmp_path, segmentation, reason):
    context_pictures(tmp_path)
    image = {'image_id': 1, 'file_name': '2008_000002.jpg', 'phase': 'val', 'height': 2, 'width': 2}
    region = {'image_id': 1, 'category_id': 2, 'segmentation': segmentation}
    text(tmp_path / 'trainval_merged.json', json.dumps({'images': [image], 'annos_segmentation': [region]}))
    dataset = open_dataset('context60', tmp_path)
    with pytest.raises(UnreadableLabels, match=reason):
        dataset.read(dataset.samples[0])


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from((0, 0.02, 0.5, 1)), st.integers(0, 99))
def test_run_lengths_are_those_of_the_mask(height, width, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    mask[height // 2 :, width // 3 :] ^= True
    counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))['counts']
    assert whole_counts(counts.decode(), mask.size) == counts
    lengths = run_lengths(np.frombuffer(counts, np.uint8))
    np.testing.assert_array_equal(np.repeat(np.arange(len(lengths)) % 2, lengths), mask.T.ravel())
    with pytest.raises(ValueError, match='in all for a mask of'):
        whole_counts(counts.decode(), mask.size + 1)


def test_a_data_set_and_its_errors_reach_worker_processes(tmp_path):
    voc(tmp_path)
    (tmp_path / 'SegmentationClass' / '2007_000061.png').write_bytes(b'')
    dataset = open_dataset('voc21', tmp_path)
    assert len(pickle.dumps(dataset._replace(samples=()))) < 4096
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        (raw,) = pool.submit(dataset.read, dataset.samples[0]).result()
        assert raw.tolist() == [[0, 1, 20], [255, 15, 0]]
        with pytest.raises(UnreadableLabels, match='2007_000061.png: not a PNG') as caught:
            pool.submit(dataset.read, dataset.samples[1]).result()
    assert (caught.value.path, caught.value.reason) == (dataset.samples[1].truths[0], 'not a PNG')


# ---- one's own folders


@pytest.mark.parametrize(
    ('name', 'expected'),
    [('a.png', 'a'), ('a.jpg.png', 'a'), ('b/a.jpg.png', 'b/a'), ('a.b.png', 'a.b'), ('a.PNG.png', 'a')],
)
def test_the_name_of_a_label_map(name, expected):
    assert picture_name(Path(name)) == expected


def test_a_folder_of_labels_with_classes(tmp_path):
    grey(tmp_path / 'b.png', [[0, 1, 255]])
    palette(tmp_path / 'sub' / 'a.jpg.png', [[2, 2, 2]])
    dataset = label_folder(tmp_path, 3)
    assert dataset.samples == (
        Sample('b', None, (tmp_path / 'b.png',)),
        Sample('sub/a', None, (tmp_path / 'sub' / 'a.jpg.png',)),
    )
    assert dataset.classes == ('0', '1', '2')
    assert truth(dataset) == [[0, 1, VOID]]
    assert label_folder(tmp_path, 3, background=2).background == 2
    assert truth(label_folder(tmp_path, 3, ignore=0)._replace(samples=dataset.samples[1:])) == [[2, 2, 2]]
    assert truth(label_folder(tmp_path, 256, ignore=0)) == [[VOID, 1, 255]]
    for num_classes, ignore, strange in ((1, 255, '1'), (3, None, '255'), (3, 7, '255')):
        with pytest.raises(UsageError, match=f'labels {strange} are not labels of folder .*0: 1, 1: 1, 255: 1'):
            truth(label_folder(tmp_path, num_classes, ignore))


def test_a_folder_of_labels_without_classes(tmp_path):
    for name in ('x_0', 'x_1', 'sub/x_0', 'y', 'z_7'):
        grey(tmp_path / f'{name}.png', [[0, 255]])
    found = {sample.name: [path.stem for path in sample.truths] for sample in label_folder(tmp_path, None).samples}
    assert found == {'sub/x': ['x_0'], 'x': ['x_0', 'x_1'], 'y': ['y'], 'z': ['z_7']}
    found = {sample.name: [path.stem for path in sample.truths] for sample in label_folder(tmp_path, None, pictures={'z_7'}).samples}
    assert found == {'sub/x': ['x_0'], 'x': ['x_0', 'x_1'], 'y': ['y'], 'z_7': ['z_7']}
    assert names(label_folder(tmp_path, 1)) == ['sub/x_0', 'x_0', 'x_1', 'y', 'z_7']
    assert truth(label_folder(tmp_path, None), 0) == [[0, 255]]  # 255 may be a region


def test_folders_of_labels_that_are_refused(tmp_path):
    with pytest.raises(LayoutError, match='there is no folder'):
        label_folder(tmp_path / 'nowhere', 2)
    with pytest.raises(LayoutError, match='there are no PNG files'):
        label_folder(tmp_path, 2)
    grey(tmp_path / 'a.png', [[0]])
    with pytest.raises(UsageError, match='num_classes: input should be greater than or equal to 1; got 0'):
        label_folder(tmp_path, 0)
    with pytest.raises(UsageError, match='background is one of the 2 classes, by name or number from 0; got 2'):
        label_folder(tmp_path, 2, background=2)
    grey(tmp_path / 'a.jpg.png', [[0]])
    with pytest.raises(LayoutError, match='two files for a: '):
        label_folder(tmp_path, 2)


@pytest.mark.parametrize(('images', 'labels'), [('images', 'labels'), ('img_dir', 'ann_dir'), ('images', 'annotations')])
@pytest.mark.parametrize(('split', 'given'), [('', None), ('val', None), ('val', 'val'), ('test', 'test')])
def test_own_folders_in_each_layout(tmp_path, images, labels, split, given):
    picture(tmp_path / images / split / 'sub' / 'a.jpg')
    grey(tmp_path / labels / split / 'sub' / 'a.png', [[0, 1, 2], [3, 255, 1]])
    text(tmp_path / 'padseg.toml', "classes = ['sky', ' sea ', 'land']\nbackground = 'sea'\nreduce_zero_label = true\n")
    dataset = open_dataset('folder', tmp_path, given)
    assert names(dataset) == ['sub/a']
    assert (dataset.classes, dataset.background, dataset.split) == (('sky', 'sea', 'land'), 1, split or 'all')
    assert truth(dataset) == [[VOID, 0, 1], [2, VOID, 0]]


def test_own_folders_with_names_and_suffixes_of_their_own(tmp_path):
    for split in ('one', 'two'):
        picture(tmp_path / 'data' / split / 'rgb' / f'{split}_photo.png')
        picture(tmp_path / 'data' / split / 'rgb' / f'{split}_depth.png')
        grey(tmp_path / 'masks' / split / f'{split}_mask.png', [[0, 1, 9], [0, 0, 0]])
    folders = "images = 'data/{split}/rgb'\nlabels = 'masks'\nignore_index = 9\nnum_classes = 2\n"
    text(tmp_path / 'padseg.toml', folders + "[suffixes]\nimages = '_photo.png'\nlabels = '_mask.png'\n")
    dataset = open_dataset('folder', tmp_path, 'two')
    assert names(dataset) == ['two_photo']
    assert truth(dataset) == [[0, 1, VOID], [0, 0, 0]]
    with pytest.raises(LayoutError, match=r'holds no pictures with labels \(three\)(.|\n)*data/three/rgb/\*_photo.png +missing'):
        open_dataset('folder', tmp_path, 'three')


def test_own_folders_may_lie_elsewhere(tmp_path):
    picture(tmp_path / 'pictures' / 'a.jpg')
    text(tmp_path / 'data' / 'padseg.toml', f"num_classes = 2\nimages = '{tmp_path}/pictures'\nlabels = '../labels'\n")
    with pytest.raises(LayoutError, match=r'pictures/\*.jpg +found: .*pictures\n +../labels/\*.png +missing'):
        open_dataset('folder', tmp_path / 'data')
    grey(tmp_path / 'labels' / 'a.png', [[0, 1]])
    assert truth(open_dataset('folder', tmp_path / 'data')) == [[0, 1]]


def test_own_folders_without_classes_are_regions_of_annotators(tmp_path):
    picture(tmp_path / 'images' / 'a.jpg')
    for number in range(2):
        grey(tmp_path / 'labels' / f'a_{number}.png', [[number, 7, 7]])
    text(tmp_path / 'padseg.toml', '')
    dataset = open_dataset('folder', tmp_path)
    assert [labels.tolist() for labels in dataset.read(dataset.samples[0])] == [[[0, 7, 7]], [[1, 7, 7]]]
    with pytest.raises(LayoutError, match='no picture in .* for 2 of the split: a_0, a_1'):
        open_folder(tmp_path, None, FolderSettings(num_classes=8))


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('num_classes = ', 'is not valid TOML: '),
        ('num_classes = 0', 'num_classes: input should be greater than or equal to 1; got 0'),
        ('num_classes = 2.0', 'num_classes: input should be a valid integer; got 2.0'),
        ('num_classes = true', 'num_classes: input should be a valid integer; got True'),
        ("num_classes = 3\nclasses = ['a', 'b']", 'num_classes is 3, but classes names 2'),
        ('classes = []', 'classes: list should have at least 1 item'),
        ("classes = ['a', 'a ']", 'classes names one class twice: a, a'),
        ('classes = [1]', r'classes\.0: input should be a valid string; got 1'),
        ("num_classes = 2\nbackground = 'sea'", "background is one of the 2 classes, by name or number from 0; got 'sea'"),
        ('num_classes = 2\nignore_index = -1', 'ignore_index: input should be greater than or equal to 0; got -1'),
        (
            'ignore = 3',
            'ignore is not a setting; the settings are num_classes, classes, ignore_index, background, reduce_zero_label, images',
        ),
        ("[suffixes]\nmask = '.png'", 'mask is not a setting; the settings are images, labels'),
        ("[suffixes]\nlabels = '.tif'", r"suffixes\.labels: .*; got '\.tif'"),
    ],
)
def test_settings_that_are_refused(tmp_path, content, message):
    picture(tmp_path / 'images' / 'a.jpg')
    grey(tmp_path / 'labels' / 'a.png', [[0]])
    text(tmp_path / 'padseg.toml', content)
    with pytest.raises(UsageError, match=message):
        open_dataset('folder', tmp_path)


def test_a_folder_without_settings_is_told_what_to_write(tmp_path):
    with pytest.raises(LayoutError, match=r'there is no .*padseg.toml, which says(.|\n)*num_classes = 3') as caught:
        open_dataset('folder', tmp_path)
    example = str(caught.value).partition('\n')[2]
    text(tmp_path / 'padseg.toml', example)
    picture(tmp_path / 'images' / 'a.jpg')
    grey(tmp_path / 'labels' / 'a.png', [[2]])
    assert truth(open_dataset('folder', tmp_path)) == [[2]]


# ---- check


def test_a_check_finds_everything_wrong(tmp_path):
    sizes = {'a': (2, 3), 'b': (4, 4), 'c': (2, 3), 'd': (2, 3), 'e': (1, 9), 'f': (2, 3)}
    for name, size in sizes.items():
        picture(tmp_path / 'images' / 'val' / f'{name}.jpg', size)
        grey(tmp_path / 'labels' / 'val' / f'{name}.png', np.full(size, 11 if name == 'e' else 3))
    grey(tmp_path / 'labels' / 'val' / 'a.png', [[0, 3, 11], [200, 200, 0]])
    (tmp_path / 'labels' / 'val' / 'c.png').write_bytes(b'nothing')
    grey(tmp_path / 'labels' / 'val' / 'd.png', [[3, 3], [3, 3], [3, 3]])
    (tmp_path / 'images' / 'val' / 'f.jpg').write_bytes(b'nothing')
    report = check_dataset(open_dataset('camvid', tmp_path))
    assert (report.name, report.split, report.layout, report.classes) == ('camvid', 'val', 'images and labels', 11)
    assert (report.pictures, report.published, report.labels) == (6, 101, 5)
    assert (report.smallest, report.largest, report.sizes) == ((2, 3), (4, 4), 3)
    assert [tuple(value) for value in report.values] == [
        (0, 2, 1, 0, 'sky'),
        (3, 1 + 16 + 6 + 6, 4, 3, 'road'),
        (11, 1 + 9, 2, None, 'ignored'),
        (200, 2, 1, None, 'out of range'),
    ]
    assert report.out_of_range == report.values[3:]
    assert report.empty == ('e',)
    assert [(problem.sample, problem.path.name) for problem in report.unreadable] == [('c', 'c.png'), ('f', 'f.jpg')]
    assert report.different == (Problem('d', tmp_path / 'labels' / 'val' / 'd.png', '(3, 2) (height, width); the picture has (2, 3)'),)
    assert not report.good
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain['values'][1] == {'value': 3, 'pixels': 29, 'files': 4, 'number': 3, 'name': 'road'}
    assert plain['out_of_range'] == plain['values'][3:]
    assert plain['unreadable'][0]['reason'] == 'not a PNG'
    assert (plain['good'], plain['smallest'], plain['root']) == (False, [2, 3], str(tmp_path))


def test_a_check_of_a_good_data_set(tmp_path):
    voc(tmp_path)
    dataset = open_dataset('voc20', tmp_path)
    seen = []
    report = check_dataset(dataset, (seen.append(sample) or sample for sample in dataset.samples))
    assert report.good
    assert tuple(seen) == dataset.samples
    assert [(value.value, value.name) for value in report.values] == [
        (0, 'ignored'),
        (1, 'aeroplane'),
        (2, 'bicycle'),
        (15, 'person'),
        (20, 'tvmonitor'),
        (255, 'ignored'),
    ]


def test_a_check_of_several_annotators_in_one_file(tmp_path):
    picture(tmp_path / 'images' / 'val' / 'a.jpg')
    mat(tmp_path / 'groundTruth' / 'val' / 'a.mat', groundTruth=groundtruth([[1, 1, 2], [1, 1, 1]], [[1, 1]]))
    report = check_dataset(open_dataset('bsds500', tmp_path))
    assert (report.labels, report.empty, [tuple(value) for value in report.values]) == (
        2,
        (),
        [(1, 7, 2, None, 'region'), (2, 1, 1, None, 'region')],
    )
    assert [problem.path.name for problem in report.different] == ['a.mat']


def test_a_check_of_labels_alone(tmp_path):
    grey(tmp_path / 'a.png', [[0, 1]])
    grey(tmp_path / 'b.png', [[2, 2, 2]])
    report = check_dataset(label_folder(tmp_path, 2))
    assert (report.smallest, report.largest, [value.value for value in report.out_of_range]) == ((1, 2), (1, 3), [2])


# ---- text and annotations of others


BOM = '\ufeff'


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    voc(tmp_path)
    text(tmp_path / 'ImageSets' / 'Segmentation' / 'val.txt', f'{BOM}2007_000061\r\n2007_000033\r\n')
    assert names(open_dataset('voc21', tmp_path)) == ['2007_000033', '2007_000061']
    own = tmp_path / 'own'
    picture(own / 'images' / 'a.jpg')
    grey(own / 'labels' / 'a.png', [[0, 1, 1], [0, 1, 1]])
    text(own / 'padseg.toml', f'{BOM}classes = ["café", "b"]\r\n')
    assert open_dataset('folder', own).classes == ('café', 'b')


@pytest.mark.parametrize('name', ['../../victim/x', '/etc/passwd', 'a/../../x', '..'])
def test_a_list_that_names_files_elsewhere_is_refused(tmp_path, name):
    voc(tmp_path)
    text(tmp_path / 'ImageSets' / 'Segmentation' / 'val.txt', f'2007_000033\n{name}\n')
    for allow_missing in (False, True):
        with pytest.raises(LayoutError, match=rf'val\.txt names {re.escape(name)}: it may only name files below .*JPEGImages'):
            open_dataset('voc21', tmp_path, allow_missing=allow_missing)


@pytest.mark.parametrize(
    ('put', 'reason'),
    [
        (lambda path: path.mkdir(), 'cannot be read: not a regular file'),
        (os.mkfifo, 'cannot be read: not a regular file'),
        (lambda path: path.symlink_to(path.name), 'cannot be read: .*symbolic links'),
        (lambda path: path.write_bytes(b'classes = "\xff"'), 'is not valid TOML'),
        (lambda path: path.write_text('a = ' + '[' * 100_000), 'is not valid TOML'),
        (lambda path: path.write_text('num_classes = nan'), 'num_classes: '),
        (lambda path: path.write_text('num_classes = 3\nsuffixes = {labels = "/../x.mat"}'), 'suffixes.labels: '),
    ],
)
def test_settings_that_are_no_settings(tmp_path, put, reason):
    put(tmp_path / 'padseg.toml')
    with pytest.raises(UsageError, match=f'padseg.toml:? {reason}'):
        open_dataset('folder', tmp_path)


@pytest.mark.parametrize(
    ('size', 'segmentation', 'reason'),
    [
        ((2, 2), {'size': [2, 2], 'counts': 'P'}, 'damaged region'),  # would go on behind its end
        ((2, 2), {'size': [2, 2], 'counts': ''}, 'damaged region'),
        ((2, 2), {'size': [2, 2], 'counts': '0\0'}, 'damaged region'),
        ((2, 2), {'size': [2, 2], 'counts': 'é'}, 'damaged region'),
        ((2, 2), {'size': [2, 2], 'counts': [4]}, 'damaged region'),
        ((2, 2), {'size': [2, 2], 'counts': '000`0'}, 'damaged region'),  # more pixels than there are
        ((2, 2), {'size': [1 << 20, 1 << 20], 'counts': '4'}, r'has size \(1048576, 1048576\), the picture \(2, 2\)'),
        ((2, 2), {'size': 2, 'counts': '4'}, 'damaged region'),
        ((1 << 20, 1 << 20), {'size': [1 << 20, 1 << 20], 'counts': '4'}, 'allowed are up to'),
        ((0, -3), {'size': [0, -3], 'counts': '4'}, 'allowed are up to'),
    ],
)
def test_regions_that_would_do_harm(tmp_path, size, segmentation, reason):
    context_pictures(tmp_path)
    image = {'image_id': 1, 'file_name': '2008_000002.jpg', 'phase': 'val', 'height': size[0], 'width': size[1]}
    region = {'image_id': 1, 'category_id': 2, 'segmentation': segmentation}
    text(tmp_path / 'trainval_merged.json', json.dumps({'images': [image], 'annos_segmentation': [region]}))
    dataset = open_dataset('context60', tmp_path)
    with pytest.raises(UnreadableLabels, match=reason):
        dataset.read(dataset.samples[0])


@pytest.mark.parametrize(
    'segment', [{'id': 2**70, 'category_id': 1}, {'id': 1, 'category_id': 2**70}, {'id': -1, 'category_id': 1}, {'id': 1}, 7]
)
def test_segments_that_cannot_be(tmp_path, segment):
    PIL.Image.new('RGB', (2, 2), (1, 0, 0)).save(tmp_path / 'a.png')
    text(tmp_path / 'a.json', json.dumps({'annotations': [{'file_name': 'a.png', 'segments_info': [segment]}]}))
    dataset = Dataset('coco-object', (), None, 'val', '', tmp_path, (), None, 'panoptic', tmp_path / 'a.json')
    with pytest.raises(UnreadableLabels, match='not panoptic annotations in COCO format'):
        dataset.read(Sample('a', None, (tmp_path / 'a.png',)))
