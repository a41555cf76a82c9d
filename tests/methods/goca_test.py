"""GoCA on small random models: the maps of one pass beside explicit softmax and (N, H, C) products, prompts, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import padseg
from padseg.backbones import flux as flux_family
from padseg.backbones.recorder import requests_of, watch
from padseg.backbones.spec import BACKBONES
from padseg.backbones.texts import texts_of
from padseg.commands import main
from padseg.errors import UsageError
from padseg.exports import read_label_map
from padseg.methods import goca, method_named
from padseg.methods.goca import BACKGROUND, GocaOptions
from padseg.methods.stages import aggregation
from padseg.methods.stages.captions import caption_entities, named_entities, roles_of, scene_of, with_synonyms
from padseg.methods.stages.cross_maps import aggregated, result_grid
from padseg.methods.stages.latents import encode
from padseg.methods.stages.saved_maps import read_maps, unpacked
from padseg.methods.stages.token_maps import attention_maps
from padseg.types import Attention

FAMILIES = ['speller', 'speller35', 'flux']
NAMES = ('cat', 'grass')
EVERY = ('queries', 'keys', 'values', 'output')


def prepared_with(backbone, names=NAMES, **options):
    return goca.prepare(backbone, GocaOptions(**options), names)


def latent_of(backbone, picture, prepared):
    noising = dataclasses.replace(backbone, spec=backbone.spec._replace(steps=prepared.options.schedule))
    return encode(picture, noising, prepared.options)


def everything_of(backbone, latent, prompt):
    """Queries, keys, values and output of every layer, in 64 bits."""
    seen = {}

    def keep(layer):
        return lambda found: seen.__setitem__(layer, Attention(*(None if part is None else part.double().clone() for part in found)))

    requests = {}
    for layer in range(backbone.layers):
        requests |= requests_of(backbone, [layer], keep(layer), EVERY)
    with torch.no_grad(), watch(requests, stop=False):
        backbone.denoise(latent.z, latent.timestep, prompt, 1.0 if backbone.spec.family == 'flux' else None)
    return seen


def naive(backbone, latent, prompt, plan):
    """The same maps the obvious way: all heads kept, and a vector in C dimensions for each of them at each pixel."""
    seen = everything_of(backbone, latent, prompt)
    h, w = backbone.grid(0, latent.z.shape)
    count, first = h * w, backbone.first_image_token(prompt)
    columns = backbone.text_columns(prompt._replace(picked=tuple(range(prompt.embeds.shape[1]))), count)
    image = slice(first, first + count)
    cross, own, weights = [], [], []
    for layer in range(backbone.layers):
        query, key, value, _, output = seen[layer]
        shares = (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(3)[:, :, image]  # (1, H, N, L)
        text = shares[..., columns]
        own.append(shares[..., image].mean(1))
        weight, bias = backbone.output_projection(layer)
        if plan.heads == 'average' or (bias is None and not plan.single):
            cross.append(text.mean(1))
        else:
            z = text @ value[:, :, columns] if plan.text_only else output[:, :, image]
            parts = weight.detach().double().unflatten(1, (z.shape[1], -1))  # (C, H, d)
            vectors = torch.einsum('chd,bhnd->bnhc', parts, z)
            whole = vectors.sum(2, keepdim=True)
            raw = {
                'dot': (vectors * whole).sum(3),
                'l2': vectors.norm(dim=3),
                'cosine': torch.cosine_similarity(vectors, whole, 3),
            }[plan.heads]
            if plan.spectral:
                norms = [torch.linalg.matrix_norm(value[0, head][columns] @ parts[:, head].T, 2) for head in range(z.shape[1])]
                raw = raw * torch.stack(norms)
            cross.append(torch.einsum('bnh,bhnt->bnt', raw / raw.sum(2, keepdim=True), text))
    if plan.by == 'uniform':
        weights = [1.0] * len(plan.cross)
    else:
        dense = seen[plan.dense].output if plan.feature == 'attn-out' else seen[plan.dense].query
        pixels = dense[:, :, image].transpose(1, 2).flatten(2)
        weight, bias = backbone.output_projection(plan.dense)
        if plan.feature == 'attn-out' and bias is not None:
            pixels = pixels @ weight.detach().double().T + bias.detach().double()
        pixels = pixels[..., :1] if plan.channels == 'first' else pixels
        affinity = (pixels @ pixels.transpose(1, 2) / math.sqrt(pixels.shape[2])).softmax(2)
        weights = [float((affinity * own[layer]).sum()) for layer in plan.cross]
    maps = sum(share * cross[layer] for share, layer in zip(weights, plan.cross, strict=True)) / sum(weights)
    maps = maps.clamp_min(0) / maps.clamp_min(0).sum(2, keepdim=True)
    self_map = torch.stack([own[layer] for layer in plan.refine]).mean(0)
    in_order = [share for _, share in sorted(zip(plan.cross, weights, strict=True))]
    return maps.transpose(1, 2).unflatten(2, (h, w)), self_map, torch.tensor(in_order)


SETTINGS = [
    {'heads': 'dot', 'similarity': 'dot'},
    {'heads': 'dot', 'similarity': 'dot', 'joint_values': 'text', 'single_blocks': 'projection', 'dense_channels': 'first'},
    {'heads': 'cosine', 'similarity': 'dot', 'value_weights': True, 'dense_feature': 'attn-out', 'layers': ('3', 'vit-block1')},
    {'heads': 'l2', 'similarity': 'uniform', 'refine_layers': ('0', '3')},
    {'preset': 'vanilla'},
]


@pytest.mark.parametrize('settings', SETTINGS, ids=lambda settings: '-'.join(map(str, settings.values())))
@pytest.mark.parametrize('family', FAMILIES)
def test_one_pass_gives_the_maps_of_the_explicit_products(family, settings, picture, request):
    backbone = request.getfixturevalue(family)
    prepared = prepared_with(backbone, **settings)
    latent, (asked,) = latent_of(backbone, picture, prepared), prepared.prompts
    maps, self_map, weights = aggregated([latent], backbone, asked.prompt, prepared.plan)
    expected = naive(backbone, latent, asked.prompt, prepared.plan)
    assert maps.shape[2:] == (h_w := backbone.grid(0, latent.z.shape)) and h_w[0] != h_w[1]  # a picture that is no square
    for found, wanted in zip((maps, self_map, weights[:, 0]), expected, strict=True):
        assert torch.allclose(found.double(), wanted.reshape(found.shape).double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_without_any_weights_maps_are_the_plain_mean_over_layers_and_heads(family, picture, request):
    backbone = request.getfixturevalue(family)
    prepared = prepared_with(backbone, heads='average', similarity='uniform')
    latent, prompt = latent_of(backbone, picture, prepared), prepared.prompts[0].prompt
    everything = prompt._replace(picked=tuple(range(prompt.embeds.shape[1])))
    plan = prepared.plan._replace(guidance=None)
    mean = attention_maps(latent.z, latent.timestep, backbone, everything, *range(backbone.layers))
    found = aggregated([latent], backbone, prompt, plan).maps
    assert torch.allclose(found, mean / mean.sum(1, keepdim=True), atol=1e-6)
    roles = prepared.prompts[0].roles
    _, plain = aggregation.class_maps(found[0], roles, rescale=False)
    columns = [roles[0].classes[number] for number in (0, 1)]
    assert torch.equal(plain[:2], aggregation.renormalised(aggregation.object_scores(found[0], columns)))


@pytest.mark.parametrize('family', FAMILIES)
def test_heads_add_up_to_the_layer_and_their_products_to_its_square(family, picture, request):
    backbone = request.getfixturevalue(family)
    prepared = prepared_with(backbone)
    seen = everything_of(backbone, latent_of(backbone, picture, prepared), prepared.prompts[0].prompt)
    weight, bias = backbone.output_projection(0)
    z = seen[0].output
    parts = weight.detach().double().unflatten(1, (z.shape[1], -1))
    vectors = torch.einsum('chd,bhnd->bnhc', parts, z)
    whole = torch.nn.functional.linear(z.transpose(1, 2).flatten(2), weight.double(), bias.double()) - bias.double()
    assert torch.allclose(vectors.sum(2), whole, atol=1e-9)
    products = aggregation.head_products(z, aggregation.projection_of(weight.detach().double(), 1))
    assert torch.allclose(products.transpose(1, 2), (vectors * whole[:, :, None]).sum(3), rtol=1e-9, atol=1e-9)
    assert torch.allclose(products.sum(1), whole.square().sum(2), rtol=1e-9)


@pytest.mark.parametrize(('renormalise', 'ratio'), [(False, [16, 4, 1, 0.25]), (True, [1, 1, 1, 1])])
def test_layers_of_other_sizes_weigh_more_or_less_by_their_size_alone(renormalise, ratio):
    dense = torch.full((1, 32**2, 32**2), 1 / 32**2)
    flat = [torch.full((1, side**2, side**2), 1 / side**2) for side in (8, 16, 32, 64)]
    grids = [(side, side) for side in (8, 16, 32, 64)]
    weights = [
        aggregation.similarity(dense, aggregation.resized(maps, grid, (32, 32), renormalise), 'dot')
        for maps, grid in zip(flat, grids, strict=True)
    ]
    assert np.allclose(np.array(weights)[:, 0] / float(weights[2]), ratio)


def test_a_layer_is_read_in_parts_and_only_where_it_is_wanted(monkeypatch):
    """Of a finer layer only every second query of each axis, with masked keys, in 7 queries at a time."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 6 * 4, 5, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 1, 1, 24).masked_fill(torch.arange(24) == 5, -1e4)
    monkeypatch.setattr(aggregation, 'CELLS_CPU', 7 * 2 * 3 * 24)
    seen = Attention(query, key, None, mask)
    whole = (query @ key.transpose(2, 3) / math.sqrt(5) + mask).softmax(3).mean(1)
    assert (whole[..., 5] == 0).all()
    assert torch.allclose(aggregation.self_map(seen, (6, 4), (6, 4)), whole, atol=1e-6)
    assert torch.allclose(aggregation.self_map(seen, (6, 4), (12, 8)), whole, atol=1e-6)  # enlarged only when it is used
    small = aggregation.self_map(seen, (6, 4), (3, 2))
    keys = torch.nn.functional.interpolate(whole.unflatten(2, (6, 4)), (3, 2), mode='bilinear').flatten(2)
    pixels = torch.nn.functional.interpolate(keys.transpose(1, 2).unflatten(2, (6, 4)), (3, 2), mode='nearest')
    assert torch.allclose(small, pixels.flatten(2).transpose(1, 2), atol=1e-6)


def mean_of(query, key, rows):
    """The mean over heads of some rows, which are computed a few at a time."""
    found = torch.full((len(query), len(rows), key.shape[2]), torch.nan)
    for number, part, mean in aggregation.head_means(Attention(query, key, None, None), rows):
        found[number, part] = mean
    return found


@pytest.mark.parametrize('scale', [0.01, 1, 12, 40, 3000])
def test_the_mean_over_heads_is_that_of_the_softmax_for_scores_of_any_size(scale):
    """Small scores, scores above the bound of the quick way, and such that its exponentials vanish."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn((2, 3, 20, 8), generator=generator) * scale for _ in range(2))
    query[0, 1, 4], key[1, 2, 5] = -1.5 * key[0, 1, 2], 0  # one far from all others
    found = mean_of(query, key, torch.arange(3, 20))
    exact = (query.double()[:, :, 3:] @ key.double().transpose(2, 3) / 8**0.5).softmax(3).mean(1)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), exact, atol=1e-6 * max(1, scale**2))


def test_what_is_not_finite_stays_so():
    query, key = torch.ones((1, 2, 3, 4)), torch.ones((1, 2, 3, 4))
    key[0, 1, 2, 0] = torch.nan
    assert mean_of(query, key, torch.arange(3)).isnan().all()


def test_few_pixels_are_projected_without_the_product_of_the_weights():
    generator = torch.Generator().manual_seed(0)
    z, weight = torch.randn((1, 4, 6, 5), generator=generator).double(), torch.randn((20, 20), generator=generator).double()
    few, many = (aggregation.projection_of(weight, pixels) for pixels in (20, 21))
    assert few.gram is None and many.gram is not None
    assert torch.allclose(aggregation.head_products(z, few), aggregation.head_products(z, many), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ('grids', 'expected'),
    [
        ([(64, 64), (32, 32), (8, 8)], (64, 64)),
        ([(48, 84), (24, 42)], (48, 84)),
        ([(128, 128), (64, 64), (16, 16)], (64, 64)),
        ([(96, 64), (48, 32)], (96, 64)),
        ([(128, 128)], (128, 128)),
    ],
)
def test_maps_have_the_finest_grid_near_that_of_the_paper(grids, expected):
    assert result_grid(grids) == expected


def test_nothing_to_divide_gives_equal_shares_and_zeros():
    nothing = torch.zeros(1, 2, 4, 3)
    for by in ('dot', 'dot-clamped', 'l2', 'cosine'):
        assert (aggregation.head_weights(nothing, aggregation.projection_of(torch.eye(6), 4), by) == 0.5).all()
    assert (aggregation.layer_shares(torch.zeros(4, 1)) == 0.25).all()
    flat = torch.ones(2, 1, 5)
    assert (aggregation.renormalised(flat) == 0).all()
    assert (aggregation.rescaled(flat, torch.zeros(3, 1, 5), (0, 2)) == 0).all()
    assert aggregation.blurred(torch.arange(2.0).reshape(1, 1, 2)).shape == (1, 1, 2)  # fewer pixels than the blur has taps
    assert torch.isfinite(aggregation.similarity(torch.eye(2)[None], torch.eye(2)[None], 'layer-mse')).all()


# prompts


WORDS = ['t-shirt', 'cats', 'Traffic Light', 'the catfish', '🐱', 'tra']


@pytest.mark.parametrize('family', ['speller', 'flux'])
def test_tokens_belong_to_the_words_that_they_stand_for(family, request):
    backbone = request.getfixturevalue(family)
    encoders = {'speller': 'l+g+t5', 'flux': 't5'}[family]
    scene = scene_of(named_entities(WORDS, range(len(WORDS)), ['sky']))
    assert scene.text == 't-shirt, cats, traffic light, the catfish, 🐱, tra, sky'
    for kind, tokens in texts_of(backbone).tokens(scene.text, encoders).items():
        roles = roles_of(scene, tokens)
        texts = {
            number: ''.join(scene.text[slice(*span)] for span in dict.fromkeys(tokens.spans[column - tokens.first] for column in columns))
            for number, columns in roles.classes.items()
        }
        spelled = {0: 'tshirt', 1: 'cats', 2: 'trafficlight', 3: 'catfish', 5: 'tra'}
        if kind == 'clip':
            spelled[4] = '🐱'  # as bytes; T5 does not know it
        assert {number: text.replace(' ', '') for number, text in texts.items()} == spelled
        assert len(roles.objects) == 1
        assert sorted(roles.content) == sorted(column for columns in (*roles.classes.values(), *roles.objects) for column in columns)


CLASSES = {0: with_synonyms('person', 'voc'), 1: with_synonyms('car', 'voc'), 2: with_synonyms('pottedplant', 'voc')}


@pytest.mark.parametrize(
    ('caption', 'expected'),
    [
        ('women, cars, carpet', [('women', 0), ('cars', 1), ('carpet', None)]),
        ('(Person, shirt), sky.', [('person, shirt', 0), ('sky', None)]),
        ('sky, (car), grass', [('sky', None), ('car', 1), ('grass', None)]),  # a group of one, which the released parser never closes
        ('sky, (man, car, road', [('sky', None), ('man', 0), ('car', 1)]),
        ('car, car, , CAR', [('car', 1)]),
        ('plants', [('plants', 2)]),
        ('', []),
    ],
)
def test_a_caption_lists_entities(caption, expected):
    assert [tuple(entity) for entity in caption_entities(caption, CLASSES)] == expected


def test_missing_classes_and_background_are_added():
    found = caption_entities('tree.', CLASSES, background=True, complete=True)
    assert [entity.text for entity in found] == ['tree', 'background', 'person', 'car', 'pottedplant']


def test_a_hundred_and_fifty_classes(speller, picture):
    names = [f'thing{number}' for number in range(150)]
    prepared = prepared_with(speller, names, background_words=('sky',))
    (maps,) = goca.maps([picture], prepared)
    assert len(prepared.prompts) > 1 and maps.names == (*names, BACKGROUND) * 6
    assert torch.isfinite(maps.maps).all() and 0 <= maps.maps.min() and maps.maps.max() <= 1 and maps.maps[150].any()
    found = goca.labels(picture, maps, prepared)
    assert found.names == tuple(names) and found.labels.max() <= 150


def test_a_class_without_tokens_is_left_out(flux, picture, caplog):
    found = padseg.label(picture, flux, ['🐱', 'cat', 'the'], method='goca')
    assert 2 in found.labels and set(np.unique(found.labels)) <= {0, 2}
    assert [record.getMessage().partition('has')[2] for record in caplog.records] == [
        f' no tokens for the name {name!r}: it is left out' for name in ('🐱', 'the')
    ]
    with pytest.raises(UsageError, match='the tokenizer has no tokens for 🐱'):
        padseg.label(picture, flux, ['🐱'], method='goca')


def test_names_that_do_not_fit(speller):
    with pytest.raises(UsageError, match=r"^the name 'a{100}' is too long for a prompt$"):
        prepared_with(speller, ['a' * 100])
    with pytest.raises(UsageError, match=r"^the name 'cat', with 40 words of background, is too long for a prompt$"):
        prepared_with(speller, ['cat'], background_words=tuple(f'sky{number}' for number in range(40)))
    with pytest.raises(UsageError, match='two classes have the same name'):
        prepared_with(speller, ['cat', 'Cat'])


# settings


def test_the_settings_of_the_paper():
    flux_spec = BACKBONES['flux']
    released = GocaOptions().resolve(flux_spec)
    assert (released.heads, released.dense_layer, released.dense_feature, released.order) == ('average', '27', 'attn-out', 2)
    assert (released.refine_layers, released.guidance, released.dense_channels) == (('12', '18'), 1.0, 'all')
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    level = flux_family.noise_level(scheduler, released.schedule, released.step, 4096)
    assert round(level.timestep, 2) == 407.08
    assert GocaOptions(preset='vanilla').resolve(flux_spec).layers == ('8', '28', '47')
    sd15 = flux_spec._replace(family='unet', layers=16, layer=11, encoders='clip')
    baseline = GocaOptions(preset='baseline').resolve(sd15)
    assert baseline.layers == tuple('4 5 6 7 8 9 10 11'.split()) and (baseline.heads, baseline.rescale) == ('average', False)
    assert (baseline.step, baseline.schedule, baseline.order, baseline.refine_layers[0]) == (101, 1000, 2, 'up-level3-repeat0-vit-block0')
    assert baseline.dense_layer == 'up-level2-repeat1-vit-block0'
    sdxl = GocaOptions().resolve(sd15._replace(layers=70, layer=64))
    assert (sdxl.step, len(sdxl.refine_layers), sdxl.dense_layer, sdxl.heads) == (100, 7, 'up-level1-repeat0-vit-block0', 'dot')
    sigma = GocaOptions().resolve(sd15._replace(family='pixart', layers=28, layer=13))
    assert sigma.dense_layer == 'vit-block13' and (sigma.order, sigma.refine_layers) == (5, tuple(map(str, range(10, 18))))


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'layers': ('4',)}, 'layers are in 0..3 for .*; got 4$'),
        ({'layers': ('vit-block9', '1')}, 'has no layer vit-block9; it has 0..3, such as vit-block3$'),
        ({'refine_layers': ()}, '^refine_layers are numbers or names of layers; got none$'),
        ({'order': -1}, '^order is a number of times in 0..100; got -1$'),
        ({'rule': 'min'}, '^rule is one of offset, max, exact, avg, vanilla; got min$'),
        ({'step': 9, 'schedule': 8}, '^step is in 1..8, the schedule; got 9$'),
        ({'guidance': 1.0}, 'takes no guidance strength$'),
        ({'captions': 'none.json'}, '^none.json cannot be read as JSON: '),
    ],
)
def test_wrong_options(speller, options, words):
    with pytest.raises(UsageError, match=words):
        prepared_with(speller, **options)


# whole pictures


@pytest.mark.parametrize('family', ['speller', 'flux'])
def test_neither_a_batch_nor_its_order_changes_anything(family, picture, request):
    backbone = request.getfixturevalue(family)
    images = [picture, picture[:, ::-1].copy(), picture[:40, :40].copy()]
    options = GocaOptions(background_words=('a',), tau=-0.2)
    together = padseg.label(images, backbone, NAMES, options, method='goca')
    turned = padseg.label(images[::-1], backbone, NAMES, options, method='goca')[::-1]
    for image, first, second in zip(images, together, turned, strict=True):
        alone = padseg.label(image, backbone, NAMES, options, method='goca')
        assert alone.labels.shape == image.shape[:2] and len(np.unique(alone.labels)) > 1
        assert np.array_equal(alone.labels, first.labels) and np.array_equal(alone.labels, second.labels)


def test_self_attention_in_16_bits_gives_nearly_the_same(speller, picture):
    exact, half = (goca.score_maps(picture, speller, NAMES, GocaOptions(half_maps=half)).maps for half in (False, True))
    assert 0 < (exact - half).abs().max() < 0.02


@pytest.mark.parametrize('rule', goca.RULES)
def test_labels_follow_the_rule_for_background(speller, picture, rule):
    """Beside the rule written out, at the size of the picture."""
    options = GocaOptions(rule=rule, tau=0.4, background_words=('a',))
    scores = goca.score_maps(picture, speller, NAMES, options)
    large = torch.nn.functional.interpolate(scores.maps[None].double(), picture.shape[:2], mode='bilinear')[0]
    expected = torch.cat((aggregation.background_score(large[-1], 0.4, rule)[None], large[:-1])).argmax(0)
    found = padseg.label(picture, speller, NAMES, options, method='goca').labels
    assert (found != expected.numpy()).mean() < 0.002 and len(np.unique(found)) > 1


@pytest.fixture
def folder(tmp_path, picture):
    (tmp_path / 'in').mkdir()
    PIL.Image.fromarray(picture).save(tmp_path / 'in' / 'one.png')
    PIL.Image.fromarray(picture[::-1]).save(tmp_path / 'in' / 'two.png')
    return tmp_path


def labelled(folder, model, *args):
    out = folder / 'out'
    command = ['label', '--method', 'goca', '--model', str(model), '--dir', str(folder / 'in'), '--out', str(out), '--quiet', *args]
    return main(command), out


def test_label_keeps_maps_that_other_thresholds_and_orders_need(folder, texts_folder, speller, picture):
    code, out = labelled(folder, texts_folder, '--classes', 'cat, grass', '--background', 'sky, wall', '--save-maps')
    assert code == 0
    record = json.loads((out / 'run.json').read_text())
    assert record['settings']['background_words'] == 'sky, wall' and record['settings']['background'] == '#ffffff'
    maps = read_maps(out / 'maps' / 'one.png.npz')
    options = GocaOptions(background_words=('sky', 'wall'))
    expected = padseg.label(picture, speller, NAMES, options, method='goca')
    assert np.array_equal(read_label_map(out / 'labels' / 'one.png.png', picture.shape[:2]), expected.labels)
    for tau, order in ((0.3, 0), (-0.1, 5)):
        other = dataclasses.replace(options, tau=tau, order=order)
        found = goca.relabel(picture, maps, NAMES, other)
        assert np.array_equal(found.labels, padseg.label(picture, speller, NAMES, other, method='goca').labels)
    with pytest.raises(UsageError, match=r'^these maps are refined 0\.\.5 times; got order 6$'):
        goca.relabel(picture, maps, NAMES, dataclasses.replace(options, order=6))
    assert unpacked(out / 'maps' / 'one.png.npz').names == ('cat', 'grass', BACKGROUND) * 6


def test_captions_by_picture(folder, texts_folder, speller, picture):
    file = folder / 'captions.json'
    file.write_text(json.dumps({'one.png': 'kitten, (tree, leaf), sky.'}))
    code, out = labelled(folder, texts_folder, '--classes', 'grass, cat', '--captions', str(file), '--synonyms', 'voc')
    assert code == 3  # two.png has no caption
    failed = [json.loads(line) for line in (out / 'failures.jsonl').read_text().splitlines()]
    assert [(each['input'], each['reason']) for each in failed] == [('two.png', f'{file} has no caption for two.png')]
    found = read_label_map(out / 'labels' / 'one.png.png', picture.shape[:2])
    scene = scene_of(caption_entities('kitten, (tree, leaf), sky', {1: ('kitten',)}))
    assert scene.text == 'kitten, tree, leaf, sky'
    expected = padseg.label(
        picture, speller, ['kitten'], GocaOptions(background_words=('tree, leaf', 'sky')), method='goca'
    )  # which is the same prompt
    assert np.array_equal(found, np.where(expected.labels == 1, 2, 0))


def test_the_method_is_offered_by_name():
    assert method_named('goca', 'classes') is goca
    with pytest.raises(UsageError, match='options of goca are GocaOptions; got LabelOptions'):
        padseg.label(np.zeros((8, 8, 3), np.uint8), 'tiny', ['cat'], padseg.LabelOptions(), method='goca')


def test_a_file_of_captions_that_is_no_file_or_too_large_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / 'pipe.json')
    (tmp_path / 'large.json').write_bytes(b'')
    os.truncate(tmp_path / 'large.json', 2**40)
    (tmp_path / 'twice.json').write_text('{"a": "a cat", "a": "a dog"}')
    for name in ('pipe.json', 'large.json', 'twice.json'):
        with pytest.raises(UsageError, match=f'{name} cannot be read as JSON'):
            goca.read_captions(tmp_path / name)


@pytest.mark.parametrize('shape', [None, (12,), (2, 1, 1, 12), (2, 3, 9, 12)], ids=['no-mask', 'keys', 'pictures', 'everything'])
def test_one_head_after_another_gives_what_all_at_once_give(shape):
    """On a CPU and on a GPU, each with the mean over heads of the weights among image tokens."""
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randn(2, 3, length, 4, generator=generator) for length in (9, 12))
    mask = None if shape is None else torch.randn(shape, generator=generator)
    seen, rows = Attention(query, key, None, mask), torch.tensor([1, 4, 8])
    keys = key.transpose(2, 3)
    for text, image in ((slice(9, 12), slice(0, 9)), ([11, 9], None)):
        ours = aggregation.parts_by_head(seen, keys, rows, text, image)
        theirs = aggregation.parts_of_heads(seen, keys, rows, text, image)
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape and torch.allclose(one, other, atol=1e-6)
    assert ours[0].shape == (2, 3, 3, 2)
