"""A training run of an embedded model: its folder, its batches, its optimisers and the model that it writes."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import cv2
import torch
from torch import Tensor, nn

from padseg.train import tiny_model as tiny
from padseg.train.data import Batch, batch, photographs
from padseg.train.denoiser import tokens_of
from padseg.train.loop import Stage
from padseg.train.muon import Muon
from padseg.train.scenes import CLASSES
from padseg.train.settings import Course, Mixture, TrainingSettings
from padseg.train.vocabulary import WORDS

STAGES = ('autoencoder', 'together', 'transformer', 'further', 'painter', 'painting')

# Settings in the `padseg.json` of a trained model. The model card says what they were chosen on.
SETTINGS: dict[str, dict[str, Any]] = {
    'seg4diff': {
        'step': 1,
        'normalisation': 'share',
        'threshold': 0.05,
        'superpixels': 50.0,
        'join': 0.75,
        'components': True,
        'min_area': 0.003,
        'regroup': 0.7,
    },
    'generate': {'scale': 4.0},
}


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


def write_model(learner: nn.Module, run: Training) -> None:
    """Write the model and its default settings to OUT/model, a folder that padseg can load."""
    kept: Any = copy.deepcopy(learner).cpu()
    parts: Any = tiny.Parts(**{name: kept[name] for name in tiny.Parts._fields})
    mean, deviation = kept.get_buffer('statistics').tolist()
    parts.vae.register_to_config(shift_factor=mean, scaling_factor=1 / deviation)
    words = sorted({word for name in CLASSES for word in name.split()})
    facts = {'layers': parts.transformer.config.num_layers, 'layer': run.settings.layer, 'side': 256, 'words': words}
    tiny.save_tiny(parts, WORDS, run.model, {**facts, **SETTINGS})


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
