"""Mask alignment by hand; the released figures are in golden_test.py."""

from __future__ import annotations

import pytest
import torch

from padseg.train import alignment
from padseg.types import Attention, Tokens


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return alignment.ScoreLayer()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def squares(count: int, side: int) -> torch.Tensor:
    """Masks in a row from the top left, each a pixel larger than the one before."""
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    for number in range(count):
        masks[number, : number + 1, : number + 1] = True
    return masks


def test_scores_are_head_major_and_their_mean_is_that_of_heads():
    query, key = random(2, 3, 20, 8), random(2, 3, 5, 8)
    expected = torch.stack([key[:, head] @ query[:, head].transpose(1, 2) / 8**0.5 for head in range(3)], 1)  # (B, H, T, N)
    every = alignment.scores(query, key, heads=True)
    assert every.shape == (2, 15, 20)
    torch.testing.assert_close(every[:, 2 * 5 + 4], expected[:, 2, 4])
    torch.testing.assert_close(every.view(2, 3, 5, 20), expected)
    torch.testing.assert_close(alignment.scores(query, key, heads=False), expected.mean(1))


def test_shares_are_of_a_softmax_over_all_keys_by_their_sum_over_the_text():
    seen = Attention(random(1, 2, 17, 8), random(1, 2, 17, 8))
    attention = (seen.query[:, :, :12] @ seen.key.transpose(2, 3) / 8**0.5).softmax(-1)[..., 12:17].transpose(2, 3)  # (1, 2, 5, 12)
    of_heads, mean = attention / attention.sum(2, keepdim=True), attention.mean(1) / attention.mean(1).sum(1, keepdim=True)
    torch.testing.assert_close(alignment.share_logits(seen, 12, range(12, 17), heads=True).sigmoid(), of_heads.flatten(1, 2))
    torch.testing.assert_close(alignment.share_logits(seen, 12, range(12, 17), heads=False).sigmoid(), mean)


def test_shares_of_nothing_and_of_all_have_finite_logits():
    seen = Attention(torch.full((1, 1, 3, 4), 50.0), torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0])[:, None].expand(1, 1, 5, 4))
    logits = alignment.share_logits(seen, 2, range(2, 5), heads=False)
    assert torch.isfinite(logits).all() and logits[0, :, 0].sigmoid().tolist() == pytest.approx([1e-4, 1 - 1e-4, 1e-4], rel=1e-3)


@pytest.mark.parametrize(
    ('logit', 'focal', 'loss'), [(5, 'correct', 7.5e-8), (5, 'released', 0.02686), (-5, 'correct', 1.235), (-5, 'released', 45.06)]
)
def test_focal_loss_of_one_pixel_in_a_mask(logit, focal, loss):
    inside, _ = alignment.focal_parts(torch.tensor([float(logit)]), focal)
    assert inside.item() == pytest.approx(loss, rel=0.01)


TEXT = 'car carpet wall-brick wall-stone'
SPANS = [(0, 3), (4, 10), (11, 21), (22, 32)]
PIECES = [(0, 0), (0, 3), (4, 7), (7, 10), (11, 15), (15, 16), (16, 21), (22, 26), (26, 27), (27, 32), (0, 0)]  # car car pet wall - brick …
IDS = [0, 5, 5, 6, 7, 8, 9, 7, 8, 10, 1]


def test_columns_of_a_name_are_those_at_its_place():
    tokens = Tokens(0, 77, tuple(PIECES), tuple(span == (0, 0) for span in PIECES))
    assert alignment.columns_by_span(tokens, SPANS) == [[1], [2, 3], [4, 5, 6], [7, 8, 9]]
    assert alignment.columns_by_span(tokens._replace(first=77), SPANS[:1]) == [[78]]
    short = tokens._replace(slots=8)  # of which the last is for the end token
    assert alignment.columns_by_span(short, SPANS) == [[1], [2, 3], [4, 5, 6], []]


def test_released_columns_are_shared_by_names_with_a_token_in_common():
    names = [IDS[1:2], IDS[2:4], IDS[4:7], IDS[7:10]]
    assert alignment.columns_by_ids(IDS, names, 77) == [[1, 2], [1, 2, 3], [4, 5, 6, 7, 8], [4, 5, 7, 8, 9]]
    assert alignment.columns_by_ids(IDS, names, 8)[3] == [4, 5, 7]


def test_a_named_candidate_is_the_mean_of_mask_logits(layer):
    maps, masks = random(6, 8, 8), squares(3, 16)
    pairs = alignment.named_pairs(maps, [[1, 4], [], [4]], masks, layer)
    logits = layer(maps)
    torch.testing.assert_close(pairs.logits, torch.stack([(logits[1] + logits[4]) / 2, logits[4]]))
    assert torch.equal(pairs.masks, masks[[0, 2]])


def test_matching_finds_what_fits_and_learns_from_nothing_else(layer, monkeypatch):
    monkeypatch.setattr(alignment, 'AT_ONCE', 7)
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    for number, rows in enumerate((slice(0, 8), slice(8, 20), slice(20, 32))):
        masks[number, rows] = True
    maps = random(40, 8, 8)
    for number, candidate in enumerate((31, 5, 17)):
        maps[candidate] = torch.nn.functional.interpolate(masks[number][None, None].float(), (8, 8))[0, 0] * 20 - 10
    maps.requires_grad_()
    for focal in ('correct', 'released'):
        pairs = alignment.matched_pairs(maps, masks, layer, focal)
        assert torch.equal(pairs.masks, masks[[1, 2, 0]])  # candidates ascend: 5, 17, 31
        torch.testing.assert_close(pairs.logits, layer(maps[[5, 17, 31]]))
    gradient = torch.autograd.grad(sum(alignment.mask_losses(pairs, 'correct')), maps)[0]
    assert gradient.flatten(1).any(1).nonzero()[:, 0].tolist() == [5, 17, 31]


@pytest.mark.parametrize('count', [0, 1, 40])
def test_any_number_of_masks_gives_finite_losses(layer, count):
    """Masks smaller than a token too, of which nothing is left where candidates are matched."""
    maps, masks = random(77, 8, 8).requires_grad_(), squares(count, 64)
    assert count == 0 or not alignment.smaller(masks, (8, 8))[0].any() or masks[0, 0, 0]
    pairs = alignment.matched_pairs(maps, masks, layer, 'released')
    assert len(pairs.logits) == count
    loss = sum(alignment.mask_losses(pairs, 'released'))
    assert (loss == 0) == (count == 0)
    assert torch.isfinite(torch.autograd.grad(loss, maps)[0]).all()
    inside = torch.zeros(1, 64, 64, dtype=torch.bool)
    inside[0, 3, 3] = True
    assert not alignment.smaller(inside, (8, 8)).any()
    assert all(torch.isfinite(part) for part in alignment.mask_losses(alignment.matched_pairs(maps, inside, layer, 'correct'), 'correct'))


def test_without_names_in_the_prompt_nothing_is_learned(layer):
    pairs = alignment.named_pairs(random(6, 8, 8), [[], []], squares(2, 16), layer)
    assert alignment.mask_losses(pairs, 'correct') == (0, 0)


def test_the_largest_masks_above_a_share_are_kept():
    masks = squares(6, 10)  # 1, 4, 9, 16, 25, 36 of 100 pixels
    assert alignment.largest(masks, 0.04, 3).flatten(1).sum(1).tolist() == [36, 25, 16]
    assert alignment.largest(masks, 0.04, 9).flatten(1).sum(1).tolist() == [36, 25, 16, 9]
    assert len(alignment.largest(masks[:0], 0.04, 9)) == 0


def test_the_score_layer_has_38145_parameters_and_sees_one_map_at_a_time(layer):
    assert sum(weight.numel() for weight in layer.parameters()) == 38145
    maps = random(5, 12, 9)
    torch.testing.assert_close(layer(maps)[3], layer(maps[3:4])[0])
