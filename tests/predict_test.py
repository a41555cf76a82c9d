"""Evaluating a model that is given names: the classes of a picture or all, and what is scored of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from padseg.cli import main
from padseg.datasets.rows import DATASETS
from padseg.datasets.tables import class_names
from padseg.errors import UsageError
from padseg.evaluate import Task
from padseg.evaluate import evaluate
from padseg.evaluate import present
from padseg.datasets import label_folder
from padseg.exports import read_label_map
from padseg.images import read
from padseg.label import label
from padseg.options import LabelOptions
from padseg.options import Options
from padseg.predict import NamePredictor
from padseg.predict import Predictor
from padseg.prompts import checked
from padseg.protocols import protocol
from padseg.protocols import view
from padseg.segment import segment

ROOT = Path(__file__).parent.parent
CLASSES = ('background', 'cat', 'traffic light', 'tra', 'photo')


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
        found = label(read(root / f'images/{name}.png'), speller, [CLASSES[number] for number in chosen], LabelOptions(geometry='stretch'))
        expected = np.array(chosen)[found.labels - 1]
        assert np.array_equal(read_label_map(out / f'labels/{name}.png'), expected)
    rules = protocol('seg4diff-ovss')
    scores = evaluate(out / 'labels', root / 'labels', num_classes=5, background=0, rules=rules)
    assert report['scores']['miou'] == pytest.approx(scores.miou) and report['scores']['accuracy'] == pytest.approx(scores.accuracy)
    assert set(report['iou']) == set(CLASSES) and report['iou']['traffic light'] is None  # not in the ground truth
    assert report['iou']['background'] is None  # named in the prompt, and not scored
    said = report['settings']['predictions']
    assert (said['names'], said['geometry'], said['layers'], said['encoders']) == (names, 'stretch', '2', 'l+g')
    assert (out / 'sheet.jpg').exists()


def test_options_of_names_reach_the_model(root, texts_folder, capsys):
    more = ('--layers', '1,3', '--step', '3', '--prompt', 'per-class', '--on', 'proposals', '--encoders', 'l', '--geometry', 'whole')
    assert main(arguments(root, texts_folder, *more)) == 0
    said = json.loads(capsys.readouterr().out)['settings']['predictions']
    assert (said['layers'], said['steps'], said['prompt'], said['on'], said['scores']) == ('1, 3', '3', 'per-class', 'proposals', 'minmax')
    assert (said['encoders'], said['geometry'], said['proposals_layer']) == ('l', 'whole', 2)
    for wrong, words in (
        (('--layer', '1', '--layers', '2'), 'Give either --layer or --layers'),
        (('--threshold', '0.1'), '--threshold is not for --protocol seg4diff-ovss'),
        (('--protocol', 'goca', '--names', 'all'), '--names is for --protocol seg4diff-ovss'),
        (('--protocol', 'diffseg', '--background-words', 'sky'), '--background-words is for --protocol seg4diff-ovss'),
        (('--protocol', 'goca'), 'regions that have names'),
        (('--names', 'some'), "'some' is not one of"),
    ):
        assert main(arguments(root, texts_folder, *wrong)) == 2
        assert words in capsys.readouterr().err


def test_pixels_without_a_class_are_background_if_there_is_one(root, speller, picture):
    options = LabelOptions(geometry='stretch', background_below=9.0)
    where = view(picture.shape[:2], 'native')
    (found,) = NamePredictor(speller, options, CLASSES, 0, 'all', None)('a', picture, where)
    assert found.shape == picture.shape[:2] and not found.any()
    with pytest.raises(UsageError, match='no class for pixels without class'):
        NamePredictor(speller, options, CLASSES, None, 'all', None)('a', picture, where)
    (nothing,) = NamePredictor(speller, options, CLASSES, None, 'present', None)('a', picture, where, ())
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
    names = class_names(DATASETS[name])
    assert checked(names) == names and not any('-' in each for each in names)


def test_scenes_for_an_evaluation(tmp_path):
    command = [sys.executable, str(ROOT / 'bin/prepare-scenes'), str(tmp_path / 'scenes'), '--count', '3']
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    files = {path: path.read_bytes() for path in (tmp_path / 'scenes').rglob('*.*')}
    assert len(files) == 7
    assert main(['eval', 'folder', '--root', str(tmp_path / 'scenes'), '--check', '-q']) == 0
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    assert {path: path.read_bytes() for path in files} == files
    sizes = [read_label_map(tmp_path / f'scenes/labels/{number:05}.png').shape for number in range(3)]
    assert sizes == [(256, 256), (208, 320), (320, 208)]


@pytest.mark.parametrize('refined', [{'refine': 'guided'}, {'superpixels': 20.0, 'join': 0.2}, {'superpixels': 20.0, 'min_area': 0.05}])
def test_regions_that_are_scored_are_refined_as_those_of_a_run(refined, backbone, picture):
    options = Options(**{'refine': 'none', 'superpixels': 0.0, 'join': 0.0, 'min_area': 0.0, 'components': False, **refined})
    (found,) = Predictor(backbone, options)('a', picture, view(picture.shape[:2], 'native'))
    expected = segment(picture, backbone, options).labels
    assert np.array_equal(found, expected)
    plain = Options(refine='none', superpixels=0.0, join=0.0, min_area=0.0, components=False)
    assert not np.array_equal(expected, segment(picture, backbone, plain).labels)
