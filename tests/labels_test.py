"""Label maps against full-size interpolation."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from padseg.labels import absorb
from padseg.labels import label_map
from padseg.labels import relabel
from padseg.labels import superpixels
from padseg.types import Frame
from padseg.types import Proposals


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


def test_superpixels_vote_with_their_mean():
    inside = np.array([[0, 0, 0, 7], [0, 0, 0, 7]])
    maps = torch.tensor([[[1.0, 0.4, 0.4, 0], [1.0, 0.4, 0.4, 0]], [[0.0, 0.5, 0.5, 1], [0.0, 0.5, 0.5, 1]]])
    assert label_map(proposals(maps, (2, 4))).labels[0].tolist() == [1, 2, 2, 2]
    assert label_map(proposals(maps, (2, 4)), inside).labels.tolist() == [[1, 1, 1, 2]] * 2


def test_relabel_keeps_zero():
    order, labels = relabel(np.array([[0, 5, 5], [2, 0, 9]]))
    assert labels.tolist() == [[0, 1, 1], [2, 0, 3]] and order == [5, 2, 9]


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
@given(arrays(np.int64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.integers(0, 9)), st.integers(0, 12))
def test_absorb_equals_the_loop(regions, smallest):
    assert absorb(regions, smallest).tolist() == absorbed_by_loop(regions, smallest).tolist()


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
    assert peak < 12 * map_bytes  # all 77 at once would be 77 float32 maps at least


def test_superpixels_follow_colours_and_large_pictures_are_reduced():
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 200
    found = superpixels(image, 100.0)
    assert found.shape == (40, 60) and (found[:, :28] == found[0, 0]).all() and found[0, 0] != found[0, 59]
    large = superpixels(np.repeat(np.repeat(image, 40, 0), 40, 1), 100.0)
    assert large.shape == (1600, 2400) and (large[:, :1150] == large[0, 0]).all() and large[0, 0] != large[0, 2399]
