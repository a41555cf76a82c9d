"""GoCA on models with cross-attention, whose layers have different sizes: beside explicit softmax, products and resizing."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import padseg
from padseg.backbones import load
from padseg.backbones.recorder import Request, watch
from padseg.methods import goca
from padseg.methods.goca import GocaOptions
from padseg.methods.stages.cross_maps import aggregated
from padseg.methods.stages.latents import encode
from padseg.types import Attention

NAMES = ('cat', 'dog')
EVERY = ('queries', 'keys', 'values', 'output')


@pytest.fixture(scope='module')
def models(unet_folders, pixart_folders):
    folders = {**unet_folders, **pixart_folders}
    return {kind: load(str(folders[kind]), device='cpu', whole=True) for kind in ('sd15', 'sdxl', 'sigma')}


def everything_of(backbone, latent, prompt):
    """What both attentions of every layer are given, in 64 bits."""
    seen = {}

    def keep(key):
        return lambda found: seen.__setitem__(key, Attention(*(None if part is None else part.double().clone() for part in found)))

    requests = {}
    for layer in range(backbone.layers):
        requests[layer, 'cross'] = Request(backbone.attention_module(layer, EVERY), keep((layer, 'cross')), EVERY)
        requests[layer, 'self'] = Request(backbone.self_attention_module(layer), keep((layer, 'self')))
    with torch.no_grad(), watch(requests, stop=False):
        backbone.denoise(latent.z, latent.timestep, prompt)
    return seen


def softmax_of(seen):
    scores = seen.query @ seen.key.transpose(2, 3) / math.sqrt(seen.query.shape[3])
    return (scores if seen.mask is None else scores + seen.mask).softmax(3)


def resized(maps, grid, to):
    keys = interpolate(maps.unflatten(2, grid), to, mode='bilinear', align_corners=False).flatten(2)
    return interpolate(keys.transpose(1, 2).unflatten(2, grid), to, mode='nearest').flatten(2).transpose(1, 2)


def naive(backbone, latent, prompt, plan):
    seen = everything_of(backbone, latent, prompt)
    grids = [backbone.grid(layer, latent.z.shape) for layer in range(backbone.layers)]
    to = max(grids, key=math.prod)
    own = [softmax_of(seen[layer, 'self']).mean(1) for layer in range(backbone.layers)]
    pixels = seen[plan.dense, 'cross'].query.transpose(1, 2).flatten(2)
    dense = (pixels @ pixels.transpose(1, 2) / math.sqrt(pixels.shape[2])).softmax(2)
    total, weights = 0, []
    for layer in plan.cross:
        found = seen[layer, 'cross']
        text = softmax_of(found)
        z = text @ found.value
        assert torch.allclose(z, found.output, atol=1e-5)
        weight, bias = backbone.output_projection(layer)
        vectors = torch.einsum('chd,bhnd->bnhc', weight.detach().double().unflatten(1, (z.shape[1], -1)), z)
        assert bias is not None
        products = (vectors * vectors.sum(2, keepdim=True)).sum(3)
        cross = torch.einsum('bnh,bhnt->bnt', products / products.sum(2, keepdim=True), text)
        weights.append(float((dense * resized(own[layer], grids[layer], grids[plan.dense])).sum()))
        large = interpolate(cross.transpose(1, 2).unflatten(2, grids[layer]), to, mode='bilinear', align_corners=False)
        total = total + weights[-1] * large
    maps = (total / sum(weights)).clamp_min(0)
    self_map = torch.stack([resized(own[layer], grids[layer], to) for layer in plan.refine]).mean(0)
    return maps / maps.sum(1, keepdim=True), self_map, torch.tensor(weights)


@pytest.mark.parametrize('kind', ['sd15', 'sdxl', 'sigma'])
def test_one_pass_gives_the_maps_of_the_explicit_products(kind, models, picture):
    backbone = models[kind]
    prepared = goca.prepare(backbone, GocaOptions(background_words=('grass',)), NAMES)
    noising = dataclasses.replace(backbone, spec=backbone.spec._replace(steps=prepared.options.schedule))
    latent, (asked,) = encode(picture, noising, prepared.options), prepared.prompts
    assert latent.timestep == {'sd15': 101, 'sdxl': 100, 'sigma': 100}[kind]
    found = aggregated([latent], backbone, asked.prompt, prepared.plan)
    expected = naive(backbone, latent, asked.prompt, prepared.plan)
    for one, other in zip((found.maps, found.self_map, found.weights[:, 0]), expected, strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-5, rtol=1e-4)
    if kind == 'sigma':
        length = len(asked.roles[0].content) + 1  # what stands between and behind the words counts, too, but no pad
        assert (found.maps[0].amax((1, 2)) > 0).sum() >= length
        assert (found.maps[0, int(asked.prompt.mask.sum()) :] == 0).all()


@pytest.mark.parametrize('kind', ['sd15', 'sdxl', 'sigma'])
def test_pictures_of_any_shape(kind, models, picture):
    options = GocaOptions(background_words=('grass',))
    images = [picture, picture[:40, :40].copy(), picture[:, ::-1].copy()]
    together = padseg.label(images, models[kind], NAMES, options, method='goca')
    for image, found in zip(images, together, strict=True):
        assert found.labels.shape == image.shape[:2]
        assert np.array_equal(found.labels, padseg.label(image, models[kind], NAMES, options, method='goca').labels)


def test_layers_have_the_names_of_the_paper(models):
    backbone = models['sd15']
    assert goca.prepare(backbone, GocaOptions(), NAMES).plan.dense == 11
    assert goca.prepare(backbone, GocaOptions(), NAMES).plan.refine == (13, 14, 1)
    assert goca.prepare(backbone, GocaOptions(preset='baseline'), NAMES).plan.cross == tuple(range(4, 12))
    named = GocaOptions(layers=('mid-vit-block0', '3'), refine_layers=('down-level2-repeat1-vit-block0',))
    assert goca.prepare(backbone, named, NAMES).plan.cross == (6, 3)
