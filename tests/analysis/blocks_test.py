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
    cell_maps,
    coverings,
    grouping,
    mean_iou,
    named_maps,
    record,
    token_groups,
    value_norms,
    word_counts,
)
from padseg.errors import UsageError
from padseg.methods.open_vocabulary import score_maps
from padseg.methods.stages.label_map import upsample
from padseg.methods.stages.latents import encode
from padseg.methods.stages.token_maps import attention_maps
from padseg.types import QueryKey


@pytest.fixture(params=['backbone', 'backbone35', 'flux'])
def seen(request, picture):
    """A model with its forward on a picture."""
    model = request.getfixturevalue(request.param)
    latent = encode(picture, model, Options(side=32).resolve(model.spec))
    return model, latent, record(latent, model)


def test_tokens_belong_to_one_kind_each(seen):
    model, _, forward = seen
    everyone = sorted(token for group in token_groups(forward, model).values() for token in group)
    assert everyone == list(range(forward.queries[0].key.shape[2]))
    count = forward.grid[0] * forward.grid[1]
    assert token_groups(forward, model)['image'] == list(range(model.first_image_token, model.first_image_token + count))
    assert [*token_groups(forward, model)['first'], *token_groups(forward, model)['pads']] == model.text_columns(count)


def test_shares_are_sums_of_the_whole_softmax(seen):
    model, _, forward = seen
    for query, key, _ in forward.queries.values():
        shares = attention_shares(QueryKey(query, key, None), token_groups(forward, model))
        whole = (query[0].float() @ key[0].float().transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1).mean(0).numpy()  # (L, L)
        for i, rows in enumerate(token_groups(forward, model).values()):
            for j, columns in enumerate(token_groups(forward, model).values()):
                assert shares[i, j] == pytest.approx(whole[np.ix_(rows, columns)].sum(1).mean(), abs=1e-5)
        assert shares.sum(1) == pytest.approx(np.ones(len(shares)), abs=1e-5)


def test_tokens_without_preference_share_evenly():
    alike = QueryKey(torch.zeros(1, 2, 6, 4), torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0)), None)
    shares = attention_shares(alike, {'image': [0, 1, 2], 'text': [3, 5], 'other': [4]})
    assert shares == pytest.approx(np.tile([1 / 2, 1 / 3, 1 / 6], (3, 1)))
    with pytest.raises(ValueError, match='one group'):
        attention_shares(alike, {'image': [0, 1, 2], 'text': [3, 5]})
    masked = alike._replace(mask=torch.tensor([0.0, 0, 0, 0, 0, -torch.inf]))  # nobody looks at the last token
    assert attention_shares(masked, {'image': [0, 1, 2], 'text': [3, 5], 'other': [4]}) == pytest.approx(np.tile([0.6, 0.2, 0.2], (3, 1)))


def test_values_are_those_that_attention_mixes(seen):
    """Every block's values, taken here from the call of the fused attention itself."""
    model, latent, forward = seen
    called = []
    original = torch.nn.functional.scaled_dot_product_attention

    class Listen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is original:
                called.append((args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Listen():
        model.denoise(latent.z, latent.timestep)
    joint = [[*args, *(kwargs[name] for name in ('query', 'key', 'value') if name in kwargs)][2] for args, kwargs in called]
    joint = [value for value in joint if value.shape[2] == forward.queries[0].key.shape[2]]  # not SD3.5's attention of the image alone
    assert len(joint) == len(forward.values) == model.spec.layers
    for value, found in zip(joint, forward.values.values(), strict=True):
        expected = value[0].transpose(0, 1).flatten(1)  # (L, D)
        torch.testing.assert_close(found, expected)
        norms = value_norms(found, token_groups(forward, model))
        for name, tokens in token_groups(forward, model).items():
            assert norms[name] == pytest.approx(np.mean([np.linalg.norm(expected[token].numpy()) for token in tokens]), rel=1e-5)


def test_the_mean_of_heads_is_what_runs_read(seen):
    model, latent, forward = seen
    for layer in range(model.spec.layers):
        maps = cell_maps(forward, layer, model)
        assert len(maps) == 1 + forward.queries[layer].query.shape[1]
        torch.testing.assert_close(maps[None][None], attention_maps(latent.z, latent.timestep, model, layer))
        torch.testing.assert_close(maps[1][None], attention_maps(latent.z, latent.timestep, model, layer, head=1))


def test_a_model_read_in_part_is_refused(sd3_folder, picture):
    part = load(str(sd3_folder), device='cpu')
    latent = encode(picture, part, Options(side=32).resolve(part.spec))
    with pytest.raises(UsageError, match=r'whole=True'):
        record(latent, part)


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
