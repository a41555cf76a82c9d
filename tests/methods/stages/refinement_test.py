"""Refinement by self-attention, beside full matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import padseg
from padseg.backbones.recorder import requests_of, watch
from padseg.methods import open_vocabulary
from padseg.methods.open_vocabulary import LabelOptions
from padseg.methods.stages.latents import encode_steps
from padseg.methods.stages.refinement import refined_by
from padseg.methods.stages.token_maps import attention_maps

NAMES = ['cat', 'grass']
PLAIN = {'refine': 'none', 'superpixels': 0.0, 'min_area': 0.0}


def test_what_is_the_same_everywhere_stays_and_values_move_along_attention():
    weights = torch.tensor([[[0.0, 0.5], [0.25, 0.25]]])  # the first pixel attends to the second alone
    maps = torch.tensor([[[[1.0, 3.0]], [[7.0, 7.0]]]])
    assert torch.equal(refined_by(maps, weights, 0), maps)
    assert refined_by(maps, weights, 1).tolist() == [[[[3.0, 2.0]], [[7.0, 7.0]]]]
    assert refined_by(maps, weights, 2).tolist() == [[[[2.0, 2.5]], [[7.0, 7.0]]]]


@pytest.mark.parametrize('family', ['speller35', 'flux'])
def test_maps_are_multiplied_by_the_mean_matrix_of_the_same_forward_pass(family, picture, request):
    backbone = request.getfixturevalue(family)
    prepared = open_vocabulary.prepare(backbone, LabelOptions(layers=(1,), order=2, refine_layers=(0, 2)), NAMES)
    (latent,) = encode_steps(picture, backbone, prepared.options, prepared.options.steps)
    prompt = prepared.prompts[0]
    with torch.no_grad(), watch(requests_of(backbone, [0, 2], lambda seen: seen), stop=False) as kept:
        backbone.denoise(latent.z, latent.timestep, prompt)
    h, w = backbone.grid(0, latent.z.shape)
    image = slice(first := backbone.first_image_token(prompt), first + h * w)
    matrices = []
    for query, key, *_ in kept.values():
        shares = (query[:, :, image].double() @ key.double().mT / math.sqrt(query.shape[3])).softmax(3)
        matrices.append(shares[..., image].mean(1))
    matrix = torch.stack(matrices).mean(0)
    matrix = matrix / matrix.sum(2, keepdim=True)
    plain = attention_maps(latent.z, latent.timestep, backbone, prompt, 1).double()
    expected = (matrix @ matrix @ plain.flatten(2).mT).mT.unflatten(2, (h, w))
    found = attention_maps(latent.z, latent.timestep, backbone, prompt, 1, refine=(0, 2), order=2)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-7) and h != w
    scores = open_vocabulary.maps([picture], prepared)[0].maps
    assert torch.allclose(scores[0].double(), expected[0, [number for number, name in enumerate(prompt.names) if name == 'cat']].mean(0))


def test_it_is_an_option_that_runs_without_it_do_not_record(speller, picture):
    spec = speller.spec
    assert not {'order', 'refine_layers'} & open_vocabulary.recorded(LabelOptions(), spec).keys()
    record = open_vocabulary.recorded(LabelOptions(order=1), spec)
    assert (record['order'], record['refine_layers']) == (1, str(spec.layer))
    assert open_vocabulary.deepest(LabelOptions(layers=(0,), order=1, refine_layers=(3,)), spec) == 3
    assert open_vocabulary.deepest(LabelOptions(layers=(0,), refine_layers=(3,)), spec) == 0
    with pytest.raises(padseg.errors.UsageError, match='layers are in 0..3'):
        open_vocabulary.prepare(speller, LabelOptions(refine_layers=(4,)), NAMES)
    flat = np.full((40, 40, 3), 90, np.uint8)
    labels = padseg.label([picture, flat], speller, NAMES, LabelOptions(order=50, **PLAIN))
    assert [found.labels.shape for found in labels] == [(48, 80), (40, 40)]
    assert all(found.labels.min() >= 1 for found in labels)
