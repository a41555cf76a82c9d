"""How much noise a step of a model's schedule has, and how it is mixed with a picture: flow matching and DDPM."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import Tensor


class NoiseLevel(NamedTuple):
    """What a step makes of a picture: signal * clean + sigma * noise. timestep: what the model is told of it, on its schedule's scale."""

    signal: float
    sigma: float
    timestep: float


def noised(clean: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """A latent (B, C, H', W') with noise of the same shape, as the model takes it at this level."""
    return level.signal * clean + level.sigma * noise


def scheduled(scheduler: Any, **timesteps: Any) -> Any:
    """A copy of one of diffusers' schedulers after `set_timesteps(**timesteps)`; the one that is given stays as it is."""
    schedule = copy.copy(scheduler)
    schedule.set_timesteps(**timesteps)
    return schedule


def flow_level(schedule: Any, step: int) -> NoiseLevel:
    """Flow matching, (1 - sigma) x + sigma e (Esser et al. 2024, Sec. 3): the step-th step from the end of a schedule, 1 has least noise.

    ValueError for a step that the schedule does not have.
    """
    timestep = timestep_of(schedule, step)
    sigma = float(schedule.sigmas[-1 - step])  # the last one belongs to no step
    return NoiseLevel(1 - sigma, sigma, timestep)


def ddpm_level(schedule: Any, step: int) -> NoiseLevel:
    """DDPM: the step-th step from the end of a schedule, 1 has least noise.

    Schedulers that divide by the signal (Euler, DPM-Solver) have sigmas of their own, s = sqrt((1 - a) / a), between timesteps too; what
    the model sees is (x + s e) / sqrt(1 + s²). PNDM repeats a timestep near the noisy end, which counts as a step of its own.
    ValueError for a step that the schedule does not have, or for whose timestep there is no noise level.
    """
    timestep = timestep_of(schedule, step)
    sigmas = getattr(schedule, 'sigmas', None)
    if sigmas is None:
        return ddpm_level_at(schedule, int(timestep))
    ratio = float(sigmas[-1 - step])
    signal = (1 + ratio**2) ** -0.5
    return NoiseLevel(signal, ratio * signal, timestep)


def ddpm_level_at(scheduler: Any, timestep: int) -> NoiseLevel:
    """DDPM, sqrt(a) x + sqrt(1 - a) e (Ho et al. 2020, Eq. 4), at a timestep of the training. ValueError for one that it did not have."""
    count = len(scheduler.alphas_cumprod)
    if not 0 <= timestep < count:
        raise ValueError(f'timestep must be in 0..{count - 1}; got {timestep}')
    kept = scheduler.alphas_cumprod[timestep]  # float32, as are the roots of diffusers' own add_noise
    return NoiseLevel(float(kept**0.5), float((1 - kept) ** 0.5), float(timestep))


def timestep_of(schedule: Any, step: int) -> float:
    count = len(schedule.timesteps)
    if not 1 <= step <= count:
        raise ValueError(f'step must be in 1..{count}; got {step}')
    return float(schedule.timesteps[-step])
