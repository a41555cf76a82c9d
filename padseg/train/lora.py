"""Fine-tune a model by LoRA so that its token maps align with masks: L = L_FM + focal + Dice (MAGNET; Seg4Diff, Sec. 5).

Read it top to bottom: what is asked for, the loop, a step's losses, what is trained, and output. `padseg train` runs it; lora_settings.py
has the hyperparameters, lessons.py makes what a step learns from, alignment.py has the mask losses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from padseg.backbones import Backbone, load
from padseg.backbones.lora import save_lora
from padseg.backbones.parts import choose_device
from padseg.backbones.recorder import Request, watch
from padseg.backbones.texts import texts_of
from padseg.errors import UsageError
from padseg.methods.options import require_family
from padseg.train.alignment import Pairs, ScoreLayer, mask_losses, matched_pairs, named_pairs, scores, share_logits
from padseg.train.annotated import Annotated, summary
from padseg.train.lessons import Lesson, Teacher, ahead, latents_of
from padseg.train.loop import Stage, finish_step, resume
from padseg.train.lora_output import Learned, best_step, draw_sheet, record_scores, write_learned
from padseg.train.lora_settings import LoraSettings, rate_factor
from padseg.types import Attention

FAMILIES = frozenset({'sd3'})
PRECISIONS = ('no', 'bf16', 'fp16')
COLUMNS = ('total', 'flow', 'focal', 'dice')
PATIENCE = 6  # hours that other processes wait for the one that validates
Validate = Callable[[Backbone, Path, int], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class LoraRun:
    """A fine-tuning: what is asked for besides the settings, which alone decide the result, up to rounding.

    model, revision, dtype: as for `padseg.load`; precision: of computing, one of PRECISIONS; both by default bfloat16 on a GPU and float32
    elsewhere. at_once: pictures per forward pass; checkpointing: recompute blocks instead of keeping what they computed; keep_texts: keep
    embeddings of texts in padseg's cache. max_steps: stop after so many steps in all; time_limit: stop after so many minutes; either can be
    continued. save_every: steps between checkpoints; check_every: between validations; shown: pictures on the sheet.
    """

    out: Path
    settings: LoraSettings
    model: str = 'tiny'
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    precision: str | None = None
    at_once: int = 1
    checkpointing: bool = False
    keep_texts: bool = False
    max_steps: int | None = None
    time_limit: float | None = None
    save_every: int = 250
    check_every: int = 250
    shown: int = 4
    quiet: bool = False


def train_lora(run: LoraRun, data: Annotated, validate: Sequence[Validate] = ()) -> Path:
    """Fine-tune a model on annotated pictures and return the folder of the LoRA, OUT/lora. An interrupted training resumes.

    validate: each gets the model as it is, a folder to write to and the number of steps done, and returns measures, of which the first
    decides what is best. In several processes, started by `accelerate launch` or torchrun, each takes its share of every batch. Raises
    UsageError if OUT has a checkpoint made with other settings, model or data.
    """
    began, settings, out = time.monotonic(), run.settings, run.out
    accelerator = accelerator_of(run)
    device = accelerator.device if accelerator.num_processes > 1 else choose_device(run.device)
    on_gpu = device.type != 'cpu'
    backbone = load(
        run.model, revision=run.revision, device=str(device), dtype=run.dtype or ('bfloat16' if on_gpu else 'float32'), whole=True
    )
    require_family('train', FAMILIES, backbone)
    layer = layer_of(settings, backbone)
    learner = make_learner(backbone.transformer, settings)
    if run.checkpointing:
        backbone.transformer.enable_gradient_checkpointing()
    teacher = Teacher(data, backbone, texts_of(backbone, run.keep_texts), settings, out / 'latents')
    share, rest = divmod(settings.batch, accelerator.num_processes)
    if rest or share % run.at_once:
        raise UsageError(
            f'{accelerator.num_processes} processes of {run.at_once} pictures at once cannot share a batch of {settings.batch}'
        )

    optimiser = make_optimiser(learner, settings)
    kept = [optimiser, accelerator.scaler] if accelerator.scaler else [optimiser]
    known = backbone.identity
    facts = {
        'dtype': backbone.dtype,
        'precision': accelerator.mixed_precision,
        'weights': known.weights[:12],
        'texts': known.text_encoders[:12],
    }
    made_with = words_of({**dataclasses.asdict(settings), **facts, 'data': data.digest[:12]})
    stage = Stage(out, 'train', settings.steps, settings.batch, COLUMNS, made_with, run.save_every, device)
    out.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        start = resume(stage, learner, kept)
    main, stop = accelerator.is_main_process, min(settings.steps, run.max_steps or settings.steps)
    output = Output(run, data, backbone, learner, teacher, validate)
    if main and not start:
        output.write(0, {})

    first = accelerator.process_index * share
    numbers = [[step * settings.batch + first + place for place in range(share)] for step in range(start, stop)]
    bar = tqdm(total=settings.steps, initial=start, unit=' steps', dynamic_ncols=True, disable=None if main and not run.quiet else True)
    looped = time.monotonic()
    with bar, contextlib.closing(ahead(teacher, numbers)) as batches:
        for step, lessons in enumerate(batches, start):
            with_flow = settings.flow_every > 0 and step % settings.flow_every == 0
            rate(optimiser, step, settings)
            optimiser.zero_grad(set_to_none=True)
            pairs = summed(accelerator, torch.tensor(float(sum(map(count_pairs, lessons)))))

            # forward and backward in parts, whose gradients add up to those of the whole batch
            losses = dict.fromkeys(COLUMNS, torch.zeros((), device=device))
            for part in range(0, share, run.at_once):
                some = lessons[part : part + run.at_once]
                found = losses_of(some, learner, backbone, layer, settings, with_flow, accelerator, float(pairs))
                if found['total'].requires_grad:
                    accelerator.backward(found['total'])
                losses = {name: value + found[name].detach() for name, value in losses.items()}

            # one step with the sum over all processes
            add_gradients(accelerator, learner)
            if accelerator.scaler:
                accelerator.scaler.unscale_(optimiser)
            if settings.clip:
                nn.utils.clip_grad_norm_(learner.parameters(), settings.clip)
            if accelerator.scaler:
                accelerator.scaler.step(optimiser)
                accelerator.scaler.update()
            else:
                optimiser.step()

            # what is written; the main process decides when time is up
            late = run.time_limit is not None and time.monotonic() - began > 60 * run.time_limit
            *values, ended = summed(accelerator, torch.stack([*losses.values(), torch.tensor(float(main and late), device=device)]))
            losses, last = dict(zip(COLUMNS, values, strict=True)), bool(ended) or step + 1 == stop
            bar.update()
            speed = (step + 1 - start) * settings.batch / (time.monotonic() - looped)
            bar.set_postfix(
                {name: f'{value:.4f}' for name, value in losses.items() if value} | {'pictures/s': f'{speed:.2f}'}, refresh=False
            )
            if main:
                if last or stage.saves_after(step) or (validate and (step + 1) % run.check_every == 0):
                    output.write(step + 1, losses)
                shown = losses if with_flow else {name: value for name, value in losses.items() if name != 'flow'}
                finish_step(stage, step, shown, learner, kept, last=last, said=bool(bar.disable) and not run.quiet)
            accelerator.wait_for_everyone()
            if last:
                break
    return out / 'lora'


def accelerator_of(run: LoraRun) -> Any:
    """Processes, mixed precision and the scaling of gradients. Raises UsageError if accelerate or peft is missing."""
    try:
        import peft  # noqa: F401
        from accelerate import Accelerator, InitProcessGroupKwargs
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise UsageError(f"training needs {error.name}: pip install 'padseg[train]'") from error
    from datetime import timedelta

    device = choose_device(run.device)
    precision = run.precision or ('bf16' if device.type == 'cuda' else 'no')
    if precision not in PRECISIONS or (precision == 'fp16' and device.type != 'cuda'):
        raise UsageError(f'precision is one of {", ".join(PRECISIONS)}, fp16 on a GPU only; got {precision} on {device.type}')
    AcceleratorState._reset_state()  # of an earlier training in this process
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=PATIENCE))
    return Accelerator(cpu=device.type == 'cpu', mixed_precision=precision, kwargs_handlers=[patience])


def layer_of(settings: LoraSettings, backbone: Backbone) -> int:
    """The expert block. UsageError if the model has no such block."""
    layer = backbone.spec.layer if settings.layer is None else settings.layer
    backbone.check_layer(layer)
    return layer


def words_of(facts: Mapping[str, Any]) -> str:
    """`name=value` for each fact, without spaces in between."""
    return ' '.join(f'{name}={value}'.replace(' ', '') for name, value in facts.items())


# a step


def count_pairs(lesson: Lesson) -> int:
    """Pairs of candidate and mask that a lesson gives; there are always more candidates of all heads than masks."""
    return len(lesson.masks)


def losses_of(
    lessons: Sequence[Lesson],
    learner: nn.ModuleDict,
    backbone: Backbone,
    layer: int,
    settings: LoraSettings,
    with_flow: bool,
    accelerator: Any,
    pairs: float,
) -> dict[str, Tensor]:
    """The losses of a part of a batch, so weighted that those of all parts and processes add up to the batch's; `total` has the graph.

    pairs: of the whole batch. Without flow matching, the forward pass ends in the expert block; without masks either, there is none.
    """
    shown = [place for place, lesson in enumerate(lessons) if settings.aligned and len(lesson.masks)]
    losses = dict.fromkeys(COLUMNS, torch.zeros((), device=backbone.device))
    if not with_flow and not shown:
        return losses
    mixed, timestep, clean, noise = noised(lessons, backbone)
    grid = backbone.grid(layer, mixed.shape)
    requests = {layer: Request(backbone.attention_module(layer), image_to_text)} if shown else {}

    # queries and keys alone are taken out of a block that may be computed a second time; what follows is computed once
    with accelerator.autocast(), watch(requests, stop=not with_flow) as seen:
        velocity = velocity_of(lessons, mixed, timestep, backbone)
        losses['flow'] = flow_loss(velocity, clean, noise).sum() / settings.batch
    if shown:
        maps = candidates(seen[layer], grid, backbone, settings)  # (B, T or heads x T, h, w)
        found = [pairs_of(maps[place], lessons[place], learner, settings) for place in shown]
        parts = [mask_losses(pair, settings.focal) for pair in found]
        own = max(1, sum(map(count_pairs, lessons))) * settings.batch / len(lessons)  # of this part, of which the batch is the mean
        count = max(1.0, pairs) if settings.count == 'batch' else own
        losses['focal'] = torch.stack([focal for focal, _ in parts]).sum() / count
        losses['dice'] = torch.stack([dice for _, dice in parts]).sum() / count
    weights = {'flow': settings.flow_weight, 'focal': settings.focal_weight, 'dice': settings.dice_weight}
    losses['total'] = torch.stack([weight * losses[name] for name, weight in weights.items()]).sum()
    return losses


def noised(lessons: Sequence[Lesson], backbone: Backbone) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised latents (B, C, h, w), their timesteps (B,), and the clean latents and the noise that they are made of."""
    clean = latents_of(lessons, backbone)
    noise = torch.stack([lesson.noise for lesson in lessons]).to(backbone.device)
    levels = [lesson.level for lesson in lessons]
    sigma, timestep = (values[levels].to(backbone.device) for values in (backbone.scheduler.sigmas, backbone.scheduler.timesteps))
    return clean + sigma[:, None, None, None] * (noise - clean), timestep, clean, noise


def velocity_of(lessons: Sequence[Lesson], mixed: Tensor, timestep: Tensor, backbone: Backbone) -> Tensor:
    """What the model predicts from noised latents and the lessons' prompts: (B, C, h, w)."""
    velocity: Tensor = backbone.transformer(
        hidden_states=mixed.to(backbone.dtype),
        encoder_hidden_states=torch.cat([lesson.embeds for lesson in lessons]),
        pooled_projections=torch.cat([lesson.pooled for lesson in lessons]),
        timestep=timestep,
        return_dict=False,
    )[0]
    return velocity


def image_to_text(seen: Attention) -> Attention:
    """Queries and keys of a call, as they are: nothing is computed that a recomputed block would have to compute again."""
    return seen


def candidates(seen: Attention, grid: tuple[int, int], backbone: Backbone, settings: LoraSettings) -> Tensor:
    """Maps that may become a mask: (B, T, h, w) float32 of the mean over heads, or (B, heads T, h, w) of all heads."""
    tokens, heads = grid[0] * grid[1], settings.candidates == 'heads'
    columns = backbone.family.text_columns(range(backbone.spec.sequence), tokens)
    if settings.maps == 'shares':
        maps = share_logits(seen, tokens, columns, heads)
    else:
        maps = scores(seen.query[:, :, :tokens], seen.key[:, :, columns[0] : columns[-1] + 1], heads)
    return maps.unflatten(2, grid)


def pairs_of(maps: Tensor, lesson: Lesson, learner: nn.ModuleDict, settings: LoraSettings) -> Pairs:
    """The pairs of a picture from its candidates (C, h, w)."""
    layer: Any = learner['score']
    masks = lesson.masks.to(maps.device)
    if settings.matching == 'names':
        return named_pairs(maps, lesson.columns, masks, layer)
    return matched_pairs(maps, masks, layer, settings.focal)


def flow_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Flow-matching loss (Lipman et al. 2023) of each picture, (B, C, h, w) each -> (B,)."""
    return (velocity.float() - (noise - clean)).square().flatten(1).mean(1)


# what is trained


def make_learner(transformer: Any, settings: LoraSettings) -> nn.ModuleDict:
    """Add a LoRA to a frozen transformer, and make the score layer, if any: one module with all that is trained, in float32, by the seed.

    Raises UsageError for targets that the model does not have.
    """
    import peft

    place = transformer.device
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets), init_lora_weights='gaussian'
    )
    with torch.random.fork_rng(devices=[place] if place.type == 'cuda' else []):
        torch.manual_seed(settings.seed)
        try:
            transformer.add_adapter(config)
        except ValueError as error:
            raise UsageError(f'targets {", ".join(settings.targets)}: {str(error).splitlines()[0][:200]}') from error
        score = (ScoreLayer() if settings.score_layer else nn.Identity()).to(place)
    matrices = [weight for weight in transformer.parameters() if weight.requires_grad]
    for weight in matrices:
        weight.data = weight.data.float()  # peft makes them in the type of the base, in which small steps would be lost
    return nn.ModuleDict({'lora': nn.ParameterList(matrices), 'score': score})


def make_optimiser(learner: nn.ModuleDict, settings: LoraSettings) -> torch.optim.Optimizer:
    """AdamW with its usual betas. The `initial_lr` of a group is its peak learning rate."""
    rates = {'lora': settings.rate, 'score': settings.score_rate}
    trained = {name: list(learner[name].parameters()) for name in rates}
    groups = [{'params': trained[name], 'lr': rate, 'initial_lr': rate} for name, rate in rates.items() if trained[name]]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


def rate(optimiser: torch.optim.Optimizer, step: int, settings: LoraSettings) -> None:
    for group in optimiser.param_groups:
        group['lr'] = group['initial_lr'] * rate_factor(step, settings)


def add_gradients(accelerator: Any, learner: nn.Module) -> None:
    """Replace all gradients by their sums over processes, in one message. What no process has a gradient for stays without."""
    if accelerator.num_processes == 1:
        return
    weights = list(learner.parameters())
    flat = [torch.zeros_like(weight).flatten() if weight.grad is None else weight.grad.flatten() for weight in weights]
    reached = torch.tensor([float(weight.grad is not None) for weight in weights], device=flat[0].device)
    *flat, reached = summed(accelerator, torch.cat([*flat, reached])).split([*map(len, flat), len(reached)])
    for weight, gradient, is_reached in zip(weights, flat, reached.tolist(), strict=True):
        weight.grad = gradient.view_as(weight).clone() if is_reached else None


def summed(accelerator: Any, values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on the device."""
    return accelerator.reduce(values.to(accelerator.device), 'sum') if accelerator.num_processes > 1 else values


# output


class Output(NamedTuple):
    """What is written besides checkpoint and losses, by the main process."""

    run: LoraRun
    data: Annotated
    backbone: Backbone
    learner: nn.ModuleDict
    teacher: Teacher
    validate: Sequence[Validate]

    @torch.no_grad()
    def write(self, done: int, losses: Mapping[str, Tensor]) -> None:
        """Write the LoRA after so many steps with its card and a sheet of token maps, validate it, and keep it if it is the best so far."""
        run, out = self.run, self.run.out
        draw_sheet(out / 'sheets' / f'{done:06}.png', self.teacher, layer_of(run.settings, self.backbone), run.shown)
        if self.validate and (done % run.check_every == 0 or done == run.settings.steps):
            measures = [part(self.backbone, out / 'validation', done) for part in self.validate]
            record_scores(out, done, {name: value for some in measures for name, value in some.items()})
        if done:
            learned = Learned(
                run.model, self.backbone.identity, run.settings, summary(self.data), done, {n: float(v) for n, v in losses.items()}
            )
            write = functools.partial(write_learned, save=save_lora, matrices=matrices_of(self.backbone), learned=learned, out=out)
            write(out / 'lora')
            if best_step(out) == done:
                write(out / 'best')


def matrices_of(backbone: Backbone) -> dict[str, Tensor]:
    """The LoRA's matrices by name, as `transformer_blocks.0.attn.to_q.lora_A.weight`."""
    from peft import get_peft_model_state_dict

    matrices: dict[str, Tensor] = get_peft_model_state_dict(backbone.transformer)
    return matrices
