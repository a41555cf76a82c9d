"""GoCA on models with cross-attention, whose layers have different sizes: beside explicit softmax, products and resizing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.explicit_goca import everything_of, naive

import padseg
from padseg.backbones import load
from padseg.methods import goca
from padseg.methods.goca import GocaOptions
from padseg.methods.stages.cross_maps import aggregated
from padseg.methods.stages.latents import encode

NAMES = ('cat', 'dog')


@pytest.fixture(scope='module')
def models(unet_folders, pixart_folders):
    folders = {**unet_folders, **pixart_folders}
    return {kind: load(str(folders[kind]), device='cpu', whole=True) for kind in ('sd15', 'sdxl', 'sigma')}


@pytest.mark.parametrize('kind', ['sd15', 'sdxl', 'sigma'])
def test_one_pass_gives_the_maps_of_the_explicit_products(kind, models, picture):
    backbone = models[kind]
    prepared = goca.prepare(backbone, GocaOptions(background_words=('grass',)), NAMES)
    noising = dataclasses.replace(backbone, spec=backbone.spec._replace(steps=prepared.options.schedule))
    latent, (asked,) = encode(picture, noising, prepared.options), prepared.prompts
    assert latent.timestep == {'sd15': 101, 'sdxl': 100, 'sigma': 100}[kind]
    found = aggregated([latent], backbone, asked.prompt, prepared.plan)
    seen = everything_of(backbone, lambda: backbone.denoise(latent.z, latent.timestep, asked.prompt))
    expected = naive(backbone, seen, latent.z.shape, prepared.plan)
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
