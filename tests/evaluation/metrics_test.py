"""Metrics against hand-made answers and against slow, obvious versions."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, strategies
from hypothesis.extra import numpy as arrays
from skimage.metrics import variation_of_information

from padseg.evaluation import metrics
from padseg.evaluation.metrics import TooMany, compact, contingency, count_ids, hungarian_counts, overlaps, region_scores

CLASSES = 4
small = strategies.tuples(strategies.integers(1, 5), strategies.integers(1, 5))


@strategies.composite
def two_maps(draw, low=0, regions=7):
    """Truth and prediction of the same size."""
    shape = draw(small)
    truth = draw(arrays.arrays(np.int32, shape, elements=strategies.integers(low, CLASSES - 1)))
    return truth, draw(arrays.arrays(np.int32, shape, elements=strategies.integers(0, regions - 1)))


def renamed(labels, seed=0):
    """The same partition under other, sparse ids."""
    ids = np.random.default_rng(seed).permutation(100)[: labels.max() + 1] * 3
    return ids[labels].astype(np.int32)


def grid(*rows):
    return np.array([[int(letter) for letter in row] for row in rows], np.int32)


def test_contingency():
    a, b = grid('0077', '0077'), grid('0111', '0222')
    assert contingency(a, b).tolist() == [[2, 1, 1], [0, 2, 2]]
    assert contingency(b, a).tolist() == contingency(a, b).T.tolist()


def test_compact_numbers_by_first_appearance():
    assert compact(grid('7733', '9903')).tolist() == [[0, 0, 1, 1], [2, 2, 3, 1]]


@given(two_maps(), strategies.sampled_from([np.uint8, np.uint16, np.int32, np.int64]), strategies.sampled_from([0, -3, 1 << 20]))
def test_compact_against_a_loop(maps, kind, shift):
    labels = maps[0] if kind in (np.uint8, np.uint16) else maps[0] + shift
    labels = labels.astype(kind)
    number: dict[int, int] = {}
    expected = [number.setdefault(label, len(number)) for label in labels.ravel().tolist()]
    assert compact(labels).ravel().tolist() == expected
    assert count_ids(labels) == len(number)


def test_matching_is_one_to_one_and_takes_the_best_total():
    # Taking the largest overlap first (class 0 with region 0, 4 pixels) would leave class 1 with nothing.
    truth, pred = grid('0000000111'), grid('0000111000')
    counts = hungarian_counts(pred, truth, 2)
    assert counts.true_positive.tolist() == [3, 3]
    assert counts.false_negative.tolist() == [4, 0]
    assert counts.false_positive.tolist() == [0, 4]
    assert counts.total == 10


def test_a_surplus_region_is_nobodys_false_positive_only_if_no_class_is_left():
    truth, pred = grid('00001111'), grid('00021111')
    assert hungarian_counts(pred, truth, 2).false_positive.tolist() == [0, 0]
    assert hungarian_counts(pred, truth, 3).false_positive.tolist() == [0, 0, 1]
    assert hungarian_counts(pred, truth, 3).false_negative.tolist() == [1, 0, 0]


def test_pixels_outside_the_classes_do_not_count():
    truth, pred = np.array([[0, 0, 255, -1, 1, 2]]), np.array([[5, 5, 5, 6, 6, 6]])
    counts = hungarian_counts(pred, truth, 2)
    assert counts.total == 3
    assert counts.true_positive.tolist() == [2, 1]
    assert counts.false_positive.tolist() == [0, 0]
    assert hungarian_counts(pred, np.full((1, 6), 255), 2).total == 0


def test_eight_bit_labels_do_not_overflow():
    void = np.array([[0, 1, 255]], np.uint8)
    assert hungarian_counts(np.zeros((1, 3), np.uint8), void, 2).total == 2
    truth, pred = np.array([[20, 20, 0]], np.uint8), np.array([[255, 255, 7]], np.uint8)
    assert hungarian_counts(pred, truth, 27).true_positive[[0, 20]].tolist() == [1, 2]


@given(two_maps(low=-1))
def test_counts_add_up_and_numbering_does_not_change_the_hits(maps):
    truth, pred = maps
    counts = hungarian_counts(pred, truth, CLASSES)
    pixels = [np.count_nonzero(truth == number) for number in range(CLASSES)]
    assert (counts.true_positive + counts.false_negative).tolist() == pixels
    assert counts.total == sum(pixels)
    assert counts.false_positive.sum() <= counts.false_negative.sum()
    assert hungarian_counts(renamed(pred), truth, CLASSES).total == counts.total
    assert all(np.array_equal(a, b) for a, b in zip(hungarian_counts(renamed(pred), truth, CLASSES), counts, strict=True))


@given(two_maps(regions=4))
def test_no_matching_has_more_hits(maps):
    truth, pred = maps
    regions = np.unique(pred).tolist() + [-1] * CLASSES  # -1: a class left without a region
    best = max(
        sum(np.count_nonzero((truth == number) & (pred == region)) for number, region in enumerate(chosen))
        for chosen in set(itertools.permutations(regions, CLASSES))
    )
    assert hungarian_counts(pred, truth, CLASSES).true_positive.sum() == best


def test_region_scores_by_hand():
    # Truth: left and right half; prediction: one region. IoU of each half with it is 1/2.
    scores = region_scores(grid('01', '01'), grid('33', '33'))
    assert scores == (0.5, pytest.approx(2 / 6), 1.0, 1)  # 2 of 6 pairs agree; one bit is missing
    # The other way about, the one region is covered by a half at best.
    assert region_scores(grid('33', '33'), grid('01', '01')) == (0.5, pytest.approx(2 / 6), 1.0, 2)
    # Crossing halves: each IoU is 1/3; of 6 pairs the two diagonals agree (apart in both).
    assert region_scores(grid('01', '01'), grid('00', '11')) == (pytest.approx(1 / 3), pytest.approx(2 / 6), 2.0, 2)


def test_one_pixel():
    assert region_scores(grid('0'), grid('5')) == (1.0, 1.0, 0.0, 1)


@given(two_maps())
def test_the_truth_scores_best(maps):
    truth, _ = maps
    scores = region_scores(truth, renamed(truth))
    assert scores[:3] == (1.0, 1.0, pytest.approx(0, abs=1e-12))
    counts = hungarian_counts(renamed(truth), truth, CLASSES)
    assert counts.true_positive.sum() == truth.size
    assert not counts.false_positive.any() and not counts.false_negative.any()


@given(two_maps())
def test_region_scores_do_not_depend_on_numbering_or_on_turning(maps):
    truth, pred = maps
    expected = pytest.approx(region_scores(truth, pred), abs=1e-12)
    assert region_scores(renamed(truth, 1), renamed(pred, 2)) == expected
    assert region_scores(truth.T, pred.T) == expected
    assert region_scores(truth[::-1], pred[::-1]) == expected


@given(two_maps())
def test_region_scores_against_loops_and_scikit_image(maps):
    truth, pred = (labels.ravel().tolist() for labels in maps)
    pixels = range(len(truth))
    pairs = list(itertools.combinations(pixels, 2))
    agree = sum((truth[i] == truth[j]) == (pred[i] == pred[j]) for i, j in pairs)

    def members(labels, number):
        return {i for i in pixels if labels[i] == number}

    covering = 0.0
    for a in set(truth):
        there = members(truth, a)
        covering += len(there) * max(len(there & members(pred, b)) / len(there | members(pred, b)) for b in set(pred)) / len(truth)
    scores = region_scores(*maps)
    assert scores.covering == pytest.approx(covering)
    assert scores.pri == pytest.approx(agree / len(pairs) if pairs else 1.0)
    assert scores.vi == pytest.approx(variation_of_information(*maps).sum(), abs=1e-12)
    assert scores.regions == len(set(pred))


@pytest.mark.parametrize('measure', [contingency, region_scores, lambda a, b: hungarian_counts(a, b, 2)])
def test_unusable_label_maps_are_refused(measure):
    with pytest.raises(ValueError, match=r'\(2, 3\) and \(3, 2\)'):
        measure(np.zeros((2, 3), int), np.zeros((3, 2), int))
    with pytest.raises(ValueError, match='same size'):
        measure(np.zeros((1, 2, 3), int), np.zeros((1, 2, 3), int))
    with pytest.raises(ValueError, match='float64'):
        measure(np.zeros((2, 3)), np.zeros((2, 3), int))


def test_65536_regions_on_either_side_take_no_table_of_all_pairs():
    """Single pixels: every region meets one other, so that only the pairs that are apart on both sides count."""
    many = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    pixels = 1 << 16
    tracemalloc.start()
    scores = region_scores(many, many[::-1].copy())
    assert scores == (1.0, 1.0, pytest.approx(0, abs=1e-9), pixels)
    pairs = region_scores(many, many // 2)  # each region of two pixels is two true ones
    assert pairs == (0.5, pytest.approx(1 - (pixels / 2) / (pixels * (pixels - 1) / 2), abs=1e-15), pytest.approx(1.0), pixels / 2)
    assert tracemalloc.get_traced_memory()[1] < 32 * 1024 * 1024  # a table of all pairs takes 32 GiB
    tracemalloc.stop()


@given(two_maps())
def test_few_and_many_overlaps_are_counted_alike(maps):
    few = overlaps(*maps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, 'COUNTED', 0)
        many = overlaps(*maps)
    assert all(np.array_equal(one, other) for one, other in zip(few, many, strict=True))
    truth, pred = map(compact, maps)
    slow = [[np.count_nonzero((truth == row) & (pred == column)) for column in range(pred.max() + 1)] for row in range(truth.max() + 1)]
    assert contingency(*maps).tolist() == slow


def test_overlaps_without_number_are_refused(monkeypatch):
    monkeypatch.setattr(metrics, 'COUNTED', 0)
    monkeypatch.setattr(metrics, 'LARGEST', 3)
    assert region_scores(grid('0012'), grid('4448')).regions == 2
    with pytest.raises(TooMany, match='4 and 4 regions overlap in more than 3 ways'):
        region_scores(grid('01233'), grid('44568'))


def test_numbers_are_those_of_first_appearance_across_blocks():
    labels = np.random.default_rng(0).integers(0, 3000, (300, 700)).astype(np.uint16)
    labels[0] = 2999
    number: dict[int, int] = {}
    assert compact(labels).ravel().tolist() == [number.setdefault(label, len(number)) for label in labels.ravel().tolist()]
