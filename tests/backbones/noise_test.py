"""Noise levels against diffusers' own schedulers and image-to-image pipelines, and the figures of published code."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    PNDMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from padseg.backbones.noise import ddpm_level, ddpm_level_at, flow_level, noised, scheduled

STABLE = {'beta_start': 0.00085, 'beta_end': 0.012, 'beta_schedule': 'scaled_linear', 'num_train_timesteps': 1000}
# as on the hub: Stable Diffusion 1.5, SDXL, PixArt-Sigma, SSD-1B as DiffCut runs it
PNDM = PNDMScheduler(**STABLE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
EULER = EulerDiscreteScheduler(**STABLE, timestep_spacing='leading', steps_offset=1)
DPM = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule='linear', num_train_timesteps=1000)
DDIM = DDIMScheduler(**STABLE, set_alpha_to_one=False, steps_offset=1, clip_sample=False)
SCHEDULERS = {'pndm': PNDM, 'euler': EULER, 'dpm': DPM, 'ddim': DDIM}
SD3 = FlowMatchEulerDiscreteScheduler(shift=3.0)
FLUX = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)

CLEAN, NOISE = torch.randn((2, 1, 4, 8, 6), generator=torch.Generator().manual_seed(0))


def flux_steps(steps: int, mu: float) -> dict[str, object]:
    return {'sigmas': np.linspace(1, 1 / steps, steps), 'mu': mu}


@pytest.mark.parametrize(('scheduler', 'timesteps'), [(SD3, {'num_inference_steps': 28}), (FLUX, flux_steps(50, 0.8))])
def test_flow_matching_is_that_of_diffusers(scheduler, timesteps):
    schedule = scheduled(scheduler, **timesteps)
    for step, timestep in enumerate(schedule.timesteps.flip(0), 1):
        level = flow_level(schedule, step)
        assert level.timestep == float(timestep) and level.signal == 1 - level.sigma
        torch.testing.assert_close(noised(CLEAN, NOISE, level), schedule.scale_noise(CLEAN, timestep[None], NOISE), atol=1e-6, rtol=0)
    assert torch.equal(noised(CLEAN, NOISE, level), NOISE)  # the first step of all


@pytest.mark.parametrize('steps', [20, 50, 999])
@pytest.mark.parametrize('name', SCHEDULERS)
def test_ddpm_is_that_of_diffusers(name, steps):
    """Also what the model sees where a scheduler divides by the signal just before."""
    schedule = scheduled(SCHEDULERS[name], num_inference_steps=steps)
    count = len(schedule.timesteps)
    assert count == steps + (name == 'pndm')
    for step in {1, 2, 7, steps // 2, count}:
        timestep = schedule.timesteps[-step]
        level = ddpm_level(schedule, step)
        own = copy.deepcopy(schedule)
        expected = own.add_noise(CLEAN, NOISE, timestep[None])
        if name == 'euler':
            expected = own.scale_model_input(expected, timestep)
        assert level.timestep == float(timestep) and level.signal**2 + level.sigma**2 == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(noised(CLEAN, NOISE, level), expected, atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(level, ddpm_level_at(schedule, int(timestep)), atol=2e-4, rtol=1e-4)
        if name in ('pndm', 'ddim'):
            assert torch.equal(noised(CLEAN, NOISE, level), expected)


def test_levels_between_timesteps():
    """Euler's schedule is not of whole numbers with linspace, nor one of Karras."""
    for options in ({'timestep_spacing': 'linspace'}, {'use_karras_sigmas': True}):
        schedule = scheduled(EulerDiscreteScheduler(**STABLE, **options), num_inference_steps=7)
        for step in range(1, 8):
            own = copy.deepcopy(schedule)
            timestep = schedule.timesteps[-step]
            expected = own.scale_model_input(own.add_noise(CLEAN, NOISE, timestep[None]), timestep)
            torch.testing.assert_close(noised(CLEAN, NOISE, ddpm_level(schedule, step)), expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ('pipeline', 'scheduler', 'step', 'timestep'),
    [
        (StableDiffusionImg2ImgPipeline, PNDM, 101, 101),  # not 100: one timestep is there twice, and all are one later
        (StableDiffusionXLImg2ImgPipeline, EULER, 100, 100),
        (StableDiffusionImg2ImgPipeline, DPM, 100, 100),
    ],
)
def test_the_hundredth_of_a_thousand_steps(pipeline, scheduler, step, timestep):
    """Where a pipeline from image to image of strength 0.1 begins, as GoCA's released code."""
    schedule = scheduled(scheduler, num_inference_steps=1000)
    first = pipeline.get_timesteps(SimpleNamespace(scheduler=schedule), 1000, 0.1, 'cpu')[0][0]
    assert ddpm_level(schedule, step).timestep == float(first) == timestep


def test_published_levels():
    assert ddpm_level(scheduled(PNDM, num_inference_steps=1000), 101).signal == pytest.approx(0.945, abs=5e-4)
    level = ddpm_level(scheduled(EULER, num_inference_steps=1000), 100)
    assert level.sigma / level.signal == pytest.approx(0.344, abs=5e-4)
    assert ddpm_level_at(PNDM, 300).signal == pytest.approx(0.768, abs=5e-4)
    assert ddpm_level_at(DDIM, 50)[:2] == pytest.approx((0.9755, 0.2201), abs=5e-5)
    assert flow_level(scheduled(SD3, num_inference_steps=28), 8).timestep == pytest.approx(515.07, abs=5e-3)
    schedule = scheduled(FLUX, **flux_steps(28, 1.15))
    for strength, step, timestep in ((0.05, 2, 195), (0.1, 3, 275), (0.15, 5, 407.08), (0.2, 6, 463), (0.25, 7, 513)):
        for pipeline in (FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline):
            first = pipeline.get_timesteps(SimpleNamespace(scheduler=copy.copy(schedule)), 28, strength, 'cpu')[0][0]
            assert flow_level(schedule, step).timestep == float(first) == pytest.approx(timestep, abs=0.5)


@pytest.mark.parametrize('scheduler', [SD3, *SCHEDULERS.values()])
def test_the_scheduler_stays_as_it_is(scheduler):
    scheduler = copy.deepcopy(scheduler)
    if not isinstance(scheduler, (PNDMScheduler, DDIMScheduler)):
        scheduler.set_begin_index(3)  # as a pipeline leaves it
    before = copy.deepcopy(vars(scheduler))
    schedule = scheduled(scheduler, num_inference_steps=30)
    level = (flow_level if scheduler.__class__ == SD3.__class__ else ddpm_level)(schedule, 8)
    assert level.timestep == float(schedule.timesteps[-8])
    assert vars(scheduler).keys() == before.keys()
    for name, value in vars(scheduler).items():
        assert np.array_equal(np.asarray(value, object), np.asarray(before[name], object)), name


def test_steps_that_a_schedule_does_not_have():
    for step in (0, -1, 29):
        with pytest.raises(ValueError, match=rf'^step must be in 1\.\.28; got {step}$'):
            flow_level(scheduled(SD3, num_inference_steps=28), step)
    with pytest.raises(ValueError, match=r'^step must be in 1\.\.21; got 22$'):
        ddpm_level(scheduled(PNDM, num_inference_steps=20), 22)
    with pytest.raises(ValueError, match=r'^timestep must be in 0\.\.999; got 1000$'):  # diffusers has no noise for it either
        ddpm_level(scheduled(PNDM, num_inference_steps=1000), 1001)
