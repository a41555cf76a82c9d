"""Train the embedded model from nothing: an autoencoder, then the transformer with L = L_FM + lambda L_mask (Seg4Diff, Eqs. 12-13).

Read it top to bottom: settings, data, autoencoder, transformer, writing. Start it with bin/train-tiny.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import click
import cv2
import numpy as np
import torch
from torch import Tensor
from torch import nn
from torch.nn import functional as F

from padseg import tiny
from padseg.attention import token_attention
from padseg.attention import watch
from padseg.backbones.sd3 import text_columns
from padseg.mask_loss import affinity_loss
from padseg.mask_loss import mask_loss
from padseg.mask_loss import share
from padseg.scenes import CLASSES
from padseg.training_data import CELL
from padseg.training_data import Batch
from padseg.training_data import batch
from padseg.training_data import photographs

WORDS = sorted({word for name in CLASSES for word in name.split()} | {'a', 'an', 'and', 'in', 'of', 'on', 'the', 'two', 'with'})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the result, apart from the data; written beside the weights."""

    seed: int = 0
    vae_steps: int = 1800
    vae_batch: int = 4  # new pictures a step
    vae_crops: int = 4  # random crops of each
    vae_side: int = 64  # pixels of a crop
    vae_rate: float = 2e-3
    vae_kl: float = 1e-3
    steps: int = 1500
    fresh: int = 8  # new pictures a step
    reuse: int = 2  # how often each picture is seen, every time with other noise
    rate: float = 6e-4
    warmup: int = 100
    weight_decay: float = 0.02
    layer: int = 4  # expert block
    supervised: tuple[int, ...] = (3, 4)  # blocks whose token maps get the mask loss
    noise: float = 0.15  # mask loss: sigma is uniform in 0..noise
    mask_weight: float = 1.0  # lambda
    affinity_weight: float = 1.0
    flow_every: int = 6  # steps between two with the flow-matching loss
    caption_dropout: float = 0.5
    synthetic: float = 0.3  # share of scenes, when there are photographs
    average: float = 0.998  # decay of the moving average of the weights that is kept


# The row that a trained model is run with. Step, normalisation, threshold and refinement were chosen on the validation split of BSDS500.
ROW = {
    'side': 256,
    'step': 1,
    'normalisation': 'minmax-softmax',
    'threshold': 0.02,
    'superpixels': 300.0,
    'components': True,
    'min_area': 0.005,
}


@click.command(context_settings={'show_default': True})
@click.option('--out', type=click.Path(path_type=pathlib.Path), default=pathlib.Path('runs/tiny'), help='checkpoints, curves and the model')
@click.option('--data', multiple=True, metavar='FOLDER[=WEIGHT[=VOID]]', help='annotated photographs: FOLDER/images and FOLDER/labels')
@click.option('--steps', type=click.IntRange(1), default=Settings.steps, help='steps of the transformer')
@click.option('--vae-steps', type=click.IntRange(1), default=Settings.vae_steps, help='steps of the autoencoder')
@click.option('--seed', type=int, default=Settings.seed)
@click.option('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
@click.option('--workers', type=click.IntRange(0), default=1, help='processes that make examples')
@click.option('--save-every', type=click.IntRange(1), default=250, help='steps between two checkpoints')
def main(
    out: pathlib.Path, data: tuple[str, ...], steps: int, vae_steps: int, seed: int, device: str, workers: int, save_every: int
) -> None:
    """Train the embedded model; the same command again goes on where a stopped one was."""
    settings = Settings(seed=seed, steps=steps, vae_steps=vae_steps)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    parts = tiny.build(WORDS)
    run = Run(out, settings, data, torch.device(device), workers, save_every)
    train_autoencoder(parts, run)
    train_transformer(parts, run)
    row = {'layers': tiny.TRANSFORMER['num_layers'], 'layer': settings.layer, **ROW}
    tiny.save(parts, WORDS, out / 'model', row)
    click.echo(f'model in {out / "model"}', err=True)


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a training run reads and writes."""

    out: pathlib.Path
    settings: Settings
    data: tuple[str, ...]
    device: torch.device
    workers: int
    save_every: int

    def batches(self, stage: int, start: int, stop: int, size: int) -> Iterator[Batch]:
        """Batches number start..stop-1 of a stage, made ahead in other processes; number i is the same in every run."""
        examples = Examples(self.settings, self.data, stage, size)
        loader = torch.utils.data.DataLoader(
            examples,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
        )
        return iter(loader)


class Examples(torch.utils.data.Dataset[Batch]):
    """Batch number i of one stage."""

    def __init__(self, settings: Settings, data: tuple[str, ...], stage: int, size: int) -> None:
        self.folders = [photographs(argument) for argument in data]
        self.settings, self.stage, self.size = settings, stage, size

    def __getitem__(self, index: int) -> Batch:
        cv2.setNumThreads(1)  # the pictures are small, and the cores belong to the training
        return batch(self.settings.seed * 2 + self.stage, index, self.size, self.folders, self.settings.synthetic)


def train_autoencoder(parts: tiny.Parts, run: Run) -> None:
    """Reconstruction with a slight KL term; then shift and scale that give latents mean 0, deviation 1."""
    settings, vae = run.settings, parts.vae.to(run.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), settings.vae_rate, weight_decay=0.0)
    start = resume(run, 'autoencoder', vae, optimiser)
    for step, examples in enumerate(run.batches(0, start, settings.vae_steps, settings.vae_batch), start):
        set_rate(optimiser, settings.vae_rate * schedule(step, settings.vae_steps, 50))
        generator = torch.Generator().manual_seed(settings.seed + step)
        pixels = random_crops(examples.images, settings.vae_crops, settings.vae_side, generator).to(run.device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with autocast(run.device):
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(run.device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2
        loss = reconstruction(decoded, pixels) + settings.vae_kl * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        finish_step(run, 'autoencoder', step, settings.vae_steps, {'loss': loss.item()}, vae, optimiser)
    mean, deviation = latent_statistics(vae, run)
    vae.register_to_config(shift_factor=mean, scaling_factor=1 / deviation)


def random_crops(images: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """`count` crops of every picture, at the same places in all: (B, 3, H, W) -> (B count, 3, side, side)."""
    crops = []
    for _ in range(count):
        top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in images.shape[2:])
        crops.append(images[..., top : top + side, left : left + side])
    return torch.cat(crops)


def reconstruction(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 and squares of brightness and of two colour differences, at four scales: on RGB pixels alone colours are learnt last."""
    opponent = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1, -1, 0], [-0.5, -0.5, 1]], device=pixels.device)
    difference = torch.einsum('ij,bjhw->bihw', opponent, decoded - pixels)  # (B, 3, H, W)
    scales = [F.avg_pool2d(difference, side) for side in (1, 2, 4, 8)]
    return torch.stack([each.abs().mean() + 2 * each.square().mean() for each in scales]).sum()


@torch.no_grad()
def latent_statistics(vae: Any, run: Run) -> tuple[float, float]:
    """Mean and standard deviation of the latents of 8 batches that the autoencoder has not seen."""
    steps = run.settings.vae_steps
    latents = [vae.encode(examples.images.to(run.device)).latent_dist.mean.flatten() for examples in run.batches(0, steps, steps + 8, 8)]
    values = torch.cat(latents)
    return float(values.mean()), float(values.std())


def train_transformer(parts: tiny.Parts, run: Run) -> None:
    """Mask loss on the null prompt's token maps at every step, flow-matching loss with captions now and then.

    The weights that are kept are a moving average.
    """
    settings, device = run.settings, run.device
    tokenizers = tiny.tokenizers(WORDS)
    learner = nn.ModuleDict({name: getattr(parts, name).to(device) for name in ('transformer', 'text_encoder', 'text_encoder_2')})
    averaged = [weight.detach().clone() for weight in learner.parameters()]
    matrices, vectors = ([p for p in learner.parameters() if (p.ndim > 1) == kind] for kind in (True, False))
    decay: list[dict[str, Any]] = [{'params': matrices}, {'params': vectors, 'weight_decay': 0.0}]
    optimiser = torch.optim.AdamW(decay, settings.rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay, foreach=True)
    start = resume(run, 'transformer', learner, optimiser, averaged)
    layers = {layer: parts.transformer.transformer_blocks[layer].attn for layer in settings.supervised}
    seen: dict[tuple[int, ...], collections.deque[tuple[Tensor, Tensor, Tensor]]] = {}
    first = max(0, start - 100)  # the store of earlier pictures is filled again before a stopped run goes on
    for step, examples in enumerate(run.batches(1, first, settings.steps, settings.fresh), first):
        with torch.no_grad(), autocast(device):
            latent = parts.vae.encode(examples.images.to(device).contiguous(memory_format=torch.channels_last)).latent_dist.mean
            latent = ((latent.float() - parts.vae.config.shift_factor) * parts.vae.config.scaling_factor).contiguous()
        store = seen.setdefault(tuple(latent.shape[2:]), collections.deque(maxlen=40))
        rng = np.random.default_rng((settings.seed, step))
        older = [store[i] for i in rng.choice(len(store), min(len(store), settings.reuse - 1), replace=False)] if store else []
        store.append((latent, examples.masks, examples.counts))
        if step < start:
            continue
        set_rate(optimiser, settings.rate * schedule(step, settings.steps, settings.warmup))
        generator = torch.Generator().manual_seed(settings.seed + step)

        # mask loss: fresh and earlier pictures, null prompt, little noise, forward only to the expert block
        z, masks, counts = (torch.cat(column).to(device) for column in zip(store[-1], *older, strict=True))
        sigma = torch.rand(len(z), generator=generator).to(device) * settings.noise  # (B,)
        with autocast(device):
            embeds, pooled = encode(learner, tokenizers, [''])
            with watch(layers) as recorded:
                parts.transformer(noised(z, sigma, generator), embeds.expand(len(z), -1, -1), pooled.expand(len(z), -1), sigma * 1000)
        truth = masks.float() / CELL**2  # (B, M, 2h, 2w)
        maps = [token_maps(recorded[layer], z.shape) for layer in settings.supervised]  # (B, 77, 2h, 2w) each
        masks_loss = torch.stack([mask_loss(each, truth, counts) for each in maps])
        pairs_loss = torch.stack([affinity_loss(F.avg_pool2d(each, 2), F.avg_pool2d(truth, 2)) for each in maps])
        loss = settings.mask_weight * masks_loss.mean() + settings.affinity_weight * pairs_loss.mean()
        row = {'mask': masks_loss[-1].item(), 'affinity': pairs_loss[-1].item()}

        # flow-matching loss: fresh pictures, their captions or the null prompt, every noise level, whole forward
        if step % settings.flow_every == 0:
            dropped = torch.rand(len(examples.captions), generator=generator) < settings.caption_dropout
            captions = ['' if drop else text for text, drop in zip(examples.captions, dropped, strict=True)]
            sigma = torch.randn(len(latent), generator=generator).sigmoid().to(device)
            noise = torch.randn(latent.shape, generator=generator).to(device)
            mixed = latent + sigma[:, None, None, None] * (noise - latent)
            with autocast(device):
                embeds, pooled = encode(learner, tokenizers, captions)
                velocity = parts.transformer(mixed, embeds, pooled, sigma * 1000, return_dict=False)[0]
            flow = F.mse_loss(velocity.float(), noise - latent)
            loss = loss + flow
            row['flow'] = flow.item()

        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(learner.parameters()), 1 - min(settings.average, (step + 1) / (step + 10)))
        finish_step(run, 'transformer', step, settings.steps, row, learner, optimiser, averaged)
    with torch.no_grad():
        for weight, average in zip(learner.parameters(), averaged, strict=True):
            weight.copy_(average)


def encode(learner: nn.ModuleDict, tokenizers: tuple[Any, Any], captions: list[str]) -> tuple[Tensor, Tensor]:
    """Captions as SD3 takes them without T5: (B, 2 x 77, D) embeddings whose second half is zero, (B, D) pooled."""
    device = next(learner.parameters()).device
    outputs = []
    for name, tokenizer in zip(('text_encoder', 'text_encoder_2'), tokenizers, strict=True):
        ids = tokenizer(captions, padding='max_length', max_length=tiny.SLOTS, truncation=True, return_tensors='pt').input_ids
        outputs.append(learner[name](ids.to(device), output_hidden_states=True))
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], -1)  # (B, 77, D)
    return F.pad(embeds, (0, 0, 0, tiny.SLOTS)), torch.cat([output.text_embeds for output in outputs], -1)


def noised(z: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    return z + sigma[:, None, None, None] * (noise - z)


def token_maps(recorded: Any, shape: torch.Size) -> Tensor:
    """The 77 maps of a layer as shares of each pixel, at twice the token grid, where the masks are: (B, 77, 2h, 2w)."""
    h, w = shape[2] // 2, shape[3] // 2
    maps = token_attention(recorded, h * w, text_columns(range(tiny.SLOTS), h * w), chunk=h * w)  # (B, h w, 77)
    maps = F.interpolate(maps.transpose(1, 2).unflatten(2, (h, w)), scale_factor=2, mode='bilinear')
    return share(maps)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group['lr'] = rate


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16)


def resume(run: Run, stage: str, model: nn.Module, optimiser: torch.optim.Optimizer, averaged: list[Tensor] | None = None) -> int:
    """Load a stage's checkpoint if there is one; the step to go on with. Refuses one that was made with other settings."""
    path = run.out / f'{stage}.pt'
    if not path.exists():
        return 0
    state = torch.load(path, map_location=run.device, weights_only=True)
    if state['made_with'] != made_with(run, stage):
        raise click.UsageError(f'{path} was made with {state["made_with"]}, this run has {made_with(run, stage)}: choose another --out')
    model.load_state_dict(state['model'])
    optimiser.load_state_dict(state['optimiser'])
    for weight, average in zip(averaged or [], state['averaged'], strict=True):
        weight.copy_(average)
    return int(state['step'])


def made_with(run: Run, stage: str) -> str:
    """What a checkpoint depends on; the autoencoder's not on the transformer's settings, so that it can be copied to another run."""
    settings = dataclasses.asdict(run.settings)
    if stage == 'autoencoder':
        settings = {name: value for name, value in settings.items() if name.startswith('vae_') or name in ('seed', 'synthetic')}
    return f'{settings} {run.data}'


def finish_step(
    run: Run, stage: str, step: int, steps: int, row: dict[str, float], model: nn.Module, optimiser: Any, averaged: Any = ()
) -> None:
    """Log the losses; now and then save a checkpoint and draw the curves."""
    with (run.out / f'{stage}.csv').open('a', newline='') as file:
        csv.writer(file).writerow(
            [step, round(time.time(), 1), row.get('loss', row.get('mask')), row.get('flow', ''), row.get('affinity', '')]
        )
    if (step + 1) % 20 == 0:
        click.echo(f'{stage} {step + 1}/{steps} ' + ' '.join(f'{name} {value:.4f}' for name, value in row.items()), err=True)
    if (step + 1) % run.save_every == 0 or step + 1 == steps:
        state = {'step': step + 1, 'model': model.state_dict(), 'optimiser': optimiser.state_dict(), 'averaged': list(averaged)}
        partial = run.out / f'{stage}.pt.partial'
        torch.save({**state, 'made_with': made_with(run, stage)}, partial)
        partial.replace(run.out / f'{stage}.pt')
        draw_curves(run, stage)


def draw_curves(run: Run, stage: str) -> None:
    """OUT/<stage>.png: the losses in OUT/<stage>.csv, each point the mean of 20 steps."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    rows = list(csv.reader((run.out / f'{stage}.csv').open(newline='')))
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for column, name in ((2, 'autoencoder' if stage == 'autoencoder' else 'mask'), (3, 'flow matching'), (4, 'affinity')):
        points = [(int(row[0]), float(row[column])) for row in rows if row[column]]
        means = [np.mean(points[i : i + 20], axis=0) for i in range(0, len(points), 20)]
        if means:
            axes.plot(*zip(*means, strict=True), label=name)
    axes.set_xlabel('step')
    axes.set_ylabel('loss')
    axes.set_yscale('log')
    axes.legend()
    figure.savefig(run.out / f'{stage}.png', dpi=120)
    pyplot.close(figure)


if __name__ == '__main__':
    main()
