"""What a fine-tuning leaves besides checkpoint and losses: the LoRA with its card, measures of validation, sheets of token maps."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from padseg.backbones import Identity
from padseg.backbones.recorder import Request, watch
from padseg.backbones.spec import BACKBONES, CARDS
from padseg.exports.overlay import overlay
from padseg.methods.stages.attention import token_attention
from padseg.methods.stages.latents import encode_pixels
from padseg.system.files import atomic
from padseg.system.text import printable
from padseg.system.versions import versions
from padseg.train.lessons import Lesson, Teacher
from padseg.train.lora_settings import PRESETS, LoraSettings
from padseg.types import Array

WEIGHTS = 'pytorch_lora_weights.safetensors'  # the name that diffusers looks for
SCORES, CURVES = 'validation.csv', 'validation.png'
MAPS, WIDTH = 7, 128  # maps of a picture on a sheet, and pixels of their side
QUIET = 0.1  # noise level at which maps are shown


class Learned(NamedTuple):
    """What a card tells of a LoRA. data: lines that describe the pictures; done: steps; losses: of the last one."""

    model: str
    identity: Identity
    settings: LoraSettings
    data: Sequence[str]
    done: int
    losses: Mapping[str, float]


def write_learned(folder: Path, save: Callable[..., None], matrices: Mapping[str, Tensor], learned: Learned, out: Path) -> None:
    """Write a LoRA and its card to a folder that diffusers and padseg load."""
    settings = learned.settings
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / WEIGHTS, matrices, settings.rank, settings.alpha, settings.targets)
    with atomic(folder / 'README.md') as temporary:
        temporary.write_text('\n'.join(card(learned, out)) + '\n', encoding='utf-8')


def card(learned: Learned, out: Path) -> list[str]:
    """The lines of a model card, all from the run itself."""
    settings, known = learned.settings, CARDS.get(learned.model)
    base = BACKBONES[learned.model].repo if learned.model in BACKBONES and learned.model != 'tiny' else learned.model
    changed = {
        name: [field.name for field in dataclasses.fields(settings) if getattr(settings, field.name) != getattr(known, field.name)]
        for name, known in PRESETS.items()
    }
    nearest = min(changed, key=lambda name: len(changed[name]))
    lines = ['---', f'base_model: {printable(base)}', 'library_name: diffusers', 'tags: [lora, padseg, segmentation]', '---', '']
    lines += [f'# A LoRA for {printable(learned.model)} that aligns its token maps with masks', '']
    terms = f' ({known.licence})' if known else ''
    lines += [
        f'Made by `padseg train`: mask-alignment fine-tuning (MAGNET; Seg4Diff, Kim et al. 2025), {learned.done} of {settings.steps} steps '
        f'of {settings.batch} pictures, the preset `{nearest}`' + (f' but for {", ".join(changed[nearest])}.' if changed[nearest] else '.'),
        f'The terms of the base model{terms} hold for what is made with it. The score layer of the training is not needed and not here.',
        '',
        '## Use',
        '',
        '```text',
        f'padseg run --model {printable(learned.model)} --lora {WEIGHTS} --dir pictures --out out',
        '```',
        '',
        'With diffusers: `pipeline.load_lora_weights(FOLDER)`.',
        '',
        '## Data',
        '',
        *(f'- {printable(line)}' for line in learned.data),
        '',
        '## Losses of the last step',
        '',
        *(f'- {name}: {value:.5f}' for name, value in learned.losses.items()),
        '',
    ]
    rows = read_scores(out)
    if rows:
        names = list(rows[0])
        lines += ['## Validation', '', f'| {" | ".join(names)} |', '|' + ' --- |' * len(names)]
        lines += [f'| {" | ".join(printable(row[name]) for name in names)} |' for row in rows]
        lines += ['']
    lines += ['## Settings', '', *(f'- {name}: {shown(value)}' for name, value in dataclasses.asdict(settings).items()), '']
    lines += ['## Made with', '', f'- weights of the base model: SHA-256 {learned.identity.weights}']
    return [*lines, *(f'- {name} {number}' for name, number in versions().items())]


def shown(value: Any) -> str:
    return ', '.join(map(str, value)) if isinstance(value, tuple) else str(value)


# validation


def read_scores(out: Path) -> list[dict[str, str]]:
    path = out / SCORES
    if not path.is_file():
        return []
    with path.open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def record_scores(out: Path, done: int, measures: Mapping[str, float]) -> None:
    """Add the measures after so many steps to OUT/validation.csv, and plot them.

    They replace those of this and later steps from before a restart.
    """
    rows = [row for row in read_scores(out) if int(row['step']) < done and row.keys() == {'step', *measures}]
    rows.append({'step': str(done), **{name: f'{value:.6f}' for name, value in measures.items()}})
    with atomic(out / SCORES) as temporary, temporary.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, ('step', *measures))
        writer.writeheader()
        writer.writerows(rows)
    draw_scores(out, rows)


def draw_scores(out: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Plot each measure over the steps to OUT/validation.png."""
    from matplotlib.figure import Figure

    names = [name for name in rows[0] if name != 'step']
    figure = Figure((7, 2 * len(names)), layout='constrained')
    steps = [int(row['step']) for row in rows]
    for axes, name in zip(figure.subplots(len(names), sharex=True, squeeze=False)[:, 0], names, strict=True):
        axes.plot(steps, [float(row[name]) for row in rows], marker='.')
        axes.set_ylabel(name)
    axes.set_xlabel('step')
    with atomic(out / CURVES) as temporary:
        figure.savefig(temporary, format='png', dpi=120)


def best_step(out: Path) -> int | None:
    """The steps after which the first measure was best, the first time; None without validation. What was not trained is not best.

    Scores are best where they are highest, a loss where it is lowest.
    """
    rows = [row for row in read_scores(out) if int(row['step'])]
    if not rows:
        return None
    name = list(rows[0])[1]
    pick = min if name == 'flow' else max
    return int(pick(rows, key=lambda row: float(row[name]))['step'])


# sheets


@torch.no_grad()
def draw_sheet(path: Path, teacher: Teacher, layer: int, count: int) -> None:
    """Draw the first lessons of the training, the same every time: the picture, its masks, and maps of text tokens after the softmax.

    Shown are the maps of the classes' words, or the token map that fits each mask best, for the largest masks.
    """
    rows = []
    for number in range(count):
        lesson = teacher.lesson(number)
        image = (lesson.image * 255).round().byte().permute(1, 2, 0).numpy()
        masks = lesson.masks.numpy()
        labels: Array = np.zeros(lesson.masks.shape[1:], np.int32)
        for place in range(len(masks))[::-1]:
            labels[masks[place]] = place + 1
        labels = cv2.resize(labels, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        tiles = [image, overlay(image, labels), *maps_of(lesson, teacher, layer)]
        tiles = [cv2.resize(tile, (WIDTH, WIDTH), interpolation=cv2.INTER_AREA) for tile in tiles]
        tiles = [cv2.copyMakeBorder(tile, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for tile in tiles]
        rows.append(np.concatenate([*tiles, *[np.full_like(tiles[0], 255)] * (MAPS + 2 - len(tiles))], axis=1))
    if not rows:
        return
    with atomic(path) as temporary:
        temporary.write_bytes(cv2.imencode('.png', np.concatenate(rows)[..., ::-1])[1].tobytes())


def maps_of(lesson: Lesson, teacher: Teacher, layer: int) -> list[Array]:
    """Token maps in colour, (h, w, 3) uint8 each: of the words of each mask, or those that fit a mask best; without masks the first."""
    backbone = teacher.backbone
    clean = encode_pixels(lesson.image[None] * 2 - 1, backbone).float()
    level = int((backbone.scheduler.sigmas - QUIET).abs().argmin())
    sigma, timestep = backbone.scheduler.sigmas[level].item(), backbone.scheduler.timesteps[level].item()
    mixed = clean + sigma * (lesson.noise[None].to(clean) - clean)
    height, width = backbone.grid(layer, mixed.shape)
    columns = backbone.family.text_columns(range(backbone.spec.sequence), height * width)
    reduce = partial(token_attention, queries=height * width, picked=columns)
    prompt = backbone.null_prompt._replace(embeds=lesson.embeds, pooled=lesson.pooled)
    with watch({layer: Request(backbone.attention_module(layer), reduce)}) as seen:
        backbone.denoise(mixed, timestep, prompt)
    maps = seen[layer][0].T.unflatten(1, (height, width)).cpu()  # (T, h, w)
    masks = (
        torch.nn.functional.interpolate(lesson.masks[None, :MAPS].float(), (height, width), mode='area')[0] if len(lesson.masks) else None
    )
    if masks is None:
        chosen = list(maps[:MAPS])
    elif lesson.columns:
        chosen = [maps[list(columns)].mean(0) for columns in lesson.columns[:MAPS]]
    else:
        near = torch.nn.functional.normalize(maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True), dim=1)
        chosen = [maps[place] for place in (masks.flatten(1) @ near.T).argmax(1)]
    return [coloured(values.numpy()) for values in chosen]


def coloured(values: Array) -> Array:
    """A map from its minimum to its maximum in colour, (h, w) -> (h, w, 3) uint8 RGB."""
    grey = (255 * (values - values.min()) / max(float(np.ptp(values)), 1e-12)).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(grey, cv2.COLORMAP_MAGMA)[..., ::-1])
