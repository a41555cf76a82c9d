"""The public face: every form in which people have pictures gives the same answer, and what is wrong is said in one line."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import padseg
from padseg.errors import PadsegError, UsageError
from padseg.images import WrongPicture
from padseg.types import LabelMap

OPTIONS = padseg.Options(threshold=0.001, normalisation='minmax-softmax')  # with which a random model gives several regions


def same(first: LabelMap, second: LabelMap) -> bool:
    return np.array_equal(first.labels, second.labels) and first.tokens == second.tokens


@pytest.fixture
def path(picture: np.ndarray, tmp_path: Path) -> Path:
    PIL.Image.fromarray(picture).save(tmp_path / 'picture.png')
    return tmp_path / 'picture.png'


def test_all_forms_of_a_picture_are_the_same_picture(backbone, picture, path):
    expected = padseg.segment(picture, backbone, OPTIONS)
    assert expected.labels.max() > 1
    with path.open('rb') as file:
        forms = [path, str(path), PIL.Image.open(path), PIL.Image.fromarray(picture), file, io.BytesIO(path.read_bytes())]
        forms += [np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)]), np.asfortranarray(picture), picture[:, ::1]]
        for form in forms:
            assert same(padseg.segment(form, backbone, OPTIONS), expected), type(form)


def test_grey_is_a_picture_of_three_like_channels(backbone, picture):
    grey = picture[..., 0]
    expected = padseg.segment(np.repeat(grey[..., None], 3, 2), backbone, OPTIONS)
    assert same(padseg.segment(grey, backbone, OPTIONS), expected)
    assert same(padseg.segment(PIL.Image.fromarray(grey), backbone, OPTIONS), expected)


def test_what_is_transparent_lies_on_white(backbone, picture):
    alpha = np.full(picture.shape[:2], 255, np.uint8)
    alpha[:20] = 0
    white = picture.copy()
    white[:20] = 255
    assert same(padseg.segment(np.dstack([picture, alpha]), backbone, OPTIONS), padseg.segment(white, backbone, OPTIONS))


def test_a_pillow_image_is_turned_upright_as_its_file_is(backbone, picture, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(picture).save(tmp_path / 'turned.jpg', exif=exif)
    labels = padseg.segment(PIL.Image.open(tmp_path / 'turned.jpg'), backbone, OPTIONS)
    assert labels.labels.shape == (80, 48)
    assert same(labels, padseg.segment(tmp_path / 'turned.jpg', backbone, OPTIONS))


def test_a_list_gives_a_list_in_its_order(speller, picture, path):
    pictures = [path, picture[:, ::-1].copy(), picture[:40, :40]]
    for function, more in (
        (padseg.segment, (OPTIONS,)),
        (padseg.label, (['cat', 'dog'],)),
    ):
        results = function(pictures, speller, *more)
        assert [result.labels.shape for result in results] == [(48, 80), (48, 80), (40, 40)]
        for result, one in zip(results, pictures, strict=True):
            assert np.array_equal(result.labels, function(one, speller, *more).labels)
        assert function([], speller, *more) == []
    maps = padseg.token_maps(tuple(pictures), speller)
    assert [each.maps.shape[0] for each in maps] == [77, 77, 77]


def test_a_name_is_a_model_that_is_loaded_once(sd3_folder, picture, monkeypatch):
    from padseg import backbones

    loads = []
    load = backbones.load
    monkeypatch.setattr(backbones, 'load', lambda *args, **how: loads.append(args) or load(*args, **how))
    first = padseg.segment(picture, str(sd3_folder), OPTIONS)
    assert same(padseg.segment(picture, str(sd3_folder), OPTIONS), first)
    padseg.token_maps(picture, str(sd3_folder))
    assert loads == [(str(sd3_folder),)]
    assert same(first, padseg.segment(picture, load(str(sd3_folder)), OPTIONS))
    deeper = padseg.Options(layer=3)  # than the block up to which it was loaded
    assert padseg.token_maps(picture, str(sd3_folder), deeper).maps.shape[0] == 77


@pytest.mark.parametrize(
    'options',
    [
        padseg.Options(),
        OPTIONS,
        padseg.Options(geometry='diffseg', threshold=0.002),
        padseg.Options(superpixels=50.0, join=0.1, components=True, min_area=0.01),
    ],
)
def test_regions_of_kept_maps_are_those_of_segment(backbone, picture, options):
    maps = padseg.token_maps(picture, backbone, options)
    assert same(padseg.regions(picture, maps, options), padseg.segment(picture, backbone, options))


def test_segment_runs_other_methods_with_their_own_options(backbone, picture):
    from padseg.methods import diffcut

    options = padseg.DiffCutOptions(tau=0.9)
    prepared = diffcut.prepare(backbone, options)
    expected = diffcut.labels(picture, diffcut.maps([picture], prepared)[0], prepared)
    assert same(padseg.segment(picture, backbone, options, method='diffcut'), expected) and expected.labels.max() > 1
    assert padseg.segment(picture, backbone, method='grid').labels.max() > 1
    with pytest.raises(UsageError, match='options of diffcut are DiffCutOptions; got DiffSegOptions'):
        padseg.segment(picture, backbone, padseg.DiffSegOptions(), method='diffcut')
    with pytest.raises(UsageError, match='method is one of seg4diff, diffseg, .*; got goca'):
        padseg.segment(picture, backbone, method='goca')


def test_regions_of_the_embedded_model_with_its_own_settings():
    path = Path(__file__).parents[1] / 'data' / 'images' / 'coffee.jpg'
    assert same(padseg.regions(path, padseg.token_maps(path)), padseg.segment(path))


def test_maps_that_do_not_say_which_model_made_them(backbone, picture):
    maps = padseg.token_maps(picture, backbone)._replace(settings={})
    with pytest.raises(UsageError, match='do not record the model.s settings for normalisation, threshold, refine'):
        padseg.regions(picture, maps)
    whole = padseg.Options().resolve(backbone.spec)
    assert same(padseg.regions(picture, maps, whole), padseg.segment(picture, backbone))


@pytest.mark.parametrize(
    'wrong',
    [
        None,
        5,
        {'a': 1},
        object(),
        np.zeros((4, 4, 3)),
        np.full((4, 4, 3), np.nan, np.float32),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4, 3), bool),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        io.StringIO('text'),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(wrong, backbone):
    for images in (wrong, [wrong]):
        with pytest.raises(WrongPicture) as caught:
            padseg.segment(images, backbone)
        message = str(caught.value)
        assert message.startswith('a picture is a path, a file opened in binary mode, a PIL image, or a uint8 array (H, W)')
        assert '; got ' in message and '\n' not in message
    assert issubclass(WrongPicture, ValueError) and issubclass(WrongPicture, PadsegError)


def test_a_tensor_is_refused(backbone):
    import torch

    with pytest.raises(WrongPicture, match='got Tensor$'):
        padseg.segment(torch.zeros(3, 8, 8), backbone)


@pytest.mark.parametrize('classes', ['cat', {'cat', 'dog'}, frozenset({'cat'})])
def test_classes_are_a_list(classes, speller, picture):
    with pytest.raises(UsageError, match=f'^classes must be a list of names in order, .*; got {type(classes).__name__}$'):
        padseg.label(picture, speller, classes)


@pytest.mark.parametrize('model', [5, Path('model')])
def test_a_model_is_a_loaded_one_or_a_name(model, picture):
    with pytest.raises(UsageError, match='expected a loaded model or a model name'):
        padseg.segment(picture, model)


def test_masks_by_hand():
    labels = np.array([[0, 1, 1, 2], [0, 1, 2, 2]], np.int32)
    first, second = LabelMap(labels, ((3,), (4, 5))).masks()
    assert first['segmentation'].tolist() == [[False, True, True, False], [False, True, False, False]]
    assert first.pop('segmentation').dtype == bool and first == {
        'area': 3,
        'bbox': [1, 0, 2, 2],
        'predicted_iou': None,
        'point_coords': None,
        'stability_score': None,
        'crop_box': [0, 0, 4, 2],
        'region': 1,
        'name': None,
    }
    assert (second['area'], second['bbox'], second['region']) == (3, [2, 0, 2, 2], 2)
    assert LabelMap(np.zeros((2, 2), np.int32), ()).masks() == []
    (shown,) = LabelMap(labels * (labels == 2), (), ('cat', 'dog')).masks()
    assert (shown['region'], shown['name']) == (2, 'dog')


def test_supervision_reads_the_masks(backbone, picture):
    supervision = pytest.importorskip('supervision')
    labels = padseg.segment(picture, backbone, OPTIONS)
    detections = supervision.Detections.from_sam(labels.masks())
    assert len(detections) == labels.labels.max() > 1
    by_area = sorted(labels.masks(), key=lambda mask: mask['area'], reverse=True)
    assert [int(area) for area in detections.area] == [mask['area'] for mask in by_area]
    for mask, box, one in zip(detections.mask, detections.xyxy, by_area, strict=True):
        left, top, width, height = one['bbox']
        assert mask.sum() == one['area'] and box.tolist() == [left, top, left + width, top + height]
    assert (detections.mask.sum(0) == (labels.labels > 0)).all()
