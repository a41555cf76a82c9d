"""ConceptAttention on small random models, beside an explicit third stream and attention with one boolean mask, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from torch.overrides import TorchFunctionMode

import padseg
from padseg.backbones import load
from padseg.backbones.recorder import requests_of, watch
from padseg.backbones.third_stream import SEES, Places, attention_apart, places_of, third_stream, with_concepts
from padseg.commands import main
from padseg.errors import ModelUnavailable, UsageError
from padseg.exports import read_label_map
from padseg.methods import concepts, seg4diff
from padseg.methods.concepts import ConceptOptions, layers_of, settings_of
from padseg.methods.stages.concept_maps import Concepts, Reading, concept_maps, concept_scores, linear_normalised
from padseg.methods.stages.token_maps import attention_maps
from padseg.types import Frame, Latent, Prompt

FAMILIES = ['speller', 'speller35', 'flux']  # with a pooled vector
POOLLESS = ['flux2', 'auraflow']
NAMES = ('cat', 'dog', 'grass')
EVERY = ('queries', 'keys', 'values', 'output')


def in_64_bits(backbone):
    """The same model in double precision."""
    import copy

    return dataclasses.replace(backbone, transformer=copy.deepcopy(backbone.transformer).double())


def inputs(backbone, concepts_count=4):
    """A latent that is no square, a prompt and concepts: random, in 64 bits."""
    generator = torch.Generator().manual_seed(3)
    config = backbone.transformer.config
    width = config.joint_attention_dim
    channels = config.in_channels // (4 if backbone.spec.family in ('flux', 'flux2') else 1)
    pooled = getattr(config, 'pooled_projection_dim', 0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    prompt = Prompt(draw(1, 7, width), draw(1, pooled), (), ())
    return draw(1, channels, 8, 12), prompt, draw(1, concepts_count, width)


def double_blocks(backbone):
    return [layer for layer, block in enumerate(backbone.family.blocks(backbone.transformer)) if hasattr(block, 'norm1_context')]


def rows(tensor, place):
    return tensor[:, :, place].transpose(1, 2).flatten(2)


def forward(backbone, z, prompt, layers):
    """Velocity, and what every layer saw."""
    wanted = requests_of(backbone, layers, lambda found: found, EVERY)
    with torch.no_grad(), watch(wanted, stop=False) as seen:
        velocity = backbone.denoise(z, 400.0, prompt, 2.0)
    return velocity, seen


def explicit_stream(backbone, z, prompt, embeds, pooled, layers):
    """Outputs of concepts in all layers, as a third stream of their own beside a forward pass that knows nothing of them."""
    _, seen = forward(backbone, z, prompt, layers)
    count = math.prod(backbone.grid(0, z.shape))
    first = backbone.first_image_token(prompt)
    transformer, found = backbone.transformer, {}
    time = torch.tensor([400.0], dtype=torch.float64)
    guidance = [torch.tensor([2000.0], dtype=torch.float64)] if getattr(transformer.config, 'guidance_embeds', False) else []
    with torch.no_grad():
        condition = transformer.time_text_embed(time, *guidance, pooled)
        tokens = transformer.context_embedder(embeds)
        for layer in layers:
            block = backbone.family.blocks(transformer)[layer]
            attention, heads = block.attn, block.attn.heads
            last = getattr(block, 'context_pre_only', False)
            if last:
                normal = block.norm1_context(tokens, condition)
            else:
                normal, gate, shift, scale, last_gate = block.norm1_context(tokens, emb=condition)
            query, key, value = (
                project(normal).unflatten(2, (heads, -1)).transpose(1, 2)
                for project in (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
            )
            if attention.norm_added_q is not None:
                query, key = attention.norm_added_q(query), attention.norm_added_k(key)
            if backbone.spec.family == 'flux':  # diffusers rotates queries and keys in 32 bits, those of text by nothing
                query, key = query.float().double(), key.float().double()
            image = slice(first, first + count)
            keys = torch.cat((key, seen[layer].key[:, :, image]), 2)
            values = torch.cat((value, seen[layer].value[:, :, image]), 2)
            output = ((query @ keys.mT / math.sqrt(query.shape[3])).softmax(3) @ values).transpose(1, 2).flatten(2)
            found[layer] = output, rows(seen[layer].output, image)
            if not last:
                tokens = tokens + gate[:, None] * attention.to_add_out(output)
                inner = block.norm2_context(tokens) * (1 + scale[:, None]) + shift[:, None]
                tokens = tokens + last_gate[:, None] * block.ff_context(inner)
    return found


@pytest.mark.parametrize('own', [False, True], ids=['one-vector', 'own-vector'])
@pytest.mark.parametrize('family', FAMILIES)
def test_masked_concepts_are_an_explicit_third_stream_and_change_nothing(family, own, request):
    backbone = in_64_bits(request.getfixturevalue(family))
    layers = double_blocks(backbone)
    z, prompt, embeds = inputs(backbone)
    if family == 'speller35':
        assert any(block.attn2 is not None for block in backbone.family.blocks(backbone.transformer))
    pooled = torch.zeros_like(prompt.pooled) if own else prompt.pooled
    expected = explicit_stream(backbone, z, prompt, embeds, pooled, layers)
    plain, _ = forward(backbone, z, prompt, [])
    together = with_concepts(prompt, embeds)
    places = places_of(backbone, together, 24)
    with third_stream(backbone, places, pooled=pooled if own else None):
        velocity, seen = forward(backbone, z, together, layers)
    assert (velocity - plain).abs().max() < 1e-12 * plain.abs().max()
    for layer in layers:
        for found, wanted in zip((places.concepts, places.image), expected[layer], strict=True):
            assert (rows(seen[layer].output, found) - wanted).abs().max() < 1e-12 * wanted.abs().max()
    assert (forward(backbone, z, prompt, [])[0] == plain).all()  # no hook is left


class Masked(TorchFunctionMode):
    """Attention of all tokens at once with a boolean mask: the plain way to keep concepts apart."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = (*args, *(kwargs or {}).values())[:3]
        scores = query @ key.mT / math.sqrt(query.shape[3])
        return scores.masked_fill(~self.mask, -math.inf).softmax(3) @ value


@pytest.mark.parametrize('family', POOLLESS)
def test_models_without_a_pooled_vector_keep_concepts_apart(family, request):
    backbone = in_64_bits(request.getfixturevalue(family))
    z, prompt, embeds = inputs(backbone)
    layers = range(len(backbone.family.blocks(backbone.transformer)))
    together = with_concepts(prompt, embeds)
    places = places_of(backbone, together, 24)
    registers = 8 if family == 'auraflow' else 0
    text = slice(registers + 7, registers + 11)
    assert places == (slice(text.stop, text.stop + 24), slice(0, text.start), text, text.stop + 24)
    mask = torch.ones(places.total, places.total, dtype=torch.bool)
    mask[:, text] = False
    mask[text, :] = False
    mask[text, text] = mask[text, places.image] = True
    with Masked(mask):
        expected, seen_masked = forward(backbone, z, together, layers)
    plain, _ = forward(backbone, z, prompt, [])
    with third_stream(backbone, places):
        velocity, seen = forward(backbone, z, together, layers)
    assert (velocity - plain).abs().max() < 1e-12 * plain.abs().max()
    assert (velocity - expected).abs().max() < 1e-12 * plain.abs().max()
    for layer in layers:
        found, wanted = seen[layer].output[:, :, text], seen_masked[layer].output[:, :, text]
        assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max()


@pytest.mark.parametrize('sees', SEES)
@pytest.mark.parametrize('places', [Places(slice(0, 6), slice(6, 9), slice(9, 12), 12), Places(slice(6, 12), slice(0, 3), slice(3, 6), 12)])
def test_attention_is_that_of_one_boolean_mask(places, sees):
    query, key, value = torch.randn(3, 2, 2, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(12, 12, dtype=torch.bool)
    for place in places.others:
        for other in places.others:
            mask[place, other] = True
    if sees in ('both', 'image'):
        mask[places.concepts, places.image] = True
    if sees in ('both', 'concepts'):
        mask[places.concepts, places.concepts] = True
    if sees == 'itself':
        mask[places.concepts, places.concepts] = torch.eye(3, dtype=torch.bool)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    assert torch.allclose(attention_apart(query, key, value, places, sees), expected, atol=1e-14)


def maps_in_64_bits(backbone, embeds, shares, **reading):
    z, prompt, _ = inputs(backbone)
    latent = Latent(z, 0.4, 400.0, Frame((8, 12), (0, 0, 8, 12)))
    found = concept_maps([latent], backbone, prompt, Concepts(embeds, shares), Reading(tuple(double_blocks(backbone)), **reading))
    return found.maps[0]


@pytest.mark.parametrize('family', FAMILIES + POOLLESS)
def test_permuted_concepts_permute_the_maps(family, request):
    backbone = in_64_bits(request.getfixturevalue(family))
    embeds, identity, order = inputs(backbone)[2], torch.eye(4, dtype=torch.float64), [2, 0, 3, 1]
    for reading in ({}, {'normalise': 'linear', 'softmax': False}, {'read': 'attention'}, {'order': 2, 'refine': (1,)}):
        maps = maps_in_64_bits(backbone, embeds, identity, **reading)
        assert maps.shape == (4, 4, 6)
        assert torch.allclose(maps_in_64_bits(backbone, embeds[:, order], identity, **reading), maps[order], atol=1e-10)
        assert not torch.allclose(maps[order], maps, atol=1e-4)
        if reading.get('softmax', True):
            assert torch.allclose(maps.sum(0), torch.ones(4, 6, dtype=torch.float64))
        if 'read' not in reading:  # rows of the image and of concepts, not of the prompt
            _, prompt, _ = inputs(backbone)
            assert not torch.allclose(maps_in_64_bits(backbone, prompt.embeds[:, :4], identity, **reading), maps, atol=1e-4)


def test_a_name_is_the_mean_of_its_tokens(speller):
    backbone = in_64_bits(speller)
    embeds = inputs(backbone)[2]
    each = maps_in_64_bits(backbone, embeds, torch.eye(4, dtype=torch.float64), softmax=False)
    shares = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    together = maps_in_64_bits(backbone, embeds, shares, softmax=False)
    assert torch.allclose(together, torch.stack((each[:2].mean(0), each[2], each[3])), atol=1e-10)


def test_linear_normalisation_and_products():
    vectors = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [1.5, 5.0]]])
    assert linear_normalised(vectors).tolist() == [[[0.0, 0.0], [pytest.approx(0.8), 0.0], [pytest.approx(0.2), 0.0]]]
    image = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert concept_scores(image, vectors, softmax=False).tolist() == [[[1.0, 10.0], [3.0, 10.0], [1.5, 10.0]]]
    assert torch.allclose(concept_scores(image, vectors)[0, :, 1], torch.full((3,), 1 / 3))
    assert torch.allclose(concept_scores(image, vectors, 'length', False)[0, 0], torch.tensor([1.0, 10.0]) / math.sqrt(26))


@pytest.mark.parametrize('family', FAMILIES + POOLLESS)
def test_maps_of_a_picture(family, picture, request):
    backbone = request.getfixturevalue(family)
    found = concepts.concept_scores(picture, backbone, NAMES)
    assert found.names == NAMES and found.maps.shape[1] < found.maps.shape[2]
    assert torch.allclose(found.maps.sum(0), torch.ones(found.maps.shape[1:]), atol=1e-5)
    with_words = concepts.concept_scores(picture, backbone, NAMES[:2], ConceptOptions(background_words=('grass',)))
    assert with_words.names == (*NAMES[:2], '(background)') and torch.allclose(with_words.maps, found.maps, atol=1e-5)
    products, captioned = (
        concepts.concept_scores(picture, backbone, NAMES, ConceptOptions(softmax=False, caption=text)).maps
        for text in (None, 'a cat on grass')
    )
    assert (captioned - products).abs().max() > 1e-3 * products.abs().max()  # the picture reads it
    two = concepts.concept_scores(picture, backbone, NAMES, ConceptOptions(noise=(0.3, 0.7)))
    ones = [concepts.concept_scores(picture, backbone, NAMES, ConceptOptions(noise=(level,))).maps for level in (0.3, 0.7)]
    assert torch.allclose(two.maps, (ones[0] + ones[1]) / 2, atol=1e-6)


@pytest.mark.parametrize('family', ['speller', 'speller35'])
def test_proposals_come_from_the_same_forward_pass(family, picture, request):
    backbone = request.getfixturevalue(family)
    prepared = concepts.prepare(backbone, ConceptOptions(on='proposals'), NAMES)
    found = concepts.maps([picture], prepared)[0]
    expected = padseg.token_maps(picture, backbone)
    assert found.names[3:] == expected.names and torch.allclose(found.maps[3:], expected.maps, atol=1e-6)
    regions, labels = padseg.segment(picture, backbone), concepts.labels(picture, found, prepared)
    for number in range(1, len(regions.tokens) + 1):
        assert len(np.unique(labels.labels[regions.labels == number])) == 1


def test_reading_no_more_blocks_than_needed_gives_the_same(texts_folder, flux_folder, speller, flux, picture):
    for folder, whole, layers, stop in ((texts_folder, speller, (0, 1), 2), (flux_folder, flux, (0, 1), 2)):
        options = ConceptOptions(layers=layers)
        assert concepts.deepest(options, whole.spec) == stop
        part = load(str(folder), device='cpu', layer=stop)
        assert part.layers == 3
        found = [concepts.concept_scores(picture, model, NAMES, options).maps for model in (part, whole)]
        assert torch.equal(*found)
        with pytest.raises(UsageError, match='only queries and keys of block 2|have none'):
            concepts.prepare(part, ConceptOptions(layers=(2,)), NAMES)


def test_refinement_is_that_of_the_plain_forward(speller, picture):
    plain = concepts.concept_scores(picture, speller, NAMES).maps
    refined = concepts.concept_scores(picture, speller, NAMES, ConceptOptions(order=3, refine_layers=(1, 2))).maps
    assert refined.flatten(1).std(1).max() < plain.flatten(1).std(1).max()
    assert torch.allclose(refined.sum(0), torch.ones(refined.shape[1:]), atol=1e-5)


def test_first_and_mean_tokens(speller):
    from padseg.backbones.texts import texts_of
    from padseg.methods.stages.concept_maps import concepts_of

    texts = texts_of(speller, keep=False)
    names = ('traffic light', 'cat')
    mean = concepts_of(names, texts, 'l+g', 'clip', 'mean', 'alone')
    first = concepts_of(names, texts, 'l+g', 'clip', 'first', 'alone')
    count = int((mean.shares[0] > 0).sum())
    assert count > 2 and torch.allclose(mean.shares.sum(1), torch.ones(2, dtype=torch.float64))
    assert first.shares.tolist() == [[1, 0], [0, 1]]
    assert torch.equal(first.embeds[:, 0], mean.embeds[:, 0]) and torch.equal(first.embeds[:, 1], mean.embeds[:, count])
    joined = concepts_of(names, texts, 'l+g', 'clip', 'mean', 'joined')
    assert torch.equal(joined.embeds[:, 0], mean.embeds[:, 0])  # CLIP reads from left to right
    assert not torch.allclose(joined.embeds[:, count], mean.embeds[:, count])


def test_settings_by_model(speller):
    from padseg.backbones.spec import BACKBONES

    flux = settings_of(BACKBONES['flux'])
    assert flux['layers'] == (14, 15, 16, 17, 18) and flux['noise'] == (0.5,) and flux['pooled'] == 'zeros'
    assert settings_of(BACKBONES['sd3'])['layers'] == tuple(range(24))
    assert layers_of(speller.spec._replace(family='flux', layers=4)) == (0,)
    assert concepts.deepest(ConceptOptions(), BACKBONES['flux']) == 19
    assert layers_of(BACKBONES['flux2-klein']) == (0, 1, 2, 3, 4) and layers_of(BACKBONES['auraflow']) == (0, 1, 2, 3)
    assert concepts.deepest(ConceptOptions(), BACKBONES['sd3']) is None
    own = {'concepts': {'layers': [2], 'noise': [0.25]}}
    assert settings_of(speller.spec._replace(own=own))['noise'] == (0.25,)
    with pytest.raises(ModelUnavailable, match='concepts'):
        settings_of(speller.spec._replace(own={'concepts': {'noise': [2]}}))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'noise': (1.5,)}, 'noise are distinct levels in 0..1; got 1.5'),
        ({'caption': 'a', 'captions': 'b.json'}, 'either caption or captions'),
        ({'caption': 'a', 'on': 'proposals'}, 'empty prompt'),
        ({'order': -1}, 'order is a number of times'),
        ({'read': 'keys'}, 'read is one of outputs, attention; got keys'),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ConceptOptions(**options)


def test_models_that_do_not_fit_are_refused(flux, flux2, speller, auraflow):
    with pytest.raises(UsageError, match='has no pooled text vector'):
        concepts.prepare(auraflow, ConceptOptions(pooled='apart'), NAMES)
    with pytest.raises(UsageError, match='weights of their own for the text; 2, 3 of'):
        concepts.prepare(flux, ConceptOptions(layers=(1, 2, 3)), NAMES)
    with pytest.raises(UsageError, match='layers are in 0..3'):
        concepts.prepare(speller, ConceptOptions(layers=(4,)), NAMES)
    with pytest.raises(UsageError, match='takes no guidance'):
        concepts.prepare(speller, ConceptOptions(guidance=1.0), NAMES)
    with pytest.raises(UsageError, match='is told no guidance strength: leave out --guidance'):
        concepts.prepare(flux2, ConceptOptions(guidance=1.0), NAMES)
    with pytest.raises(UsageError, match='concepts does not support'):
        concepts.prepare(dataclasses.replace(speller, spec=speller.spec._replace(family='unet')), ConceptOptions(), NAMES)
    with pytest.raises(UsageError, match='caption .* is too long'):
        concepts.prepare(speller, ConceptOptions(caption='cat ' * 100), NAMES)


def test_above_mean_is_the_mask_of_one_class(speller, picture):
    options = ConceptOptions(above_mean=True, softmax=False, refine='none', superpixels=0.0, min_area=0.0)
    prepared = concepts.prepare(speller, options, ['cat'])
    found = concepts.maps([picture], prepared)[0]
    above = (found.maps[0] > found.maps[0].mean()).numpy()
    direct = found._replace(frame=Frame(above.shape, (0, 0, *above.shape)))
    small = np.ascontiguousarray(picture[: above.shape[0], : above.shape[1]])
    assert np.array_equal(concepts.labels(small, direct, prepared).labels == 1, above)


@pytest.mark.parametrize('family', ['texts_folder', 'texts35_folder', 'flux_folder', 'flux2_folder', 'auraflow_folder'])
def test_label_from_end_to_end(family, picture, tmp_path, request):
    (tmp_path / 'in').mkdir()
    for name in ('a', 'b'):
        PIL.Image.fromarray(picture).save(tmp_path / 'in' / f'{name}.png')
    (tmp_path / 'texts.json').write_text(json.dumps({'a': 'a cat', 'b.png': 'dog on grass'}))
    command = ['label', '-q', '--method', 'concepts', '--model', str(request.getfixturevalue(family)), '--device', 'cpu']
    command += ['--dir', str(tmp_path / 'in'), '--classes', 'cat, grass', '--background-words', 'dog', '--save-maps']
    command += ['--captions', str(tmp_path / 'texts.json'), '--order', '1', '--out', str(tmp_path / 'out')]
    assert main(command) == 0
    labels = [read_label_map(tmp_path / 'out' / 'labels' / f'{name}.png.png') for name in 'ab']
    assert all(found.shape == picture.shape[:2] and set(np.unique(found)) <= {0, 1, 2} for found in labels)
    record = json.loads((tmp_path / 'out' / 'run.json').read_text())
    assert record['settings']['captions_sha256'] and record['settings']['order'] == 1
    assert main(command) == 0  # continued: nothing to do


def test_tiny_and_its_python_face(picture):
    labels = padseg.label(picture, 'tiny', ['fur', 'grass'], ConceptOptions(), method='concepts')
    assert labels.names == ('fur', 'grass') and labels.labels.shape == picture.shape[:2]
    regions = seg4diff.settings_of(load('tiny').spec)
    assert concepts.recorded(ConceptOptions(), load('tiny').spec)['superpixels'] == regions['superpixels']


@pytest.mark.parametrize('family', ['speller', 'flux', *POOLLESS])
def test_pads_are_read_without_concepts(family, request):
    """The attention of the picture to the prompt, of a pass with concepts and of one without."""
    backbone = in_64_bits(request.getfixturevalue(family))
    z, prompt, embeds = inputs(backbone)
    prompt = prompt._replace(picked=(0, 3, 6))
    latent = Latent(z, 0.4, 400.0, Frame((8, 12), (0, 0, 8, 12)))
    reading = Reading((0,), pads=1)
    found = concept_maps([latent], backbone, prompt, Concepts(embeds, torch.eye(4, dtype=torch.float64)), reading)
    expected = attention_maps(z, 400.0, backbone, prompt, 1)
    assert torch.allclose(found.pads, expected, atol=1e-6)
