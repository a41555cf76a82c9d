"""Teach a trained model to paint what captions say, without losing the maps that it segments by.

Read it top to bottom. Flow matching on captioned scenes alone teaches a copy of the model, the painter, and spoils its maps. The model then
learns from the two: from the painter how to denoise what is mostly noise, from itself as it was how to denoise the rest and where its token
maps are. Both are exact targets, where flow matching has only samples of them. `padseg train-tiny --painting-steps` runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from padseg.train.data import Batch
from padseg.train.denoiser import autocast, encode_batch, mixed, noised_batch, normalised, pixels_of, token_maps, tokens_of
from padseg.train.loop import finish_step, moving_average, resume, take_step, trapezoid
from padseg.train.losses import divergence_of_maps
from padseg.train.run import Training, make_optimisers, write_model
from padseg.train.tiny_model import make_tokenizers
from padseg.train.vocabulary import WORDS

PAINTS = 0.3  # noise level from which on the painter is followed; up to that of the mask losses nothing may change
FIT_STEPS, FIT_RATE = 2000, 2e-3  # of the embedding of noise levels that the model begins with


class Noised(NamedTuple):
    """Latents, noise and the mixture that is seen, (B, C, h, w) each, at noise levels sigma (B,), with the embeddings of captions."""

    z: Tensor
    noise: Tensor
    seen: Tensor
    sigma: Tensor
    embeds: Tensor
    pooled: Tensor


Goal = Callable[[Noised], Tensor]


def learn_painting(learner: nn.ModuleDict, run: Training) -> None:
    """Train the painter, begin half-way between the model and the painter, train the model, and write it. The other parts stay frozen."""
    learner.requires_grad_(False)
    model: Any = learner['transformer']
    before, painter = copy.deepcopy(model), copy.deepcopy(model)
    train_transformer(painter, learner, run, 'painter', lambda given: given.noise - given.z)
    begin_between(model, before, painter, run.settings.noise)
    kept = before if run.settings.supervised else None
    train_transformer(model, learner, run, 'painting', lambda given: followed(painter, before, given), kept)
    write_model(learner, run)


def train_transformer(transformer: Any, learner: nn.ModuleDict, run: Training, name: str, goal: Goal, kept: Any = None) -> None:
    """Train a transformer towards the velocities of a goal, and with `kept` also towards the token maps of that transformer.

    Its weights become their moving average. The embedding of the noise level is only trained without `kept`. Of the course's flow matching
    only the dropout counts here.
    """
    settings, course, device = run.settings, run.settings.course(name), run.device
    taught = nn.ModuleDict({'transformer': transformer.requires_grad_(True)})
    transformer.time_text_embed.timestep_embedder.requires_grad_(kept is None)
    empty = tokens_of(make_tokenizers(WORDS), [''])  # (2, 1, 77)
    averaged = AveragedModel(taught, multi_avg_fn=moving_average(course.average))
    optimisers = make_optimisers(taught, settings, course)
    stage = run.stage(name, course.steps, settings.size, ('velocity',) if kept is None else ('velocity', 'maps'))
    start = resume(stage, taught, optimisers, averaged)
    schedules = [trapezoid(optimiser, course.steps, course.warmup, course.decay, start) for optimiser in optimisers]
    for step, (examples, tokens) in enumerate(run.batches(name, start, course.steps, settings.size), start):
        generator = torch.Generator().manual_seed(settings.seed + step)
        z = latents(learner, examples, device)
        prompts, captions = tokens[:, : len(z)], tokens[:, len(z) :]
        dropped = torch.rand(len(z), generator=generator) < course.flow.dropout
        given = noised(learner, z, torch.where(dropped[:, None], empty, captions), generator)
        with autocast(device):
            velocity = transformer(given.seen, given.embeds, given.pooled, given.sigma * 1000, return_dict=False)[0].float()
        losses = {'velocity': F.mse_loss(velocity, goal(given))}
        if kept is not None:
            losses['maps'] = change_of_maps(transformer, kept, learner, z, prompts, run, generator)
        take_step(losses['velocity'] + settings.maps_weight * losses.get('maps', 0.0), taught, optimisers, schedules)
        averaged.update_parameters(taught)
        finish_step(stage, step, losses, taught, optimisers, averaged)
    taught.load_state_dict(averaged.module.state_dict())
    transformer.requires_grad_(False)


@torch.no_grad()
def latents(learner: nn.ModuleDict, examples: Batch, device: torch.device) -> Tensor:
    """Latents of a batch as the transformer takes them: (B, C, h, w)."""
    vae: Any = learner['vae']
    with autocast(device):
        mean = vae.encode(pixels_of(examples, device).contiguous(memory_format=torch.channels_last)).latent_dist.mean
    return normalised(mean, learner.get_buffer('statistics'))


@torch.no_grad()
def noised(learner: nn.ModuleDict, z: Tensor, captions: Tensor, generator: torch.Generator) -> Noised:
    """Noise latents to levels that are mostly high, where captions count: the logistic function of a normal distribution around 0.8."""
    sigma = (0.8 + torch.randn(len(z), generator=generator)).sigmoid().to(z.device)
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    with autocast(z.device):
        texts = encode_batch(learner, captions)
    return Noised(z, noise, mixed(z, noise, sigma), sigma, *texts)


@torch.no_grad()
def followed(painter: Any, before: Any, given: Noised) -> Tensor:
    """The velocities to learn, (B, C, h, w): the painter's from the noise level PAINTS on, below it those of the model as it was."""
    goal = torch.empty_like(given.z)
    for teacher, part in ((painter, given.sigma >= PAINTS), (before, given.sigma < PAINTS)):
        if part.any():
            with autocast(goal.device):
                velocity = teacher(given.seen[part], given.embeds[part], given.pooled[part], given.sigma[part] * 1000, return_dict=False)
            goal[part] = velocity[0].float()
    return goal


def change_of_maps(
    transformer: Any, before: Any, learner: nn.ModuleDict, z: Tensor, prompts: Tensor, run: Training, generator: torch.Generator
) -> Tensor:
    """KL divergence of the token maps in the supervised blocks from those that they were, at noise levels at which a model segments."""
    sigma = torch.rand(len(z), generator=generator).to(z.device) * run.settings.noise
    seen = noised_batch(z, sigma, generator)
    with torch.no_grad(), autocast(z.device):
        texts = encode_batch(learner, prompts)
    with torch.no_grad():
        were = token_maps(before, seen, sigma, *texts, run.settings.supervised)
    return divergence_of_maps(were, token_maps(transformer, seen, sigma, *texts, run.settings.supervised))


def begin_between(model: Any, before: Any, painter: Any, low: float) -> None:
    """Give a model the means of the weights of two, in place, and an embedding of noise levels that is still the first one's up to `low`.

    Of all that the painter learns, it is its embedding of the noise level that spoils the maps most.
    """
    with torch.no_grad():
        for own, one, other in zip(model.parameters(), before.parameters(), painter.parameters(), strict=True):
            own.copy_((one + other) / 2)
    first, second = before.time_text_embed.timestep_embedder, copy.deepcopy(model.time_text_embed.timestep_embedder)
    levels = torch.linspace(0, 1, 501, device=next(model.parameters()).device)
    inputs = model.time_text_embed.time_proj(levels * 1000)
    share = ((levels - low) / (PAINTS - low)).clamp(0, 1)[:, None]
    with torch.no_grad():
        goal = torch.lerp(first(inputs), second(inputs), share)
    embedder = model.time_text_embed.timestep_embedder
    embedder.load_state_dict(first.state_dict())
    fit_embedder(embedder, inputs, goal)


def fit_embedder(embedder: nn.Module, inputs: Tensor, goal: Tensor) -> None:
    """Fit the embedder to values (N, D) at inputs (N, F), by Adam with a falling rate."""
    embedder.requires_grad_(True)
    optimiser = torch.optim.Adam(embedder.parameters(), lr=FIT_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, FIT_STEPS)
    for _ in range(FIT_STEPS):
        optimiser.zero_grad(set_to_none=True)
        F.mse_loss(embedder(inputs), goal).backward()
        optimiser.step()
        schedule.step()
    embedder.requires_grad_(False)
