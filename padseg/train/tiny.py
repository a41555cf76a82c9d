"""Train the embedded model from scratch: first the autoencoder, then all parts with L = L_FM + lambda L_mask (Seg4Diff, Eqs. 12-13).

Read it top to bottom: data, autoencoder, the whole model, output. `padseg train-tiny` runs it; settings.py has the hyperparameters.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from padseg.backbones import load
from padseg.backbones.parts import choose_device
from padseg.exports.overlay import overlay
from padseg.methods.seg4diff import segment
from padseg.train import tiny_model as tiny
from padseg.train.data import CELL
from padseg.train.denoiser import autocast, encode_batch, flow_loss, noised_batch, normalised, pixels_of, token_maps, tokens_of
from padseg.train.held_out import held_out_scene
from padseg.train.loop import Stage, cosine, finish_step, moving_average, resume, take_step, trapezoid
from padseg.train.losses import affinity_loss, mask_loss, named_mask_loss, share_over_tokens
from padseg.train.painting import learn_painting
from padseg.train.run import STAGES, Training, leave_cores, make_optimisers, write_model
from padseg.train.scenes import Scene
from padseg.train.settings import TrainingSettings
from padseg.train.vocabulary import WORDS
from padseg.types import Array


def train_tiny(
    out: pathlib.Path,
    settings: TrainingSettings,
    data: Sequence[str] = (),
    start: pathlib.Path | None = None,
    device: str | None = None,
    workers: int = 1,
    save_every: int = 250,
    shown: int = 8,
    transformer: dict[str, Any] = tiny.TRANSFORMER,
    vae: dict[str, Any] = tiny.VAE,
) -> pathlib.Path:
    """Train all stages, or with `start` only the last ones from that model, and return the model's folder.

    An interrupted training resumes. data: folders of annotated photographs, see `photographs`; workers: processes that make examples;
    save_every: steps between checkpoints; shown: held-out scenes on the sheet that is drawn at each; transformer, vae: sizes of the
    networks, see `build_tiny`. Raises UsageError if `out` has a checkpoint made with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    leave_cores(0)  # here too: a worker forked from a process with OpenCV threads hangs when it shuts them down
    torch.manual_seed(settings.seed)
    run = Training(out, settings, tuple(data), str(start) if start else None, choose_device(device), workers, save_every, shown)
    if start:
        learner = make_learner(tiny.read_tiny(start, WORDS), run)
    else:
        parts = tiny.build_tiny(WORDS, transformer, vae)
        train_autoencoder(parts, run)
        learner = make_learner(parts, run)
        train(learner, run, 'together')
    for name in ('transformer', 'further'):
        if settings.course(name).steps:
            train(learner, run, name)
    if settings.painting.steps:
        learn_painting(learner, run)
    return run.model


def train_autoencoder(parts: tiny.Parts, run: Training) -> None:
    """Train the autoencoder alone, with the reconstruction loss and a small KL term."""
    settings, vae = run.settings, parts.vae.to(run.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW([{'params': list(vae.parameters()), 'initial_lr': settings.vae_rate}], weight_decay=0.0)
    stage = run.stage('autoencoder', settings.vae_steps, settings.vae_batch, ('reconstruction',))
    start = resume(stage, vae, [optimiser])
    schedule = cosine(optimiser, settings.vae_steps, 50, start)
    for step, (examples, _) in enumerate(run.batches(stage.name, start, settings.vae_steps, settings.vae_batch), start):
        generator = torch.Generator().manual_seed(settings.seed + step)
        pixels = random_crops(pixels_of(examples, run.device), settings.vae_crops, settings.vae_side, generator)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with autocast(run.device):
            posterior = vae.encode(pixels).latent_dist
            loss = decoding_loss(vae, posterior.mean, posterior.std, pixels, generator) + settings.vae_kl * divergence(posterior)
        take_step(loss, vae, [optimiser], [schedule])
        finish_step(stage, step, {'reconstruction': loss}, vae, [optimiser])
        if stage.saves_after(step):
            draw_rebuilt(vae, stage, run.shown)


def random_crops(images: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """Take `count` random crops, at the same positions in every image: (B, 3, H, W) -> (B count, 3, side, side)."""
    crops = []
    for _ in range(count):
        top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in images.shape[2:])
        crops.append(images[..., top : top + side, left : left + side])
    return torch.cat(crops)


def decoding_loss(vae: Any, mean: Tensor, deviation: Tensor, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Reconstruction loss of the pixels (B, 3, 8 h, 8 w), decoded from a random sample of their latents (B, C, h, w)."""
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return reconstruction(vae.decode(mean + deviation * noise).sample.float(), pixels)


def divergence(posterior: Any) -> Tensor:
    """KL divergence of the latents' distribution from the standard normal, averaged over values."""
    return (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2


def reconstruction(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 plus squared error of brightness and two colour differences, summed over four scales.

    With a loss on RGB pixels alone, the autoencoder learns colours last.
    """
    opponent = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1, -1, 0], [-0.5, -0.5, 1]], device=pixels.device)
    difference = torch.einsum('ij,bjhw->bihw', opponent, decoded - pixels)  # (B, 3, H, W)
    scales = [F.avg_pool2d(difference, side) for side in (1, 2, 4, 8)]
    return torch.stack([scaled.abs().mean() + 2 * scaled.square().mean() for scaled in scales]).sum()


@torch.no_grad()
def latent_statistics(vae: Any, run: Training) -> Tensor:
    """Mean and standard deviation (2,) of the latents of two batches of 8 pictures not used to train the autoencoder."""
    steps = run.settings.vae_steps
    batches = run.batches(STAGES[0], steps, steps + 2, 8)
    values = torch.cat([vae.encode(pixels_of(examples, run.device)).latent_dist.mean.flatten() for examples, _ in batches])
    return torch.stack([values.mean(), values.std()])


def make_learner(parts: tiny.Parts, run: Training) -> nn.ModuleDict:
    """Move the parts to the device, as one module with a buffer for the mean and standard deviation of the latents."""
    learner = nn.ModuleDict({name: part.to(run.device) for name, part in parts._asdict().items()})
    config = parts.vae.config
    known = torch.tensor([config.shift_factor, 1 / config.scaling_factor]) if run.start else latent_statistics(parts.vae, run)
    learner.register_buffer('statistics', known.to(run.device))
    return learner


def train(learner: nn.ModuleDict, run: Training, name: str) -> None:
    """Train one stage: mask losses at every step, flow matching at some or all, as the course says.

    The mask losses reach the autoencoder through the transformer. The autoencoder also keeps its own loss, so that its latents still encode
    the image while they become features (as in REPA-E, Leng et al. 2025). The latents drift, so their mean and deviation are tracked. A
    moving average of the weights is saved. With an encoder rate of 0 the autoencoder is frozen, else after its share of the steps.
    """
    settings, course, device = run.settings, run.settings.course(name), run.device
    empty = tokens_of(tiny.make_tokenizers(WORDS), [''])  # (2, 1, 77)
    vae: Any = learner['vae']
    transformer: Any = learner['transformer']
    statistics = learner.get_buffer('statistics')
    averaged = AveragedModel(learner, multi_avg_fn=moving_average(course.average))
    optimisers = make_optimisers(learner, settings, course)
    stage = run.stage(name, course.steps, settings.size, ('reconstruction', 'mask', 'affinity', 'words', 'flow'))
    start = resume(stage, learner, optimisers, averaged)
    encoder_steps = round(course.encoder_share * course.steps) if course.encoder_rate else 0
    lengths = (course.steps, course.steps, encoder_steps or course.steps)
    schedules = [
        trapezoid(optimiser, steps, course.warmup, course.decay, start) for optimiser, steps in zip(optimisers, lengths, strict=True)
    ]
    for step, (examples, tokens) in enumerate(run.batches(name, start, course.steps, settings.size), start):
        generator = torch.Generator().manual_seed(settings.seed + step)
        pixels = pixels_of(examples, device).contiguous(memory_format=torch.channels_last)  # (B, 3, H, W)
        masks = examples.masks.to(device, non_blocking=True).float() / CELL**2  # (B, M, H/8, W/8)
        learns = step < encoder_steps

        # reconstruction: one crop of the first images
        losses = {}
        with autocast(device), torch.set_grad_enabled(learns):
            posterior = vae.encode(pixels).latent_dist
        if learns:
            track_statistics(statistics, posterior.mean)
            top, left = (int(torch.randint(length - 7, (), generator=generator)) for length in posterior.mean.shape[2:])
            some = slice(course.rebuilt)
            cells, crop = np.s_[some, :, top : top + 8, left : left + 8], np.s_[some, :, 8 * top : 8 * top + 64, 8 * left : 8 * left + 64]
            with autocast(device):
                rebuilt = decoding_loss(vae, posterior.mean[cells], posterior.std[cells], pixels[crop], generator)
            losses['reconstruction'] = rebuilt + settings.vae_kl * divergence(posterior)
        z = normalised(posterior.mean, statistics)  # (B, C, h, w)

        # mask losses: null prompt or the names of the masks, low noise, forward pass only to the last supervised block
        if settings.supervised:
            sigma = torch.rand(len(z), generator=generator).to(device) * settings.noise  # (B,)
            with autocast(device):
                texts = encode_batch(learner, tokens[:, : len(z)])
            maps = token_maps(transformer, noised_batch(z, sigma, generator), sigma, *texts, settings.supervised)  # (B, 77, h, w) each
            is_named = examples.words.any(2).any(1)  # (B,)
            named, others = is_named.nonzero()[:, 0].to(device), (~is_named).nonzero()[:, 0].to(device)
            if len(others):
                counts = examples.counts.to(device)[others]
                losses |= grouping_losses([share_over_tokens(layer[others]) for layer in maps], masks[others], counts)
            if len(named):
                words = examples.words.to(device)[named]  # (b, M, 77)
                by_name = [share_over_tokens(torch.einsum('bmt,bthw->bmhw', words, layer[named])) for layer in maps]
                losses['words'] = torch.stack([named_mask_loss(layer, masks[named]) for layer in by_name]).mean() * (len(named) / len(z))

        # flow matching: captions or the null prompt, all noise levels, full forward pass; no gradient to the autoencoder
        if step % course.flow.every == 0:
            count = max(1, round(course.flow.part * len(z)))
            dropped = torch.rand(count, generator=generator) < course.flow.dropout
            captions = torch.where(dropped[:, None], empty, tokens[:, len(z) : len(z) + count])
            losses['flow'] = flow_loss(transformer, z[:count].detach(), *encode_batch(learner, captions), generator)

        weights = {
            'mask': settings.mask_weight,
            'affinity': settings.affinity_weight,
            'words': settings.words_weight,
            'flow': course.flow.weight,
        }
        loss = torch.stack([value * weights.get(name, 1.0) for name, value in losses.items()]).sum()
        take_step(loss, learner, optimisers, schedules)
        averaged.update_parameters(learner)
        finish_step(stage, step, losses, learner, optimisers, averaged)
        if stage.saves_after(step):
            write_model(averaged.module, run)
            draw_regions(run.model, stage, run.shown)
    learner.load_state_dict(averaged.module.state_dict())


@torch.no_grad()
def track_statistics(statistics: Tensor, latents: Tensor) -> None:
    """Update the running mean and standard deviation (2,) of the latents, in place."""
    statistics.lerp_(torch.stack([latents.float().mean(), latents.float().std()]), 0.02)


def grouping_losses(maps: list[Tensor], masks: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Mask and affinity losses, averaged over the layers.

    maps: for each layer (B, 77, h, w), summing to 1 over tokens; masks: (B, M, h, w); counts: (B,) masks per image.
    """
    cells = F.avg_pool2d(masks, 2)
    return {
        'mask': torch.stack([mask_loss(layer, masks, counts) for layer in maps]).mean(),
        'affinity': torch.stack([affinity_loss(F.avg_pool2d(layer, 2), cells) for layer in maps]).mean(),
    }


def held_out(count: int) -> list[Scene]:
    """The scenes on sheets, all of one size."""
    return [held_out_scene(number, size=(208, 320)) for number in range(count)]


@torch.no_grad()
def draw_rebuilt(vae: Any, stage: Stage, shown: int) -> None:
    """Draw held-out scenes, each above its reconstruction, to OUT/autoencoder.sheet.png."""
    images = [kept.image for kept in held_out(shown)]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().to(stage.device) / 127.5 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    rebuilt = ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    write_training_sheet(images, rebuilt, stage)


def draw_regions(model: pathlib.Path, stage: Stage, shown: int) -> None:
    """Draw held-out scenes, each above the regions that the current model finds, to OUT/<stage>.sheet.png."""
    backbone = load(str(model), device=stage.device.type)
    images = [kept.image for kept in held_out(shown)]
    write_training_sheet(images, [overlay(image, segment(image, backbone).labels) for image in images], stage)


def write_training_sheet(above: Sequence[Array], below: Sequence[Array], stage: Stage) -> None:
    """Write a sheet of images of equal size, four per row, each above its counterpart."""
    columns = [np.concatenate(pair) for pair in zip(above, below, strict=True)]
    rows = [np.concatenate(columns[start : start + 4], axis=1) for start in range(0, len(columns), 4)]
    PIL.Image.fromarray(np.concatenate(rows)).save(stage.file('.sheet.png'))
