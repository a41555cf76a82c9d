"""The loop of sampling: beside diffusers' own pipelines, paired by seeds, and guided by blurred attention."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, PixArtSigmaPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from padseg.backbones import load, unet
from padseg.errors import NotFinite, UsageError
from padseg.generation.guidance import guide_of
from padseg.generation.sample import sample, sampler_of
from padseg.generation.settings import SamplingSettings
from padseg.methods import check_settings

PROMPTS = ('a cat on grass', 'a dog')
PIPELINES = {'sd15': StableDiffusionPipeline, 'sd21': StableDiffusionPipeline, 'sdxl': StableDiffusionXLPipeline}


@pytest.fixture(scope='module')
def samplers(backbone, backbone35, flux, unets, pixarts):
    loaded = {'sd3': backbone, 'sd35': backbone35, 'flux': flux, 'sigma': pixarts['sigma'], **unets}
    return {name: sampler_of(model) for name, model in loaded.items()}


def made(sampler, prompts=PROMPTS[:1], seeds=(3,), **settings):
    resolved = SamplingSettings(**{'steps': 3, 'size': 32, **settings}).resolve(sampler.backbone.spec)
    return sample(sampler, prompts, seeds, resolved, guide_of(sampler.backbone, resolved), with_tokens=False)


def pipeline_of(name, sampler):
    folder = sampler.backbone.identity.folder
    kind = StableDiffusion3Pipeline if name.startswith('sd3') else {**PIPELINES, 'flux': FluxPipeline, 'sigma': PixArtSigmaPipeline}[name]
    absent = {'text_encoder_3': None, 'tokenizer_3': None} if name.startswith('sd3') else {}
    pipeline = kind.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def t5_embeddings(pipeline):
    """Of the precision in which the text encoder is loaded here."""
    pipeline.text_encoder.to(torch.bfloat16)
    with torch.no_grad():
        found = pipeline.encode_prompt(list(PROMPTS), device='cpu')
    pipeline.text_encoder.float()  # or the pipeline would round the latents too
    names = ('prompt_embeds', 'prompt_attention_mask', 'negative_prompt_embeds', 'negative_prompt_attention_mask')
    return {'negative_prompt': None, **{name: part.float() for name, part in zip(names, found, strict=True)}}


@pytest.mark.parametrize('name', ['sd3', 'sd15', 'sd21', 'sdxl', 'sigma', 'flux'])
def test_pictures_are_those_of_diffusers(samplers, name, monkeypatch):
    """With classifier-free guidance, but for Flux, whose guidance is the model's own. The small VAEs halve sides only once."""
    monkeypatch.setattr(unet, 'CELL', 2)  # pixels of a cell, by which SDXL is told the picture's size
    sampler = samplers[name]
    guidance = {'guidance': 'none'} if name == 'flux' else {'scale': 3.0}
    found = made(sampler, PROMPTS, (3, 4), **guidance)
    given = {
        'sd3': {'max_sequence_length': 77, 'guidance_scale': 3.0},
        'flux': {'max_sequence_length': sampler.backbone.spec.sequence, 'guidance_scale': 3.5},
        'sigma': {'use_resolution_binning': False, 'clean_caption': False, 'guidance_scale': 3.0},
    }
    pipeline = pipeline_of(name, sampler)
    texts = {'prompt': list(PROMPTS)} if name != 'sigma' else t5_embeddings(pipeline)
    expected = pipeline(
        **texts,
        height=32,
        width=32,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type='np',
        **given.get(name, {'guidance_scale': 3.0}),
    ).images
    for one, other in zip(found, expected, strict=True):
        assert one.shape == (32, 32, 3) and np.abs(one - 255 * other).max() < 1.01 and one.std() > 2
    assert not np.array_equal(*found)


def calls_of(sampler, prompts, seeds, **settings):
    """The latents that the model is called with, by step."""
    calls = []
    resolved = SamplingSettings(**{'steps': 2, 'size': 32, **settings}).resolve(sampler.backbone.spec)

    def around(call):
        calls.append(call)
        return contextlib.nullcontext()

    sample(sampler, prompts, seeds, resolved, guide_of(sampler.backbone, resolved), around, with_tokens=False)
    return calls


def test_one_seed_is_one_noise_with_every_guidance_prompt_and_place(samplers):
    sampler = samplers['sd3']
    first = calls_of(sampler, ['a cat'], [5], guidance='none')[0]
    expected = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    assert torch.equal(first.z, expected) and (first.number, first.of, first.timestep) == (0, 2, 1000.0)
    for settings in ({'guidance': 'cfg'}, {'guidance': 'perturbed'}, {'guidance': 'perturbed', 'scale': 2.0}):
        calls = calls_of(sampler, ['a dog', ''], [1, 5], **settings)
        assert torch.equal(calls[0].z[1:], expected) and not torch.equal(calls[0].z[:1], expected)
        assert [call.number for call in calls] == [0, 1]


def test_pictures_do_not_depend_on_their_order_or_on_the_others(samplers):
    for name in ('sd3', 'sd15', 'sigma'):
        one, other = made(samplers[name], PROMPTS, (3, 4))
        again = made(samplers[name], PROMPTS[::-1], (4, 3))
        assert np.array_equal(one, again[1]) and np.array_equal(other, again[0])
        assert np.array_equal(one, made(samplers[name], (PROMPTS[0], 'grass'), (3, 7))[0])


def test_noise_that_a_scheduler_adds_comes_from_the_pictures_own_seed(samplers):
    from diffusers import EulerAncestralDiscreteScheduler
    from support.crossing import EULER

    sampler = samplers['sdxl']
    ancestral = dataclasses.replace(sampler.backbone, scheduler=EulerAncestralDiscreteScheduler(**EULER))
    sampler = dataclasses.replace(sampler, backbone=ancestral)
    torch.manual_seed(0)
    one, other = made(sampler, PROMPTS, (3, 4))
    torch.manual_seed(1)
    again = made(sampler, PROMPTS[::-1], (4, 3))
    assert np.array_equal(one, again[1]) and np.array_equal(other, again[0])


@pytest.mark.parametrize('name', ['sd35', 'sd15', 'sigma'])
@pytest.mark.parametrize(('scale', 'plain'), [(None, {'guidance': 'none'}), (4.0, {'scale': 4.0})])
def test_no_strength_and_no_blur_give_the_plain_picture_bit_for_bit(samplers, name, scale, plain):
    sampler = samplers[name]
    expected = made(sampler, **plain)[0]
    layer = ('1',)
    for settings in ({'perturb_scale': 0.0}, {'perturb_size': 1}):
        found = made(sampler, guidance='perturbed', scale=scale, perturb_layer=layer, **settings)[0]
        assert np.array_equal(found, expected)
    assert not np.array_equal(made(sampler, guidance='perturbed', scale=scale, perturb_layer=layer, perturb_scale=8.0)[0], expected)


@pytest.mark.parametrize('scale', [0.0, 4.0])
def test_perturbed_guidance_is_equation_7(samplers, scale):
    """From the predictions of single calls: v_c + s (v_c - v_p), or v_u + w (v_c - v_u) + s (v_c - v_p)."""
    from padseg.backbones.blur import Blur, blurred
    from padseg.generation.guidance import perturbed
    from padseg.generation.sample import Call, encode, nothing, predict

    sampler = samplers['sd3']
    backbone = sampler.backbone
    texts = encode(sampler, PROMPTS, SamplingSettings().resolve(backbone.spec), with_tokens=False)
    call, blur = Call(0, 1, 700.0, torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))), Blur((1, 2))
    seen = []

    def counted(prompts, of):
        seen.append(len(prompts))
        return predict(backbone, nothing, prompts, of)

    with torch.no_grad():
        found = perturbed(backbone, blur, 2.0, scale)(counted, call, texts)
        empty, text = (predict(backbone, nothing, [prompt], call)[0] for prompt in (texts.empty, texts.text))
        with blurred(backbone, blur, texts.text, 64):
            worse = predict(backbone, nothing, [texts.text], call)[0]
    expected = text + 2 * (text - worse) + ((scale - 1) * (text - empty) if scale else 0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert seen == [3 if scale else 2] and (text - worse).abs().max() > 1e-3


def test_steps_can_be_seen(samplers):
    seen = []
    sampler = samplers['sd3']
    settings = SamplingSettings(steps=4, size=32).resolve(sampler.backbone.spec)
    guide = guide_of(sampler.backbone, settings)
    sample(sampler, PROMPTS, (0, 1), settings, guide, seen=lambda call, z: seen.append((call.number, z.shape)))
    assert seen == [(number, (2, 4, 16, 16)) for number in range(4)]


def test_defaults_are_the_models_own(samplers):
    spec = samplers['sd3'].backbone.spec
    found = SamplingSettings().resolve(spec)
    assert (found.steps, found.scale, found.size, found.perturb_layer) == (28, 7.5, 32, ('2',))
    assert SamplingSettings(guidance='perturbed').resolve(spec).scale == 0
    own = spec._replace(own={'generate': {'scale': 4, 'steps': 9}})
    check_settings(own)
    assert (SamplingSettings().resolve(own).scale, SamplingSettings(steps=2).resolve(own).steps) == (4.0, 2)


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        ({'guidance': 'more'}, 'guidance is one of none, cfg'),
        ({'steps': 0}, 'steps is a number of steps in 1'),
        ({'scale': -1.0}, 'scale is a strength from 0'),
        ({'perturb_size': 4}, 'an odd number'),
        ({'perturb_pad': 'zeros'}, 'perturb_pad is one of reflect, symmetric'),
        ({'size': 33}, 'of a multiple of'),
        ({'size': 4096}, 'up to 96'),
        ({'guidance': 'perturbed', 'perturb_layer': ('9',)}, 'has no block 9; it has 0..3, such as vit-block3'),
        ({'encoders': 't5'}, 'has no T5'),
    ],
)
def test_settings_that_cannot_be(samplers, settings, words):
    with pytest.raises(UsageError, match=words):
        made(samplers['sd3'], **settings)


def test_models_that_cannot_make_pictures(sd3_folder):
    with pytest.raises(UsageError, match='was loaded in part'):
        sampler_of(load(str(sd3_folder), device='cpu'))


def test_overflow_is_told(samplers):
    sampler = samplers['sd3']
    settings = SamplingSettings(steps=1, size=32).resolve(sampler.backbone.spec)
    with pytest.raises(NotFinite, match='overflowed in float32'):
        sample(sampler, PROMPTS[:1], (0,), settings, lambda *_: torch.full((1, 4, 16, 16), torch.inf))
