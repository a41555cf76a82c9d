"""S-CFG and GoCA's masks for it, on small random models beside plain loops over all maps; the released figures are in golden_test.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.explicit_goca import everything_of, naive, resized, row_of, softmax_of
from torch.nn.functional import conv2d, interpolate, pad

from padseg.backbones.recorder import watch
from padseg.backbones.texts import texts_of
from padseg.errors import UsageError
from padseg.generation import goca_masks, scfg
from padseg.types import Prompt, Tokens

TEXTS = ('a cat on grass', 'a dog')


@pytest.fixture(scope='module')
def models(unets, pixarts, backbone, flux):
    return {'sd15': unets['sd15'], 'sdxl': unets['sdxl'], 'sigma': pixarts['sigma'], 'sd3': backbone, 'flux': flux}


def joined(prompts, count):
    """One prompt with `count` rows of each."""
    embeds, pooled = (torch.cat([part.expand(count, *part.shape[1:]) for part in parts]) for parts in list(zip(*prompts, strict=True))[:2])
    masks = [prompt.mask.expand(count, -1) for prompt in prompts if prompt.mask is not None]
    return Prompt(embeds, pooled, (), (), mask=torch.cat(masks) if masks else None)


def call_of(backbone, size, texts=TEXTS):
    """A step for pictures of some texts: the guide's arguments."""
    reader, encoders = texts_of(backbone, keep=False), backbone.spec.encoders
    *rows, empty = (Prompt(*reader.encode(text, encoders, 'zeros'), (), (), mask=reader.mask(text)) for text in (*texts, ''))
    if backbone.spec.family == 'unet' and empty.pooled.shape[1]:  # as SDXL's pipeline has it
        empty = empty._replace(embeds=torch.zeros_like(empty.embeds), pooled=torch.zeros_like(empty.pooled))
    tokens = tuple(reader.tokens(text, encoders) for text in texts)
    channels = backbone.family.size(backbone.transformer.config).channels
    z = torch.cat([torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(seed)) for seed in range(len(texts))])
    call = SimpleNamespace(number=0, of=4, timestep=500.0, z=z)

    def predict(prompts, call):
        with torch.no_grad():
            found = backbone.denoise(call.z.repeat(len(prompts), 1, 1, 1), call.timestep, joined(prompts, len(call.z)))
        return list(found.float().split(len(call.z)))

    return predict, call, SimpleNamespace(empty=empty, text=joined(rows, 1), tokens=tokens)


def plainly(backbone, arguments):
    """The predictions for the empty prompt and the text, and everything that both attentions of every layer are given."""
    predict, call, texts = arguments
    found = []
    seen = everything_of(backbone, lambda: found.extend(predict([texts.empty, texts.text], call)))
    return found[0].double(), found[1].double(), seen


def blurred(maps, kernel):
    reach = len(kernel) // 2
    return conv2d(pad(maps[:, None], (reach,) * 4, mode='reflect'), torch.outer(kernel, kernel)[None, None])[:, 0]


def guided_plainly(empty, text, tokens, foreground, scale):
    """Of one picture, cell by cell."""
    change = text - empty
    eta = change.square().sum(0).sqrt()
    size = tuple(eta.shape)
    tokens = interpolate(tokens[None], size)[0]
    whole = eta[interpolate(foreground[None, None], size)[0, 0] > 0].mean() if foreground.any() else 0
    factor = torch.zeros_like(eta)
    for mask in tokens:
        if mask.any():
            factor[mask > 0] += whole / eta[mask > 0].mean()
    shares = torch.tensor([-1.0, 0, 1]).double().square().neg().exp()
    factor = blurred(factor.clamp(0.8, 3).clamp_max(15 / scale)[None], shares / shares.sum())[0]
    return empty + scale * factor * change


def own_masks(backbone, seen, row, count, shape, ends):
    """S-CFG's segmentation of one picture."""
    to = (-(-shape[2] // 4), -(-shape[3] // 4))
    shares = torch.tensor([-1.0, 0, 1]).double().square().neg().exp()
    tokens, pairs = [], []
    for layer in range(backbone.layers):
        grid = backbone.grid(layer, shape)
        if grid not in (to, (-(-shape[2] // 8), -(-shape[3] // 8))):
            continue
        halves = []
        for number in (row, count + row):
            one = row_of(seen, number)
            own, cross = (softmax_of(one[layer, kind]).mean(1)[0] for kind in ('self', 'cross'))
            walked = (own + own @ own + own @ own + own @ own) / 4 @ cross
            maps = interpolate(walked.T.unflatten(1, grid)[None], to, mode='bilinear')[0]
            halves.append(blurred(maps, shares / shares.sum()))
        tokens.append(halves[1] / halves[1].mean((1, 2), keepdim=True))
        source, column = (halves[1], ends[row]) if ends else (halves[0], 0)
        others = source.sum(0) - source[column]
        pairs.append(torch.stack([source[column] / source[column].mean(), others / others.mean()]))
    tokens, pair = torch.stack(tokens).mean(0), torch.stack(pairs).mean(0)
    return (tokens == tokens.amax(0)).double(), (pair[1] > pair[0]).double()


@pytest.mark.parametrize('size', [(32, 24), (20, 28)])
def test_s_cfg_is_the_plain_loop_over_all_maps(size, models):
    backbone = models['sd15']
    arguments = call_of(backbone, size)
    shape = arguments[1].z.shape
    empty, text, seen = plainly(backbone, arguments)
    found = scfg.s_cfg(backbone, 7.5)(*arguments)
    for row in range(2):
        tokens, foreground = own_masks(backbone, seen, row, 2, shape, None)
        assert tokens.flatten(1).any(1).sum() > 1 and 0 < foreground.mean() < 1
        expected = guided_plainly(empty[row], text[row], tokens, foreground, 7.5)
        assert torch.allclose(found[row].double(), expected, atol=1e-4)


def goca_plainly(backbone, seen, row, shape, content, end):
    """GoCA's masks of one picture; end: the column of PixArt's end token."""
    plan, order = goca_masks.plan_for(backbone)
    maps, own, _ = naive(backbone, row_of(seen, 2 + row), shape, plan)
    maps, own = maps[0], own[0]
    ground = maps[end] if end is not None else naive(backbone, row_of(seen, row), shape, plan)[0][0, 0]
    taps = torch.tensor([-2.0, -1, 0, 1, 2]).double().div(1.1).square().mul(-0.5).exp()
    taps = taps / taps.sum()

    def scaled(many):
        many = many - many.amin((1, 2), keepdim=True)
        return many / many.amax((1, 2), keepdim=True).clamp_min(1e-300)

    def refined(many):
        for _ in range(order):
            many = torch.einsum('pq,cq->cp', own, many.flatten(1)).unflatten(1, many.shape[1:])
        return scaled(many)

    tokens = refined(scaled(blurred(maps / maps[content].sum(0), taps)))
    tokens[max(content) + 1 :] = 0
    background = scaled(blurred(refined(ground[None]), taps))[0]
    return (tokens == tokens.amax(0)).double(), (background < 0.5).double()


@pytest.mark.parametrize(('kind', 'size'), [('sd15', (16, 24)), ('sigma', (16, 16))])
def test_goca_s_cfg_is_the_plain_loop_over_all_maps(kind, size, models):
    backbone = models[kind]
    arguments = call_of(backbone, size)
    shape = arguments[1].z.shape
    empty, text, seen = plainly(backbone, arguments)
    found = goca_masks.goca_s_cfg(backbone, 5.0)(*arguments)
    for row, (own,) in enumerate(tokens.values() for tokens in arguments[2].tokens):
        words = [place for place, span in enumerate(own.spans) if span != (0, 0)]
        assert len(words) == len(TEXTS[row].split())
        end = len(own.spans) - 1 if kind == 'sigma' else None
        tokens, foreground = goca_plainly(backbone, seen, row, shape, words, end)
        assert tokens.flatten(1).any(1).sum() > 1 and 0 < foreground.mean() < 1
        expected = guided_plainly(empty[row], text[row], tokens, foreground, 5.0)
        assert torch.allclose(found[row].double(), expected, atol=1e-4)


@pytest.mark.parametrize('kind', ['sdxl', 'sigma', 'sd3'])
@pytest.mark.parametrize('make', [scfg.s_cfg, goca_masks.goca_s_cfg])
def test_where_the_paper_has_no_such_model(kind, make, models):
    backbone = models[kind]
    predict, call, texts = call_of(backbone, (16, 16))
    calls = []

    def counted(prompts, call):
        calls.append(len(prompts))
        return predict(prompts, call)

    found = make(backbone, 5.0)(counted, call, texts)
    assert calls == [2] and found.shape == call.z.shape and found.isfinite().all()
    empty, text = predict([texts.empty, texts.text], call)
    factors = (found - empty) / (5 * (text - empty))
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), atol=1e-3)  # one for all channels
    assert 0.799 < factors.min() and factors.max() < 3.001 and not torch.allclose(factors, torch.ones(1))
    alone = [make(backbone, 5.0)(*call_of_row(backbone, call, row)) for row in range(2)]
    assert torch.allclose(torch.cat(alone), found, atol=1e-4)


def call_of_row(backbone, call, row):
    """The step for one of the pictures alone."""
    predict, own, texts = call_of(backbone, call.z.shape[2:], TEXTS[row : row + 1])
    own.z = call.z[row : row + 1]
    return predict, own, texts


def test_what_is_recorded_of_the_models(models):
    layers = {kind: scfg.layers_read(models[kind], (1, 4, 32, 32)) for kind in ('sd15', 'sdxl', 'sigma', 'sd3')}
    assert set(layers['sd15'].values()) == {(8, 8), (4, 4)} and len(layers['sd15']) == 6
    assert set(layers['sdxl'].values()) == {(8, 8)}
    assert list(layers['sigma'].values()) == [(16, 16)] and list(layers['sd3'].values()) == [(16, 16)]


def test_sd3_is_read_at_every_second_token(models):
    backbone = models['sd3']
    plan, _ = goca_masks.plan_for(backbone)
    assert plan.every == 2 and goca_masks.plan_for(models['sd15'])[0].every == 1
    predict, call, texts = call_of(backbone, (16, 16))
    found = {}
    for every, by in ((1, 'uniform'), (2, 'uniform'), (2, 'dot')):
        of_one = plan._replace(every=every, by=by, cross=(1,), refine=(1,))
        requests, found[every, by] = goca_masks.reading(backbone, texts.text, call.z.shape, of_one)
        with torch.no_grad(), watch(requests, stop=False):
            predict([texts.text], call)
    whole, small, compared = found.values()
    pixels = whole.maps[:, :, ::2, ::2]
    assert torch.allclose(small.maps, interpolate(pixels, (8, 8), mode='bilinear'), atol=1e-6)
    assert torch.allclose(small.self_map, whole.self_map, atol=1e-7) and torch.allclose(compared.self_map, whole.self_map, atol=1e-7)
    assert compared.dense.shape == (2, 16, 16)
    ((weight,),) = [compared.weights.values()]
    own = resized(whole.self_map.double(), (8, 8), (4, 4))
    assert torch.allclose(weight, (compared.dense.double() * own).sum((1, 2)), rtol=1e-5)


# The rule by hand


def test_where_all_change_alike_gamma_is_one():
    masks = torch.nn.functional.one_hot(torch.arange(16).reshape(1, 4, 4) % 5, 6).permute(0, 3, 1, 2).float()
    foreground = torch.zeros(1, 4, 4)
    foreground[:, 1:3] = 1
    factor = scfg.gamma(torch.full((1, 8, 8), 0.3), masks, foreground, 7.5)
    assert torch.allclose(factor, torch.ones(1), atol=1e-5)


def test_without_a_foreground_gamma_is_the_lowest():
    eta = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    masks = torch.ones(1, 1, 4, 4)
    assert torch.allclose(scfg.gamma(eta, masks, torch.zeros(1, 4, 4), 7.5), torch.tensor(0.8))
    strong = scfg.gamma(eta, masks, torch.zeros(1, 4, 4), 30.0)  # the cap comes last, 15 / 30
    assert torch.allclose(strong, torch.tensor(0.5))


def test_what_tied_tokens_contribute_is_added_and_empty_ones_add_nothing():
    eta = torch.tensor([[[1.0, 1], [4, 4]]])
    masks = torch.tensor([[[[1.0, 1], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]]])
    foreground = torch.ones(1, 2, 2)
    found = scfg.regional(eta, masks, foreground)  # 2.5 / 1 + 2.5 / 2.5 above, 2.5 / 2.5 below
    assert torch.allclose(found, torch.tensor([[[3.5, 3.5], [1, 1]]]))
    tied = scfg.highest(torch.tensor([[[[0.2, 0.5]], [[0.2, 0.1]], [[0.1, 0.5]]]]))
    assert torch.equal(tied, torch.tensor([[[[1.0, 1]], [[1, 0]], [[0, 1]]]]))


def test_the_kernel_is_wider_than_its_name():
    point = torch.zeros(1, 1, 5)
    point[0, 0, 2] = 1
    assert torch.allclose(scfg.smoothed(point)[0, 0], torch.tensor([0, 0.21194, 0.57612, 0.21194, 0]), atol=1e-5)
    edge = torch.tensor([[[1.0, 0, 0]]])  # mirrored without repeating the border
    assert torch.allclose(scfg.smoothed(edge)[0, 0], torch.tensor([0.57612, 0.21194, 0]), atol=1e-5)


def test_content_is_all_that_stands_for_something():
    spans = ((0, 0), (0, 1), (2, 5), (0, 0), (6, 7), (0, 0))
    tokens = Tokens(3, 8, spans, (True, False, False, False, True, True), (3,))
    assert goca_masks.content_of(tokens) == (4, 5, 7)  # an unknown word is content, a space alone is not
    long = Tokens(0, 4, ((0, 0), *((place, place + 1) for place in range(6)), (0, 0)), (False,) * 8)
    assert goca_masks.content_of(long) == (1, 2)


def test_an_empty_text_changes_nothing(models):
    predict, call, texts = call_of(models['sd15'], (16, 16), ('',))
    for make in (scfg.s_cfg, goca_masks.goca_s_cfg):
        assert torch.equal(make(models['sd15'], 7.5)(predict, call, texts), predict([texts.empty, texts.text], call)[0])


def test_flux_has_no_empty_prompt_to_be_guided_from(models):
    for name, make in (('s-cfg', scfg.s_cfg), ('goca-s-cfg', goca_masks.goca_s_cfg)):
        with pytest.raises(UsageError, match=f'^{name} does not support'):
            make(models['flux'], 5.0)
