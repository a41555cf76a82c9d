"""Normalisation, KL divergence and merging against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from padseg.errors import UsageError
from padseg.methods.options import NORMALISATIONS
from padseg.methods.stages.proposals import EPS, greedy_groups, merge, near_groups, normalise, spatial, symmetric_kl
from padseg.types import Frame, TokenMaps


def random_maps(tokens, h=5, w=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((tokens, h, w), generator=generator) ** 3 * 0.01


def token_maps(maps):
    return TokenMaps(maps, tuple(map(str, range(len(maps)))), Frame((10, 14), (0, 0, 10, 14)))


def released_unit(maps, token, y, x):
    """A map's value on the scale of all maps' values at that pixel, as Seg4Diff's released code has it."""
    here = [float(each[y, x]) for each in maps]
    return (here[token] - min(here)) / (max(here) - min(here) + 1e-6)


def normalised_by_loop(maps, normalisation):
    maps = maps.numpy().astype(np.float64)
    result = np.empty_like(maps)
    for t, each in enumerate(maps):
        for y in range(each.shape[0]):
            for x in range(each.shape[1]):
                if normalisation == 'released':
                    result[t, y, x] = math.exp(released_unit(maps, t, y, x)) / sum(
                        math.exp(released_unit(maps, t, row, column)) for row in range(each.shape[0]) for column in range(each.shape[1])
                    )
                elif normalisation == 'minmax-softmax':
                    unit = (each - each.min()) / (each.max() - each.min())
                    result[t, y, x] = math.exp(unit[y, x]) / sum(math.exp(value) for value in unit.ravel())
                elif normalisation == 'sum':
                    result[t, y, x] = each[y, x] / sum(each.ravel())
                else:
                    result[t, y, x] = each[y, x] / sum(other[y, x] for other in maps)
    return result


def kl_by_loop(p):
    def kl(a, b):
        return sum(x * math.log(max(x, EPS) / max(y, EPS)) for x, y in zip(a, b, strict=True))

    return [[(kl(a, b) + kl(b, a)) / 2 for b in p.tolist()] for a in p.tolist()]


def merged_by_loop(normalised, threshold):
    """Anchor after anchor, comparing with every map, those that an earlier anchor took included."""
    rows = [(row / row.sum()).tolist() for row in normalised.reshape(len(normalised), -1)]
    distance = kl_by_loop(np.array(rows))
    taken, groups, means = set(), [], []
    for anchor in range(len(rows)):
        if anchor in taken:
            continue
        group = [other for other in range(len(rows)) if other == anchor or distance[anchor][other] < threshold]
        taken.update(group)
        groups.append(tuple(group))
        means.append(sum(normalised[other] for other in group) / len(group))
    return groups, np.array(means)


@pytest.mark.parametrize('normalisation', NORMALISATIONS)
def test_normalisations_equal_the_loop(normalisation):
    maps = random_maps(4)
    got = normalise(maps, normalisation)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), normalised_by_loop(maps, normalisation), rtol=1e-12)


@pytest.mark.parametrize('normalisation', NORMALISATIONS)
def test_maps_without_content_stay_finite(normalisation):
    maps = torch.zeros((3, 4, 4))
    maps[1] = 0.5
    assert torch.isfinite(normalise(maps, normalisation)).all()
    assert merge(token_maps(maps), 0.1, normalisation).maps.isfinite().all()


def test_the_released_normalisation_by_hand():
    """At the left pixel the tokens have 0, 1e-6 and 3e-6, so the range is 4e-6 with what is added; at the right one all have the same."""
    maps = torch.tensor([[[0, 5e-3]], [[1e-6, 5e-3]], [[3e-6, 5e-3]]], dtype=torch.float64)
    expected = [[1 / (1 + math.exp(-unit)), 1 / (1 + math.exp(unit))] for unit in (0, 0.25, 0.75)]
    np.testing.assert_allclose(normalise(maps, 'released')[:, 0].numpy(), expected, rtol=1e-12)


def test_symmetric_kl_equals_the_loop():
    p = normalise(random_maps(6), 'sum').flatten(1)
    np.testing.assert_allclose(symmetric_kl(p).numpy(), kl_by_loop(p), atol=5e-14)


def test_symmetric_kl_by_hand():
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3) + 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)) / 2
    torch.testing.assert_close(symmetric_kl(p), torch.tensor([[0, expected], [expected, 0]], dtype=torch.float64))


@pytest.mark.parametrize('normalisation', NORMALISATIONS)
@pytest.mark.parametrize('threshold', [0, 1e-4, 0.01, 0.1, 0.5, math.inf])
def test_merge_equals_the_plain_loop(normalisation, threshold):
    maps = random_maps(12)
    maps[7:10] = maps[3] * torch.linspace(0.9, 1.1, 35).view(5, 7) + 1e-4 * maps[:3]  # three near copies of one map
    groups, means = merged_by_loop(normalised_by_loop(maps, normalisation), threshold)
    proposals = merge(token_maps(maps), threshold, normalisation)
    assert list(proposals.members) == groups
    np.testing.assert_allclose(proposals.maps.numpy(), means, rtol=1e-10)


def test_groups_overlap_as_in_the_released_code():
    # on a line at 0, 1, 2: the first takes the second, the third is an anchor of its own and averages the second again
    distance = torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]], dtype=torch.float64)
    assert greedy_groups(distance, 1.5) == ((0, 1), (1, 2))


def many_maps():
    """512 maps in overlapping clouds around 40 maps, some of them equal, some with zeros."""
    generator = torch.Generator().manual_seed(0)
    kinds = random_maps(40, 12, 12).repeat(13, 1, 1)[:512]
    maps = kinds * (1 + 0.6 * torch.rand((512, 12, 12), generator=generator) * torch.rand((512, 1, 1), generator=generator))
    maps[7] = maps[300] = maps[450]
    maps[100:110, :6] = 0
    return spatial(maps.double().flatten(1))


@pytest.mark.parametrize('threshold', [0, 1e-9, 0.005, 0.02, 0.05, 0.2, math.inf])
def test_distances_from_anchors_alone_give_the_same_groups(threshold):
    shares = many_maps()
    groups = near_groups(shares, threshold)
    assert groups == greedy_groups(symmetric_kl(shares), threshold)
    assert len(groups) == 1 if threshold == math.inf else len(groups) > 2


def test_what_float32_cannot_tell_is_compared_exactly():
    """Thresholds a little above and below distances, by less than the rounding of float32."""
    shares = many_maps()[:60]
    distance = symmetric_kl(shares)
    for column in range(1, 60, 7):
        between = float(distance[0, column])
        for threshold in (between * (1 - 1e-11), between * (1 + 1e-11)):
            assert near_groups(shares, threshold) == greedy_groups(distance, threshold)
        assert (column in near_groups(shares, between * (1 + 1e-11))[0]) and column not in near_groups(shares, between * (1 - 1e-11))[0]


def test_distances_to_other_maps_are_those_among_all():
    shares = many_maps()
    torch.testing.assert_close(symmetric_kl(shares[:5], shares[3:]), symmetric_kl(shares)[:5, 3:], atol=1e-13, rtol=0)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(0, 10_000), st.floats(0, 1))
def test_every_token_is_a_member_and_the_ends_are_exact(tokens, seed, threshold):
    maps = token_maps(random_maps(tokens, 3, 4, seed))
    members = merge(maps, threshold, 'sum').members
    assert set().union(*members) == set(range(tokens))
    assert merge(maps, 0, 'sum').members == tuple((token,) for token in range(tokens))
    assert merge(maps, math.inf, 'sum').members == (tuple(range(tokens)),)


@pytest.mark.parametrize('normalisation', NORMALISATIONS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_maps_themselves_stay_as_they_are(normalisation, dtype):
    maps = random_maps(5).to(dtype)
    before = maps.clone()
    merge(token_maps(maps), 0.1, normalisation)
    assert torch.equal(maps, before)


def test_bad_values_name_what_is_allowed():
    maps = token_maps(random_maps(2))
    for threshold in (-0.1, math.nan):
        with pytest.raises(UsageError, match='>= 0'):
            merge(maps, threshold)
    with pytest.raises(UsageError, match='released, minmax-softmax, sum, share'):
        merge(maps, 0.1, 'softmax')
