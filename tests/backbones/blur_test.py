"""The blur of attention from image to text: beside explicit matrices in 64 bits, for every family."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from padseg.backbones.blur import Blur, blur_matrix, blurred
from padseg.backbones.recorder import Request, watch
from padseg.errors import UsageError
from padseg.types import Prompt

EVERY = ('queries', 'keys', 'values', 'output')
MODES = {'reflect': 'mirror', 'symmetric': 'reflect'}  # SciPy's names
TAPS = [0.1975, 0.2012, 0.2025, 0.2012, 0.1975]


@pytest.mark.parametrize('pad', MODES)
@pytest.mark.parametrize('count', [1, 2, 3, 7, 77])
def test_the_matrix_is_scipys_filter(pad, count):
    taps = np.exp(-0.5 * (np.arange(-2, 3) / 9.0) ** 2)
    expected = correlate1d(np.eye(count), taps / taps.sum(), axis=0, mode=MODES[pad])
    np.testing.assert_allclose(blur_matrix(count, pad=pad), expected, atol=1e-6)
    assert torch.equal(blur_matrix(count, size=1, pad=pad), torch.eye(count))


def test_the_first_tokens_lose_and_gain_mass_only_where_the_end_is_not_repeated():
    reflected, repeated = blur_matrix(77), blur_matrix(77, pad='symmetric')
    np.testing.assert_allclose(reflected[10, 8:13], TAPS, atol=5e-5)
    np.testing.assert_allclose(reflected.sum(0)[:4], [0.601, 1.201, 1.198, 1.0], atol=5e-4)
    np.testing.assert_allclose(repeated.sum(0), 1, atol=1e-6)
    assert torch.equal(repeated, repeated.T) and not torch.equal(reflected, reflected.T)


@pytest.fixture(scope='module')
def models(backbone35, flux, unets, pixarts):
    """One of each family, the layer to blur, and how many columns of the text are blurred."""
    return {
        'sd3': (backbone35, 1, 77),
        'flux': (flux, 1, 77),  # a double block
        'flux-single': (flux, 3, 77),
        'unet': (unets['sd15'], 11, 77),
        'pixart': (pixarts['sigma'], 1, None),
    }


def call_of(backbone, layer, blur=None, rows=None):
    """What a layer's attention was given and what it gave, in 64 bits, for three pictures, with the model's answer."""
    generator = torch.Generator().manual_seed(0)
    null = backbone.null_prompt
    embeds = torch.randn((3, *null.embeds.shape[1:]), generator=generator)
    mask = None
    if null.mask is not None:
        mask = (torch.arange(null.mask.shape[1]) < torch.tensor([[1], [4], [9]])).float()
    prompt = Prompt(embeds, null.pooled, (), (), mask=mask)
    side = 2 * backbone.patch * 2
    z = torch.randn((3, backbone.family.size(backbone.transformer.config).channels, side, side), generator=generator)
    tokens = (side // backbone.patch) ** 2
    requests = {layer: Request(backbone.attention_module(layer, EVERY), lambda seen: type(seen)(*map(as_double, seen)), EVERY)}
    with torch.no_grad():
        if blur is None:
            with watch(requests, stop=False) as kept:
                answer = backbone.denoise(z, 300.0, prompt)
        else:
            with blurred(backbone, blur, prompt, tokens, rows), watch(requests, stop=False) as kept:
                answer = backbone.denoise(z, 300.0, prompt)
    return kept[layer], answer, prompt, tokens


def as_double(part):
    return None if part is None else part.double().clone()


def explicit(seen, backbone, layer, prompt, tokens, blur, count):
    """Attention with blurred columns, by the whole matrix; text queries of joint attention keep their own."""
    scores = seen.query @ seen.key.transpose(2, 3) / math.sqrt(seen.query.shape[3])
    plain = (scores if seen.mask is None else scores + seen.mask).softmax(3)
    found = plain.clone()
    first = backbone.first_image_token(prompt)
    joint = seen.key.shape[2] > prompt.embeds.shape[1]
    image = slice(first, first + tokens) if joint else slice(None)
    for row in range(3):
        length = count or int(prompt.mask[row].sum())
        columns = backbone.family.text_columns(range(length), tokens)
        before = plain[row][:, image][:, :, columns]
        after = before @ blur_matrix(length, blur.size, blur.sigma, blur.pad).double().T
        if blur.renorm:
            after = after * (before.sum(2, keepdim=True) / after.sum(2, keepdim=True))
        part = found[row][:, image]
        part[:, :, columns] = after
        found[row][:, image] = part
    return found @ seen.value, image


@pytest.mark.parametrize('family', ['sd3', 'flux', 'flux-single', 'unet', 'pixart'])
@pytest.mark.parametrize(('pad', 'renorm'), [('reflect', False), ('symmetric', False), ('reflect', True)])
def test_substituted_values_give_what_the_blurred_matrix_gives(models, family, pad, renorm):
    backbone, layer, count = models[family]
    blur = Blur((layer,), pad=pad, renorm=renorm)
    seen, answer, prompt, tokens = call_of(backbone, layer, blur)
    plain, unblurred, _, _ = call_of(backbone, layer)
    expected, image = explicit(seen, backbone, layer, prompt, tokens, blur, count)
    assert torch.equal(seen.value, plain.value)  # a recorder sees the model's own
    torch.testing.assert_close(seen.output, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(seen.output[:, :, image], plain.output[:, :, image], atol=1e-4)
    assert not torch.allclose(answer, unblurred, atol=1e-5)


def test_the_other_way_round_differs_where_ends_are_reflected(models, monkeypatch):
    from padseg.backbones import blur as module

    backbone, layer, count = models['sd3']
    blur = Blur((layer,))
    plain = blur_matrix
    monkeypatch.setattr(module, 'blur_matrix', lambda *given: plain(*given).T.contiguous())
    seen, _, prompt, tokens = call_of(backbone, layer, blur)
    expected, image = explicit(seen, backbone, layer, prompt, tokens, blur, count)
    assert (seen.output - expected)[:, :, image].abs().max() > 1e-3


def test_only_the_rows_asked_for_change_and_text_tokens_never_do(models):
    backbone, layer, _ = models['sd3']
    seen, answer, prompt, tokens = call_of(backbone, layer, Blur((layer,)), slice(2, None))
    plain, unblurred, _, _ = call_of(backbone, layer)
    assert torch.equal(seen.output[:2], plain.output[:2]) and torch.equal(answer[:2], unblurred[:2])
    assert torch.equal(seen.output[2, :, tokens:], plain.output[2, :, tokens:])
    assert not torch.equal(answer[2], unblurred[2])


@pytest.mark.parametrize('family', ['sd3', 'flux', 'unet', 'pixart'])
def test_a_blur_of_one_tap_is_no_blur(models, family):
    backbone, layer, _ = models[family]
    assert torch.equal(call_of(backbone, layer, Blur((layer,), size=1))[1], call_of(backbone, layer)[1])


def test_several_layers_and_fewer_columns(models):
    backbone, layer, _ = models['sd3']
    answers = [call_of(backbone, layer, Blur(layers, slots=slots))[1] for layers, slots in (((1,), None), ((1, 2), None), ((1,), 5))]
    assert not any(torch.equal(one, other) for one, other in zip(answers, answers[1:] + answers[:1], strict=True))
    assert torch.equal(call_of(backbone, layer, Blur((layer,), slots=1))[1], call_of(backbone, layer)[1])  # one column has no neighbour
    with pytest.raises(UsageError, match='up to block 3'), blurred(backbone, Blur((9,)), backbone.null_prompt, 4):
        pass
