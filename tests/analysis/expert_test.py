"""Finding the expert block: measures by hand, a model with a planted block, and the embedded model."""

from __future__ import annotations

import csv
import json

import cv2
import numpy as np
import pytest
from support import planted

from padseg import Options, load, segment
from padseg.analysis import expert
from padseg.commands import main
from padseg.train.scenes import CLASSES, scene


@pytest.fixture(scope='module')
def model(made_once, make_model):
    return made_once('planted', planted.planted, make_model)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('expert')
    planted.pictures(folder, 3)
    return folder


def found(place, model, *flags: str):
    """The record, the rows and the settings that the command writes."""
    out = place / 'out'
    assert main(['analyze', 'expert', '--model', str(model), '--device', 'cpu', '--out', str(out), '-q', *flags]) == 0
    assert sorted(path.name for path in out.iterdir()) == ['expert.csv', 'expert.json', 'expert.png', 'padseg.json']
    assert cv2.imread(str(out / 'expert.png')).shape[1] > 800
    return tuple(json.loads((out / name).read_text()) for name in ('expert.json', 'padseg.json'))


def test_information_that_label_maps_share_by_hand():
    halves, quarters = np.array([[0, 0, 1, 1]]), np.array([[5, 6, 7, 8]])
    assert expert.shared(halves, halves) == pytest.approx(1) and expert.shared(halves, quarters) == pytest.approx(1)
    assert expert.shared(quarters, quarters) == pytest.approx(2)
    assert expert.shared(halves, np.array([[0, 1, 0, 1]])) == pytest.approx(0) == expert.shared(halves, np.zeros_like(halves))


def test_coherence_by_hand():
    stripes = np.array([[1, 1, 2, 2]] * 2)  # of 10 pairs of neighbours 8 are alike; of two pixels at all, half
    assert expert.coherence(stripes) == pytest.approx((0.8 - 0.5) / 0.5)
    assert expert.coherence(np.array([[1, 2], [2, 1]])) == pytest.approx(-1)
    assert expert.coherence(np.ones((3, 3), int)) == 0 == expert.coherence(np.ones((1, 1), int))


def test_the_middle_of_equal_thresholds():
    scores = [0.1, 0.5, 0.5, 0.4999, 0.5, 0.2, 0.5]
    assert expert.best_threshold(np.array([scores])) == 2 and expert.best_threshold(np.array([[0.1, 0.2, 0.9]])) == 2


def test_measures_that_some_pictures_lack():
    rows = np.array([[np.nan, 1.0], [np.nan, 3.0]])
    assert np.array_equal(expert.mean_of([rows, np.array([[np.nan, np.nan], [2.0, 5.0]])]), [[np.nan, 1], [2, 4]], equal_nan=True)


@pytest.mark.parametrize('labelled', [False, True])
def test_the_planted_block_is_found(labelled, place, model, capsys):
    labels = ['--labels', str(place / 'labels')] if labelled else []
    record, settings = found(place, model, '--data', str(place / 'images'), *labels, '--steps', '1')
    rows = list(csv.DictReader((place / 'out' / 'expert.csv').open()))
    assert len(rows) == len(record['results']) == 2 * 4 and record['settings']['steps'] == [1, 25]  # 25 is the model's own
    best = max(record['results'], key=lambda row: row['score'])
    assert (best['step'], best['layer']) == (1, planted.LAYER) and record['settings']['labelled'] == labelled
    assert settings['layer'] == planted.LAYER and settings['open-vocabulary'] == {'layers': [planted.LAYER], 'steps': [1]}
    assert settings['seg4diff'] == {name: best[name] for name in ('step', 'normalisation', 'threshold')}
    if not labelled:  # blocks that see places agree with themselves even more, but with other pictures too
        blind = next(row for row in record['results'] if (row['step'], row['layer']) == (1, 3))
        assert blind['agreement'] > best['agreement'] and blind['chance'] > 0.5 * blind['agreement'] > 2 * best['chance']
    assert f'--config {place / "out" / "padseg.json"}' in capsys.readouterr().out


def test_the_score_is_that_of_the_label_maps_of_a_run(place, model):
    """The covering of a cell, with label maps that `segment` makes."""
    record, _ = found(place, model, '--dir', str(place / 'images'), '--labels', str(place / 'labels'), '--steps', '1', '--count', '1')
    row = next(row for row in record['results'] if (row['step'], row['layer']) == (1, planted.LAYER))
    options = Options(step=1, layer=planted.LAYER, threshold=row['threshold'])
    image = cv2.imread(str(place / 'images' / '0.png'))[..., ::-1]
    labels = segment(np.ascontiguousarray(image), load(str(model), device='cpu', whole=True), options).labels
    truth = cv2.imread(str(place / 'labels' / '0.png'), cv2.IMREAD_GRAYSCALE)
    assert labels.shape == truth.shape  # 4 pixels per token, at which both are compared
    ious = [
        [(np.sum((truth == true) & (labels == said)) / np.sum((truth == true) | (labels == said))) for said in np.unique(labels)]
        for true in np.unique(truth)
    ]
    covering = sum(max(line) * np.mean(truth == true) for line, true in zip(ious, np.unique(truth), strict=True))
    assert row['covering'] == pytest.approx(covering) == pytest.approx(row['score']) and row['groups'] == len(np.unique(labels))


def scenes(folder, count):
    for name in ('images', 'labels'):
        (folder / name).mkdir()
    for number in range(count):
        made = scene(np.random.default_rng((1_000_000, number)), 192, 192)
        cv2.imwrite(str(folder / 'images' / f'{number}.png'), made.image[..., ::-1])
        cv2.imwrite(str(folder / 'labels' / f'{number}.png'), np.array([CLASSES.index(name) for name in made.names], np.uint8)[made.labels])


@pytest.mark.slow
def test_the_expert_of_the_embedded_model_with_labels(tmp_path):
    scenes(tmp_path, 2)
    _, settings = found(tmp_path, 'tiny', '--dir', str(tmp_path / 'images'), '--labels', str(tmp_path / 'labels'), '--steps', '1,10')
    assert settings['layer'] == 4 and settings['seg4diff']['step'] == 1


@pytest.mark.slow
def test_the_expert_of_the_embedded_model_without_labels(tmp_path):
    """The mask losses saw two blocks, 3 and 4, which do about the same."""
    scenes(tmp_path, 6)
    _, settings = found(tmp_path, 'tiny', '--dir', str(tmp_path / 'images'), '--steps', '1,4,10')
    assert settings['layer'] in (3, 4) and settings['seg4diff']['step'] == 1


@pytest.mark.parametrize(
    ('flags', 'code', 'words'),
    [
        (['--count', '1'], 2, 'give more than one'),
        (['--normalisations', 'none'], 2, 'normalisation is one of released'),
        (['--steps', '29'], 2, 'step is one of 1..28'),
        (['--steps', '0'], 2, 'step is counted from the end of the schedule, from 1; got 0'),
        (['--out', 'MODEL'], 2, 'is the folder of the model'),
        (['--dir', 'nowhere'], 5, 'nowhere'),
        (['--model', 'sd1.5'], 2, 'analyze does not support sd1.5'),
    ],
)
def test_what_does_not_fit_is_refused(flags, code, words, place, model, capsys):
    flags = [str(model) if flag == 'MODEL' else flag for flag in flags]
    usual = [
        'analyze',
        'expert',
        '--model',
        str(model),
        '--dir',
        str(place / 'images'),
        '--out',
        str(place / 'other'),
        '--device',
        'cpu',
        '-q',
    ]
    assert main([*usual, *flags]) == code and words in capsys.readouterr().err
    assert not list((place / 'other').glob('*.json'))
