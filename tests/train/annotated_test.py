"""Annotated pictures: each kind of source by hand with exact masks, crops of a picture that shows its coordinates, and what is refused."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import PIL.Image
import pytest
import torch
from pycocotools import mask
from support.runs import put_run

from padseg.errors import PadsegError, UsageError
from padseg.run.records import read_run
from padseg.system.ledger import write_header
from padseg.train.annotated import View, first_sentences, open_annotated, summary
from padseg.train.sources import open_source, read_captions

SIDE = 64
WHOLE = View(SIDE, 'whole', flip=False)
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]
LEFT, TOP = COLUMNS < 24, ROWS < 16  # 24 x 64 and 64 x 16 pixels


def put(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.asarray(pixels)).save(path)


def put_picture(path, size=(SIDE, SIDE)):
    """A picture that shows its coordinates: red is the column, green the row."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    put(path, np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def put_text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def runs(pixels):
    encoded = mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return {'size': list(pixels.shape), 'counts': encoded['counts'].decode()}


def label_folder(root, labels, names='', classes=None, part=''):
    put_picture(root / 'images' / part / 'a.png')
    for end, values in labels.items():
        put(root / 'labels' / part / f'a{end}.png', values)
    if classes:
        put_text(root / 'classes.txt', '\n'.join(classes) + '\n')
    return str(root)


def masks_of(source, index=0, view=WHOLE, **given):
    """Names, or numbers from 0, and masks of an example."""
    made = open_annotated([source], **given).example(index, np.random.default_rng(0), view)
    assert made.image.shape == (3, SIDE, SIDE) and made.image.dtype == torch.float32
    assert made.masks.dtype == torch.bool and made.masks.shape[1:] == (SIDE, SIDE)
    return {name: one.numpy() for name, one in zip(made.names or range(len(made.masks)), made.masks, strict=True)}


def assert_masks(found, expected):
    assert list(found) == list(expected)
    for name, pixels in expected.items():
        np.testing.assert_array_equal(found[name], pixels)


def values(*regions, rest=0, dtype=np.uint8):
    """A label map: pairs of a value and where it is, later on top."""
    labels = np.full((SIDE, SIDE), rest, dtype)
    for value, where in regions:
        labels[where] = value
    return labels


def test_a_folder_with_classes_largest_first(tmp_path):
    source = label_folder(tmp_path, {'': values((2, LEFT), (255, TOP), rest=1)}, classes=['sky', 'wall', 'red car'])
    assert_masks(masks_of(source), {'wall': ~LEFT & ~TOP, 'red car': LEFT & ~TOP})


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (',void=0', {'b': LEFT}),
        (',void=none', {'a': ~LEFT, 'b': LEFT}),
        (',first=1', {'a': LEFT}),
        (',first=1,void=none', {'a': LEFT}),
        (',void=1', {'a': ~LEFT}),
    ],
)
def test_what_counts_as_nothing_in_a_folder(tmp_path, options, expected):
    source = label_folder(tmp_path, {'': values((1, LEFT))}, classes=['a', 'b'])
    assert_masks(masks_of(source + options), expected)


def test_regions_without_classes_in_16_bits(tmp_path):
    source = label_folder(tmp_path, {'': values((60000, LEFT), (255, TOP), rest=0, dtype=np.uint16)})
    assert_masks(masks_of(source), {0: ~LEFT & ~TOP, 1: LEFT & ~TOP})
    assert_masks(masks_of(source + ',void=60000'), {0: ~LEFT & ~TOP, 1: TOP})


def test_annotators_are_drawn_and_train_is_the_usual_split(tmp_path):
    source = label_folder(tmp_path, {'_0': values((1, LEFT)), '_1': values((1, TOP))}, part='train')
    label_folder(tmp_path, {'': values((1, LEFT | TOP))}, part='val')
    data = open_annotated([source])
    drawn = [data.example(0, np.random.default_rng(seed), WHOLE).masks[1].numpy() for seed in range(8)]
    kinds = [next(name for name, where in (('left', LEFT), ('top', TOP)) if (one == where).all()) for one in drawn]
    assert set(kinds) == {'left', 'top'}
    assert_masks(masks_of(f'{source},split=val'), {0: LEFT | TOP, 1: ~(LEFT | TOP)})


def coco(root, images='train2017'):
    for name in ('000000000009', '000000000025'):
        put_picture(root / images / f'{name}.png')
    return f'coco:{root}'


CATEGORIES = [{'id': 1, 'name': 'person'}, {'id': 7, 'name': 'train'}, {'id': 187, 'name': 'sky-other-merged'}]


def test_stuff_maps_of_coco(tmp_path):
    source = coco(tmp_path / 'coco', 'images/train2017')
    for name in ('000000000009', '000000000025'):
        put(tmp_path / 'coco' / 'stuffthingmaps' / 'train2017' / f'{name}.png', values((0, LEFT), (255, TOP), rest=156))
    expected = {'sky-other': ~LEFT & ~TOP, 'person': LEFT & ~TOP}
    assert_masks(masks_of(source, 1), expected)
    assert_masks(masks_of(f'coco:{tmp_path},pictures=1'), expected)


def test_the_names_of_stuff_maps(tmp_path):
    source = coco(tmp_path)
    for name, row in (('000000000009', (0, 12, 89, 91)), ('000000000025', (170, 181, 10, 255))):
        put(tmp_path / 'annotations' / 'train2017' / f'{name}.png', np.array(row, np.uint8).repeat(16)[None].repeat(SIDE, 0))
    data = open_annotated([source])
    first, second = (sorted(data.example(index, np.random.default_rng(0), WHOLE).names) for index in range(2))
    assert first == ['banner', 'person', 'stop sign', 'toothbrush']
    assert second == ['fire hydrant', 'wall-brick', 'wood']
    assert len(data.classes) == 171


def panoptic(root):
    numbers = values((66000, LEFT), (300, TOP), (7, TOP & LEFT), rest=0, dtype=np.int32)
    colours = np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], -1).astype(np.uint8)
    put(root / 'annotations' / 'panoptic_train2017' / '000000000025.png', colours)
    segments = [{'id': 66000, 'category_id': 1}, {'id': 300, 'category_id': 187}, {'id': 7, 'category_id': 1}]
    annotations = [{'image_id': 25, 'file_name': '000000000025.png', 'segments_info': segments}]
    put_text(root / 'annotations' / 'panoptic_train2017.json', {'categories': CATEGORIES, 'images': [], 'annotations': annotations})


def test_panoptic_annotations_by_class_and_by_segment(tmp_path):
    source = coco(tmp_path)
    panoptic(tmp_path)
    assert_masks(masks_of(source), {'person': LEFT, 'sky-other-merged': TOP & ~LEFT})
    apart = open_annotated([source]).example(0, np.random.default_rng(0), WHOLE._replace(merge=False))
    assert apart.names == ('person', 'sky-other-merged', 'person')
    np.testing.assert_array_equal(apart.masks.numpy(), [LEFT & ~TOP, TOP & ~LEFT, LEFT & TOP])


def instances(root, annotations, name='instances_train2017.json'):
    images = [{'id': 9, 'file_name': '000000000009.png', 'width': 9, 'height': 9}, {'id': 25, 'file_name': '000000000025.png'}]
    put_text(root / name, {'categories': CATEGORIES, 'images': images, 'annotations': annotations})


def one(segmentation, category=1, image=25, **more):
    return {'image_id': image, 'category_id': category, 'segmentation': segmentation, **more}


def test_instances_as_polygons_and_run_lengths(tmp_path):
    source = coco(tmp_path)
    counts = [0, 24 * SIDE, 40 * SIDE]  # column by column
    instances(
        tmp_path / 'annotations',
        [
            one([[0, 0, 64, 0, 64, 16, 0, 16]], category=7),
            one({'size': [SIDE, SIDE], 'counts': counts}),
            one(runs(COLUMNS >= 60)),
            one(runs(np.ones((SIDE, SIDE))), iscrowd=1),
        ],
        'instances_train2017.json',
    )
    assert_masks(masks_of(source, 1), {'person': LEFT | (COLUMNS >= 60), 'train': TOP})
    assert_masks(masks_of(source, 0), {})
    apart = open_annotated([source]).example(1, np.random.default_rng(0), WHOLE._replace(merge=False, least_area=0))
    assert apart.names == ('person', 'train', 'person')
    np.testing.assert_array_equal(apart.masks.numpy(), [LEFT, TOP, COLUMNS >= 60])
    text = '\n'.join(summary(open_annotated([source])))
    assert '1 crowds' in text and '1 without regions: 000000000009' in text


def test_a_polygon_far_outside_is_cut_off_at_the_edge(tmp_path):
    source = coco(tmp_path)
    instances(tmp_path, [one([[0, 0, 1e15, 0, 1e15, 16, 0, 16]])])
    assert_masks(masks_of(source, 1), {'person': TOP})


def test_the_form_of_coco_is_chosen_and_captions_are_found(tmp_path):
    source = coco(tmp_path)
    panoptic(tmp_path)
    instances(tmp_path, [one(runs(TOP), category=7)])
    captions = [{'image_id': 25, 'caption': ' a  train '}, {'image_id': 25, 'caption': 'a man'}]
    put_text(tmp_path / 'captions_train2017.json', {'images': [{'id': 25, 'file_name': '000000000025.jpg'}], 'annotations': captions})
    assert_masks(masks_of(source + ',labels=instances', 1), {'train': TOP})
    data = open_annotated([source])
    assert {data.example(0, np.random.default_rng(seed), WHOLE).caption for seed in range(8)} == {'a train', 'a man'}


def sa1b(root, annotations, name='sa_1'):
    put_picture(root / f'{name}.png')
    put_text(root / f'{name}.json', {'image': {'file_name': '../../x.jpg', 'width': 1, 'height': 1}, 'annotations': annotations})
    return f'sa1b:{root}'


def test_sa1b_has_overlapping_masks_without_classes(tmp_path):
    source = sa1b(tmp_path / 'part', [{'segmentation': runs(TOP), 'area': 1e18}, {'segmentation': runs(LEFT), 'area': 0}])
    assert_masks(masks_of(f'sa1b:{tmp_path}'), {0: LEFT, 1: TOP})
    assert_masks(masks_of(source), {0: LEFT, 1: TOP})


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('c.json', {'sa_1.jpg': 'A cat. A dog. A bird.'}),
        ('c.json', {'sa_1': ['A cat. A dog. A bird.']}),
        ('c.json', [{'image': 'x/sa_1.png', 'caption': 'A cat. A dog. A bird.'}, {'image': 'sa_2', 'caption': 'No'}]),
        ('c.jsonl', '{"file_name": "sa_1.jpg", "text": "A cat. A dog. A bird."}\n\n{"sa_2": "no"}\n'),
        ('c.jsonl', '{"sa_1": "A cat. A dog. A bird."}\n'),
    ],
)
def test_captions_of_sa1b_are_two_sentences(tmp_path, name, content):
    source = sa1b(tmp_path / 'data' / 'x', [{'segmentation': runs(TOP)}])
    put_text(tmp_path / name, content)
    data = open_annotated([f'sa1b:{tmp_path}/data'], captions=tmp_path / name)
    assert data.example(0, np.random.default_rng(0), WHOLE).caption == 'A cat. A dog.'
    assert open_annotated([source]).example(0, np.random.default_rng(0), WHOLE).caption == ''


@pytest.mark.parametrize(
    ('caption', 'expected'), [('no stop', 'no stop'), ('One.', 'One.'), ('', ''), ('A. B.', 'A. B.'), ('A. B', 'A. B')]
)
def test_a_caption_may_have_fewer_sentences(caption, expected):
    assert first_sentences(caption) == expected


def test_numbers_are_found_with_and_without_zeros(tmp_path):
    put_text(tmp_path / 'c.json', [{'id': 25, 'caption': 'one'}])
    assert read_captions(tmp_path / 'c.json') == {'25': ('one',)}
    source = coco(tmp_path)
    panoptic(tmp_path)
    assert open_annotated([source], captions=tmp_path / 'c.json').picture(0)[1].captions == ('one',)


def labelled(root, classes=(), status='finished'):
    out = put_run(root, {'sub/a.png': values((1, LEFT), (2, TOP)).astype(np.int32)})
    run = read_run(out / 'run.json')
    settings = {'classes': json.dumps(classes)} if classes else {}
    write_header(run.model_copy(update={'status': status, 'settings': settings}), out / 'run.json')
    return out


def test_the_results_of_label_and_of_run(tmp_path):
    expected = {'a cat': LEFT & ~TOP, 'sky': TOP}
    assert_masks(masks_of(str(labelled(tmp_path, ('a cat', 'sky')))), dict(sorted(expected.items(), key=lambda one: -one[1].sum())))
    out = labelled(tmp_path / 'other')
    assert_masks(masks_of(str(out)), {0: LEFT & ~TOP, 1: TOP} if (LEFT & ~TOP).sum() > TOP.sum() else {0: TOP, 1: LEFT & ~TOP})
    (tmp_path / 'other' / 'in').rename(tmp_path / 'moved')
    with pytest.raises(PadsegError, match='images=FOLDER'):
        open_source(str(out))
    assert len(open_annotated([f'{out},images={tmp_path / "moved"}'])) == 1


def coordinates(root, size, name='a'):
    """A picture and a label map whose regions are columns of 8 pixels."""
    put_picture(root / 'images' / f'{name}.png', size)
    put(root / 'labels' / f'{name}.png', (np.mgrid[: size[0], : size[1]][1] // 8).astype(np.uint8))
    return open_annotated([str(root)])


def shown(made):
    """(rows, columns) of the picture that each pixel of an example shows."""
    pixels = (made.image * 255).round().int().numpy()
    return pixels[1], pixels[0]


@pytest.mark.parametrize('size', [(64, 100), (90, 64), (64, 64)])
def test_a_random_crop_is_a_square_of_picture_and_masks_alike(tmp_path, size):
    data = coordinates(tmp_path, size)
    corners, mirrored = set(), set()
    for seed in range(12):
        made = data.example(0, np.random.default_rng(seed), View(SIDE, least_area=0))
        rows, columns = shown(made)
        mirrored.add(bool(columns[0, 0] > columns[0, -1]))
        corners.add((int(rows.min()), int(columns.min())))
        assert (np.diff(rows, axis=0) == 1).all() and (abs(np.diff(columns, axis=1)) == 1).all()
        strips = {tuple(np.unique(columns[one] // 8)) for one in made.masks.numpy()}
        assert all(len(strip) == 1 for strip in strips) and made.masks.sum() == SIDE**2
    assert mirrored == {False, True}
    assert len(corners) > 1 if max(size) > SIDE else corners == {(0, 0)}
    assert all(top <= size[0] - SIDE and left <= size[1] - SIDE for top, left in corners)
    unflipped = [shown(data.example(0, np.random.default_rng(seed), View(SIDE, flip=False)))[1] for seed in range(12)]
    assert all(columns[0, 0] < columns[0, -1] for columns in unflipped)


def test_the_released_crop_is_the_top_left_of_the_random_one(tmp_path):
    data = coordinates(tmp_path, (SIDE, 100))
    for seed in range(8):
        square = shown(data.example(0, np.random.default_rng(seed), View(SIDE, least_area=0)))
        made = data.example(0, np.random.default_rng(seed), View(SIDE, 'released', least_area=0))
        assert made.image.shape == (3, SIDE, SIDE) and made.masks.shape[1:] == (40, 40)  # 640 of 1024
        for pixels, whole in zip(shown(made), square, strict=True):
            part = whole[:40, :40]
            np.testing.assert_array_equal(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], part[[0, 0, -1, -1], [0, -1, 0, -1]])
            middle = (np.arange(SIDE) + 0.5) * 40 / SIDE - 0.5  # centres of the result's pixels in the crop's
            line = np.interp(middle, np.arange(40), part[0] if pixels[0, 0] != pixels[0, -1] else part[:, 0])
            assert abs((pixels[0] if pixels[0, 0] != pixels[0, -1] else pixels[:, 0]) - line).max() <= 1
        columns = square[1][:40, :40]
        for one in made.masks.numpy():
            assert len(np.unique(columns[one] // 8)) == 1
        assert made.masks.sum() == 1600


def test_resizing_keeps_picture_and_masks_in_place(tmp_path):
    data = coordinates(tmp_path, (2 * SIDE, 3 * SIDE))
    made = data.example(0, np.random.default_rng(3), View(SIDE, flip=False, least_area=0))
    columns = shown(made)[1]
    for one in made.masks.numpy():
        assert len(np.unique(columns[one] // 8)) == 1
    squeezed = data.example(0, np.random.default_rng(0), View(SIDE, 'whole', flip=False, least_area=0))
    assert squeezed.masks.shape == (24, SIDE, SIDE)
    rows, columns = shown(squeezed)
    assert (rows[0, 0], columns[0, 0], rows[-1, -1], columns[-1, -1]) == (0, 1, 2 * SIDE - 2, 3 * SIDE - 2)


def test_masks_of_a_share_of_the_crop_and_no_more_than_wanted(tmp_path):
    numbers = (ROWS // 8 * 8 + COLUMNS // 8).astype(np.uint8)  # 64 regions of 64 pixels each
    numbers[0, 0] = numbers[0, 8]  # one has 63, another 65
    source = label_folder(tmp_path, {'': numbers})
    assert list(masks_of(source, view=WHOLE._replace(least_area=64 / 4096, most=99))) == [0]
    assert len(masks_of(source, view=WHOLE._replace(least_area=63 / 4096, most=99))) == 63
    found = masks_of(source)
    assert len(found) == 32
    assert found[0].sum() == 65
    assert found[1].sum() == 64 and found[1][0, 16]  # of equal ones the first
    flags = [{'segmentation': runs(numbers == number)} for number in range(64)]
    assert len(masks_of(sa1b(tmp_path / 'sa', flags))) == 32
    assert masks_of(f'sa1b:{tmp_path / "sa"}')[0].sum() == 65


def digest_of(data, index, seed, view):
    made = data.example(index, np.random.default_rng(seed), view)
    return made.image.sum().item(), made.masks.sum((1, 2)).tolist(), made.names, made.caption


def test_an_example_depends_on_number_and_generator_alone(tmp_path):
    source = label_folder(tmp_path, {'_0': values((1, LEFT)), '_1': values((1, TOP))})
    coordinates(tmp_path / 'more', (70, 90))
    data = open_annotated([source, str(tmp_path / 'more')])
    assert len(data) == 2
    expected = [digest_of(data, index, 5, View(SIDE)) for index in (0, 1)]
    data.example(1, np.random.default_rng(1), View(SIDE))
    assert [digest_of(pickle.loads(pickle.dumps(data)), index, 5, View(SIDE)) for index in (0, 1)] == expected
    with ProcessPoolExecutor(1, get_context('fork')) as pool:
        assert [pool.submit(digest_of, data, index, 5, View(SIDE)).result() for index in (1, 0)] == expected[::-1]
    assert data.digest == open_annotated([source, str(tmp_path / 'more')]).digest != open_annotated([source]).digest
    with pytest.raises(IndexError):
        data.example(2, np.random.default_rng(0), View(SIDE))


def test_what_is_found_before_training_begins(tmp_path):
    label_folder(tmp_path, {'': values((1, LEFT), rest=255)}, classes=['a', 'b', 'c'])
    put_picture(tmp_path / 'images' / 'b.png', (20, 30))
    put(tmp_path / 'labels' / 'b.png', np.full((20, 30), 255, np.uint8))
    put_picture(tmp_path / 'images' / 'unlabelled.png')
    data = open_annotated([str(tmp_path)])
    checked = data.checks[0]
    assert (checked.looked, checked.regions, checked.maps) == (2, 1, 2)
    assert checked.void == pytest.approx(1 - 24 * 64 / (64 * 64 + 600))
    assert (checked.smallest, checked.largest, checked.sizes) == ((20, 30), (64, 64), 2)
    assert (checked.classes, checked.empty, checked.bad) == ({'b': 1}, ('b',), {})
    lines = summary(data)
    assert '2 pictures' in lines[0] and 'left out: 1 without picture or labels' in lines[0]
    assert '30x20 to 64x64 (2 sizes)' in lines[1] and '67.3% void' in lines[1]
    assert '1 of 3 classes seen' in lines[2]
    assert open_annotated([str(tmp_path)], looks=1).checks[0].looked == 1


def test_pictures_that_cannot_be_used_are_named_or_left_out(tmp_path):
    source = label_folder(tmp_path, {'': values((1, LEFT))})
    put_picture(tmp_path / 'images' / 'short.png')
    put(tmp_path / 'labels' / 'short.png', np.zeros((5, 5), np.uint8))
    put_text(tmp_path / 'images' / 'text.png', 'no picture')
    put(tmp_path / 'labels' / 'text.png', np.zeros((5, 5), np.uint8))
    with pytest.raises(
        UsageError, match=r'2 of 3 pictures cannot be used: .*short.png: differs in size.*text.png: not a picture'
    ) as caught:
        open_annotated([source])
    assert '\n' not in str(caught.value)
    data = open_annotated([source], leave_out=True)
    assert len(data) == 1 and '2 left out' in summary(data)[-1]


def broken_folder(root, content):
    label_folder(root, {'': values((1, LEFT))}, classes=['a', 'b'])
    content(root)
    return str(root)


BAD = {
    'no such folder': (lambda root: str(root / 'none'), 'there is no folder'),
    'empty': (lambda root: str(root), 'no images/ with labels/'),
    'a picture': (lambda root: put_picture(root / 'a.png') or str(root / 'a.png'), 'there is no folder'),
    'options of another kind': (lambda root: f'{root},labels=stuff', 'labels= is not an option'),
    'an option twice': (lambda root: f'{root},void=1,void=2', 'void= is given twice'),
    'void is no number': (lambda root: label_folder(root, {'': values()}) + ',void=x', 'void= is a whole number'),
    'void is too large': (lambda root: label_folder(root, {'': values()}) + ',void=65536', 'void= is a value below 65536'),
    'first': (lambda root: label_folder(root, {'': values()}) + ',first=2', 'first= is 0 or 1'),
    'pictures': (lambda root: label_folder(root, {'': values()}) + ',pictures=0', 'pictures= is a whole number from 1'),
    'value without a name': (lambda root: label_folder(root, {'': values((9, LEFT))}, classes=['a']), 'the value 9 has no name'),
    'a deep value without a name': (
        lambda root: label_folder(root, {'': values((900, LEFT), dtype=np.uint16)}, classes=['a']),
        'the value 900 has no name',
    ),
    'a class twice': (lambda root: label_folder(root, {'': values()}, classes=['a', 'a']), 'twice'),
    'an empty line': (lambda root: label_folder(root, {'': values()}, classes=['a', '', 'b']), 'empty line'),
    'classes are no text': (
        lambda root: broken_folder(root, lambda root: (root / 'classes.txt').write_bytes(b'\xff\xfe')),
        'cannot be read as text',
    ),
    'labels in colours': (lambda root: broken_folder(root, lambda root: put_picture(root / 'labels' / 'a.png')), 'one channel'),
    'damaged labels': (lambda root: broken_folder(root, lambda root: put_text(root / 'labels' / 'a.png', '\x89PNG')), 'not a PNG'),
    'no labels': (
        lambda root: broken_folder(root, lambda root: (root / 'labels' / 'a.png').rename(root / 'labels' / 'b.png')),
        r'of the split: b$',
    ),
    'coco without pictures': (lambda root: panoptic(root) or f'coco:{root}', 'lacks the pictures of COCO: train2017/'),
    'coco without labels': (lambda root: coco(root), 'stuffthingmaps/train2017/, or annotations/panoptic_train2017.json'),
    'coco of another form': (lambda root: panoptic(root) or coco(root) + ',labels=instances', 'lacks .*: annotations/instances_train2017'),
    'an unknown form': (lambda root: coco(root) + ',labels=masks', 'labels= is one of stuff, panoptic, instances'),
    'coco of other pictures': (
        lambda root: instances(root, []) or put_picture(root / 'train2017' / 'b.png') or f'coco:{root}',
        'no picture of',
    ),
    'coco is no JSON': (lambda root: put_text(root / 'instances_train2017.json', '{') or coco(root), 'not valid JSON'),
    'coco of another JSON': (lambda root: put_text(root / 'instances_train2017.json', [1]) or coco(root), 'not annotations in COCO format'),
    'a category without a name': (
        lambda root: put_text(root / 'instances_train2017.json', {'categories': [{'id': 1, 'name': ' '}]}) or coco(root),
        'a category without a name',
    ),
    'an unknown category': (lambda root: instances(root, [one([[0, 0, 1, 1, 0, 1]], 5)]) or coco(root), 'not annotations in COCO format'),
    'a segment that nobody knows': (
        lambda root: panoptic(root) or put_picture(root / 'annotations' / 'panoptic_train2017' / '000000000025.png') or coco(root),
        'segment .* is not in',
    ),
    'a line': (lambda root: instances(root, [one([[0, 0, 9, 9]])]) or coco(root), 'damaged region of 000000000025: not polygons'),
    'a polygon of text': (lambda root: instances(root, [one([['a'] * 6])]) or coco(root), 'damaged region'),
    'an infinite polygon': (lambda root: instances(root, [one([[0, 0, 1, 1, 0, float('inf')]])]) or coco(root), 'not polygons'),
    'another size': (lambda root: instances(root, [one(runs(np.ones((5, 5))))]) or coco(root), r'of size \(5, 5\)'),
    'runs too short': (
        lambda root: instances(root, [one({'size': [SIDE, SIDE], 'counts': runs(np.ones((5, 5)))['counts']})]) or coco(root),
        'run lengths of 25 pixels in all for a mask of 4096',
    ),
    'runs too long': (
        lambda root: instances(root, [one({'size': [SIDE, SIDE], 'counts': [0, 10**12]})]) or coco(root),
        'run lengths that do not fill',
    ),
    'runs that go on': (lambda root: instances(root, [one({'size': [SIDE, SIDE], 'counts': 'o'})]) or coco(root), 'no run lengths'),
    'no outline': (lambda root: instances(root, [one(None)]) or coco(root), 'damaged region'),
    'sa1b without files': (lambda root: put_picture(root / 'a.png') or f'sa1b:{root}', 'no x.jpg with x.json'),
    'sa1b is no JSON': (lambda root: sa1b(root, []) and put_text(root / 'sa_1.json', 'x') or f'sa1b:{root}', 'not valid JSON'),
    'sa1b of another JSON': (lambda root: sa1b(root, []) and put_text(root / 'sa_1.json', {}) or f'sa1b:{root}', 'format of SA-1B'),
    'sa1b of another size': (lambda root: sa1b(root, [{'segmentation': runs(np.ones((9, 9)))}]), r'of size \(9, 9\)'),
    'a run that goes on': (lambda root: str(labelled(root, status='interrupted')), 'is not finished'),
    'a record of something else': (lambda root: put_text(root / 'run.json', '{}') or str(root), 'not a record'),
    'a class that no name has': (lambda root: str(labelled(root, ('a',))), 'has no name'),
}


@pytest.mark.parametrize('kind', BAD)
def test_what_is_no_source_is_refused_in_one_line(tmp_path, kind):
    make, reason = BAD[kind]
    with pytest.raises(PadsegError, match=reason) as caught:
        open_annotated([make(tmp_path)])
    assert '\n' not in str(caught.value) and not caught.value.several_lines


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        ('{"a": 5}', 'captions are texts'),
        ('[5]', 'captions are objects'),
        ('{', 'neither JSON nor JSON on each line'),
        ('{"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}', 'not captions in COCO format'),
        ('{"other.jpg": "x"}', 'describes none of the pictures: it has other'),
    ],
)
def test_captions_that_are_refused(tmp_path, content, reason):
    source = label_folder(tmp_path / 'data', {'': values((1, LEFT))})
    put_text(tmp_path / 'c.json', content)
    with pytest.raises(PadsegError, match=reason) as caught:
        open_annotated([source], captions=tmp_path / 'c.json')
    assert '\n' not in str(caught.value)


def test_annotations_lead_nowhere_outside_their_folder(tmp_path):
    put_picture(tmp_path / 'secret.png')
    source = coco(tmp_path / 'coco')
    images = [{'id': 25, 'file_name': '../../secret.png'}, {'id': 9, 'file_name': str(tmp_path / 'secret.png')}]
    put_text(tmp_path / 'coco' / 'instances_train2017.json', {'categories': CATEGORIES, 'images': images, 'annotations': []})
    with pytest.raises(PadsegError, match='no picture of train2017'):
        open_source(source)
    out = labelled(tmp_path / 'run')
    (out.parent / 'in' / 'sub').rename(tmp_path / 'elsewhere')
    (out.parent / 'in' / 'sub').symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(PadsegError, match='is a link'):
        open_source(str(out))
