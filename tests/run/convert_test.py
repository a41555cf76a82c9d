"""A run's results in other forms: each file read back as its format is published gives the same regions, and nothing is lost unsaid."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings, strategies
from hypothesis.extra import numpy as arrays
from pycocotools.coco import COCO
from support.runs import HAND_MADE, MAPS, put_run

from padseg.commands import main
from padseg.errors import NoImages, UsageError
from padseg.exports import CONVERTERS, read_label_map, write_label_map
from padseg.exports.imagefolder import portable
from padseg.exports.labelme import file_names
from padseg.exports.panoptic import coded
from padseg.exports.regions import each_region
from padseg.run.convert import convert, place_of, write_coco
from padseg.run.records import Entry, read_run
from padseg.system.files import together
from padseg.system.ledger import line, write_lines
from padseg.types import LabelMap

ROOT = Path(__file__).parents[2]
label_maps = arrays.arrays(np.int32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=strategies.integers(0, 4))


@pytest.fixture
def out(tmp_path):
    return put_run(tmp_path, MAPS)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def of_labelme(path: Path) -> np.ndarray:
    """The label map that labelme draws: shapes in turn, each within its box, whose last point belongs to it."""
    data = json.loads(path.read_text(encoding='utf-8'))
    labels = np.zeros((data['imageHeight'], data['imageWidth']), np.int32)
    for number, shape in enumerate(data['shapes'], start=1):
        (left, top), (right, bottom) = shape['points']
        with PIL.Image.open(io.BytesIO(base64.b64decode(shape['mask'], validate=True))) as picture:
            labels[top : bottom + 1, left : right + 1][np.asarray(picture).astype(bool)] = number
    return labels


def of_panoptic(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as picture:
        assert picture.mode == 'RGB'
        return np.asarray(picture).astype(int) @ (1, 256, 65536)


def test_regions_by_hand():
    found = list(each_region(HAND_MADE))
    assert [(region.number, region.box, region.area) for region in found] == [
        (1, (1, 0, 2, 2), 3),
        (2, (2, 0, 2, 2), 3),
        (3, (0, 1, 1, 1), 1),
    ]
    assert found[1].patch.tolist() == [[False, True], [True, True]]
    assert list(each_region(np.zeros((2, 2), np.uint8))) == []


def test_coco_by_hand(tmp_path):
    out = put_run(tmp_path, {'a b.png': HAND_MADE})
    assert convert(out, 'coco') == (out / 'coco', 1, {})
    data = json.loads((out / 'coco' / 'instances.json').read_bytes())
    runs = [annotation.pop('segmentation') for annotation in data['annotations']]
    common = {'image_id': 1, 'category_id': 1, 'iscrowd': 0}
    assert data == {
        'info': {'description': 'regions found by padseg', 'version': '1.2.3', 'model': 'tiny', 'revision': 'abc', 'weights': 'f00'},
        'licenses': [],
        'categories': [{'id': 1, 'name': 'region', 'supercategory': ''}],
        'annotations': [
            {'id': 1, 'area': 3, 'bbox': [1, 0, 2, 2], **common},
            {'id': 2, 'area': 3, 'bbox': [2, 0, 2, 2], **common},
            {'id': 3, 'area': 1, 'bbox': [0, 1, 1, 1], **common},
        ],
        'images': [{'id': 1, 'file_name': 'a b.png', 'width': 4, 'height': 2}],
    }
    # columns from the top: 1 zero and 1 one; and so on: 2 zeros, 3 ones, 3 zeros; written as digits from '0' on
    assert runs[0] == {'size': [2, 4], 'counts': '233'}
    assert runs[2] == {'size': [2, 4], 'counts': '116'}


def test_coco_as_pycocotools_reads_it(out):
    convert(out, 'coco')
    coco = COCO(out / 'coco' / 'instances.json')
    images = coco.loadImgs(coco.getImgIds())
    assert [(image['id'], image['file_name']) for image in images] == list(enumerate(sorted(MAPS), start=1))
    assert sorted(coco.getAnnIds()) == list(range(1, 306))
    for image in images:
        labels = MAPS[image['file_name']]
        assert (image['height'], image['width']) == labels.shape
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image['id']))
        assert len(annotations) == labels.max()
        decoded = np.zeros(labels.shape, int)
        for number, annotation in enumerate(annotations, start=1):
            mask = coco.annToMask(annotation)
            assert not decoded[mask > 0].any()
            decoded[mask > 0] = number
            assert annotation['area'] == mask.sum()
        assert np.array_equal(decoded, labels)


def test_panoptic_colours_are_the_regions(out):
    convert(out, 'coco-panoptic')
    data = json.loads((out / 'coco' / 'panoptic.json').read_bytes())
    assert data['categories'] == [{'id': 1, 'name': 'region', 'supercategory': '', 'isthing': 1, 'color': [220, 20, 60]}]
    names = {image['id']: image['file_name'] for image in data['images']}
    assert list(names.values()) == sorted(MAPS)
    for annotation in data['annotations']:
        labels = MAPS[names[annotation['image_id']]]
        assert annotation['file_name'] == f'{names[annotation["image_id"]]}.png'
        assert np.array_equal(of_panoptic(out / 'coco' / 'panoptic' / annotation['file_name']), labels)
        segments = {segment['id']: segment for segment in annotation['segments_info']}
        assert sorted(segments) == sorted(set(labels[labels > 0].tolist()))
        assert all(segment['area'] == (labels == number).sum() for number, segment in segments.items())
        assert all((segment['category_id'], segment['iscrowd']) == (1, 0) for segment in segments.values())
    by_hand = next(annotation for annotation in data['annotations'] if annotation['file_name'] == 'a b.png.png')
    assert [segment['bbox'] for segment in by_hand['segments_info']] == [[1, 0, 2, 2], [2, 0, 2, 2], [0, 1, 1, 1]]


def test_panoptic_codes_in_the_order_blue_green_red():
    assert coded(np.array([[0, 258, 65535]], np.uint16)).tolist() == [[[0, 0, 0], [0, 1, 2], [0, 255, 255]]]
    assert coded(np.array([[65536 * 255 + 3]], np.int32)).tolist() == [[[255, 0, 3]]]


def test_labelme_shapes_are_the_regions(out):
    convert(out, 'labelme')
    for name, labels in MAPS.items():
        path = out / 'labelme' / Path(name).with_suffix('.json')
        assert np.array_equal(of_labelme(path), labels)
        data = json.loads(path.read_text(encoding='utf-8'))
        assert (path.parent / data['imagePath']).samefile(out.parent / 'in' / name)
        assert (data['version'], data['flags'], data['imageData']) == ('5.5.0', {}, None)
    shape = json.loads((out / 'labelme' / 'a b.json').read_bytes())['shapes'][1]
    assert isinstance(shape.pop('mask'), str)
    expected = {'label': 'region', 'points': [[2, 0], [3, 1]], 'group_id': None, 'description': '', 'shape_type': 'mask', 'flags': {}}
    assert shape == expected


def test_labelme_beside_the_pictures_leaves_what_others_wrote(out, tmp_path):
    theirs = tmp_path / 'in' / 'a b.json'
    theirs.write_text('{"by": "hand"}')
    converted = convert(out, 'labelme', tmp_path / 'in')
    assert converted.failed == {'a b.png': f'{theirs}: already exists with other annotations: move it away, or choose another --out'}
    assert theirs.read_text() == '{"by": "hand"}'
    assert json.loads((tmp_path / 'in/sub/many.json').read_bytes())['imagePath'] == 'many.png'
    theirs.unlink()
    for _ in range(2):
        assert convert(out, 'labelme', tmp_path / 'in').failed == {}


def test_labelme_inside_the_run_is_replaced(out):
    convert(out, 'labelme')
    (out / 'labelme' / 'a b.json').write_text('{}')
    assert convert(out, 'labelme').failed == {}
    assert np.array_equal(of_labelme(out / 'labelme' / 'a b.json'), HAND_MADE)


def test_labelme_files_of_pictures_that_share_a_stem():
    assert file_names(['a.jpg', 'b.jpg', 'b.png', 'c/b.png']) == {
        'a.jpg': 'a.json',
        'b.jpg': 'b.jpg.json',
        'b.png': 'b.png.json',
        'c/b.png': 'c/b.json',
    }
    assert file_names(['A.jpg', 'a.png']) == {'A.jpg': 'A.jpg.json', 'a.png': 'a.png.json'}


@given(strategies.lists(strategies.from_regex(r'([ab]/)?[abA](\.(jpg|png|b)){1,3}', fullmatch=True), unique_by=str.casefold))
def test_no_two_pictures_share_a_labelme_file(names):
    assert len({file.casefold() for file in file_names(names).values()}) == len(names)


def test_imagefolder_pairs_pictures_and_label_maps(out):
    convert(out, 'hf-imagefolder')
    folder = out / 'hf-imagefolder'
    with (folder / 'metadata.csv').open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert rows == [{'file_name': f'images/{name}.png', 'mask_file_name': f'labels/{name}.png'} for name in sorted(MAPS)]
    for name, row in zip(sorted(MAPS), rows, strict=True):
        assert np.array_equal(read_label_map(folder / row['mask_file_name']), MAPS[name])
        with PIL.Image.open(folder / row['file_name']) as ours, PIL.Image.open(out.parent / 'in' / name) as theirs:
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert len(files(folder)) == 2 * len(MAPS) + 2
    # one split, although a folder is called test
    assert (folder / 'README.md').read_text().split('---')[1].split() == (
        'configs: - config_name: default data_files: - split: train path: "**"'.split()
    )


def test_imagefolder_has_pictures_upright_and_without_exif(tmp_path):
    out = put_run(tmp_path, {'a.png': HAND_MADE})
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    exif[PIL.ExifTags.Base.Make] = 'a camera'
    sideways = np.zeros((4, 2, 3), np.uint8)
    sideways[0, 0] = 255  # upper left: turned clockwise, it is upper right
    PIL.Image.fromarray(sideways).save(tmp_path / 'in/a.png', exif=exif)
    entry = Entry(input='a.png', status='done', size=(2, 4), outputs={'labels': 'labels/a.png.png'})
    write_lines([line(entry)], out / 'manifest.jsonl')
    assert convert(out, 'hf-imagefolder').failed == {}
    with PIL.Image.open(out / 'hf-imagefolder/images/a.png.png') as picture:
        assert np.asarray(picture)[..., 0].tolist() == [[0, 0, 0, 255], [0, 0, 0, 0]]
        assert not picture.getexif() and not picture.info


def test_imagefolder_leaves_a_card_that_is_there(out, tmp_path):
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set/README.md').write_text('by hand')
    assert convert(out, 'hf-imagefolder', tmp_path / 'set').pictures == len(MAPS)
    assert (tmp_path / 'set/README.md').read_text() == 'by hand'


def test_imagefolder_names_pictures_that_are_gone_changed_or_badly_named(tmp_path):
    maps = dict.fromkeys(('changed.png', 'gone.png', 'good.png', 'back\\slash.png'), HAND_MADE)
    out = put_run(tmp_path, maps)
    (tmp_path / 'in/gone.png').unlink()
    PIL.Image.new('RGB', (4, 2), 'red').save(tmp_path / 'in/changed.png')
    converted = convert(out, 'hf-imagefolder')
    assert converted.pictures == 1
    assert list(converted.failed) == ['back\\slash.png', 'changed.png', 'gone.png']
    assert 'backslash' in converted.failed['back\\slash.png']
    assert 'not the picture that was segmented' in converted.failed['changed.png']
    assert 'No such file' in converted.failed['gone.png'] and '--images' in converted.failed['gone.png']
    assert sorted(files(out / 'hf-imagefolder')) == ['README.md', 'images/good.png.png', 'labels/good.png.png', 'metadata.csv']


@pytest.mark.skipif(sys.platform == 'darwin', reason='macOS has no such file names')
def test_names_that_are_no_utf8(tmp_path, capsys):
    name = os.fsdecode(b'\xff.png')
    out = put_run(tmp_path, {name: HAND_MADE})
    for format in ('coco', 'coco-panoptic', 'labelme'):
        assert main(['export', str(out), '--format', format]) == 0
    assert json.loads((out / 'coco/instances.json').read_bytes())['images'][0]['file_name'] == name
    assert np.array_equal(of_labelme(out / 'labelme' / os.fsdecode(b'\xff.json')), HAND_MADE)
    capsys.readouterr()
    assert main(['export', str(out), '--format', 'hf-imagefolder']) == 3
    assert capsys.readouterr().err.startswith('padseg: \\udcff.png: its name')


@settings(max_examples=30)
@given(label_maps)
def test_every_form_holds_the_same_regions(tmp_path_factory, labels):
    ids = np.unique(labels[labels > 0])
    labels = np.where(labels > 0, np.searchsorted(ids, labels) + 1, 0).astype(np.int32)
    out = put_run(tmp_path_factory.mktemp('same'), {'a.png': labels})
    for format in CONVERTERS:
        assert convert(out, format)[1:] == (1, {})
    coco = COCO(out / 'coco' / 'instances.json')
    masks = [coco.annToMask(annotation) * number for number, annotation in enumerate(coco.loadAnns(coco.getAnnIds()), start=1)]
    assert np.array_equal(sum(masks, np.zeros(labels.shape, int)), labels)
    assert np.array_equal(of_panoptic(out / 'coco/panoptic/a.png.png'), labels)
    assert np.array_equal(of_labelme(out / 'labelme/a.json'), labels)
    assert np.array_equal(read_label_map(out / 'hf-imagefolder/labels/a.png.png'), labels)


@pytest.mark.parametrize('format', CONVERTERS)
def test_again_gives_the_same_bytes_and_leaves_the_run_alone(out, tmp_path, format):
    before = files(out)
    convert(out, format, tmp_path / 'a')
    first = files(tmp_path / 'a')
    for path in (tmp_path / 'a', *((tmp_path / 'a' / part / 'sub') for part in CONVERTERS[format].PARTS)):
        (path / '.padseg-0').write_bytes(b'of a killed one')
    convert(out, format, tmp_path / 'a')
    assert files(tmp_path / 'a') == first and first
    assert files(out) == before


@pytest.mark.parametrize('format', CONVERTERS)
def test_label_maps_that_cannot_be_used_are_named_and_the_rest_go_on(out, format):
    (out / 'labels/a b.png.png').unlink()
    many = out / 'labels/sub/many.png.png'
    many.write_bytes(many.read_bytes()[:60])
    write_label_map(LabelMap(HAND_MADE, ()), out / 'labels/void.png.png')
    converted = convert(out, format)
    assert converted.pictures == 1
    assert list(converted.failed) == ['a b.png', 'sub/many.png', 'void.png']
    for name, words in zip(converted.failed, ('missing', 'truncated or damaged', 'differs in size'), strict=True):
        assert words in converted.failed[name] and f'labels/{name}.png' in converted.failed[name]
    written = files(converted.folder)
    assert [name for name in written if 'a b' in name or 'many' in name or 'void' in name] == []
    if format == 'coco':
        data = json.loads(written['instances.json'])
        assert [(image['id'], image['file_name']) for image in data['images']] == [(3, 'sub/test/é.png')]
        assert [(annotation['id'], annotation['image_id']) for annotation in data['annotations']] == [(1, 3), (2, 3)]
    elif CONVERTERS[format].PARTS:
        assert any('é' in name for name in written)
    else:
        data = b''.join(written.values())
        assert ('é'.encode() in data or b'%C3%A9' in data) and b'many' not in data


@pytest.mark.parametrize('format', CONVERTERS)
def test_only_pictures_that_are_there_are_exported(out, tmp_path, format):
    """The run found them, and they are gone now; where all their folder is gone, nothing is known of them."""
    (tmp_path / 'in/a b.png').unlink()
    (tmp_path / 'in/void.png').unlink()
    converted = convert(out, format, tmp_path / 'present')
    reason = f'cannot read {tmp_path}/in/a b.png: No such file or directory (--images says where the pictures are)'
    assert converted.failed.keys() == {'a b.png', 'void.png'} and converted.failed['a b.png'] == reason
    written = b''.join(files(tmp_path / 'present').values())
    assert converted.pictures == 2 and b'a b' not in written and b'void.png' not in written and b'many' in written
    shutil.rmtree(tmp_path / 'in')
    failed = convert(out, format, tmp_path / 'all').failed
    assert failed.keys() == (set(MAPS) if format == 'hf-imagefolder' else set())


def test_the_command_line_of_a_run_says_which_pictures_are_not_in_the_export(out, tmp_path, capsys):
    (tmp_path / 'in/a b.png').unlink()
    assert main(['export', str(out), '--format', 'coco']) == 3
    assert capsys.readouterr().err.splitlines()[0].startswith(f'padseg: a b.png: cannot read {tmp_path}/in/a b.png')


def test_two_exports_at_once_leave_each_other_alone(out, tmp_path):
    """What the first has half written stays while others work and end; what a killed one left goes when none is at work."""
    with CONVERTERS['coco'].writer(place_of(out, read_run(out / 'run.json'), tuple(MAPS), tmp_path / 'both', None)):
        with together(tmp_path / 'both', lambda: None):
            begun = sorted((tmp_path / 'both').iterdir())
            assert len(begun) == 1
            assert convert(out, 'coco', tmp_path / 'both').failed == {}
            assert convert(out, 'coco-panoptic', tmp_path / 'both').failed == {}
            assert begun[0].exists()
        convert(out, 'coco-panoptic', tmp_path / 'both')
        assert not begun[0].exists()
        begun[0].write_text('')  # for the writer to end
    assert len(list((tmp_path / 'both').iterdir())) == 3


def test_names_of_the_datasets_library_are_one_to_one():
    assert portable('sub/a b+é.png') == 'sub/a b+é.png'
    assert portable('$HOME/%41.png') == '%24HOME/%2541.png'
    assert portable('.a/__b/_c/..d.png') == '%2Ea/%5F_b/_c/%2E.d.png'
    names = [''.join(letters) for letters in itertools.product(['$', '%', '24', '%24', 'a', '.', '/', '_'], repeat=4)]
    assert len({portable(name) for name in names}) == len(set(names))


def test_a_file_where_a_folder_is_fails_alone(out):
    (out / 'labelme' / 'a b.json').mkdir(parents=True)
    converted = convert(out, 'labelme')
    assert list(converted.failed) == ['a b.png'] and 'directory' in converted.failed['a b.png'].lower()
    assert converted.pictures == len(MAPS) - 1


def test_pictures_that_moved_and_a_run_over_one_picture(tmp_path):
    out = put_run(tmp_path, {'a.png': HAND_MADE}, source=tmp_path / 'in' / 'a.png')
    assert convert(out, 'hf-imagefolder').failed == {}
    (tmp_path / 'in').rename(tmp_path / 'moved')
    assert list(convert(out, 'hf-imagefolder').failed) == ['a.png']
    assert convert(out, 'hf-imagefolder', images=tmp_path / 'moved').failed == {}
    convert(out, 'labelme', images=tmp_path / 'moved')
    assert json.loads((out / 'labelme/a.json').read_bytes())['imagePath'] == '../../moved/a.png'


def test_both_files_of_coco(out, tmp_path):
    assert write_coco(out) == {}
    convert(out, 'coco', tmp_path / 'apart')
    convert(out, 'coco-panoptic', tmp_path / 'apart')
    assert files(out / 'coco') == files(tmp_path / 'apart')
    (out / 'labels/a b.png.png').unlink()
    assert list(write_coco(out)) == ['a b.png']


def test_where_there_is_no_run(out, tmp_path):
    with pytest.raises(NoImages, match='no results of `padseg run` in'):
        convert(tmp_path / 'in', 'coco')
    with pytest.raises(UsageError, match='unknown format yolo; known: coco, coco-panoptic, labelme, hf-imagefolder'):
        convert(out, 'yolo')
    with pytest.raises(UsageError, match='mix with those of the run'):
        convert(out, 'hf-imagefolder', out)
    with pytest.raises(NoImages, match='there is no folder'):
        convert(out, 'labelme', images=tmp_path / 'nowhere')
    write_lines([], out / 'manifest.jsonl')
    with pytest.raises(NoImages, match='no picture is done'):
        convert(out, 'coco')
    assert not (out / 'coco').exists()


def test_the_command(out, tmp_path, capsys):
    (out / 'labels/void.png.png').unlink()
    assert main(['export', str(out), '--format', 'coco', '--out', str(tmp_path / 'c'), '--json']) == 3
    printed, said = capsys.readouterr()
    reason = f'{out}/labels/void.png.png: missing'
    assert json.loads(printed) == {'folder': str(tmp_path / 'c'), 'pictures': 3, 'failed': {'void.png': reason}}
    assert said.splitlines() == [f'padseg: void.png: {reason}', f'3 pictures in {tmp_path / "c"}, 1 failed']
    assert len(COCO(tmp_path / 'c' / 'instances.json').getImgIds()) == 3


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main(['export', str(tmp_path), '--format', 'coco']) == 5
    assert capsys.readouterr() == ('', f'padseg: there are no results of `padseg run` in {tmp_path}\n')
    assert main(['export', str(tmp_path), '--format', 'yolo']) == 2
    assert 'coco-panoptic' in capsys.readouterr().err


def test_readme_names_all_forms():
    table = (ROOT / 'docs/formats.md').read_text(encoding='utf-8').partition('| format | what it writes')[2].partition('\n\n')[0]
    assert [line.split('`')[1] for line in table.splitlines()[2:]] == list(CONVERTERS)
