"""The noise level of each step of a model's schedule, and adding noise to a latent: flow matching and DDPM."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import Tensor


class NoiseLevel(NamedTuple):
    """A step's mix, signal * clean + sigma * noise. timestep: the model's time input, on its schedule's scale."""

    signal: float
    sigma: float
    timestep: float


def noised(clean: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """Add noise to a latent (B, C, H', W') at a noise level; the noise has the same shape."""
    return level.signal * clean + level.sigma * noise


def scheduled(scheduler: Any, **timesteps: Any) -> Any:
    """Return a copy of a diffusers scheduler after `set_timesteps(**timesteps)`; the original stays unchanged."""
    schedule = copy.copy(scheduler)
    schedule.set_timesteps(**timesteps)
    return schedule


def flow_level(schedule: Any, step: int) -> NoiseLevel:
    """Flow matching, (1 - sigma) x + sigma e (Esser et al. 2024, Sec. 3), at the step-th step from the end; step 1 has the least noise.

    Raises ValueError for a step outside the schedule.
    """
    timestep = timestep_of(schedule, step)
    sigma = float(schedule.sigmas[-1 - step])  # the last sigma belongs to no step
    return NoiseLevel(1 - sigma, sigma, timestep)


def flow_level_at(sigma: float) -> NoiseLevel:
    """Flow matching at any noise level in 0..1, whatever steps a schedule has."""
    return NoiseLevel(1 - sigma, sigma, 1000 * sigma)


def ddpm_level(schedule: Any, step: int) -> NoiseLevel:
    """DDPM noise level at the step-th step from the end of a schedule; step 1 has the least noise.

    Schedulers that divide by the signal (Euler, DPM-Solver) define their own sigmas, s = sqrt((1 - a) / a), also between timesteps; the
    model then sees (x + s e) / sqrt(1 + s²). PNDM repeats a timestep near the noisy end, which counts as a separate step. Raises ValueError
    for a step outside the schedule, or one whose timestep has no noise level.
    """
    timestep = timestep_of(schedule, step)
    sigmas = getattr(schedule, 'sigmas', None)
    if sigmas is None:
        return ddpm_level_at(schedule, int(timestep))
    ratio = float(sigmas[-1 - step])
    signal = (1 + ratio**2) ** -0.5
    return NoiseLevel(signal, ratio * signal, timestep)


def ddpm_level_at(scheduler: Any, timestep: int) -> NoiseLevel:
    """DDPM, sqrt(a) x + sqrt(1 - a) e (Ho et al. 2020, Eq. 4), at a training timestep. ValueError for a timestep out of range."""
    count = len(scheduler.alphas_cumprod)
    if not 0 <= timestep < count:
        raise ValueError(f'timestep must be in 0..{count - 1}; got {timestep}')
    kept = scheduler.alphas_cumprod[timestep]  # float32, as in diffusers' own add_noise
    return NoiseLevel(float(kept**0.5), float((1 - kept) ** 0.5), float(timestep))


def timestep_of(schedule: Any, step: int) -> float:
    count = len(schedule.timesteps)
    if not 1 <= step <= count:
        raise ValueError(f'step must be in 1..{count}; got {step}')
    return float(schedule.timesteps[-step])
