"""Label maps against all proposals enlarged at once, and each step against passes over the pixels."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from skimage.measure import label as connected_components
from support.graphs import random_graph
from torch.nn import functional as F

from padseg.images import read
from padseg.methods.stages import superpixels
from padseg.methods.stages.enlarging import upsample
from padseg.methods.stages.join import Join
from padseg.methods.stages.labels import (
    JoinOrder,
    absorb,
    coarsened,
    common_borders,
    component_runs,
    label_map,
    relabel,
    scaled_proposals,
    unassign,
)
from padseg.methods.stages.runs import mean_inside, painted, parts, runs_of, totals
from padseg.methods.stages.superpixels import superpixels_of
from padseg.types import Frame, LabelMap, Proposals

IMAGES = Path(__file__).parents[3] / 'data/images'


def proposals(maps, size, box=None):
    return Proposals(maps.double(), tuple((number,) for number in range(len(maps))), Frame(size, box or (0, 0, *size)))


def random_proposals(count, h, w, size, box=None):
    maps = torch.rand((count, h, w), generator=torch.Generator().manual_seed(count))
    return proposals((maps.flatten(1) * 4).softmax(1).view_as(maps), size, box)


def winners_at_full_size(maps, size):
    """All maps interpolated to the picture's size in float64 at once, then argmax."""
    return F.interpolate(maps[None], size, mode='bilinear', align_corners=False)[0].argmax(0).numpy()


@pytest.mark.parametrize('size', [(33, 57), (8, 8), (5, 4), (200, 3)])
def test_label_map_equals_full_size_interpolation(size):
    nine = random_proposals(9, 8, 8, size)
    result = label_map(nine)
    winners = winners_at_full_size(nine.maps, size)
    found = np.array([tokens[0] for tokens in result.tokens])[result.labels - 1]
    assert result.labels.dtype == np.int32 and result.labels.shape == size
    assert (found == winners).mean() > 0.999  # float32 may decide a tie otherwise


def test_regions_are_numbered_by_first_appearance():
    maps = torch.zeros((4, 1, 3))
    maps[3, 0, 0] = maps[0, 0, 1] = maps[2, 0, 2] = 1
    result = label_map(proposals(maps, (1, 3)))
    assert result.labels.tolist() == [[1, 2, 3]]
    assert result.tokens == ((3,), (0,), (2,))


def test_outside_the_box_is_unassigned():
    result = label_map(random_proposals(3, 4, 4, (10, 20), (0, 5, 10, 10)))
    assert (result.labels[:, :5] == 0).all() and (result.labels[:, 15:] == 0).all()
    assert (result.labels[:, 5:15] > 0).all()


def test_split_makes_regions_of_components():
    maps = torch.tensor([[[1.0, 0, 1, 0]], [[0, 1, 0, 0.5]]])
    whole, split = label_map(proposals(maps, (1, 4))), label_map(proposals(maps, (1, 4)), components=True)
    assert whole.labels.tolist() == [[1, 2, 1, 2]]
    assert split.labels.tolist() == [[1, 2, 3, 4]]
    assert split.tokens == ((0,), (1,), (0,), (1,))


def test_regions_join_where_most_of_their_superpixels_do():
    """Superpixels 0 to 4 in a row; region 2 has one pixel of superpixel 1, and two of superpixel 2, which joins 3 before 1 joins 0."""
    inside = np.array([[9, 0, 0, 0, 1, 2, 2, 3, 3, 4]])
    labels = np.array([[0, 1, 1, 1, 2, 2, 2, 3, 3, 4]], np.int32)
    steps = [Join(0.5, 2, 3), Join(1.0, 0, 1), Join(2.0, 2, 4), Join(3.0, 0, 2)]
    order = JoinOrder(runs_of(inside[:, 1:]), np.zeros((5, 1)), random_graph(0, 5), steps)
    frame = Frame((1, 10), (0, 1, 1, 9))
    levels = coarsened(labels, order, frame, [0.5, 0.6, 1.5, 2.5, 9.0], components=True)
    assert [level.tolist() for level in levels] == [
        [[0, 1, 1, 1, 2, 2, 2, 3, 3, 4]],
        [[0, 1, 1, 1, 2, 2, 2, 2, 2, 3]],
        [[0, 1, 1, 1, 2, 2, 2, 2, 2, 3]],
        [[0, 1, 1, 1, 2, 2, 2, 2, 2, 2]],
        [[0, 1, 1, 1, 1, 1, 1, 1, 1, 1]],
    ]


def test_superpixels_vote_with_their_mean():
    inside = np.array([[0, 0, 0, 7], [0, 0, 0, 7]])
    maps = torch.tensor([[[1.0, 0.4, 0.4, 0], [1.0, 0.4, 0.4, 0]], [[0.0, 0.5, 0.5, 1], [0.0, 0.5, 0.5, 1]]])
    assert label_map(proposals(maps, (2, 4))).labels[0].tolist() == [1, 2, 2, 2]
    assert label_map(proposals(maps, (2, 4)), inside).labels.tolist() == [[1, 1, 1, 2]] * 2


numbered_pictures = arrays(np.int64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.integers(0, 9))


def test_runs_by_hand():
    runs = runs_of(np.array([[7, 7, 0], [0, 3, 7]], np.uint8))
    assert (runs.names.tolist(), runs.places.tolist(), runs.areas.tolist()) == ([0, 3, 7], [2, 4, 0], [2, 1, 3])
    assert (runs.starts.tolist(), runs.lengths.tolist(), runs.regions.tolist()) == ([0, 2, 4, 5], [2, 2, 1, 1], [2, 0, 1, 2])
    assert painted(runs, np.array([5, 6, 8])).tolist() == [[8, 8, 5], [5, 6, 8]]
    assert mean_inside(runs, np.array([[1, 2, 5], [6, 0, 9]], np.float32)).tolist() == [5.5, 0, 4]


@given(numbered_pictures)
def test_runs_are_the_picture(numbers):
    runs = runs_of(numbers)
    names, places, areas = np.unique(numbers, return_index=True, return_counts=True)
    assert [each.tolist() for each in runs[:3]] == [each.tolist() for each in (names, places, areas)]
    assert np.array_equal(painted(runs, runs.names), numbers)
    values = np.random.default_rng(0).random(numbers.shape, np.float32)
    np.testing.assert_allclose(mean_inside(runs, values), [values[numbers == name].mean(dtype=float) for name in names], rtol=1e-12)


@given(numbered_pictures)
def test_borders_are_counted_edge_by_edge(numbers):
    regions = runs_of(numbers)
    index = np.searchsorted(regions.names, numbers)
    expected = np.zeros((len(regions.names),) * 2, int)
    for y, x in np.ndindex(numbers.shape):
        for near in ((y, x + 1), (y + 1, x)):
            if near[0] < numbers.shape[0] and near[1] < numbers.shape[1] and index[near] != index[y, x]:
                expected[index[y, x], index[near]] += 1
                expected[index[near], index[y, x]] += 1
    borders = common_borders(regions)
    assert [[borders[one][other] for other in range(len(expected))] for one in range(len(expected))] == expected.tolist()


def test_relabel_keeps_zero():
    regions = runs_of(np.array([[0, 5, 5], [2, 0, 9]]))
    order, labels = relabel(regions, np.arange(4))
    assert labels.tolist() == [[0, 1, 1], [2, 0, 3]] and labels.dtype == np.int32 and regions.names[order].tolist() == [5, 2, 9]
    order, labels = relabel(regions, np.array([0, 3, 2, 3]))
    assert labels.tolist() == [[0, 1, 1], [2, 0, 2]] and regions.names[order].tolist() == [5, 9]


def test_pixels_that_show_nothing_are_unassigned():
    labels = LabelMap(np.array([[1, 2, 2], [3, 3, 1]], np.int32), ((4,), (5,), (6, 7)))
    left = unassign(labels, np.array([[True, False, False], [False, False, True]]))
    assert left.labels.tolist() == [[0, 1, 1], [2, 2, 0]] and left.labels.dtype == np.int32 and left.tokens == ((5,), (6, 7))
    nothing = unassign(labels, np.ones((2, 3), bool))
    assert not nothing.labels.any() and nothing.tokens == ()


def absorbed_by_loop(regions, smallest):
    """Again and again the smallest region (the first by name among equals) to its neighbour with the longest border, counted afresh."""
    regions = regions.copy()
    stuck = set()
    while True:
        names = [name for name in np.unique(regions) if name != 0 and name not in stuck]
        sizes = {name: int((regions == name).sum()) for name in np.unique(regions)}
        small = sorted((sizes[name], name) for name in names if sizes[name] < smallest)
        if not small:
            return regions
        name = small[0][1]
        lengths = {}
        for y, x in np.argwhere(regions == name):
            for near in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)):
                if 0 <= near[0] < regions.shape[0] and 0 <= near[1] < regions.shape[1] and regions[near] not in (0, name):
                    lengths[regions[near]] = lengths.get(regions[near], 0) + 1
        if lengths:
            regions[regions == name] = max(lengths, key=lambda other: (lengths[other], sizes[other], -other))
        else:
            stuck.add(name)


@settings(deadline=None, max_examples=80)
@given(numbered_pictures, st.integers(0, 12))
def test_absorb_equals_the_loop(numbers, smallest):
    regions = runs_of(numbers)
    absorbed = painted(regions, regions.names[absorb(regions, smallest)])
    assert absorbed.tolist() == absorbed_by_loop(numbers, smallest).tolist()


def slow_label_map(proposals, inside=None, components=False, min_area=0.0):
    """All proposals enlarged at once; passes over all pixels for every region."""
    (height, width), (top, left, tall, wide) = proposals.frame
    box = np.s_[top : top + tall, left : left + wide]
    values = np.stack([cv2.resize(each, (wide, tall), interpolation=cv2.INTER_LINEAR) for each in scaled_proposals(proposals)])
    if inside is not None:
        index = np.unique(inside[box], return_inverse=True)[1].ravel()
        means = [np.bincount(index, each.ravel()) / np.bincount(index) for each in values]
        values = np.array(means)[:, index].reshape(values.shape)
    labels = np.zeros((height, width), np.int32)
    labels[box] = values.argmax(0) + 1
    regions = connected_components(labels, background=0, connectivity=1) if components else labels
    found = absorbed_by_loop(regions, min_area * regions.size) if min_area else regions
    result, tokens = np.zeros_like(labels), []
    for name in dict.fromkeys(found[found > 0].tolist()):
        tokens.append(proposals.members[labels[regions == name][0] - 1])
        result[found == name] = len(tokens)
    return LabelMap(result, tuple(tokens))


def smooth_proposals(count, cells, size, box, rng):
    maps = np.stack([cv2.resize(rng.standard_normal((5, 5)), cells[::-1], interpolation=cv2.INTER_CUBIC) for _ in range(count)])
    return Proposals(torch.tensor(maps), tuple((number,) for number in range(count)), Frame(size, box or (0, 0, *size)))


@pytest.mark.parametrize('seed', range(60))
def test_label_map_equals_the_slow_way(seed):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(12, 60, 2).tolist())
    box = (3, 2, size[0] - 5, size[1] - 7) if seed % 3 == 0 else None
    many = smooth_proposals(int(rng.integers(1, 40)), tuple(rng.integers(1, 20, 2).tolist()), size, box, rng)
    inside = rng.integers(0, 9, size).cumsum(1) // 30 * 1000 if seed % 2 else None
    for components, min_area in ((False, 0.0), (True, 0.0), (False, 0.02), (True, 0.02)):
        result, expected = (way(many, inside, components, min_area) for way in (label_map, slow_label_map))
        assert np.array_equal(result.labels, expected.labels) and result.tokens == expected.tokens
        assert result.labels.dtype == np.int32


@pytest.mark.parametrize('name', ['astronaut.jpg', 'scene-22.png'])
def test_refinements_of_a_picture_equal_the_slow_way(name):
    image = np.ascontiguousarray(read(IMAGES / name)[::2, ::2])
    many = smooth_proposals(25, (30, 30), image.shape[:2], None, np.random.default_rng(0))
    inside = superpixels_of(image, 100.0)
    result, expected = (way(many, inside, True, 0.002) for way in (label_map, slow_label_map))
    assert np.array_equal(result.labels, expected.labels) and result.tokens == expected.tokens and len(result.tokens) > 10


@pytest.mark.parametrize('count', [255, 256, 300])
def test_more_proposals_than_a_byte_holds(count):
    maps = torch.eye(count, dtype=torch.float64)[:, None]  # each is the strongest in one column
    many = Proposals(maps, tuple((number,) for number in range(count)), Frame((2, count), (0, 0, 2, count)))
    for result in (label_map(many), label_map(many, np.arange(2 * count).reshape(2, count) % count)):
        assert result.labels.tolist() == [list(range(1, count + 1))] * 2
        assert result.tokens == tuple((number,) for number in range(count))


def test_the_first_wins_among_equals():
    maps = torch.tensor([[[0.0, 1, 1]], [[1, 1, 1]], [[1, 1, 0]]])
    for inside in (None, np.array([[5, 6, 7]])):
        result = label_map(proposals(maps, (1, 3)), inside)
        assert result.labels.tolist() == [[1, 2, 2]] and result.tokens == ((1,), (0,))


def test_small_regions_go_to_the_longest_border_and_keep_its_tokens():
    maps = torch.zeros(3, 4, 4)
    maps[0, :, :2], maps[1, :, 2:] = 1, 1
    maps[2, 1, 1] = 2
    result = label_map(proposals(maps, (4, 4)), min_area=0.1)
    assert result.labels.tolist() == [[1, 1, 2, 2]] * 4 and result.tokens == ((0,), (1,))


def test_memory_is_a_few_maps_whatever_their_number():
    size = (600, 800)
    map_bytes = size[0] * size[1] * 4
    many = random_proposals(77, 32, 32, size)
    tracemalloc.start()
    label_map(many)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * map_bytes  # all 77 at once would be 77 float32 maps at least


@given(arrays(np.int32, st.tuples(st.integers(1, 12), st.integers(1, 6)), elements=st.integers(0, 3)), st.integers(1, 30))
def test_components_found_in_parts_are_those_of_the_whole(labels, most):
    expected = connected_components(labels, background=0, connectivity=1)
    runs = component_runs(labels, most)
    assert np.array_equal(painted(runs, np.arange(len(runs.names)) + (runs.names[0] > 0)), expected)  # the first that appears is 1
    places = np.unique(expected, return_index=True, return_counts=True)[1:]
    assert [runs.places.tolist(), runs.areas.tolist()] == [each.tolist() for each in places]


@pytest.mark.parametrize('most', [128, 1000, 5000])
def test_totals_in_parts_are_the_same_to_the_last_bit(most):
    rng = np.random.default_rng(most)
    values = rng.random(9000, np.float32)
    for count in (1, 5, 300):
        starts = np.unique(np.append(0, rng.integers(1, 9000, count)))
        assert np.array_equal(totals(values, starts, most), np.add.reduceat(values, starts, dtype=np.float64))


@pytest.mark.parametrize(('cells', 'size'), [((16, 16), (300, 400)), ((5, 1), (40, 30)), ((1, 7), (9, 333)), ((40, 64), (37, 60))])
def test_strips_are_those_of_the_whole_to_the_last_bit(cells, size):
    values = np.random.default_rng(0).random(cells, np.float32)
    found = [upsample(values, size, columns) for columns in parts(size[1], size[0], 900)]
    assert len(found) > 1 and np.array_equal(np.concatenate(found, 1), cv2.resize(values, size[::-1], interpolation=cv2.INTER_LINEAR))


def test_parts_cover_everything_and_none_is_alone():
    for length, across, most in ((10, 5, 15), (11, 5, 10), (1, 5, 1), (7, 100, 10), (9, 1, 4)):
        found = list(parts(length, across, most))
        assert [row for part in found for row in range(length)[part]] == list(range(length))
        assert length == 1 or min(part.stop - part.start for part in found) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    'options', [{'join': 0.1, 'components': True, 'min_area': 0.001, 'regroup': 0.5}, {'components': True}, {'refine': 'guided'}]
)
def test_a_large_picture_takes_few_bytes_a_pixel(options):
    """Beside picture and superpixels; the label map itself takes 4."""
    height, width = size = 5000, 7000
    image = np.zeros((height, width, 3), np.uint8)
    image[:, 3000:] = 200
    inside = (image[..., 0] > 0).astype(np.uint8) if 'join' in options else None
    many = random_proposals(3, 8, 8, size)
    tracemalloc.start()
    label_map(many, inside, image=image, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    fixed = 300e6 if 'refine' in options else 150e6  # of what is done in parts, or for a copy of a million pixels
    assert peak - fixed < 7 * height * width


def test_superpixels_follow_colours_and_large_pictures_are_reduced(monkeypatch):
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 200
    found = superpixels_of(image, 100.0)
    assert found.shape == (40, 60) and (found[:, :28] == found[0, 0]).all() and found[0, 0] != found[0, 59]
    monkeypatch.setattr(superpixels, 'SUPERPIXEL_AREA', 62_500)
    large = superpixels_of(np.repeat(np.repeat(image, 10, 0), 10, 1), 100.0)
    assert large.shape == (400, 600) and (large[:, :287] == large[0, 0]).all() and large[0, 0] != large[0, 599]
