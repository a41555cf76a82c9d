"""Protocols: worked cases with exact answers, the compared pixels, and rules in words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from hypothesis.extra import numpy as arrays
from scipy.optimize import linear_sum_assignment

from padseg.datasets import VOID
from padseg.errors import UsageError
from padseg.evaluation.metrics import ClassCounts, TooMany, class_scores, class_table, hungarian_counts
from padseg.evaluation.protocols import (
    LATER,
    NAMINGS,
    PROTOCOLS,
    WORDS,
    Classes,
    class_counts,
    compared_view,
    protocol,
    rules,
    scored_classes,
    seen,
    seen_prediction,
)
from padseg.methods.options import GEOMETRIES

CASES = json.loads((Path(__file__).parent / 'protocol_cases.json').read_text())
RAW = protocol('seg4diff-paper', ids='as they are')
ROWS = protocol('seg4diff-release')


def cases(kind):
    return [pytest.param(case, id=case['name']) for case in CASES[kind]]


def names(number, background=None):
    return Classes(tuple(f'class {name}' for name in range(number)), background)


def agree(counts, expected, absent='unless-predicted'):
    """All counts to the last pixel, all scores to the digits of the case; None is nan."""
    assert counts.true_positive.tolist() == expected['tp']
    assert counts.false_positive.tolist() == expected['fp']
    assert counts.false_negative.tolist() == expected['fn']
    assert counts.total == expected['all']
    scores = class_scores(counts, absent)
    wanted = [expected[name] for name in ('acc', 'miou', 'macc')] + expected['iou']
    got = [scores.accuracy, scores.miou, scores.mean_accuracy, *scores.iou]
    np.testing.assert_allclose(got, [np.nan if value is None else value for value in wanted], rtol=0, atol=1e-11)


def summed(preds, truths, classes, chosen):
    total = ClassCounts.none(len(classes.names))
    for pred, truth in zip(preds, truths, strict=True):
        truth = np.where((truth >= 0) & (truth < len(classes.names)), truth, -1)
        total = total.plus(class_counts(pred, truth, classes, chosen))
    return total


@pytest.mark.parametrize('case', cases('diffseg'))
def test_diffsegs_counts(case):
    agree(summed(np.array(case['pred']), np.array(case['label']), names(case['n_class']), RAW), case)


@pytest.mark.parametrize('case', cases('row_wise_seg4diff_release'))
def test_matching_by_rows(case):
    pred, truth = np.array([case['pred']]), np.array([case['label']])
    agree(summed(pred, truth, names(case['n_class']), RAW), case['per_image'])
    agree(summed(pred, truth, names(case['n_class']), ROWS), case['per_row'])


@pytest.mark.parametrize('case', cases('diffcut_background'))
def test_diffcuts_background(case):
    number = case['n_class_with_background']
    classes = names(number, background=number - 1)
    pred, truth = np.array(case['pred']), np.array(case['label'])
    raw = protocol('diffcut', ids='as they are')
    agree(class_counts(pred, truth, classes, raw), case['diffcut'])
    agree(class_counts(pred, truth, classes, protocol('diffcut')), case['diffcut'])
    plain = protocol('diffcut', ids='as they are', background='class')
    agree(class_counts(pred, truth, classes, plain), case['plain_one_to_one_with_background_as_class'])


@pytest.mark.parametrize('case', cases('sem_seg_evaluator'))
def test_named_classes_as_detectron2_counts_them(case):
    chosen = protocol('seg4diff-ovss')
    truth = np.array(case['gt'])
    truth = np.where(truth == case['ignore_label'], -1, truth)
    scores = class_scores(class_counts(np.array(case['pred']), truth, names(case['n_class']), chosen), chosen.absent)
    wanted = [np.nan if value is None else value for value in case['iou']]
    np.testing.assert_allclose(scores.iou, wanted, rtol=0, atol=1e-11)
    assert scores.miou == pytest.approx(case['miou'], abs=1e-11)
    assert scores.mean_accuracy == pytest.approx(case['macc'], abs=1e-11)
    assert scores.accuracy == pytest.approx(case['pacc'], abs=1e-11)


def test_background_is_ignored_in_open_vocabulary_where_there_is_one():
    case = next(case for case in CASES['sem_seg_evaluator'] if case['ignore_label'] == 0)
    chosen = protocol('seg4diff-ovss')
    counts = class_counts(np.array(case['pred']), np.array(case['gt']), names(3, background=0), chosen)
    assert class_scores(counts, chosen.absent).miou == pytest.approx(case['miou'])


@pytest.mark.parametrize('case', cases('goca'))
def test_gocas_mean(case):
    chosen = protocol('goca')
    counts = class_counts(np.array(case['pred']), np.array(case['gt']), names(case['class_count'], background=0), chosen)
    scores = class_scores(counts, chosen.absent)
    np.testing.assert_allclose(scores.iou, case['iou'], rtol=0, atol=1e-11)
    assert scores.miou == pytest.approx(case['miou'], abs=1e-11)


def test_goca_makes_void_a_class():
    chosen = protocol('goca')
    assert scored_classes(('a', 'b'), None, chosen) == (('a', 'b', 'background'), 2)
    assert scored_classes(('background', 'a'), 0, chosen) == (('background', 'a'), 0)
    counts = class_counts(np.array([[0, 1, 2, 2]]), np.array([[0, 1, 1, -1]]), scored_classes(('a', 'b'), None, chosen), chosen)
    assert counts.true_positive.tolist() == [1, 1, 1] and counts.false_positive.tolist() == [0, 0, 1]


def test_void_in_diffcut_and_its_corrected_form():
    truth, pred, classes = np.array([[0, 0, 1, -1]]), np.array([[0, 0, 1, 1]]), names(2, background=1)
    assert class_counts(pred, truth, classes, protocol('diffcut')).total == 4
    assert class_counts(pred, truth, classes, protocol('diffcut-fixed')).total == 3
    assert class_counts(pred, truth, names(2), protocol('diffcut')).total == 3  # there is no background to become


def test_order_of_classes_is_diffcuts_wherever_background_stands():
    rng = np.random.default_rng(0)
    for _ in range(50):
        truth, pred = rng.integers(0, 4, (2, 6, 6))
        first = class_counts(pred, truth, names(4, background=0), protocol('diffcut'))
        last = class_counts(pred, (truth + 3) % 4, names(4, background=3), protocol('diffcut'))
        for one, other in zip(first[:4], last[:4], strict=True):
            assert np.roll(one, -1).tolist() == other.tolist()


shapes = strategies.tuples(strategies.integers(1, 5), strategies.integers(1, 5))


@strategies.composite
def maps(draw):
    """Ground truth of 4 classes and void, and a prediction, of one size."""
    shape = draw(shapes)
    return draw(arrays.arrays(np.int32, shape, elements=strategies.integers(-1, 3))), draw(
        arrays.arrays(np.int32, shape, elements=strategies.integers(0, 6))
    )


@given(maps(), strategies.sampled_from(['seg4diff-paper', 'seg4diff-release', 'diffcut', 'diffcut-fixed', 'diffseg']))
@settings(deadline=None)
def test_counts_add_up_under_every_matching(pair, name):
    truth, pred = pair
    chosen = protocol(name)
    classes = names(4, background=3)
    counts = class_counts(pred, truth, classes, chosen)
    wanted = np.where(truth == -1, 3, truth) if chosen.void == 'background' else truth
    assert (counts.true_positive + counts.false_negative).tolist() == [(wanted == number).sum() for number in range(4)]
    assert counts.total == counts.true_positive.sum() + counts.false_negative.sum() == (wanted >= 0).sum()
    assert counts.false_positive.sum() <= counts.false_negative.sum()
    assert (counts.spilled <= counts.false_positive).all()
    if chosen.matching == 'picture':
        assert not counts.spilled[counts.true_positive > 0].any()


@given(maps())
@settings(deadline=None)
def test_without_surplus_regions_all_wrong_pixels_are_somebodys(pair):
    truth, pred = pair
    counts = hungarian_counts(pred % 4, truth, 4)
    assert counts.false_positive.sum() == counts.false_negative.sum()


@given(maps(), strategies.permutations(range(7)))
@settings(deadline=None)
def test_numbering_changes_raw_scores_only_by_ties(pair, order):
    truth, pred = pair
    renamed = np.array(order)[pred]
    raw, other = (hungarian_counts(each, truth, 4, compacted=False) for each in (pred, renamed))
    assert raw.true_positive.sum() == other.true_positive.sum()
    compacted, again = (hungarian_counts(each, truth, 4) for each in (pred, renamed))
    assert all(np.array_equal(one, two) for one, two in zip(compacted, again, strict=True))


@given(maps())
@settings(deadline=None)
def test_turning_both_changes_no_picture_wise_hits(pair):
    truth, pred = pair
    assert hungarian_counts(pred, truth, 4).true_positive.sum() == hungarian_counts(pred.T, truth.T, 4).true_positive.sum()


def test_gaps_in_ids_change_the_raw_score_and_no_other():
    truth = np.array([[0, 0, 0, 0], [1, 1, 1, 1]])
    pred = np.array([[0, 0, 0, 1], [2, 2, 2, 2]])
    gaps = pred * 90
    classes = names(3)
    whole, sparse = (class_scores(class_counts(each, truth, classes, RAW)) for each in (pred, gaps))
    assert whole.miou == pytest.approx((0.75 + 1 + 0) / 3) and sparse.miou == pytest.approx((0.75 + 1) / 2)
    assert whole.miou_order_free == sparse.miou_order_free == pytest.approx((0.75 + 1) / 2)
    compacted = [class_counts(each, truth, classes, protocol('seg4diff-paper')) for each in (pred, gaps)]
    assert all(np.array_equal(one, two) for one, two in zip(*compacted, strict=True))


def test_class_table_by_hand():
    truth, pred = np.array([[0, 1, -1], [1, 5, 2]]), np.array([[9, 4, 4], [9, 9, 7]])
    assert class_table(truth, pred, 3).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    raw = class_table(truth, pred, 3, compacted=False)
    assert raw.shape == (3, 10) and raw[:, [9, 4, 7]].tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match='>= 0; got -2'):
        class_table(truth, pred - 6, 3)


def test_predictions_of_classes_must_be_classes():
    with pytest.raises(UsageError, match=r'holds 3; allowed: 0\.\.2'):
        class_counts(np.array([[3]]), np.array([[0]]), names(3), protocol('goca'))


def test_compared_pixels():
    picture = np.arange(5 * 8).reshape(5, 8)
    assert np.array_equal(seen(picture, compared_view((5, 8), 'native')), picture)
    crop = compared_view((5, 8), 'crop')
    assert crop.box == (0, 1, 5, 5) and crop.size == (5, 5)
    assert np.array_equal(seen(picture, crop), picture[:, 1:6]) and np.array_equal(seen_prediction(picture, crop), picture[:, 1:6])
    assert compared_view((300, 400), '512').box == (0, 50, 300, 300) and compared_view((300, 400), '512').size == (512, 512)
    assert compared_view((300, 400), 'short-640').size == (640, 853)
    assert compared_view((100, 1000), 'short-640').size == (256, 2560)


def test_enlarged_and_reduced_views_take_the_pixels_that_the_libraries_take():
    import PIL.Image
    import torch

    rng = np.random.default_rng(1)
    picture = rng.integers(0, 255, (333, 500)).astype(np.uint8)
    tensor = torch.from_numpy(picture)[None, None].float()
    square = tensor[..., 83:416]
    exact = torch.nn.functional.interpolate(square, (512, 512), mode='nearest-exact')[0, 0].numpy()
    assert np.array_equal(seen(picture, compared_view((333, 500), '512')), exact)
    pillow = PIL.Image.fromarray(picture).resize((961, 640), PIL.Image.Resampling.NEAREST)
    assert np.array_equal(seen(picture, compared_view((333, 500), 'short-640')), np.asarray(pillow))
    # DiffCut: centre square one pixel smaller, nearest-exact to 1024, nearest to 128
    square = tensor[..., 0:332, 84:416]
    large = torch.nn.functional.interpolate(square, (1024, 1024), mode='nearest-exact')
    small = torch.nn.functional.interpolate(large, (128, 128), mode='nearest')[0, 0].numpy()
    where = compared_view((333, 500), '128')
    assert where.box == (0, 84, 332, 332)
    assert np.array_equal(seen(picture, where), small)


@pytest.mark.parametrize('compare', WORDS['compare'])
@given(strategies.integers(1, 90), strategies.integers(1, 90))
@settings(deadline=None, max_examples=30)
def test_views_stay_inside_the_picture(compare, height, width):
    where = compared_view((height, width), compare)
    picture = np.arange(height * width).reshape(height, width)
    assert seen(picture, where).shape == where.size == seen_prediction(picture, where).shape
    assert where.rows.min() >= 0 and where.columns.min() >= 0


def test_presets_use_known_values_and_say_them_in_words():
    for name, chosen in PROTOCOLS.items():
        for field, words in WORDS.items():
            assert getattr(chosen, field) in words, (name, field)
        spelled = rules(chosen)
        untold = {field for field in LATER if getattr(chosen, field) == getattr(PROTOCOLS['goca'], field)}
        assert set(spelled) == {field.name for field in dataclasses.fields(chosen)} - untold | {'sums'}


def test_a_model_sees_what_that_of_the_source_saw():
    others = {'diffcut-fixed': 'diffcut', 'goca': 'stretch', **dict.fromkeys(NAMINGS, 'stretch')}
    assert {name: chosen.geometry for name, chosen in PROTOCOLS.items()} == {name: others.get(name, name) for name in PROTOCOLS}
    assert {chosen.geometry for chosen in PROTOCOLS.values()} == set(GEOMETRIES) - {'whole'}


def test_conceptattention_compares_64_pixels_a_side_and_takes_void_for_wrong():
    chosen = protocol('conceptattention')
    assert compared_view((128, 256), chosen.compare).size == (64, 64)
    pixels = seen(np.arange(128 * 256).reshape(128, 256), compared_view((128, 256), chosen.compare))
    assert pixels[[0, -1], [0, -1]].tolist() == [1 * 256 + 2, 127 * 256 + 254]
    truth = np.array([[0, 1, 1, VOID, VOID]])
    counts = class_counts(np.array([[0, 1, 0, 1, 2]]), truth, Classes(('background', 'cat', 'dog'), 0), chosen)
    assert counts.true_positive.tolist() == [1, 1, 0] and counts.false_negative.tolist() == [0, 1, 0]
    assert counts.false_positive.tolist() == [1, 1, 1] and counts.total == 5


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match='diffseg, diffcut, .*; got miou'):
        protocol('miou')
    with pytest.raises(UsageError, match='compare is one of native, .*; got 64'):
        protocol('diffseg', compare='64')


# ---- the presets that are named after a source, against its rules in slow loops


def slow_match(pred, label, n):
    """DiffSeg's matching as its rules say it: histogram of classes and ids, gaps included, and the assignment with the most pixels."""
    columns = max(n, max(map(max, pred)) + 1)
    histogram = [[0] * columns for _ in range(n)]
    for ids, classes in zip(pred, label, strict=True):
        for region, number in zip(ids, classes, strict=True):
            if 0 <= number < n:
                histogram[number][region] += 1
    _, chosen = linear_sum_assignment(np.array(histogram), maximize=True)
    return histogram, chosen.tolist()


def slow_counts(pred, label, n):
    histogram, chosen = slow_match(pred, label, n)
    hits = [histogram[number][chosen[number]] for number in range(n)]
    wrong = [sum(row[chosen[number]] for row in histogram) - hits[number] for number in range(n)]
    return hits, wrong, [sum(histogram[number]) - hits[number] for number in range(n)]


def slow_diffcut(pred, label, n):
    """DiffCut's background, the last of n classes: what protects no class becomes one new id, and all is matched again."""
    histogram, chosen = slow_match(pred, [[number if number < n - 1 else -1 for number in row] for row in label], n - 1)
    kept = {chosen[number] for number in range(n - 1) if any(histogram[number][column] for column in chosen)}
    new = max(map(max, pred)) + 1
    merged = [[region if region in kept else new for region in row] for row in pred]
    return slow_counts(merged, [[n - 1 if number < 0 else number for number in row] for row in label], n)


@pytest.mark.parametrize('name', ['diffseg', 'diffcut', 'diffcut-fixed'])
def test_presets_give_the_figures_of_their_sources(name):
    rng = np.random.default_rng(0)
    other = 0
    for _ in range(200):
        n = int(rng.integers(2, 6))
        label = rng.integers(-1, n, (4, 5))
        pred = rng.permutation(12)[rng.integers(0, rng.integers(2, 8), (4, 5))]  # ids with gaps, in no order
        slow = slow_counts if name == 'diffseg' else slow_diffcut
        wanted = np.where(label < 0, n, label) if name == 'diffcut-fixed' else label
        expected = slow(pred.tolist(), wanted.tolist(), n)
        background = None if name == 'diffseg' else n - 1
        counts = class_counts(pred, label, names(n, background), protocol(name))
        assert [column.tolist() for column in counts[:3]] == list(expected)
        compacted = class_counts(pred, label, names(n, background), protocol(name, ids='compact'))
        other += [column.tolist() for column in compacted[:3]] != list(expected)
    assert other > 10  # renumbered ids are not the source's


def test_the_upper_left_corner_of_a_large_prediction_meets_the_whole_truth():
    """Seg4Diff's release: of a map of 1024 x 2048 the first 640 x 1280 pixels are compared with the truth reduced to that size."""
    halves = np.zeros((1024, 2048), np.uint8)
    halves[:, 1024:] = 1
    chosen = protocol('seg4diff-release')
    where = compared_view(halves.shape, chosen.compare)
    truth, pred = seen(halves, where), seen_prediction(halves, where)
    assert truth.shape == pred.shape == (640, 1280)
    assert truth.mean() == 0.5 and pred.mean() == 0.2  # 1024 of 1280 columns are of the left half
    scores = class_scores(class_counts(pred, truth, names(2), chosen))
    assert (scores.accuracy, scores.iou) == (0.7, (640 / 1024, 256 / 640))
    right = compared_view(halves.shape, 'short-640')
    assert class_scores(class_counts(seen_prediction(halves, right), truth, names(2), chosen)).miou == 1.0


@pytest.mark.parametrize(
    ('size', 'cut', 'compared'),
    [
        ((640, 700), (640, 700), (640, 700)),
        ((333, 500), (333, 500), (640, 961)),  # a smaller one is enlarged whole
        ((700, 641), (699, 640), (699, 640)),
        ((500, 3000), (427, 2560), (427, 2560)),
    ],
)
def test_what_is_cut_from_other_sizes(size, cut, compared):
    where = compared_view(size, 'short-640-cut')
    assert (where.box, where.size) == ((0, 0, *cut), compared)
    picture = np.arange(size[0] * size[1]).reshape(size)
    assert np.array_equal(seen(picture, where), seen(picture, compared_view(size, 'short-640')))
    slow = picture[: cut[0], : cut[1]]
    rows, columns = (((np.arange(to) + 0.5) * of / to).astype(int) for of, to in zip(cut, compared, strict=True))
    assert np.array_equal(seen_prediction(picture, where), slow[rows[:, None], columns])


def test_tables_that_cannot_be_matched_are_refused():
    many = np.arange(1 << 16).reshape(256, 256)
    with pytest.raises(TooMany, match='65536 classes and region numbers up to 65535 make a table of more than'):
        class_counts(many, many, names(1 << 16), protocol('diffseg'))
    assert class_counts(many, many % 150, names(150), protocol('diffseg')).total == 1 << 16
