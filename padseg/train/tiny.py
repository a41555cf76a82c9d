"""Train the embedded model from scratch: first the autoencoder, then all parts with L = L_FM + lambda L_mask (Seg4Diff, Eqs. 12-13).

Read it top to bottom: data, autoencoder, the whole model, output. `padseg train-tiny` runs it; settings.py has the hyperparameters.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from padseg.backbones import load
from padseg.backbones.parts import choose_device, has_bfloat16
from padseg.backbones.recorder import Request, watch
from padseg.backbones.sd3 import text_columns
from padseg.exports.overlay import overlay
from padseg.methods.seg4diff import segment
from padseg.methods.stages.attention import token_attention
from padseg.train import tiny_model as tiny
from padseg.train.data import CELL, Batch, batch, photographs
from padseg.train.held_out import held_out_scene
from padseg.train.loop import Stage, cosine, finish_step, moving_average, resume, trapezoid
from padseg.train.losses import affinity_loss, mask_loss, named_mask_loss, share_over_tokens
from padseg.train.muon import Muon
from padseg.train.scenes import CLASSES, Scene
from padseg.train.settings import Course, Mixture, TrainingSettings
from padseg.train.vocabulary import SLOTS, WORDS
from padseg.types import Array, Attention

STAGES = ('autoencoder', 'together', 'transformer', 'further')


# Seg4Diff's settings in the `padseg.json` of a trained model, chosen on the validation splits of BSDS500 and CamVid.
SETTINGS = {
    'step': 1,
    'normalisation': 'share',
    'threshold': 0.05,
    'superpixels': 60.0,
    'join': 0.75,
    'components': True,
    'min_area': 0.003,
    'regroup': 0.7,
}


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
    for name in STAGES[2:]:
        if settings.course(name).steps:
            train(learner, run, name)
    return run.model


@dataclasses.dataclass(frozen=True)
class Training:
    """A training run: its settings, inputs and output folder."""

    out: pathlib.Path
    settings: TrainingSettings
    data: tuple[str, ...]
    start: str | None
    device: torch.device
    workers: int
    save_every: int
    shown: int

    @property
    def model(self) -> pathlib.Path:
        return self.out / 'model'

    def batches(self, stage: str, start: int, stop: int, size: int) -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches start..stop-1 of a stage, prefetched by the workers; batch i is the same in every run."""
        examples = Examples(self.settings, self.data, stage, size)
        loader = torch.utils.data.DataLoader(
            examples,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self.workers,
            worker_init_fn=leave_cores,
            prefetch_factor=4 if self.workers else None,
            pin_memory=self.device.type == 'cuda',
        )
        return iter(loader)

    def stage(self, name: str, steps: int, pictures: int, columns: tuple[str, ...]) -> Stage:
        """Describe a stage. Its checkpoint depends on the settings of this and all earlier stages, but not on its own number of steps."""
        settings = dataclasses.asdict(self.settings)
        courses = {course: settings.pop(course) for course in STAGES[1:]}
        if name == 'autoencoder':
            made_with = {key: value for key, value in settings.items() if key.startswith('vae_') or key == 'seed'}
        else:
            own = {key: value for key, value in courses[name].items() if key != 'steps'}
            before = self.start or {stage: courses[stage] for stage in STAGES[1 : STAGES.index(name)]}
            made_with = {**settings, **own, 'before': before}
        return Stage(self.out, name, steps, pictures, columns, f'{made_with} {self.data}', self.save_every, self.device)


def leave_cores(worker: int) -> None:
    """Limit OpenCV to one thread: images are small, and the training needs the cores."""
    cv2.setNumThreads(1)


class Examples(torch.utils.data.Dataset[tuple[Batch, Tensor]]):
    """The batches of one stage, by index, each with the tokens of its prompts and captions, (2, 2 B, 77): for both text encoders."""

    def __init__(self, settings: TrainingSettings, data: tuple[str, ...], stage: str, size: int) -> None:
        self.folders = [photographs(argument) for argument in data]
        self.settings, self.stage, self.size = settings, stage, size
        self.tokenizers = tiny.make_tokenizers(WORDS)

    def __getitem__(self, index: int) -> tuple[Batch, Tensor]:
        settings = self.settings
        mixtures = ((0, Mixture(settings.vae_synthetic)),) if self.stage == 'autoencoder' else settings.course(self.stage).mixtures
        mixture = [mixture for first, mixture in mixtures if first <= index][-1]
        examples = batch(settings.seed * len(STAGES) + STAGES.index(self.stage), index, self.size, self.folders, mixture)
        return examples, tokens_of(self.tokenizers, [*examples.prompts, *examples.captions])


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
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        finish_step(stage, step, {'reconstruction': loss}, vae, [optimiser])
        if stage.saves_after(step):
            draw_rebuilt(vae, stage, run.shown)


def pixels_of(examples: Batch, device: torch.device) -> Tensor:
    """The images of a batch on the device: (B, 3, H, W) in -1..1, channels last."""
    return examples.images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1


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
    averaged = AveragedModel(learner, multi_avg_fn=moving_average(settings.average))
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
                embeds, pooled = encode_batch(learner, tokens[:, : len(z)])
                reduce = partial(training_maps, shape=z.shape)
                requests = {layer: Request(transformer.transformer_blocks[layer].attn, reduce) for layer in settings.supervised}
                with watch(requests) as kept:
                    transformer(noised_batch(z, sigma, generator), embeds, pooled, sigma * 1000)
            maps = [kept[layer] for layer in settings.supervised]  # (B, 77, h, w) each
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
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
        averaged.update_parameters(learner)
        finish_step(stage, step, losses, learner, optimisers, averaged)
        if stage.saves_after(step):
            write_model(averaged.module, run)
            draw_regions(run.model, stage, run.shown)
    learner.load_state_dict(averaged.module.state_dict())


def write_model(learner: nn.Module, run: Training) -> None:
    """Write the model and its default settings to OUT/model, a folder that padseg can load."""
    kept: Any = copy.deepcopy(learner).cpu()
    parts: Any = tiny.Parts(**{name: kept[name] for name in tiny.Parts._fields})
    mean, deviation = kept.get_buffer('statistics').tolist()
    parts.vae.register_to_config(shift_factor=mean, scaling_factor=1 / deviation)
    words = sorted({word for name in CLASSES for word in name.split()})
    facts = {'layers': parts.transformer.config.num_layers, 'layer': run.settings.layer, 'side': 256, 'words': words}
    tiny.save_tiny(parts, WORDS, run.model, {**facts, 'seg4diff': SETTINGS})


def make_optimisers(learner: nn.ModuleDict, settings: TrainingSettings, course: Course) -> list[torch.optim.Optimizer]:
    """Make Muon (Jordan et al. 2024) for the matrices of attention and MLP, and AdamW for the rest and for the autoencoder.

    The `initial_lr` of a group is its peak learning rate.
    """
    named = dict(learner.named_parameters())
    inner = {
        name for name, weight in named.items() if weight.ndim == 2 and 'transformer_blocks' in name and ('.attn.' in name or '.ff' in name)
    }
    encoder = {name for name in named if name.startswith('vae.')}
    rest = named.keys() - inner - encoder
    rate, decay = course.rate, settings.weight_decay
    muon = Muon(
        [{'params': [named[name] for name in sorted(inner)], 'initial_lr': rate}], weight_decay=decay, adjust_lr_fn='match_rms_adamw'
    )
    groups: list[dict[str, Any]] = [
        {'params': [named[name] for name in sorted(rest) if named[name].ndim > 1], 'initial_lr': rate, 'weight_decay': decay},
        {'params': [named[name] for name in sorted(rest) if named[name].ndim <= 1], 'initial_lr': rate},
    ]
    autoencoder: list[dict[str, Any]] = [{'params': [named[name] for name in sorted(encoder)], 'initial_lr': course.encoder_rate}]
    return [muon, *(torch.optim.AdamW(each, betas=(0.9, 0.98), weight_decay=0.0, foreach=True) for each in (groups, autoencoder))]


@torch.no_grad()
def track_statistics(statistics: Tensor, latents: Tensor) -> None:
    """Update the running mean and standard deviation (2,) of the latents, in place."""
    statistics.lerp_(torch.stack([latents.float().mean(), latents.float().std()]), 0.02)


def normalised(latents: Tensor, statistics: Tensor) -> Tensor:
    mean, deviation = statistics
    return ((latents.float() - mean) / deviation).contiguous()


def grouping_losses(maps: list[Tensor], masks: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Mask and affinity losses, averaged over the layers.

    maps: for each layer (B, 77, h, w), summing to 1 over tokens; masks: (B, M, h, w); counts: (B,) masks per image.
    """
    cells = F.avg_pool2d(masks, 2)
    return {
        'mask': torch.stack([mask_loss(layer, masks, counts) for layer in maps]).mean(),
        'affinity': torch.stack([affinity_loss(F.avg_pool2d(layer, 2), cells) for layer in maps]).mean(),
    }


def flow_loss(transformer: Any, z: Tensor, embeds: Tensor, pooled: Tensor, generator: torch.Generator) -> Tensor:
    """Flow-matching loss (Lipman et al. 2023) on latents (B, C, h, w), with SD3's logit-normal noise levels."""
    sigma = torch.randn(len(z), generator=generator).sigmoid().to(z.device)
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    mixed = z + sigma[:, None, None, None] * (noise - z)
    with autocast(z.device):
        velocity = transformer(mixed, embeds, pooled, sigma * 1000, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - z)


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


def tokens_of(tokenizers: tuple[Any, Any], texts: list[str]) -> Tensor:
    """The tokens of texts for both text encoders: (2, B, 77) int64."""
    return torch.stack(
        [each(texts, padding='max_length', max_length=SLOTS, truncation=True, return_tensors='pt').input_ids for each in tokenizers]
    )


def encode_batch(learner: nn.ModuleDict, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Encode tokens (2, B, 77) as SD3 does without T5: embeddings (B, 2 x 77, D) with zeros in the second half, and pooled (B, D)."""
    tokens = tokens.to(next(learner.parameters()).device, non_blocking=True)
    encoders = (learner[name] for name in ('text_encoder', 'text_encoder_2'))
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, tokens, strict=True)]
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], -1)  # (B, 77, D)
    return F.pad(embeds, (0, 0, 0, SLOTS)), torch.cat([output.text_embeds for output in outputs], -1)


def noised_batch(z: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    return z + sigma[:, None, None, None] * (noise - z)


def training_maps(seen: Attention, shape: torch.Size) -> Tensor:
    """The 77 token maps of a layer at the resolution of the masks, twice the token grid: (B, 77, 2h, 2w), float32 even under autocast."""
    h, w = shape[2] // 2, shape[3] // 2
    with torch.autocast(seen.query.device.type, enabled=False):
        maps = token_attention(seen, h * w, text_columns(range(SLOTS), h * w), chunk=h * w)  # (B, h w, 77)
    return F.interpolate(maps.transpose(1, 2).unflatten(2, (h, w)), scale_factor=2, mode='bilinear')


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision where the device has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))
