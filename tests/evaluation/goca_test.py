"""GoCA by its released protocol: thresholds tried on the scored pictures, and unlabelled pixels both ways."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest

import padseg
from padseg.commands import main
from padseg.methods.goca import GocaOptions

SIZE = (48, 80)
PERSON, CAT = 15, 8  # values in VOC's files


@pytest.fixture
def root(tmp_path, picture):
    """Two pictures in VOC's layout: a person beside a cat in front of background, with unlabelled pixels, and one of background alone."""
    home = tmp_path / 'VOCdevkit' / 'VOC2012'
    for folder in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
        (home / folder).mkdir(parents=True)
    truth = np.zeros(SIZE, np.uint8)
    truth[:, :30], truth[20:, 30:], truth[:5] = PERSON, CAT, 255
    for name, values in (('one', truth), ('two', np.zeros(SIZE, np.uint8))):
        PIL.Image.fromarray(picture).save(home / 'JPEGImages' / f'{name}.jpg', quality=100)
        PIL.Image.fromarray(values).save(home / 'SegmentationClass' / f'{name}.png')
    (home / 'ImageSets' / 'Segmentation' / 'train.txt').write_text('one\ntwo\n')
    return tmp_path


def iou_by_hand(found, truth, void_counts):
    """By numbers of the files, 0 = background: the released mean over all 21 classes, absent ones as 0."""
    if void_counts:
        truth = np.where(truth == 255, 0, truth)
    else:
        found, truth = found[truth != 255], truth[truth != 255]
    both = [(((found == number) & (truth == number)).sum(), ((found == number) | (truth == number)).sum()) for number in range(21)]
    return float(np.mean([shared / (joined + 1e-8) for shared, joined in both]))


def test_the_released_protocol_and_unlabelled_pixels_ignored_beside_it(root, texts_folder, capsys):
    out = root / 'out'
    command = ['eval', 'voc21', '--root', str(root), '--split', 'train', '--method', 'goca', '--protocol', 'goca', '--tau-sweep']
    command += ['--model', str(texts_folder), '--out', str(out), '--quiet', '--json']
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    source, rows = report['settings']['predictions'], report['sweep']['rows']
    assert (source['background_words'], source['geometry'], source['names']) == ('background', 'stretch', 'present')
    taus = [0.0, *(tenths / 10 for tenths in range(-4, 5))]
    assert [(row['void'], row['threshold']) for row in rows] == [(void, tau) for void in ('class', 'ignored') for tau in taus]
    assert report['scores']['miou'] == rows[0]['miou'] and report['counts']['pictures'] == 2
    home = root / 'VOCdevkit' / 'VOC2012'
    image, truth = (np.asarray(PIL.Image.open(home / part)) for part in ('JPEGImages/one.jpg', 'SegmentationClass/one.png'))
    for row in (rows[0], rows[2], rows[10], rows[19]):
        options = GocaOptions(tau=row['threshold'], background_words=('background',), geometry='stretch')
        labels = padseg.label(image, str(texts_folder), ['cat', 'person'], options, method='goca').labels
        found = np.concatenate([np.array([0, CAT, PERSON])[labels], np.zeros(SIZE, int)])  # a picture without classes is background
        assert row['miou'] == pytest.approx(iou_by_hand(found, np.concatenate([truth, np.zeros_like(truth)]), row['void'] == 'class'))
    for void, best in report['sweep']['best'].items():
        assert best['miou'] == max(row['miou'] for row in rows if row['void'] == void)
    assert 'best, chosen on these very pictures, at ' in (out / 'scores.md').read_text()
    lines = (out / 'pictures.jsonl').read_bytes()
    assert main(command) == 0 and (out / 'pictures.jsonl').read_bytes() == lines
    assert json.loads(capsys.readouterr().out)['sweep'] == report['sweep']


def test_thresholds_are_tried_where_there_are_some(root, texts_folder, capsys):
    command = ['eval', 'voc21', '--root', str(root), '--split', 'train', '--method', 'open-vocabulary', '--protocol', 'goca', '--tau-sweep']
    assert main([*command, '--model', str(texts_folder)]) == 2
    assert 'open-vocabulary has no threshold for --tau-sweep' in capsys.readouterr().err


def test_a_data_set_without_background_takes_a_threshold_below_all_scores(texts_folder, picture, tmp_path, capsys):
    truth = np.zeros(SIZE, np.uint8)
    truth[:, 30:] = 1
    for folder, values in (('images', picture), ('labels', truth)):
        (tmp_path / folder).mkdir()
        PIL.Image.fromarray(values).save(tmp_path / folder / 'a.png')
    (tmp_path / 'padseg.toml').write_text('classes = ["cat", "photo"]\n')
    command = ['eval', 'folder', '--root', str(tmp_path), '--method', 'goca', '--protocol', 'seg4diff-ovss', '--geometry', 'whole']
    command += ['--model', str(texts_folder), '--device', 'cpu', '--quiet', '--json']
    assert main([*command, '--tau', '2']) == 2
    assert 'the data set has no class for unlabelled pixels, which --background-below, --tau and' in capsys.readouterr().err
    assert main([*command, '--tau', '-1000']) == 0
    assert json.loads(capsys.readouterr().out)['counts']['pictures'] == 1
