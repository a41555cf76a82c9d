"""The analysis of blocks against whole matrices and loops, on small random models of both families."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from padseg import LabelOptions, Options, load
from padseg.analysis.blocks import (
    ENLARGED,
    Cell,
    anatomy,
    attention_shares,
    best,
    block_maps,
    coverings,
    every_block,
    grid_of,
    grouping,
    mean_iou,
    named_maps,
    token_groups,
    value_norms,
    word_counts,
)
from padseg.errors import UsageError
from padseg.methods.open_vocabulary import score_maps
from padseg.methods.stages.enlarging import upsample
from padseg.methods.stages.latents import encode
from padseg.methods.stages.token_maps import attention_maps
from padseg.types import Attention


@pytest.fixture(params=['backbone', 'backbone35', 'flux'])
def seen(request, picture):
    """A model, a picture's latent, and all that attention has in every block of a forward on it."""
    model = request.getfixturevalue(request.param)
    latent = encode(picture, model, Options(side=32).resolve(model.spec))
    return model, latent, every_block(latent, model, model.null_prompt, lambda call: call, ('queries', 'keys', 'values'))


def groups_of(model, latent) -> dict[str, list[int]]:
    h, w = grid_of(latent, model)
    return token_groups(model, model.null_prompt, h * w)


def test_tokens_belong_to_one_kind_each(seen):
    model, latent, blocks = seen
    groups, (h, w) = groups_of(model, latent), grid_of(latent, model)
    assert sorted(token for group in groups.values() for token in group) == list(range(blocks[0].key.shape[2]))
    first = model.first_image_token(model.null_prompt)
    assert groups['image'] == list(range(first, first + h * w))
    assert [*groups['first'], *groups['pads']] == model.text_columns(model.null_prompt, h * w)


def test_shares_are_sums_of_the_whole_softmax(seen):
    model, latent, blocks = seen
    groups = groups_of(model, latent)
    assert len(blocks) == model.spec.layers
    for call in blocks:
        shares = attention_shares(call, groups)
        query, key = call.query[0].float(), call.key[0].float()
        whole = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1).mean(0).numpy()  # (L, L)
        for i, rows in enumerate(groups.values()):
            for j, columns in enumerate(groups.values()):
                assert shares[i, j] == pytest.approx(whole[np.ix_(rows, columns)].sum(1).mean(), abs=1e-5)
        assert shares.sum(1) == pytest.approx(np.ones(len(shares)), abs=1e-5)


def test_tokens_without_preference_share_evenly():
    alike = Attention(torch.zeros(1, 2, 6, 4), torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0)))
    shares = attention_shares(alike, {'image': [0, 1, 2], 'text': [3, 5], 'other': [4]})
    assert shares == pytest.approx(np.tile([1 / 2, 1 / 3, 1 / 6], (3, 1)))
    with pytest.raises(ValueError, match='one group'):
        attention_shares(alike, {'image': [0, 1, 2], 'text': [3, 5]})
    masked = alike._replace(mask=torch.tensor([0.0, 0, 0, 0, 0, -torch.inf]))  # nobody looks at the last token
    assert attention_shares(masked, {'image': [0, 1, 2], 'text': [3, 5], 'other': [4]}) == pytest.approx(np.tile([0.6, 0.2, 0.2], (3, 1)))


def test_norms_are_those_of_all_heads_side_by_side(seen):
    model, latent, blocks = seen
    groups = groups_of(model, latent)
    for call in blocks:
        norms = value_norms(call.value[0], groups)
        for name, tokens in groups.items():
            expected = [np.linalg.norm([call.value[0, head, token].numpy() for head in range(2)]) for token in tokens]
            assert norms[name] == pytest.approx(np.mean(expected), rel=1e-5)


def test_anatomy_is_that_of_the_blocks(seen):
    model, latent, blocks = seen
    groups, found = groups_of(model, latent), anatomy(latent, model)
    assert found['groups'] == [*groups] and found['tokens'] == [len(tokens) for tokens in groups.values()]
    for call, shares, norms in zip(blocks, found['shares'], found['norms'], strict=True):
        assert np.array_equal(shares, attention_shares(call, groups))
        assert norms.tolist() == [*value_norms(call.value[0], groups).values()]


def test_the_mean_of_heads_is_what_runs_read(seen):
    model, latent, blocks = seen
    found = block_maps(latent, model, model.null_prompt, dict)
    assert len(found) == model.spec.layers
    for layer, maps in enumerate(found):
        assert len(maps) == 1 + blocks[layer].query.shape[1]
        for head in (None, 1):
            expected = attention_maps(latent.z, latent.timestep, model, model.null_prompt, layer, head=head)
            torch.testing.assert_close(maps[head][None], expected)


def test_a_model_read_in_part_is_refused(sd3_folder, picture):
    part = load(str(sd3_folder), device='cpu')
    latent = encode(picture, part, Options(side=32).resolve(part.spec))
    with pytest.raises(UsageError, match=r'whole=True'):
        every_block(latent, part, part.null_prompt, lambda call: call)


def test_maps_that_are_the_truth_cover_it():
    truth = np.zeros((40, 40), np.int32)
    truth[:20, 20:], truth[20:] = 1, 2
    maps = torch.stack([torch.from_numpy(truth[::10, ::10] == number).float() for number in range(3)])  # (3, 4, 4)
    scores = coverings(maps, truth, 'share', (0.1, float('inf')))
    assert scores == pytest.approx([1.0, 0.5 * 0.5 + 2 * 0.25 * 0.25])  # apart, and all three merged
    assert ENLARGED * 4 == 16


def test_grouping_has_heads_at_one_step_and_means_at_all(backbone, picture):
    truth = np.zeros(picture.shape[:2], np.int32)
    truth[:, 20:] = 1
    scores = grouping(picture, truth, backbone, Options(side=32, step=2), (1, 2))
    layers, heads = backbone.spec.layers, 2
    assert set(scores) == {Cell(2, layer, head) for layer in range(layers) for head in (None, *range(heads))} | {
        Cell(1, layer, None) for layer in range(layers)
    }
    assert all((values >= 0).all() and (values <= 1).all() for values in scores.values())
    cell = Cell(1, 0, None)
    assert best([{cell: np.array([0.2, 0.6])}, {cell: np.array([0.5, 0.3])}]) == {cell: pytest.approx(0.45)}
    with pytest.raises(UsageError, match='whole or stretch'):
        grouping(picture, truth, backbone, Options(side=32, geometry='diffseg'))


def test_anatomy_has_a_row_for_every_block(backbone, picture):
    found = anatomy(encode(picture, backbone, Options(side=32).resolve(backbone.spec)), backbone)
    assert found['groups'] == ['image', 'first', 'pads', 'rest'] and found['tokens'][1:] == [1, 76, 77]
    assert found['shares'].shape == (backbone.spec.layers, 4, 4) and found['norms'].shape == (backbone.spec.layers, 4)


@pytest.mark.parametrize('name', ['backbone', 'flux'])
def test_words_are_read_in_all_blocks_by_one_forward(name, picture, request):
    """As one run a block would read them."""
    model = request.getfixturevalue(name)
    calls = []

    class Counted:
        def __getattr__(self, attribute):
            return getattr(model.family, attribute)

        def denoise(self, *arguments):
            calls.append(arguments)
            return model.family.denoise(*arguments)

    counted = dataclasses.replace(model, family=Counted())
    names, options = ['cat', 'grass'], LabelOptions(side=32)
    found = named_maps(picture, counted, names, options)
    assert len(calls) == 1 and len(found) == model.spec.layers * 3
    for (_, layer, head), maps in found.items():
        expected = score_maps(picture, model, names, dataclasses.replace(options, layers=(layer,), head=head))
        torch.testing.assert_close(maps, expected.maps)


def test_words_are_counted_for_the_classes_of_the_picture(backbone, picture):
    truth = np.full(picture.shape[:2], 2, np.int32)
    truth[:, 40:], truth[:4] = 0, 255
    names, options = ['cat', 'dog', 'grass'], LabelOptions(side=32)
    counts = word_counts(picture, truth, backbone, names, options)
    cell = Cell(LabelOptions().resolve(backbone.spec).steps[0], 2, None)
    scores = score_maps(picture, backbone, ['cat', 'grass'], options).maps.numpy()
    pred = np.array([0, 2])[np.stack([upsample(values, truth.shape) for values in scores]).argmax(0)]
    for number in range(3):
        true, said = truth == number, (pred == number) & (truth != 255)
        assert counts[cell].true_positive[number] == (true & said).sum()
        assert counts[cell].false_positive[number] == (said & ~true).sum()
        assert counts[cell].false_negative[number] == (true & ~said).sum()
    assert word_counts(picture, np.full_like(truth, 255), backbone, names, options) == {}
    ious = [((truth == n) & (pred == n)).sum() / (((truth == n) | (pred == n)) & (truth != 255)).sum() for n in (0, 2)]
    assert mean_iou([{}, counts])[cell] == pytest.approx(np.mean(ious))
