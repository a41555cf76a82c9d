"""Validate a model while it is trained: by the code of `padseg eval` on the model in memory, and by its loss on pictures held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from padseg.backbones import Backbone
from padseg.backbones.texts import texts_of
from padseg.datasets import Dataset
from padseg.evaluation.engine import run_evaluation
from padseg.evaluation.evaluate import Task
from padseg.evaluation.job import Asked, Contender, Evaluation, Ground, as_released, check_task, ground_of, predictor_of, source_of
from padseg.methods import DEFAULTS, METHODS
from padseg.methods.seg4diff import UNREFINED
from padseg.train.annotated import Annotated
from padseg.train.lessons import Teacher
from padseg.train.lora import Validate, flow_loss, noised, velocity_of
from padseg.train.lora_settings import LoraSettings


def validation(name: str, root: Path, split: str | None, protocol: str | None, plain: bool, pictures: int | None) -> Validate:
    """What validates a model on a data set of `padseg eval`. plain: leave out all that refines token maps; pictures: use so many at most.

    The measures are covering, PRI and VI of regions without classes, else mIoU and accuracy; the first decides. Raises UsageError or
    NoImages for a data set that cannot be used.
    """
    fields: dict[str, Any] = dict.fromkeys(Asked._fields)
    fields |= dict.fromkeys(('regions', 'raw_ids', 'resize', 'allow_missing', 'tau_sweep'), False)
    asked = Asked(
        **{**fields, 'dataset': name, 'root': root, 'split': split, 'protocol': protocol, 'ignore': 255, 'workers': 1, 'overwrite': True}
    )
    ground = ground_of(asked)
    ground = ground._replace(dataset=fewer(ground.dataset, pictures))
    contender = contender_of(ground, plain)
    check_task(ground, contender, METHODS[contender.method])

    def validate(backbone: Backbone, out: Path, done: int) -> Mapping[str, float]:
        return measures(run_evaluation(evaluation_of(asked._replace(out=out), ground, contender, backbone)).report.scores)

    return validate


def loss_on(data: Annotated, settings: LoraSettings, at_once: int) -> Validate:
    """The mean flow-matching loss of these pictures, with the same views and the same noise every time, whatever the seed of the training.

    Noise levels are spread evenly over the schedule, one for each picture.
    """
    settings = dataclasses.replace(settings, seed=0, flip=False, views=0)

    @torch.no_grad()
    def validate(backbone: Backbone, out: Path, done: int) -> Mapping[str, float]:
        teacher = Teacher(data, backbone, texts_of(backbone, False), settings, out)
        levels = [int((place + 0.5) / len(data) * teacher.levels) for place in range(len(data))]
        losses = []
        for first in range(0, len(data), at_once):
            lessons = [teacher.lesson(number)._replace(level=levels[number]) for number in range(len(data))[first : first + at_once]]
            mixed, timestep, clean, noise = noised(lessons, backbone)
            losses.append(flow_loss(velocity_of(lessons, mixed, timestep, backbone), clean, noise))
        return {'flow': float(torch.cat(losses).mean())}

    return validate


def fewer(dataset: Dataset, pictures: int | None) -> Dataset:
    """At most so many samples, spread evenly."""
    count = len(dataset.samples)
    if pictures is None or pictures >= count:
        return dataset
    return dataset._replace(samples=tuple(dataset.samples[place * count // pictures] for place in range(pictures)))


def contender_of(ground: Ground, plain: bool) -> Contender:
    """The usual method for the ground truth, with its usual options."""
    name = DEFAULTS['classes' if ground.rules.matching == 'none' and ground.dataset.classes else 'regions']
    kind: Any = METHODS[name].Options
    options = kind(geometry=ground.rules.geometry)
    if plain:
        known = {field.name for field in dataclasses.fields(options)}
        options = dataclasses.replace(options, **{field: value for field, value in UNREFINED.items() if field in known})
    values: dict[str, Any] = {**dict.fromkeys(Contender._fields), **Contender._field_defaults}
    return Contender(**{**values, 'method': name, 'options': options, 'model': 'in training', 'compile': False})


def evaluation_of(asked: Asked, ground: Ground, contender: Contender, backbone: Backbone) -> Evaluation:
    """The evaluation of a model in memory."""
    method = METHODS[contender.method]
    contender = contender._replace(options=as_released(contender.options, ground, method))
    return Evaluation(
        Task(ground.dataset, ground.rules),
        ground.protocol,
        source_of(contender, method, backbone),
        predictor_of(asked, ground, contender, method, backbone),
        ground.thresholds,
        ground.dataset.missing,
        asked.out,
        overwrite=True,
    )


def measures(scores: Mapping[str, Any]) -> dict[str, float]:
    """The measures worth a column, the one that decides first."""
    names = ('covering', 'pri', 'vi') if scores.get('covering') is not None else ('miou', 'accuracy')
    return {name: float(scores[name]) for name in names if scores.get(name) is not None}
