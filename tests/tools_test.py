"""The forms of `padseg export` read back by the libraries of the tools that they are for: every one gives the same label maps."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import urllib.parse
import xml.etree.ElementTree
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, strategies
from hypothesis.extra import numpy as arrays
from support.runs import HAND_MADE, MAPS, put_run

from padseg.exports.cvat import run_lengths
from padseg.exports.labelstudio import brush_bytes
from padseg.exports.regions import each_region
from padseg.run.convert import convert

label_maps = arrays.arrays(np.int32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=strategies.integers(0, 4))
masks = arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40))
HOSTILE = ('a&b <c> "d" \'e\'.png', 'tab\t, line\n, return\r.png', '100% ?d=/#;+.png', 'é€😀.png', 'sub/ud\u0085\u2028.png')
BRUSHES = ('label_studio_converter.brush', 'label_studio_sdk.converter.brush')  # the second is the younger, and pins another OpenCV


@pytest.fixture
def out(tmp_path):
    return put_run(tmp_path, MAPS)


def joined(found: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Masks (H, W) as a label map, numbered in turn; none may overlap another or be empty."""
    labels = np.zeros(shape, np.int32)
    for number, mask in enumerate(found, start=1):
        assert mask.shape == shape and mask.any() and not labels[mask].any()
        labels[mask] = number
    return labels


def images_of_cvat(path: Path) -> list[xml.etree.ElementTree.Element]:
    root = xml.etree.ElementTree.parse(path).getroot()
    assert (root.tag, root.findtext('version'), root.findtext('meta/task/mode')) == ('annotations', '1.1', 'annotation')
    assert [label.findtext('name') for label in root.iterfind('meta/task/labels/label')] == ['region']
    return root.findall('image')


def of_cvat(path: Path) -> dict[str, np.ndarray]:
    """Label maps by picture. CVAT's server makes of a mask the numbers that its library decodes: the runs, then the box's corners."""
    decode_mask = pytest.importorskip('cvat_sdk.masks').decode_mask
    labels = {}
    for image in images_of_cvat(path):
        height, width = int(image.attrib['height']), int(image.attrib['width'])
        found = []
        for mask in image:
            assert (mask.tag, mask.attrib['label']) == ('mask', 'region')
            left, top, across, down = (int(mask.attrib[name]) for name in ('left', 'top', 'width', 'height'))
            points = [*map(int, mask.attrib['rle'].split(',')), left, top, left + across - 1, top + down - 1]
            found.append(decode_mask(points, image_width=width, image_height=height))
        labels[image.attrib['name']] = joined(found, (height, width))
    return labels


def of_label_studio(tasks: list[dict], brush: ModuleType, pictures: Path) -> dict[str, np.ndarray]:
    """Label maps by picture; the layer that counts is the last of four, opacity."""
    labels = {}
    for task in tasks:
        found, shape = [], (0, 0)
        for each in task['predictions'][0]['result']:
            shape = (each['original_height'], each['original_width'])
            pixels = brush.decode_rle(each['value']['rle']).reshape(*shape, 4)
            assert (pixels == pixels[..., 3:]).all() and set(np.unique(pixels)) <= {0, 255}
            found.append(pixels[..., 3] == 255)
        name = addressed(task, pictures).relative_to(pictures).as_posix()
        labels[name] = joined(found, shape) if found else np.zeros(MAPS[name].shape, np.int32)
    return labels


def addressed(task: dict, pictures: Path) -> Path:
    """The file that Label Studio serves for a task, where its root is the folder above the pictures."""
    address = urllib.parse.urlsplit(task['data']['image'])
    assert (address.scheme, address.netloc, address.path, address.fragment) == ('', '', '/data/local-files/', '')
    return pictures.parent / urllib.parse.parse_qs(address.query)['d'][-1]


def tasks_of(out: Path) -> list[dict]:
    return json.loads((out / 'label-studio/tasks.json').read_text(encoding='ascii'))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == sorted(expected)
    for name, labels in expected.items():
        assert np.array_equal(found[name], labels), name


def test_cvat_by_hand(tmp_path):
    out = put_run(tmp_path, {'a b.png': HAND_MADE, 'void.png': MAPS['void.png']})
    assert convert(out, 'cvat') == (out / 'cvat', 2, {})
    first, second = images_of_cvat(out / 'cvat/annotations.xml')
    assert first.attrib == {'id': '0', 'name': 'a b.png', 'width': '4', 'height': '2'}
    assert second.attrib == {'id': '1', 'name': 'void.png', 'width': '3', 'height': '2'}
    common = {'label': 'region', 'source': 'auto', 'occluded': '0', 'z_order': '0'}
    assert [mask.attrib for mask in first] == [
        {'rle': '0, 3, 1', 'left': '1', 'top': '0', 'width': '2', 'height': '2', **common},
        {'rle': '1, 3', 'left': '2', 'top': '0', 'width': '2', 'height': '2', **common},
        {'rle': '0, 1', 'left': '0', 'top': '1', 'width': '1', 'height': '1', **common},
    ]
    assert list(second) == []


def test_cvat_as_its_library_decodes_it(out):
    convert(out, 'cvat')
    assert_same(of_cvat(out / 'cvat/annotations.xml'), MAPS)


def test_cvat_as_datumaro_reads_it(out):
    datumaro = pytest.importorskip('datumaro')
    convert(out, 'cvat')
    pictures = out / 'cvat/images'  # it wants to see the pictures
    pictures.symlink_to(out.parent / 'in')
    found = {}
    for item in datumaro.Dataset.import_from(str(out / 'cvat'), 'cvat'):
        name = Path(item.media.path).relative_to(pictures).as_posix()
        found[name] = joined([annotation.image.astype(bool) for annotation in item.annotations], item.media.size)
    assert_same(found, MAPS)


@given(masks.filter(np.any))
def test_runs_are_those_of_cvat(mask):
    encoded = pytest.importorskip('cvat_sdk.masks').encode_mask(mask)
    (region,) = each_region(mask.astype(np.int32))
    left, top, width, height = region.box
    assert [*run_lengths(region.patch), left, top, left + width - 1, top + height - 1] == encoded


def test_names_that_are_hard_to_write(tmp_path):
    maps = dict.fromkeys(HOSTILE, HAND_MADE)
    out = put_run(tmp_path, maps)
    assert convert(out, 'cvat').failed == {} and convert(out, 'label-studio').failed == {}
    assert_same(of_cvat(out / 'cvat/annotations.xml'), maps)
    assert [addressed(task, tmp_path / 'in') for task in tasks_of(out)] == [tmp_path / 'in' / name for name in sorted(maps)]


@pytest.mark.skipif(sys.platform == 'darwin', reason='macOS has no such file names')
def test_names_that_cannot_be_written_are_left_out(tmp_path):
    strange = os.fsdecode(b'\xff.png')
    names = ('good.png', 'bell\x07.png', strange)
    out = put_run(tmp_path, dict.fromkeys(names, HAND_MADE))
    cvat, studio = convert(out, 'cvat'), convert(out, 'label-studio')
    assert list(cvat.failed) == ['bell\x07.png', strange] and 'XML cannot hold' in cvat.failed['bell\x07.png']
    assert list(of_cvat(out / 'cvat/annotations.xml')) == ['good.png']
    assert list(studio.failed) == [strange] and 'not valid UTF-8' in studio.failed[strange]
    assert [addressed(task, tmp_path / 'in').name for task in tasks_of(out)] == ['bell\x07.png', 'good.png']


def test_label_studio_by_hand(tmp_path):
    out = put_run(tmp_path, {'a b.png': np.array([[1, 2]], np.int32)})
    assert convert(out, 'label-studio') == (out / 'label-studio', 1, {})
    (task,) = tasks_of(out)
    (prediction,) = task['predictions']
    one, two = (each.pop('value') for each in prediction['result'])
    assert one['rle'] != two.pop('rle') and two == {'format': 'rle', 'brushlabels': ['region']}
    # 8 values (32 bits), of 7 + 1 bits (5), lengths of 2 + 1, 3 + 1, 7 + 1 or 15 + 1 bits (4 each);
    # a run, the first kind of length, 3 + 1 of them, 255; the same with 0; filled up to whole bytes
    bits = f'{8:032b} 00111 0010 0011 0111 1111  1 00 011 11111111  1 00 011 00000000  0000000'.replace(' ', '')
    assert one['rle'] == [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]
    size = {'original_width': 2, 'original_height': 1, 'image_rotation': 0}
    common = {'type': 'brushlabels', 'from_name': 'brush', 'to_name': 'image', **size}
    assert prediction == {'model_version': 'padseg 1.2.3 tiny', 'result': [{'id': '1', **common}, {'id': '2', **common}]}
    assert task['data'] == {'image': '/data/local-files/?d=in/a%20b.png'}
    view = xml.etree.ElementTree.parse(out / 'label-studio/interface.xml').getroot()
    assert view.find('Image').attrib['name'] == 'image' and view.find('Image').attrib['value'] == '$image'
    assert view.find('BrushLabels').attrib == {'name': 'brush', 'toName': 'image'}
    assert [label.attrib['value'] for label in view.iterfind('BrushLabels/Label')] == ['region']


def test_label_studio_addresses_pictures_from_the_folder_above_theirs(tmp_path, monkeypatch):
    out = put_run(tmp_path, {'sub/a.png': HAND_MADE})
    (tmp_path / 'in').rename(tmp_path / 'mo ved')
    monkeypatch.chdir(tmp_path / 'mo ved' / 'sub')
    for images in (tmp_path / 'mo ved', Path('..')):
        convert(out, 'label-studio', images=images)
        assert tasks_of(out)[0]['data'] == {'image': '/data/local-files/?d=mo%20ved/sub/a.png'}


@pytest.mark.parametrize('module', BRUSHES)
def test_label_studio_as_its_library_decodes_it(out, module):
    brush = pytest.importorskip(module)
    convert(out, 'label-studio')
    assert_same(of_label_studio(tasks_of(out), brush, out.parent / 'in'), MAPS)


@pytest.mark.parametrize('module', BRUSHES)
def test_the_bit_stream_of_label_studio(module):
    brush = pytest.importorskip(module)

    @given(masks)
    def every_mask(mask):
        check(mask)

    def check(mask):
        assert np.array_equal(brush.decode_rle(brush_bytes(mask)), np.repeat(mask.ravel() * np.uint8(255), 4))

    every_mask()
    for pixels in (1, 2, 3, 4, 5, 63, 64, 65, 16383, 16384, 16385, 40000):  # around the ends of what a kind of length holds
        for value in (False, True):
            check(np.full((1, pixels), value))
            check(np.array([[*[value] * pixels, not value]]))


def test_label_studio_takes_the_predictions_for_its_interface(out):
    interface = pytest.importorskip('label_studio_sdk.label_interface').LabelInterface
    convert(out, 'label-studio')
    view = interface((out / 'label-studio/interface.xml').read_text(encoding='ascii'))
    view.validate()
    for task in tasks_of(out):
        assert view.validate_task({'data': task['data']})
        for prediction in task['predictions']:
            assert view.validate_prediction(prediction, return_errors=True) == []


def test_label_studio_finds_the_pictures(tmp_path, monkeypatch):
    files = pytest.importorskip('label_studio_sdk._extensions.label_studio_tools.core.utils.io')
    names = {**MAPS, **dict.fromkeys(HOSTILE, HAND_MADE)}
    out = put_run(tmp_path, names)
    convert(out, 'label-studio')
    monkeypatch.setattr(files, 'LOCAL_FILES_DOCUMENT_ROOT', str(tmp_path))
    found = [files.resolve_local_storage_file(task['data']['image']) for task in tasks_of(out)]
    assert found == [str(tmp_path / 'in' / name) for name in sorted(names)]


def test_coco_as_supervision_reads_it(out):
    supervision = pytest.importorskip('supervision')
    convert(out, 'coco')
    pictures = out.parent / 'in'
    paths = {'images_directory_path': str(pictures), 'annotations_path': str(out / 'coco/instances.json')}
    dataset = supervision.DetectionDataset.from_coco(**paths, force_masks=True)
    assert dataset.classes == ['region']
    found = {}
    for path, image, detections in dataset:
        name = Path(path).relative_to(pictures).as_posix()
        found[name] = joined(list(detections.mask) if len(detections) else [], image.shape[:2])
        assert (detections.class_id == 0).all()
    assert_same(found, MAPS)


def test_coco_as_fiftyone_reads_it(out):
    coco = pytest.importorskip('fiftyone.utils.coco')
    convert(out, 'coco')
    pictures = out.parent / 'in'
    paths = {'data_path': str(pictures), 'labels_path': str(out / 'coco/instances.json')}
    found = {}
    with coco.COCODetectionDatasetImporter(**paths, label_types='segmentations') as importer:
        for path, size, regions in importer:
            masks = []
            for region in regions.detections if regions else ():
                assert region.label == 'region'
                mask = np.zeros((size.height, size.width), bool)
                left, top = (round(share * length) for share, length in zip(region.bounding_box, mask.shape[::-1], strict=False))
                rows, columns = region.mask.shape
                mask[top : top + rows, left : left + columns] = region.mask
                masks.append(mask)
            found[Path(path).relative_to(pictures).as_posix()] = joined(masks, (size.height, size.width))
    assert_same(dict(sorted(found.items())), MAPS)


def test_labelme_files_as_labelme_reads_them(out):
    labelme = pytest.importorskip('labelme')
    convert(out, 'labelme')
    for name, labels in MAPS.items():
        file = labelme.LabelFile(str(out / 'labelme' / Path(name).with_suffix('.json')))
        assert file.image_data == (out.parent / 'in' / name).read_bytes()
        classes, instances = importlib.import_module('labelme.utils').shapes_to_label(labels.shape, file.shapes, {'region': 1})
        assert np.array_equal(instances, labels) and np.array_equal(classes, labels > 0)


LOAD = """
import sys, datasets, numpy
rows = datasets.load_dataset(sys.argv[1], split='train')
assert rows.column_names == ['image', 'mask'], rows.column_names
for number, row in enumerate(rows):
    numpy.savez(f'{sys.argv[2]}/{number}', image=row['image'], mask=row['mask'])
"""


LOAD_SETS = """
import hashlib, json, sys, datasets, numpy
found = []
for folder in sys.argv[1:]:
    rows = datasets.load_dataset(folder, split='train')
    assert rows.column_names == ['image', 'mask'], rows.column_names
    found.append([[hashlib.sha256(numpy.array(row['image'])).hexdigest(), int(numpy.max(row['mask']))] for row in rows])
print(json.dumps(found))
"""


def test_imagefolder_as_the_datasets_library_loads_it(out, tmp_path):
    pytest.importorskip('datasets.load')  # without the library, `datasets` is the folder tests/datasets
    convert(out, 'hf-imagefolder')
    home = {'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1'}
    (tmp_path / 'rows').mkdir()
    command = [sys.executable, '-c', LOAD, out / 'hf-imagefolder', tmp_path / 'rows']
    ran = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    found = {}
    for path in (tmp_path / 'rows').iterdir():
        with np.load(path) as row:
            found[row['image'].tobytes()] = row['mask']
    assert len(found) == len(MAPS)
    for name, labels in MAPS.items():
        with PIL.Image.open(out.parent / 'in' / name) as picture:
            assert np.array_equal(found[np.asarray(picture).tobytes()], labels), name


def test_the_datasets_library_loads_pictures_of_any_name(tmp_path):
    """Names that mean something to it, or to what it reads tables with; in the last two sets there is no other picture."""
    pytest.importorskip('datasets.load')  # without the library, `datasets` is the folder tests/datasets
    strange = ('$HOME.png', '${HOME}.png', 'a\rb.png', 'a%24HOME.png', '%.png', '%2e%2E.png', 'tab\t.png', 'dir /x.png', 'train/x.png')
    strange += ('~.png', 'a::b.png', '=1+1.png', 'a,"b".png', 'line\n.png', '*?[a].png', 'NA.png', 'metadata.csv.png')
    sets = [strange, ('__MACOSX/._a.png', '__pycache__.png'), ('.hidden/a.png', '.b.png')]
    command = [sys.executable, '-c', LOAD_SETS]
    for number, names in enumerate(sets):
        out = put_run(tmp_path / str(number), {name: np.full((2, 3), place, np.int32) for place, name in enumerate(sorted(names))})
        assert convert(out, 'hf-imagefolder', tmp_path / f'set{number}').failed == {}
        command.append(str(tmp_path / f'set{number}'))
    home = {'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1', 'b': 'a variable'}
    ran = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    for number, (names, digests) in enumerate(zip(sets, json.loads(ran.stdout), strict=True)):
        pictures = [np.asarray(PIL.Image.open(tmp_path / str(number) / 'in' / name)) for name in sorted(names)]
        assert digests == [[hashlib.sha256(picture).hexdigest(), place] for place, picture in enumerate(pictures)]


@given(label_maps)
def test_every_label_map_comes_back(tmp_path_factory, labels):
    brush = pytest.importorskip(BRUSHES[0])
    ids = np.unique(labels[labels > 0])
    labels = np.where(labels > 0, np.searchsorted(ids, labels) + 1, 0).astype(np.int32)
    folder = tmp_path_factory.mktemp('same')
    out = put_run(folder, {'a.png': labels})
    assert convert(out, 'cvat').failed == {} and convert(out, 'label-studio').failed == {}
    assert_same(of_cvat(out / 'cvat/annotations.xml'), {'a.png': labels})
    if labels.any():  # without a region nothing in a task says how large its picture is
        assert_same(of_label_studio(tasks_of(out), brush, folder / 'in'), {'a.png': labels})
