"""Evaluating a model that is given names: the classes of a picture or all, and what is scored of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import pytest
import torch

from padseg.commands import main
from padseg.datasets import label_folder
from padseg.datasets.rows import DATASETS
from padseg.datasets.tables import row_class_names
from padseg.errors import UsageError
from padseg.evaluation.evaluate import Task, evaluate, present
from padseg.evaluation.metrics import compact
from padseg.evaluation.predict import has_numbers, predict_classes, predict_regions, proposal_numbers
from padseg.evaluation.protocols import compared_view, protocol
from padseg.exports import read_label_map
from padseg.images import read
from padseg.methods import METHODS, open_vocabulary, seg4diff
from padseg.methods.open_vocabulary import LabelOptions, label, prepare
from padseg.methods.seg4diff import Options, segment
from padseg.methods.stages.prompts import checked_names
from padseg.types import Frame, TokenMaps

ROOT = Path(__file__).parents[2]
CLASSES = ('background', 'cat', 'traffic light', 'tra', 'photo')
OPTIONS = LabelOptions(geometry='seg4diff-ovss')


@pytest.fixture
def root(tmp_path, picture):
    """Two pictures, of which one shows background, cat and photo, the other background, tra, and void."""
    rng = np.random.default_rng(0)
    for name, values in (('a', (0, 1, 4)), ('b', (0, 3, 255))):
        (tmp_path / 'set/images').mkdir(parents=True, exist_ok=True)
        (tmp_path / 'set/labels').mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray((picture + rng.integers(0, 30, picture.shape)).astype(np.uint8)).save(tmp_path / f'set/images/{name}.png')
        truth = rng.choice(values, (6, 10)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        PIL.Image.fromarray(truth).save(tmp_path / f'set/labels/{name}.png')
    (tmp_path / 'set/padseg.toml').write_text(f'classes = {json.dumps(CLASSES)}\nbackground = "background"\n')
    return tmp_path / 'set'


def arguments(root, texts_folder, *more):
    model = ['--model', str(texts_folder), '--device', 'cpu']
    return ['eval', 'folder', '--root', str(root), '--protocol', 'seg4diff-ovss', *model, '--json', '-q', *map(str, more)]


@pytest.mark.parametrize('names', ['present', 'all'])
def test_a_model_with_names_is_scored_as_its_label_maps_are(names, root, texts_folder, speller, tmp_path, capsys):
    out = tmp_path / 'out'
    assert main(arguments(root, texts_folder, '--out', out, *(() if names == 'present' else ('--names', 'all')))) == 0
    report = json.loads(capsys.readouterr().out)
    for name, shown in (('a', (0, 1, 4)), ('b', (0, 3))):
        chosen = shown if names == 'present' else range(5)
        found = label(read(root / f'images/{name}.png'), speller, [CLASSES[number] for number in chosen], OPTIONS)
        expected = np.array(chosen)[found.labels - 1]
        assert np.array_equal(read_label_map(out / f'labels/{name}.png'), expected)
    rules = protocol('seg4diff-ovss')
    scores = evaluate(out / 'labels', root / 'labels', num_classes=5, background=0, rules=rules)
    assert report['scores']['miou'] == pytest.approx(scores.miou) and report['scores']['accuracy'] == pytest.approx(scores.accuracy)
    assert set(report['iou']) == set(CLASSES) and report['iou']['traffic light'] is None  # not in the ground truth
    assert report['iou']['background'] is None  # named in the prompt, and not scored
    said = report['settings']['predictions']
    assert (said['names'], said['geometry'], said['layers'], said['encoders']) == (names, 'seg4diff-ovss', '2', 'l+g')
    assert (out / 'sheet.jpg').exists()


def test_options_of_names_reach_the_model(root, texts_folder, capsys):
    more = ('--layers', '1,3', '--step', '3', '--prompt', 'per-class', '--on', 'proposals', '--encoders', 'l', '--geometry', 'whole')
    assert main(arguments(root, texts_folder, *more)) == 0
    said = json.loads(capsys.readouterr().out)['settings']['predictions']
    assert (said['layers'], said['steps'], said['prompt'], said['on'], said['scores']) == ('1, 3', '3', 'per-class', 'proposals', 'minmax')
    assert (said['encoders'], said['geometry'], said['proposals_layer']) == ('l', 'whole', 2)
    for wrong, words in (
        (('--layer', '1', '--layers', '2'), 'Give either --layer or --layers'),
        (('--threshold', '0.1'), '--threshold is an option of --method seg4diff, diffseg and diffseg-names.'),
        (('--protocol', 'diffseg', '--names', 'all'), '--names is for methods that take class names; seg4diff takes none'),
        (
            ('--protocol', 'diffseg', '--background-words', 'sky'),
            '--background-words is an option of --method open-vocabulary, goca, concepts and diffseg-names.',
        ),
        (('--protocol', 'goca'), 'scores named regions'),
        (('--names', 'some'), "'some' is not one of"),
    ):
        assert main(arguments(root, texts_folder, *wrong)) == 2
        assert words in capsys.readouterr().err


def test_pixels_without_a_class_are_background_if_there_is_one(root, speller, picture):
    options = LabelOptions(geometry='stretch', background_below=9.0)
    where = compared_view(picture.shape[:2], 'native')
    (found,) = predict_classes(open_vocabulary, speller, options, CLASSES, 0, 'all')('a', picture, where, ())
    assert found.shape == picture.shape[:2] and not found.any()
    with pytest.raises(UsageError, match='no class for unlabelled pixels'):
        predict_classes(open_vocabulary, speller, options, CLASSES, None, 'all')('a', picture, where, ())
    (nothing,) = predict_classes(open_vocabulary, speller, options, CLASSES, None)('a', picture, where, ())
    assert not nothing.any()  # nothing to look for, nothing that counts


def test_a_class_that_is_lost_at_640_pixels_is_not_named(tmp_path):
    truth = np.zeros((1281, 1400), np.uint8)
    truth[0, 0], truth[1, 1], truth[5, 5] = 1, 2, 255  # rows and columns 1, 3, 5, … are looked at
    (tmp_path / 'labels').mkdir()
    PIL.Image.fromarray(truth).save(tmp_path / 'labels/a.png')
    dataset = label_folder(tmp_path / 'labels', 3)
    assert present(Task(dataset, protocol('seg4diff-ovss')), dataset.samples[0], [truth]) == [0, 2]


@pytest.mark.parametrize('name', ['voc20', 'coco-object', 'context59', 'ade150', 'cityscapes19'])
def test_names_of_data_sets_can_stand_in_a_prompt(name):
    names = row_class_names(DATASETS[name])
    assert checked_names(names) == names and not any('-' in each for each in names)


class Small(NamedTuple):
    """A data set of two pictures. values: the file values of the first one, with the names of the classes that they mean; the second
    has the first value, and the last one, which has no name or is background."""

    pictures: str
    labels: str
    listing: str
    values: dict[int, str | None]


SMALL = {
    'voc20': Small(
        'JPEGImages/{}.jpg',
        'SegmentationClass/{}.png',
        'ImageSets/Segmentation/val.txt',
        {8: 'cat', 6: 'bus', 20: 'tvmonitor', 255: None, 0: None},
    ),
    'coco-object': Small(
        'val2017/{}.jpg',
        'stuffthingmaps_trainval2017/val2017/{}.png',
        '',
        {9: 'traffic light', 60: 'cake', 89: 'toothbrush', 255: 'background', 91: 'background'},
    ),
    'context59': Small(
        'JPEGImages/{}.jpg',
        'SegmentationClassContext/{}.png',
        'ImageSets/SegmentationContext/val.txt',
        {1: 'aeroplane', 15: 'cat', 59: 'wood', 255: None, 0: None},
    ),
    'ade150': Small(
        'images/validation/{}.jpg',
        'annotations/validation/{}.png',
        '',
        {1: 'wall', 41: 'base', 45: 'chest of drawers', 150: 'flag', 255: None, 0: None},
    ),
    'cityscapes19': Small(
        'leftImg8bit/val/ulm/{}_leftImg8bit.png',
        'gtFine/val/ulm/{}_gtFine_labelIds.png',
        '',
        {7: 'road', 19: 'traffic light', 28: 'bus', 9: None, 0: None},
    ),
}


def written(small, root, picture):
    """The data set on disk; the names in the ground truth of each of its pictures, (48, 80) of objects."""
    rng = np.random.default_rng(0)
    values = list(small.values)
    names = {}
    for name, own in (('a', values), ('b', [values[0], values[-1]])):
        raw = rng.choice(own, (6, 10)).repeat(8, 0).repeat(8, 1)
        names[name] = np.array([small.values[value] for value in raw.flat], object).reshape(raw.shape)
        for pattern, pixels in ((small.pictures, picture + rng.integers(0, 30, picture.shape)), (small.labels, raw)):
            path = root / pattern.format(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels.astype(np.uint8)).save(path)
    if small.listing:
        (root / small.listing).parent.mkdir(parents=True)
        (root / small.listing).write_text('a\nb\n')
    return names


@pytest.mark.parametrize('names', ['present', 'all'])
@pytest.mark.parametrize('name', SMALL)
def test_a_model_with_names_on_a_data_set(name, names, texts_folder, speller, picture, tmp_path, capsys):
    small, root, out = SMALL[name], tmp_path / 'set', tmp_path / 'out'
    truths = written(small, root, picture)
    model = ['--model', str(texts_folder), '--device', 'cpu', '--allow-missing', '--out', str(out)]
    assert main(['eval', name, '--root', str(root), '--protocol', 'seg4diff-ovss', '--names', names, *model, '--json', '-q']) == 0
    report = json.loads(capsys.readouterr().out)
    classes = row_class_names(DATASETS[name])
    pairs = Counter()  # (found, true): pixels
    for (each, truth), stored in zip(truths.items(), sorted((out / 'labels').rglob('*.png')), strict=True):
        shown = [one for one in classes if (truth == one).any()]
        asked = shown if names == 'present' else classes
        assert (len(prepare(speller, OPTIONS, asked).prompts) > 1) == (names == 'all')
        found = label(read(root / small.pictures.format(each)), speller, asked, OPTIONS)
        guess = np.array(['', *asked], object)[found.labels]
        assert np.array_equal(np.array(classes, object)[read_label_map(stored)], guess)
        pairs.update(zip(guess.flat, truth.flat, strict=True))
    scored = Counter({pair: count for pair, count in pairs.items() if pair[1] not in (None, 'background')})
    ious = {}
    for one in classes:
        true, guessed = (sum(count for pair, count in scored.items() if pair[side] == one) for side in (1, 0))
        ious[one] = scored[one, one] / (true + guessed - scored[one, one]) if true else None
    assert report['iou'] == pytest.approx(ious)
    told = [iou for iou in ious.values() if iou is not None]
    assert len(told) == len({*small.values.values()} - {None, 'background'})
    assert report['scores']['miou'] == pytest.approx(sum(told) / len(told))
    right = sum(count for (guess, truth), count in scored.items() if guess == truth)
    assert report['scores']['accuracy'] == pytest.approx(right / scored.total())
    assert 0 < right < scored.total()  # a random model finds some: else wrong figures could be equal


def test_scenes_for_an_evaluation(tmp_path):
    command = [sys.executable, str(ROOT / 'bin/prepare-scenes'), str(tmp_path / 'scenes'), '--count', '3']
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    files = {path: path.read_bytes() for path in (tmp_path / 'scenes').rglob('*.*')}
    assert len(files) == 8
    assert main(['eval', 'folder', '--root', str(tmp_path / 'scenes'), '--check', '-q']) == 0
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    assert {path: path.read_bytes() for path in files} == files
    sizes = [read_label_map(tmp_path / f'scenes/labels/{number:05}.png').shape for number in range(3)]
    assert sizes == [(256, 256), (208, 320), (320, 208)]


@pytest.mark.parametrize('refined', [{'refine': 'guided'}, {'superpixels': 20.0, 'join': 0.2}, {'superpixels': 20.0, 'min_area': 0.05}])
def test_regions_that_are_scored_are_refined_as_those_of_a_run(refined, backbone, picture):
    plain = Options(refine='none', superpixels=0.0, join=0.0, min_area=0.0, components=False, normalisation='minmax-softmax')
    options = dataclasses.replace(plain, **refined)
    (found,) = predict_regions(seg4diff, seg4diff.prepare(backbone, options))('a', picture, compared_view(picture.shape[:2], 'native'), ())
    expected = segment(picture, backbone, options).labels
    assert np.array_equal(found, expected)
    assert not np.array_equal(expected, segment(picture, backbone, plain).labels)


@pytest.mark.parametrize('size', [(60, 90), (700, 900)])
def test_regions_of_the_released_code_have_the_numbers_of_its_argmax(size):
    """Maps are enlarged to the picture, cut at the upper left corner to its size with a short edge of 640, and enlarged to that."""
    maps = TokenMaps(torch.rand(7, 6, 6, generator=torch.manual_seed(0)), tuple('abcdefg'), Frame(size, (0, 0, *size)))
    maps.maps[3] = maps.maps[0] / 2  # never the strongest: its number stays unused
    options = seg4diff.Options(geometry='seg4diff-release', threshold=0.0, normalisation='sum', **seg4diff.UNREFINED)
    chosen = protocol('seg4diff-release')
    where = compared_view(size, chosen.compare)
    height, width = where.size
    shares = (maps.maps.double() / maps.maps.double().sum((1, 2), keepdim=True))[None]
    whole = torch.nn.functional.interpolate(shares, size, mode='bilinear', align_corners=False)[..., :height, :width]
    expected = torch.nn.functional.interpolate(whole, where.size, mode='bilinear', align_corners=False)[0].argmax(0).numpy()
    found = proposal_numbers(options, maps, where, chosen)
    assert found.shape == expected.shape and (found == expected).mean() > 0.9999
    assert has_numbers(seg4diff, options, maps, where, chosen)
    assert not has_numbers(seg4diff, dataclasses.replace(options, components=True), maps, where, chosen)
    assert not has_numbers(METHODS['grid'], METHODS['grid'].Options(), None, where, chosen)


def test_regions_are_numbered_as_proposals_where_ids_are_taken_as_they_are(picture, backbone, tmp_path):
    options = seg4diff.Options(geometry='diffseg', threshold=0.0)
    where = compared_view(picture.shape[:2], '512')
    prepared = seg4diff.prepare(backbone, options)
    (raw,) = predict_regions(seg4diff, prepared, out=tmp_path, rules=protocol('diffseg'))('a', picture, where)
    (plain,) = predict_regions(seg4diff, prepared, rules=protocol('diffseg', ids='compact'))('a', picture, where)
    assert np.array_equal(compact(raw), compact(plain)) and not np.array_equal(raw, plain)
    assert np.array_equal(read_label_map(tmp_path / 'labels/a.png'), raw)
