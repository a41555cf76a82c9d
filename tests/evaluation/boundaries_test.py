"""Boundary scores against hand-made answers and against slow, obvious versions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies
from hypothesis.extra import numpy as arrays
from scipy.optimize import linear_sum_assignment
from skimage.morphology import thin

from padseg.evaluation import boundaries
from padseg.evaluation.boundaries import (
    BoundaryCounts,
    boundary_counts,
    boundary_sweep,
    count_matches,
    match_boundaries,
    precision_recall_f,
    region_boundaries,
    score_sweep,
    thin_boundaries,
    total_counts,
)
from padseg.evaluation.metrics import TooMany

HEIGHT, WIDTH = 30, 40  # diagonal: 50
THREE_PIXELS = 0.06

maps = arrays.arrays(np.int32, strategies.tuples(strategies.integers(1, 7), strategies.integers(1, 7)), elements=strategies.integers(0, 2))
tolerances = strategies.sampled_from([0.0, 0.0075, 0.15, 0.3, 1.0])


@strategies.composite
def two_maps(draw):
    first = draw(maps)
    return first, draw(arrays.arrays(np.int32, first.shape, elements=strategies.integers(0, 2)))


@strategies.composite
def two_clouds(draw):
    """Up to nine points in each of two small squares, none twice, and a radius."""
    square = arrays.arrays(bool, (3, 3))
    radius = draw(strategies.sampled_from([0.0, 1.0, 1.5, 2.0, 5.0]))
    return np.argwhere(draw(square)), np.argwhere(draw(square)), radius


def grid(*rows):
    return np.array([[int(letter) for letter in row] for row in rows], np.int32)


def bars(*columns):
    """Upright stripes; a new one begins at each of the columns."""
    return np.searchsorted(columns, np.arange(WIDTH), side='right').astype(np.int32)[None].repeat(HEIGHT, 0)


def counts(f_up, f_down=10):
    """Counts with precision and recall f_up / f_down."""
    return BoundaryCounts(f_up, f_down, f_up, f_down)


def test_boundaries_by_hand():
    drawn = region_boundaries(grid('0011', '0011', '2222', '2222'))
    assert drawn.astype(int).tolist() == grid('0100', '1111', '0000', '0000').tolist()
    # A corner counts for its block alone; along the last column and row only the edge in it does.
    assert region_boundaries(grid('000', '000', '001')).astype(int).tolist() == grid('000', '011', '010').tolist()
    assert not region_boundaries(grid('77', '77')).any()


@given(maps)
def test_boundaries_against_loops(labels):
    height, width = labels.shape
    for i in range(height):
        for j in range(width):
            below, right = min(i + 1, height - 1), min(j + 1, width - 1)
            edges = (
                labels[i, j] != labels[i, right],
                labels[below, j] != labels[below, right],
                labels[i, j] != labels[below, j],
                labels[i, right] != labels[below, right],
            )
            assert region_boundaries(labels)[i, j] == any(edges)


@given(maps)
def test_boundaries_turn_with_the_map_and_know_no_numbers(labels):
    assert np.array_equal(region_boundaries(labels.T), region_boundaries(labels).T)
    assert np.array_equal(region_boundaries(np.array([7, 0, 65535])[labels]), region_boundaries(labels))


def test_eight_bit_labels_do_not_overflow():
    assert region_boundaries(np.array([[255, 0]], np.uint8)).tolist() == [[True, False]]


def test_a_staircase_becomes_a_diagonal():
    labels = np.tri(8, dtype=int)
    assert region_boundaries(labels).sum() == 14  # every step is two pixels wide
    assert np.argwhere(thin_boundaries(labels)).tolist() == [*([step, step] for step in range(7)), [6, 7]]


@pytest.mark.parametrize(('shift', 'matched'), [(0, HEIGHT), (3, HEIGHT), (-3, HEIGHT), (4, 0), (-4, 0)])
def test_a_line_matches_up_to_the_tolerance(shift, matched):
    assert boundary_counts(bars(20 + shift), [bars(20)], THREE_PIXELS) == (matched, HEIGHT, matched, HEIGHT)


def test_the_standard_tolerance_is_a_share_of_the_diagonal():
    truth = np.zeros((300, 400), int)  # diagonal 500: 3.75 pixels
    truth[:, 200:] = 1
    assert boundary_counts(np.roll(truth, 3, 1)[:, 10:], [truth[:, 10:]])[0] == 300
    assert boundary_counts(np.roll(truth, 4, 1)[:, 10:], [truth[:, 10:]])[0] == 0


def test_two_lines_beside_one_count_once():
    assert boundary_counts(bars(18, 21), [bars(20)], THREE_PIXELS) == (HEIGHT, HEIGHT, HEIGHT, 2 * HEIGHT)
    assert boundary_counts(bars(20), [bars(18, 21)], THREE_PIXELS) == (HEIGHT, 2 * HEIGHT, HEIGHT, HEIGHT)


def test_a_predicted_line_needs_one_annotator_and_a_drawn_one_the_prediction():
    # Both annotators drew the line: it is found twice and predicted once.
    assert boundary_counts(bars(20), [bars(20), bars(21)], THREE_PIXELS) == (2 * HEIGHT, 2 * HEIGHT, HEIGHT, HEIGHT)
    # Each drew one of the two.
    assert boundary_counts(bars(10, 30), [bars(10), bars(30)], THREE_PIXELS) == (2 * HEIGHT, 2 * HEIGHT, 2 * HEIGHT, 2 * HEIGHT)
    # Only the second drew the one predicted.
    assert boundary_counts(bars(30), [bars(10), bars(30)], THREE_PIXELS) == (HEIGHT, 2 * HEIGHT, HEIGHT, HEIGHT)


def test_no_boundary_on_either_side():
    empty = bars()
    assert boundary_counts(empty, [bars(20), empty]) == (0, HEIGHT, 0, 0)
    assert boundary_counts(bars(20), [empty]) == (0, 0, 0, HEIGHT)
    assert boundary_counts(empty, [empty]) == (0, 0, 0, 0)


def test_a_chain_is_matched_along_its_whole_length():
    # Each point of `a` stands beside two of `b`, but for the last, which has only the one that the nearest choice would have taken away.
    a, b = np.array([[0, 0], [0, 3], [0, 6]]), np.array([[0, 2], [0, 5], [0, 8]])
    first, second = match_boundaries(a, b, 2)
    assert dict(zip(first.tolist(), second.tolist(), strict=True)) == {0: 0, 1: 1, 2: 2}
    first, second = match_boundaries(a, np.array([[0, 2], [0, 5]]), 2)
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [(1, 0), (2, 1)]


def test_the_nearer_line_is_the_partner():
    first, second = match_boundaries(np.argwhere(region_boundaries(bars(18, 21))), np.argwhere(region_boundaries(bars(20))), 3)
    assert set(first.tolist()) == set(range(1, 2 * HEIGHT, 2))
    assert (first // 2).tolist() == second.tolist()


def test_more_pairs_go_before_nearer_ones():
    # Leaving out (0, 0) would cost nothing in distance; a chain of 400 points has to move aside for it.
    a = np.array([[0, 0], *([0, column] for column in range(1, 401))])
    b = np.array([[0, column] for column in range(1, 402)])
    first, second = match_boundaries(a, b, 1)
    assert first[second.argsort()].tolist() == list(range(401))


@given(two_clouds())
def test_matching_against_a_dense_assignment(clouds):
    a, b, radius = clouds
    distance = np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1))  # (A, B)
    gain = np.where(distance <= radius, 1000 - distance, 0)
    best = linear_sum_assignment(gain, maximize=True)
    first, second = match_boundaries(a, b, radius)
    assert len(set(first.tolist())) == len(set(second.tolist())) == len(first) == len(second)
    assert (distance[first, second] <= radius).all()
    assert len(first) == np.count_nonzero(gain[best])
    assert gain[first, second].sum() == pytest.approx(gain[best].sum())


@given(two_maps(), maps, tolerances)
def test_counts_against_each_annotator_alone(two, other, tolerance):
    pred, truth = two
    second = np.resize(other, truth.shape)
    alone = [boundary_counts(pred, [one], tolerance) for one in (truth, second)]
    both = boundary_counts(pred, [truth, second], tolerance)
    assert both[:2] == total_counts(alone)[:2]
    assert both.pred == alone[0].pred == alone[1].pred == thin(region_boundaries(pred)).sum()
    assert max(one.matched_pred for one in alone) <= both.matched_pred <= sum(one.matched_pred for one in alone)
    for one in alone:
        assert 0 <= one.matched_truth == one.matched_pred <= min(one.truth, one.pred)
    assert alone[0] == count_matches(thin_boundaries(pred), [thin_boundaries(truth)], tolerance)


@given(maps, tolerances)
def test_the_truth_finds_all_of_itself(truth, tolerance):
    found = boundary_counts(truth, [truth] * 2, tolerance)
    assert found.matched_truth == found.truth == 2 * found.pred
    assert found.matched_pred == found.pred
    assert precision_recall_f(found) == ((1, 1, 1) if found.pred else (0, 0, 0))


@given(two_maps(), tolerances)
def test_changing_places_changes_precision_and_recall(two, tolerance):
    there, back = boundary_counts(two[0], [two[1]], tolerance), boundary_counts(two[1], [two[0]], tolerance)
    assert there == (back.matched_pred, back.pred, back.matched_truth, back.truth)


@given(two_maps())
def test_a_wider_tolerance_finds_no_less(two):
    found = [boundary_counts(two[0], [two[1]], tolerance).matched_truth for tolerance in (0, 0.15, 0.3, 1)]
    assert found == sorted(found)
    assert found[-1] == min(thin_boundaries(two[0]).sum(), thin_boundaries(two[1]).sum())


@pytest.mark.parametrize(
    ('found', 'expected'),
    [
        ((3, 4, 1, 2), (0.5, 0.75, 0.6)),
        ((0, 4, 0, 2), (0, 0, 0)),
        ((0, 4, 0, 0), (0, 0, 0)),
        ((0, 0, 0, 2), (0, 0, 0)),
        ((0, 0, 0, 0), (0, 0, 0)),
    ],
)
def test_precision_recall_f_by_hand(found, expected):
    assert precision_recall_f(BoundaryCounts(*found)) == pytest.approx(expected)


def test_boundary_sweep_by_hand():
    # Summed: 3 + 1 and 2 + 30 and 9 + 2 of 10 + 40; the second threshold is best. Each picture's own best: 9 of 10 and 30 of 40.
    sweep = boundary_sweep([[counts(3), counts(2), counts(9)], [counts(1, 40), counts(30, 40), counts(2, 40)]])
    assert sweep.best == 1
    assert sweep.ods == pytest.approx((0.64, 0.64, 0.64))
    assert sweep.ois == pytest.approx((0.78, 0.78, 0.78))


def test_among_equal_thresholds_the_first_is_taken():
    few, many = BoundaryCounts(1, 2, 1, 2), BoundaryCounts(10, 20, 10, 20)
    assert boundary_sweep([[few, many]]).best == 0
    # The other picture would gain if `many` were taken: 11 of 22 instead of 2 of 4 beside 0 of 4.
    assert boundary_sweep([[few, many], [counts(0, 2), counts(0, 2)]]).ois == pytest.approx((0.25, 0.25, 0.25))


def test_score_sweep_by_hand():
    assert score_sweep(np.array([[0.25, 0.5, 0.75], [0.5, 0.75, 0.25]])) == (1, 0.625, 0.75)
    assert score_sweep(np.array([[0.5, 0.5]])) == (0, 0.5, 0.5)


@given(arrays.arrays(float, strategies.tuples(strategies.integers(1, 4), strategies.integers(1, 4)), elements=strategies.floats(0, 1)))
def test_each_pictures_own_best_scores_no_less(scores):
    sweep = score_sweep(scores)
    assert sweep.ois >= sweep.ods - 1e-12
    assert sweep.ods == pytest.approx(max(np.mean(column) for column in scores.T))
    assert sweep.ois == pytest.approx(np.mean([max(row) for row in scores]))


def test_total_adds_each_count():
    assert total_counts([BoundaryCounts(1, 2, 3, 4), BoundaryCounts(10, 20, 30, 40)]) == (11, 22, 33, 44)


def test_unusable_input_is_refused():
    with pytest.raises(ValueError, match=r'\(30, 40\) and \(2, 2\)|\(2, 2\) and \(30, 40\)'):
        boundary_counts(grid('01', '01'), [bars(3)])
    with pytest.raises(ValueError, match='float64'):
        region_boundaries(np.zeros((2, 2)))
    with pytest.raises(ValueError, match='at least one annotator'):
        boundary_counts(bars(3), [])
    with pytest.raises(ValueError, match='got 1 and -0.1'):
        boundary_counts(bars(3), [bars(3)], -0.1)
    with pytest.raises(ValueError, match=r'got shape \(0,\)'):
        score_sweep(np.zeros(0))
    for nothing in ([], [[]], [[counts(1)], [counts(1), counts(2)]]):
        with pytest.raises(ValueError, match='same number of thresholds, at least one'):
            boundary_sweep(nothing)


def test_areas_of_single_pixels_are_refused_where_thinning_them_would_take_hours():
    noise = np.arange(1500 * 1500).reshape(1500, 1500)
    with pytest.raises(TooMany, match='boundaries are 1500 pixels thick'):
        thin_boundaries(noise)
    noise[3:] = 0  # a picture as large with lines
    assert thin_boundaries(noise)[:3].any()


def test_more_near_pixels_than_can_be_matched_are_refused(monkeypatch):
    monkeypatch.setattr(boundaries, 'NEAR', 100)
    lines = np.argwhere(np.ones((20, 1)))
    assert len(match_boundaries(lines, lines, 1.0)[0]) == 20  # 58 pairs
    with pytest.raises(TooMany, match='more than 100 pairs of boundary pixels'):
        match_boundaries(lines, lines, 3.0)
