"""Evaluation of folders: who belongs to whom, what is refused, and scores worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
import pytest

from padseg.errors import NoImages
from padseg.errors import UsageError
from padseg.evaluate import evaluate


def put(path, *rows):
    """Write a label map given as rows of digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.array([[int(letter) for letter in row] for row in rows], np.uint8)).save(path)


@pytest.fixture
def folders(tmp_path):
    return tmp_path / 'pred', tmp_path / 'truth'


def test_class_scores_by_hand(folders):
    pred, truth = folders
    put(truth / 'a.png', '00001111')
    put(pred / 'a.jpg.png', '22223333')
    put(truth / 'sub' / 'b.png', '00001111')
    put(pred / 'sub' / 'b.png', '11111111')  # goes to class 0, the first of a tie
    scores = evaluate(pred, truth, num_classes=3)
    assert scores.images == 2
    assert scores.accuracy == 12 / 16
    assert scores.iou[:2] == (8 / 12, 4 / 8)
    assert math.isnan(scores.iou[2])
    assert scores.miou == pytest.approx((8 / 12 + 4 / 8) / 2)
    assert scores.mean_accuracy == pytest.approx((1 + 1 / 2) / 2)


def test_ignored_pixels_have_no_influence(folders):
    pred, truth = folders
    put(truth / 'a.png', '00119')
    put(pred / 'a.png', '11225')
    first = evaluate(pred, truth, num_classes=2, ignore=9)
    put(pred / 'a.png', '11221')
    assert evaluate(pred, truth, num_classes=2, ignore=9) == first
    assert first.accuracy == first.miou == 1.0
    with pytest.raises(UsageError, match=r'class 9; allowed: 0\.\.1'):
        evaluate(pred, truth, num_classes=2)


def test_a_class_below_the_number_of_classes_can_be_ignored(folders):
    pred, truth = folders
    put(truth / 'a.png', '0112')
    put(pred / 'a.png', '5112')
    scores = evaluate(pred, truth, num_classes=3, ignore=0)
    assert scores.accuracy == 1.0
    assert scores.iou[1:] == (1.0, 1.0)


def test_region_scores_average_annotators_then_pictures(folders):
    pred, truth = folders
    put(pred / 'a.jpg.png', '11', '11')
    put(truth / 'a_0.png', '00', '00')  # agrees
    put(truth / 'a_1.png', '01', '01')  # covering 1/2, PRI 2/6, VI 1
    put(pred / 'b_7.png', '12', '12')  # a picture whose own name ends in a number
    put(truth / 'b_7.png', '34', '34')
    scores = evaluate(pred, truth)
    assert scores == (2, (0.75 + 1) / 2, pytest.approx((4 / 6 + 1) / 2), 0.25, 1.5)


def test_the_truth_as_prediction(folders):
    pred, truth = folders
    for name in ('a', 'b'):
        put(pred / f'{name}.png', '0123', '0023')
        put(truth / f'{name}.png', '0123', '0023')
    assert evaluate(pred, truth)[:4] == (2, 1.0, 1.0, 0.0)
    assert evaluate(pred, truth, num_classes=4)[:4] == (2, 1.0, 1.0, 1.0)


def test_pictures_without_a_partner_are_named(folders):
    pred, truth = folders
    put(pred / 'a.png', '1')
    put(truth / 'a.png', '1')
    put(truth / 'sub' / 'a.png', '1')
    with pytest.raises(NoImages, match='no label map for sub/a in'):
        evaluate(pred, truth)
    for number in range(7):
        put(pred / 'sub' / f'{"abcdefg"[number]}.png', '1')
    with pytest.raises(NoImages, match='no ground truth for sub/b, sub/c, sub/d, sub/e, sub/f and 1 more in'):
        evaluate(pred, truth)


def test_two_label_maps_of_one_name_are_refused(folders):
    pred, truth = folders
    put(pred / 'a.jpg.png', '1')
    put(pred / 'a.png.png', '1')
    put(truth / 'a.png', '1')
    with pytest.raises(NoImages, match='two label maps for a'):
        evaluate(pred, truth)


@pytest.mark.parametrize('num_classes', [None, 2])
def test_sizes_must_match(folders, num_classes):
    pred, truth = folders
    put(pred / 'a.png', '11')
    put(truth / 'a.png', '1', '1')
    with pytest.raises(NoImages, match=r'\(2, 1\) and \(1, 2\)'):
        evaluate(pred, truth, num_classes)


def test_empty_folders_and_bad_numbers(folders):
    with pytest.raises(NoImages, match='no PNG files'):
        evaluate(*folders)
    with pytest.raises(UsageError, match='at least 1; got 0'):
        evaluate(*folders, num_classes=0)
