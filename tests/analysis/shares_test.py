"""Shares of attention and norms of values against explicit softmax and loops; and the sets of tokens that they are measured on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from padseg import Options
from padseg.analysis import norms, shares
from padseg.analysis.norms import filled_sets, set_norms
from padseg.analysis.recording import Pictures, Sight, Subject, Text, over_pictures, text_of, token_sets
from padseg.analysis.shares import set_masses, set_shares
from padseg.backbones.texts import kept_texts
from padseg.system.progress import Silent
from padseg.types import Attention, Prompt, Tokens


def worded(model, text: str) -> Text:
    return text_of(kept_texts(model, True), text, model.spec.encoders)


def source(model, picture, *texts: str, steps=(1,)) -> Pictures:
    subjects = [Subject(f'{number}.png', picture, text) for number, text in enumerate(texts)]
    return Pictures(subjects, model, Options(side=32).resolve(model.spec), steps, Silent())


def test_sets_of_tokens(backbone, flux):
    sets = token_sets(backbone, worded(backbone, 'a cat on grass'), 6)
    assert sets['image'] == list(range(6)) and sets['text'] == list(range(6, 6 + 154))
    assert sets['clip'] == list(range(6, 83)) and sets['empty'] == list(range(83, 160)) and sets['t5'] == []
    assert sets['prompt'] == [7, 8, 9, 10] and sets['sos'] == [6]
    assert token_sets(backbone, worded(backbone, ''), 6)['prompt'] == []
    sets = token_sets(flux, worded(flux, 'cat'), 6)  # text comes first
    slots = len(sets['text'])
    assert (
        sets['image'] == list(range(slots, slots + 6)) and sets['t5'] == sets['text'] and sets['empty'] == sets['sos'] == sets['clip'] == []
    )
    assert 0 in sets['prompt'] and max(sets['prompt']) < 6


def test_a_text_that_is_too_long_is_cut_as_the_model_sees_it(backbone):
    text = worded(backbone, 'cat ' * 100)
    assert len(text.tokens['clip'].spans) == 77
    assert token_sets(backbone, text, 6)['prompt'] == list(range(7, 7 + 75))  # between start and end


def seen_by(heads: int, tokens: int, mask=None) -> Attention:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (3 * torch.randn(1, heads, tokens, 8, generator=generator) for _ in range(3))
    return Attention(query, key, value, mask)


@pytest.mark.parametrize('mask', [None, torch.tensor([0.0] * 9 + [-torch.inf] * 2)])
def test_masses_are_sums_of_the_explicit_softmax(mask):
    seen = seen_by(2, 11, mask)
    sets = {'image': range(5), 'text': range(5, 11), 'some': [6, 9], 'none': []}
    scores = seen.query[0].double() @ seen.key[0].double().transpose(1, 2) / 8**0.5
    whole = (scores if mask is None else scores + mask).softmax(-1)  # (heads, N, L)
    masses = set_masses(seen, sets, chunk=4)
    for number, columns in enumerate(sets.values()):
        torch.testing.assert_close(masses[..., number].double(), whole[..., list(columns)].sum(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(masses[..., 0] + masses[..., 1], torch.ones(2, 11), atol=2e-6, rtol=0)
    found = set_shares(seen, sets)
    assert found[2, 0] == pytest.approx(float(whole[:, [6, 9], :5].sum(2).mean()), abs=1e-6)
    assert np.isnan(found[3]).all() and np.isnan(found[:, 3]).all()


@pytest.mark.parametrize('name', ['backbone', 'backbone35', 'flux'])
def test_shares_of_a_model_sum_to_one(name, request, picture):
    model = request.getfixturevalue(name)
    found = shares.measure(source(model, picture, 'cat', 'dog', '', steps=(1, 4)))
    image, text = found.sets.index('image'), found.sets.index('text')
    assert found.mean.shape == (2, model.spec.layers, len(found.sets), len(found.sets)) and found.pictures == 3 and found.steps == [1, 4]
    assert found.mean[..., image] + found.mean[..., text] == pytest.approx(1, abs=1e-5)
    assert found.uniform[image] + found.uniform[text] == pytest.approx(1)
    if name != 'flux':
        clip, empty = found.sets.index('clip'), found.sets.index('empty')
        assert found.mean[..., clip] + found.mean[..., empty] == pytest.approx(found.mean[..., text], abs=1e-5)
        assert found.enrichment[..., clip] == pytest.approx(found.mean[..., clip] / found.uniform[clip])
        rows = shares.rows(found)
        assert len(rows) == 2 * model.spec.layers * len(found.sets) ** 2
        one = next(row for row in rows if (row['step'], row['layer'], row['queries'], row['keys']) == (4, 1, 'image', 'prompt'))
        assert one['share'] == pytest.approx(found.mean[1, 1, image, found.sets.index('prompt')])
        assert one['query_tokens'] == 60 and one['key_tokens'] == 1  # the mean of those that have a prompt
        assert shares.summary(found)[1]['image→prompt'] == pytest.approx(found.mean[0, 1, image, found.sets.index('prompt')])


def test_without_preference_shares_are_uniform():
    alike = Attention(torch.zeros(1, 2, 6, 4), torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0)))
    sets = {'image': [0, 1, 2, 3], 'text': [4, 5]}
    assert set_shares(alike, sets) == pytest.approx(np.tile([2 / 3, 1 / 3], (2, 1)))


def test_what_only_some_pictures_have_is_averaged_over_those():
    def sight(name: str, step: int) -> Sight:
        prompt = Prompt(torch.zeros(1, 1, 1), torch.zeros(1, 0), (), ())
        return Sight(name, step, Text('', prompt, {'clip': Tokens(0, 1, (), ())}), (1, 1), {})

    readings = [(sight(name, step), np.array([value, step])) for name, step, value in (('a', 8, 1.0), ('b', 8, np.nan), ('c', 8, 4.0))]
    readings += [(sight(name, step), np.array([np.nan, step])) for name, step in (('a', 2), ('b', 2), ('c', 2))]
    mean, std = over_pictures(readings)
    assert mean == pytest.approx(np.array([[2.5, 8], [np.nan, 2]]), nan_ok=True)
    assert std == pytest.approx(np.array([[1.5, 0], [np.nan, 0]]), nan_ok=True)


def test_norms_by_hand():
    values = torch.zeros(2, 4, 2)  # two heads, four tokens
    values[0, 0], values[1, 0] = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 12.0])
    values[0, 1], values[1, 1] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    found = set_norms(values, {'image': [0, 1], 'one': [0], 'none': []})
    assert found == pytest.approx(np.array([[7, 13, np.nan], [3, 5, np.nan], [6, 12, np.nan]]), nan_ok=True)
    assert filled_sets({'text': [3, 4, 5], 'empty': [4, 5], 'sos': [3]}) == {'text': [3], 'empty': [4, 5], 'sos': [3]}


def test_norms_of_a_model(backbone, picture):
    where = source(backbone, picture, 'cat', 'dog on grass')
    found = norms.measure(where)
    assert found.sets == ['image', 'text', 'clip', 'empty', 'prompt', 'sos'] and found.mean.shape == (1, 4, 3, 6)
    assert found.tokens.tolist() == [60, 77, 77, 77, 2, 1]
    values = [blocks for _, blocks in where(lambda seen, sight: seen.value[0], ('values',))]
    for layer in range(4):
        expected = [one[layer].transpose(0, 1).flatten(1).norm(dim=1)[:60].mean() for one in values]
        assert found.mean[0, layer, 0, 0] == pytest.approx(np.mean(expected), rel=1e-5)
        assert found.std[0, layer, 0, 0] == pytest.approx(np.std(expected), abs=1e-5)
        single = [one[layer][1, 60 + 77 :].norm(dim=1).mean() for one in values]  # second head, slots that nothing fills
        assert found.mean[0, layer, 2, 3] == pytest.approx(np.mean(single), rel=1e-5)
    rows = norms.rows(found)
    assert [row['head'] for row in rows[:18:6]] == [None, 0, 1] and len(rows) == 4 * 3 * 6
    assert norms.summary(found)[2]['prompt'] == pytest.approx(found.mean[0, 2, 0, 4])
