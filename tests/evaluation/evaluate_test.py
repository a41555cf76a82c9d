"""Evaluation of folders: who belongs to whom, what is refused, and scores worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
import pytest

from padseg.datasets import label_folder
from padseg.errors import NoImages, UsageError
from padseg.evaluation.evaluate import Task, evaluate, paired, score_stored, stored
from padseg.evaluation.protocols import protocol


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
    assert scores[:3] == (2, 0, 0)
    assert scores.accuracy == 12 / 16
    assert [scores.iou['0'], scores.iou['1']] == [8 / 12, 4 / 8]
    assert math.isnan(scores.iou['2'])
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
    with pytest.raises(UsageError, match='9'):
        evaluate(pred, truth, num_classes=2)


def test_a_class_below_the_number_of_classes_can_be_ignored(folders):
    pred, truth = folders
    put(truth / 'a.png', '0112')
    put(pred / 'a.png', '5112')
    scores = evaluate(pred, truth, num_classes=3, ignore=0)
    assert scores.accuracy == 1.0
    assert [scores.iou['1'], scores.iou['2']] == [1.0, 1.0]


def test_region_scores_average_annotators_then_pictures(folders):
    pred, truth = folders
    put(pred / 'a.jpg.png', '11', '11')
    put(truth / 'a_0.png', '00', '00')  # agrees
    put(truth / 'a_1.png', '01', '01')  # covering 1/2, PRI 2/6, VI 1
    put(pred / 'b_7.png', '12', '12')  # a picture whose own name ends in a number
    put(truth / 'b_7.png', '34', '34')
    scores = evaluate(pred, truth)
    assert scores[:6] == (2, 0, 0, (0.75 + 1) / 2, pytest.approx((4 / 6 + 1) / 2), 0.25)
    assert scores.regions == 1.5


def test_the_truth_as_prediction(folders):
    pred, truth = folders
    for name in ('a', 'b'):
        put(pred / f'{name}.png', '0123', '0023')
        put(truth / f'{name}.png', '0123', '0023')
    assert evaluate(pred, truth) == (2, 0, 0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 4.0)
    assert evaluate(pred, truth, num_classes=4)[:7] == (2, 0, 0, 1.0, 1.0, 1.0, 1.0)


def test_pictures_without_a_partner_are_named(folders):
    pred, truth = folders
    put(pred / 'a.png', '1')
    put(truth / 'a.png', '1')
    put(truth / 'sub' / 'a.png', '1')
    with pytest.raises(NoImages, match='no label map for sub/a: --allow-missing'):
        evaluate(pred, truth)
    assert evaluate(pred, truth, allow_missing=True).pictures == 1
    put(pred / 'sub' / 'a.png', '1')
    for letter in 'bcdefgh':
        put(pred / 'sub' / f'{letter}.png', '1')
    with pytest.raises(NoImages, match='no ground truth for sub/b, sub/c, sub/d, sub/e, sub/f and 2 more'):
        evaluate(pred, truth)
    assert evaluate(pred, truth, allow_missing=True).pictures == 2
    put(truth.parent / 'other' / 'z.png', '1')
    with pytest.raises(NoImages, match='no label map has the name of a ground truth'):
        evaluate(pred, truth.parent / 'other', allow_missing=True)


def test_two_label_maps_of_one_name_are_refused(folders):
    pred, truth = folders
    put(pred / 'a.jpg.png', '1')
    put(pred / 'a.png.png', '1')
    put(truth / 'a.png', '1')
    with pytest.raises(NoImages, match='two label maps for a'):
        evaluate(pred, truth)


@pytest.mark.parametrize('num_classes', [None, 3])
def test_a_prediction_of_another_size_is_resized_only_on_demand(folders, num_classes):
    pred, truth = folders
    put(pred / 'a.png', '12')
    put(truth / 'a.png', '1122', '1122')
    with pytest.raises(UsageError, match=r'a.png is 2 x 1 \(width x height\), but its ground truth is 4 x 2.*--resize'):
        evaluate(pred, truth, num_classes)
    assert evaluate(pred, truth, num_classes, resize=True)[3] == 1.0


def test_annotators_of_different_sizes_are_refused(folders):
    pred, truth = folders
    put(pred / 'a.png', '12')
    put(truth / 'a_0.png', '12')
    put(truth / 'a_1.png', '12', '12')
    with pytest.raises(UsageError, match=r'ground truths of a differ in size: 2 x 1 \(width x height\) and 2 x 2'):
        evaluate(pred, truth)


def test_empty_folders_and_bad_numbers(folders):
    with pytest.raises(NoImages, match='no '):
        evaluate(*folders)
    for folder in folders:
        put(folder / 'a.png', '0')
    with pytest.raises(UsageError, match='num_classes.*greater than or equal to 1; got 0'):
        evaluate(*folders, num_classes=0)


def test_pictures_without_a_pixel_that_counts_contribute_nothing(folders):
    pred, truth = folders
    put(truth / 'a.png', '99')
    put(pred / 'a.png', '12')
    put(truth / 'b.png', '01')
    put(pred / 'b.png', '12')
    scores = evaluate(pred, truth, num_classes=2, ignore=9)
    assert scores[:6] == (1, 1, 0, 1.0, 1.0, 1.0)
    for folder in folders:
        (folder / 'b.png').unlink()
    nothing = evaluate(pred, truth, num_classes=2, ignore=9)
    assert nothing[:3] == (0, 1, 0) and math.isnan(nothing.accuracy) and math.isnan(nothing.miou)


@pytest.mark.parametrize('which', ['pred', 'truth'])
def test_a_file_that_cannot_be_read_is_counted_and_the_rest_scored(folders, which):
    for folder in folders:
        for name in 'abc':
            put(folder / f'{name}.png', '01')
    broken = folders[which == 'truth'] / 'b.png'
    broken.write_bytes(broken.read_bytes()[:40])
    for num_classes in (2, None):
        assert evaluate(*folders, num_classes)[:4] == (2, 0, 1, 1.0)


def test_a_picture_of_colours_is_no_prediction(folders):
    pred, truth = folders
    put(truth / 'a.png', '01')
    pred.mkdir()
    PIL.Image.new('RGB', (2, 1)).save(pred / 'a.png')
    assert evaluate(pred, truth, num_classes=2)[:3] == (0, 0, 1)


def test_too_few_classes_are_refused_with_the_values_that_are_there(folders):
    pred, truth = folders
    put(truth / 'a.png', '0123', '3333')
    put(pred / 'a.png', '0123', '3333')
    with pytest.raises(UsageError, match=r'(?s)a\.png.*3.*5'):  # the value 3, five times
        evaluate(pred, truth, num_classes=3)


def test_several_processes_give_the_same_records(folders):
    pred, truth = folders
    rng = np.random.default_rng(0)
    for number in range(12):
        rows = [''.join(map(str, row)) for row in rng.integers(0, 3, (4, 5)).tolist()]
        put(truth / f'{number}.png', *rows)
        put(pred / f'{number}.png', *rows[::-1])
    rules = protocol('seg4diff-paper', compare='native')
    dataset, preds = paired(label_folder(truth, 3), stored(pred), False)
    task = Task(dataset, rules, preds)
    one, two = (list(score_stored(task, dataset.samples, workers)) for workers in (1, 2))
    assert one == two and len(one) == 12 and [record.name for record in one] == sorted(map(str, range(12)))
