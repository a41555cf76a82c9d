"""A step of fine-tuning by mask alignment, on SD3-medium's shape with random weights, compared with the obvious way: bin/bench train."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from padseg.backbones import Backbone, Identity, family_of
from padseg.backbones.recorder import Request, watch
from padseg.backbones.spec import BACKBONES, CELL
from padseg.bench.measure import between, finish_bench, fresh, measured_on, output_flags, row_of_numbers, spread, surroundings
from padseg.bench.model import SHARPER, SIZES, default_dtype, random_vae
from padseg.bench.setting import QUIET, memory, own_side, synchronize
from padseg.train import alignment, lora
from padseg.train.alignment import Pairs, mask_losses
from padseg.train.lessons import Lesson
from padseg.train.lora_settings import PRESETS, LoraSettings
from padseg.types import Prompt

DTYPES = {'bfloat16': 'bf16', 'float32': 'no'}  # of the frozen weights, and the precision of computing that goes with it
UPWARD = 0.02  # standard deviation of the LoRA's second matrices: where they are zero, as they begin, the first get no gradient
LIMITS = {'bfloat16': 0.05, 'float32': 1e-3}  # on the differences of losses and gradients
CARDS, SIDES = (24, 48, 80), (512, 1024)  # GB; pixels
FEW, MANY = 1, 8  # pictures at once of which the memory is reckoned; in between and above along a line
ASIDE = 2e9  # bytes of a card that are not reckoned with: its driver's, and what lies idle between tensors
WARM_UP = 128  # side in pixels

Losses = Callable[..., dict[str, Tensor]]


aten = torch.ops.aten
FLOPS = {
    **flop_registry,  # which lacks the processor's fused attention
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[aten._scaled_dot_product_flash_attention_backward],
}


class TrainSetting(NamedTuple):
    """Settings of one process. batch: pictures at once; masks: of each."""

    size: str
    side: int
    batch: int
    masks: int
    preset: str
    dtype: str = 'bfloat16'
    device: str = 'cpu'
    checkpointing: bool = True


class Way(NamedTuple):
    """A step. with_flow: with the flow-matching loss; aligned: with mask losses."""

    losses: Losses
    with_flow: bool
    aligned: bool


class Step(NamedTuple):
    """seconds: of a step; peak: memory in MiB; losses: by name; gradients: (n,), the norm of each trained tensor's."""

    seconds: float
    peak: float
    losses: dict[str, float]
    gradients: Any


@click.command('train')
@click.option('--size', type=click.Choice(list(SIZES)), default='full', show_default=True, help='SD3-medium, or a small model for tests')
@click.option('--side', type=click.IntRange(WARM_UP), help="side of the pictures in pixels (default: the model's own)")
@click.option('--batch', type=click.IntRange(1), default=1, show_default=True, help='pictures at once')
@click.option('--masks', type=click.IntRange(1), default=16, show_default=True, help='masks of each picture')
@click.option(
    '--dtype', type=click.Choice(list(DTYPES)), default='bfloat16', show_default=True, help='of the frozen weights and of computing'
)
@click.option('--device', default='cpu', show_default=True, help='cpu or cuda')
@click.option('--checkpointing/--no-checkpointing', default=True, show_default=True, help='recompute blocks, or keep what they computed')
@click.option('--ways', help='which of these to measure, separated by commas, or none (default: all)')
@click.option('--reckon/--no-reckon', default=True, show_default=True, help='also reckon from shapes what fits on a GPU, in some minutes')
@click.option('--repeats', type=click.IntRange(1), default=3, show_default=True, help='repetitions, each in fresh processes')
@output_flags
def command(ways: str | None, reckon: bool, repeats: int, record: bool, as_json: bool, **settings: Any) -> None:
    """Measure a training step on random weights: ours, the obvious way, and steps with one of the losses alone.

    A step is one forward and backward pass of a batch and an update of the LoRA and the score layer, by the code of `padseg train`. Latents
    and embeddings of texts are given. The obvious way runs all blocks for the masks, keeps the scores of all heads of all blocks, and
    passes all candidates through the score layer with their graph. It must find the same losses and gradients.
    """
    os.environ |= QUIET  # inherited by the processes
    setting = TrainSetting(preset='paper', **{**settings, 'side': settings['side'] or own_side(settings['size'])})
    names = [name.strip() for name in ways.split(',') if name != 'none'] if ways else list(WAYS)
    strange = [name for name in names if name not in WAYS]
    if strange:
        raise click.BadParameter(f'one of {", ".join(WAYS)}; got {strange[0]}', param_hint='--ways')
    turns = [{name: fresh(measured_step, name, setting) for name in names} for _ in range(repeats if names else 1)]
    measured = summary(setting, turns, reckoned_table(setting) if reckon else [])
    finish_bench('train', f'{setting.size}-{setting.side}-batch-{setting.batch}-{setting.dtype}', measured, record, as_json, in_words)
    for pair, difference in measured['difference'].items():
        if not difference <= LIMITS[setting.dtype]:
            raise click.ClickException(f'{pair} differ by {difference:.2g} of the largest loss or gradient')


# a model and what it learns from


def random_backbone(setting: TrainSetting, with_vae: bool = False) -> Backbone:
    """SD3's transformer alone, or with its VAE, with random weights and sharper attention than they give."""
    import diffusers

    architecture = SIZES[setting.size]
    width = architecture.transformer['num_attention_heads'] * architecture.transformer['attention_head_dim']
    torch.manual_seed(0)
    with default_dtype(getattr(torch, setting.dtype)), torch.device(setting.device), torch.no_grad():
        transformer = diffusers.SD3Transformer2DModel(
            in_channels=16, out_channels=16, caption_projection_dim=width, qk_norm=None, **architecture.transformer
        )
        for block in transformer.transformer_blocks:
            for projection in (block.attn.to_q, block.attn.to_k, block.attn.add_q_proj, block.attn.add_k_proj):
                projection.weight.mul_(SHARPER)
        vae = random_vae(architecture.vae).requires_grad_(False) if with_vae else None
    transformer.requires_grad_(False)
    layers = len(transformer.transformer_blocks)
    spec = BACKBONES['sd3']._replace(layers=layers, **architecture.row)
    return Backbone(
        spec=spec,
        identity=Identity('sd3', '', None, '', '', ''),
        family=family_of(spec),
        transformer=transformer,
        vae=vae,
        scheduler=schedule(),
        null_prompt=Prompt(torch.zeros(1, 0, 0), torch.zeros(1, 0), (), ()),
        layers=layers,
        whole=True,
        patch=2,
        multiple=2 * CELL,
        limit=architecture.transformer['pos_embed_max_size'] * 2 * CELL,
    )


@cache
def schedule() -> Any:
    """SD3's, whose values are needed where tensors have none: call it before."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def random_learner(backbone: Backbone, settings: LoraSettings) -> nn.ModuleDict:
    """What is trained, as after some steps."""
    learner = lora.make_learner(backbone.transformer, settings)
    with torch.no_grad():
        for name, weight in backbone.transformer.named_parameters():
            if 'lora_B' in name:
                weight.normal_(std=UPWARD)
    return learner


def random_lessons(backbone: Backbone, setting: TrainSetting, side: int, folder: Path | None) -> list[Lesson]:
    """Lessons with rectangles for masks. folder: for latents; without one, pictures are encoded."""
    from safetensors.torch import save_file

    config, cells = backbone.transformer.config, side // CELL
    generator = torch.Generator(device=setting.device).manual_seed(1)
    lessons = []
    with torch.device(setting.device):
        for number in range(setting.batch):
            place = folder / f'{side}-{number}.safetensors' if folder else None
            if place:
                save_file({'latents': torch.randn(16, cells, cells, generator=generator).cpu()}, place)
            lessons.append(
                Lesson(
                    image=torch.zeros(3, side, side),
                    masks=rectangles(setting.masks, side).to(setting.device),
                    columns=(),
                    embeds=torch.randn(1, 2 * backbone.spec.sequence, config.joint_attention_dim, generator=generator),
                    pooled=torch.randn(1, config.pooled_projection_dim, generator=generator),
                    level=500,
                    noise=torch.randn(16, cells, cells, generator=generator),
                    place=place,
                )
            )
    return lessons


def rectangles(count: int, side: int) -> Tensor:
    """Masks (count, side, side) bool, the largest first: quarters of the picture and smaller."""
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    for number in range(count):
        length = max(1, side // (2 + number // 4))
        masks[number, (side - length) * (number >> 1 & 1) :, (side - length) * (number & 1) :][:length, :length] = True
    return masks


# ways


def obvious(
    lessons: Sequence[Lesson],
    learner: nn.ModuleDict,
    backbone: Backbone,
    layer: int,
    settings: LoraSettings,
    with_flow: bool,
    accelerator: Any,
    pairs: float,
) -> dict[str, Tensor]:
    """The losses of `padseg.train.lora.losses_of` for matched candidates of all heads, in the obvious way."""
    mixed, timestep, clean, noise = lora.noised(lessons, backbone)
    requests = {one: Request(backbone.attention_module(one), lora.image_to_text) for one in range(backbone.layers)}
    with accelerator.autocast(), watch(requests, stop=False) as seen:
        velocity = lora.velocity_of(lessons, mixed, timestep, backbone)
    kept = [lora.candidates(seen[one], backbone.grid(one, mixed.shape), backbone, settings) for one in range(backbone.layers)]
    zero = torch.zeros((), device=backbone.device)
    losses = {'flow': lora.flow_loss(velocity, clean, noise).sum() / settings.batch if with_flow else zero, 'focal': zero, 'dice': zero}
    for lesson, maps in zip(lessons, kept[layer], strict=True):
        masks = lesson.masks.to(backbone.device)
        logits = learner['score'](maps)
        candidates, chosen = alignment.match(logits.detach(), masks, settings.focal)
        focal, dice = mask_losses(Pairs(logits[candidates], masks[chosen]), settings.focal)
        losses['focal'], losses['dice'] = losses['focal'] + focal / pairs, losses['dice'] + dice / pairs
    weights = {'flow': settings.flow_weight, 'focal': settings.focal_weight, 'dice': settings.dice_weight}
    losses['total'] = torch.stack([weight * losses[name] for name, weight in weights.items()]).sum()
    return losses


WAYS = {
    'ours': Way(lora.losses_of, True, True),
    'obvious': Way(obvious, True, True),
    'flow-alone': Way(lora.losses_of, True, False),
    'masks-alone': Way(lora.losses_of, False, True),
    'masks-alone-obvious': Way(obvious, False, True),
}
COMPARED = {'ours and obvious': ('ours', 'obvious'), 'masks-alone and masks-alone-obvious': ('masks-alone', 'masks-alone-obvious')}


def settings_of(way: Way, setting: TrainSetting) -> LoraSettings:
    weights: dict[str, Any] = {} if way.aligned else {'focal_weight': 0.0, 'dice_weight': 0.0}
    return dataclasses.replace(PRESETS[setting.preset], batch=setting.batch, side=setting.side, **weights)


def backward(way: Way, lessons: list[Lesson], learner: nn.ModuleDict, backbone: Backbone, settings: LoraSettings, accelerator: Any) -> Any:
    """Losses of a batch, whose gradients are in the learner afterwards."""
    pairs = float(sum(len(lesson.masks) for lesson in lessons))
    losses = way.losses(lessons, learner, backbone, backbone.spec.layer, settings, way.with_flow, accelerator, pairs)
    accelerator.backward(losses['total'])
    return losses


def measured_step(name: str, setting: TrainSetting) -> Step:
    """Warm up on small pictures, then measure one step."""
    way = WAYS[name]
    settings = settings_of(way, setting)
    with tempfile.TemporaryDirectory(prefix='padseg-bench-') as folder:
        accelerator = accelerator_of(setting, settings)
        backbone = random_backbone(setting)
        learner = random_learner(backbone, settings)
        prepare(backbone, setting)
        optimiser = lora.make_optimiser(learner, settings)
        small, full = (random_lessons(backbone, setting, side, Path(folder)) for side in (min(WARM_UP, setting.side), setting.side))
        backward(way, small, learner, backbone, settings, accelerator)
        optimiser.zero_grad(set_to_none=True)
        synchronize(setting.device)
        if setting.device.startswith('cuda'):
            torch.cuda.reset_peak_memory_stats(setting.device)
        start = time.perf_counter()
        losses = backward(way, full, learner, backbone, settings, accelerator)
        gradients = [weight.grad.norm().item() if weight.grad is not None else 0.0 for weight in learner.parameters()]
        nn.utils.clip_grad_norm_(learner.parameters(), settings.clip)
        optimiser.step()
        synchronize(setting.device)
        seconds = time.perf_counter() - start
        return Step(seconds, memory(setting.device), {one: float(value.detach()) for one, value in losses.items()}, np.array(gradients))


def accelerator_of(setting: TrainSetting, settings: LoraSettings) -> Any:
    return lora.accelerator_of(lora.LoraRun(Path(), settings, device=setting.device, precision=DTYPES[setting.dtype]))


def prepare(backbone: Backbone, setting: TrainSetting) -> None:
    if setting.checkpointing:
        backbone.transformer.enable_gradient_checkpointing()


# what fits


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that live at one time. most: since the beginning; flops: of all products and convolutions since."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.flops = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def forget(self, size: int) -> None:
        self.now -= size


@contextlib.contextmanager
def shapes_alone() -> Iterator[Held]:
    """Inside, tensors have shapes but no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), Held() as held:
        yield held


def take_shapes(network: nn.Module) -> None:
    """Give a network on the device `meta` new weights, which are on the device that is simulated if there is a simulation."""
    for part in network.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad))
        for name, values in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(values.shape, dtype=values.dtype))


class Need(NamedTuple):
    """What a step needs. bytes: at its peak, with weights, VAE and the optimiser's moments; flops: two per multiply-add."""

    bytes: int
    flops: int


@cache
def reckoned(name: str, setting: TrainSetting) -> Need:
    """What a step needs, from shapes."""
    way = WAYS[name]
    settings = settings_of(way, setting)
    accelerator = accelerator_of(setting, settings)
    schedule()
    backbone = random_backbone(setting._replace(device='meta'), with_vae=True)
    learner = random_learner(backbone, settings)
    with shapes_alone() as held:
        for part in (backbone.transformer, backbone.vae, learner['score']):
            take_shapes(part)
        matrices = [weight for weight in backbone.transformer.parameters() if weight.requires_grad]
        learner = nn.ModuleDict({'lora': nn.ParameterList(matrices), 'score': learner['score']})
        prepare(backbone, setting)
        backward(way, random_lessons(backbone, setting, setting.side, None), learner, backbone, settings, accelerator)
        moments = sum(2 * weight.numel() * weight.element_size() for weight in learner.parameters())
    return Need(held.most + moments, held.flops)


def reckoned_table(setting: TrainSetting) -> list[dict[str, Any]]:
    """For several sides: bytes of a step of FEW and of MANY pictures, how many fit on each card, and operations for one of them."""
    rows = []
    sides = SIDES if setting.size == 'full' else (setting.side,)
    for side in sides:
        for name in ('ours', 'obvious', 'masks-alone'):
            few, many = (reckoned(name, setting._replace(side=side, batch=count, device='cpu')) for count in (FEW, MANY))
            more = (many.bytes - few.bytes) / (MANY - FEW)
            fits, flops = fitting(few.bytes, more), many.flops / MANY
            rows.append({'way': name, 'side': side, 'bytes': few.bytes, 'bytes_more': more, 'fits': fits, 'flops': flops})
    return rows


def fitting(few: float, more: float) -> dict[str, int]:
    """Pictures that fit on each card, by gigabytes: FEW take so many bytes, each further one so many more."""
    return {str(card): max(0, FEW + math.floor((1e9 * card - ASIDE - few) / more)) for card in CARDS}


# what is said


def summary(setting: TrainSetting, turns: list[dict[str, Step]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Collect all figures for the JSON report, with the values of all repeats. Memory is in MiB, what is reckoned in bytes."""
    first = turns[0]
    pairs = {pair: both for pair, both in COMPARED.items() if all(name in first for name in both)}
    return {
        **setting._asdict(),
        **surroundings(setting.device),
        'seconds': {name: [turn[name].seconds for turn in turns] for name in first},
        'peak_mib': {name: [turn[name].peak for turn in turns] for name in first},
        'losses': {name: step.losses for name, step in first.items()},
        'difference': {pair: difference(first[one], first[other]) for pair, (one, other) in pairs.items()},
        'ratio': {
            f'{other} to {one}': spread([turn[other].seconds / turn[one].seconds for turn in turns])
            for one, other in (*pairs.values(), ('masks-alone', 'ours'))
            if one in first and other in first
        },
        'reckoned': rows,
    }


def difference(one: Step, other: Step) -> float:
    """The largest difference of a loss, by its size, or of a gradient's norm, by the largest."""
    losses = [abs(one.losses[name] - other.losses[name]) / max(abs(other.losses[name]), 1e-9) for name in one.losses]
    return float(max(*losses, np.abs(one.gradients - other.gradients).max() / other.gradients.max()))


def in_words(measured: dict[str, Any]) -> str:
    """Format a table with a column for each way, and one of what fits."""
    seconds, peaks = measured['seconds'], measured['peak_mib']
    kept = 'recomputed' if measured['checkpointing'] else 'kept'
    lines = [
        f'{measured["size"]} model, {measured["side"]} x {measured["side"]}, {measured["batch"]} at once with {measured["masks"]} masks, '
        f'{measured["dtype"]}, blocks {kept}; {measured_on(measured)}',
        *([f'{"":22}' + ''.join(f'{name:>28}' for name in seconds)] if seconds else []),
        *([row_of_numbers('step, s', *seconds.values()), row_of_numbers('peak memory, MiB', *peaks.values(), digits=0)] if seconds else []),
        *(f'{pair}: {between(values)} x the time' for pair, values in measured['ratio'].items()),
        *(f'{pair} differ by at most {value:.1e}' for pair, value in measured['difference'].items()),
    ]
    if measured['reckoned']:
        lines.append(
            f'{"from shapes":22}{"side":>6}{"GB for 1":>12}{"GB a picture more":>20}{"TFLOP a picture":>18}'
            + ''.join(f'{f"fit {card} GB":>12}' for card in CARDS)
        )
    for row in measured['reckoned']:
        numbers = f'{row["side"]:6}{row["bytes"] / 1e9:12.2f}{row["bytes_more"] / 1e9:20.2f}{row["flops"] / 1e12:18.2f}'
        lines.append(f'{row["way"]:22}{numbers}' + ''.join(f'{row["fits"][str(card)]:12}' for card in CARDS))
    return '\n'.join(lines)
