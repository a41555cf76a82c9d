"""What an evaluation is asked to do: the ground truth, the rules, and the source of the predictions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from padseg.datasets import FOLDER, Dataset, FolderSettings, Sample, label_folder, open_dataset, open_folder
from padseg.datasets.check import Check, check_dataset
from padseg.errors import UsageError
from padseg.evaluation.evaluate import Task, paired, stored
from padseg.evaluation.protocols import CONTEXT, DEFAULT, WARNINGS, Protocol, protocol, scored_classes
from padseg.methods import DEFAULTS, Method, method_named, open_backbone, swept_method
from padseg.methods.options import filled
from padseg.system.progress import Progress

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.evaluation.predict import Predict
    from padseg.methods.options import MethodOptions


PRESENT = 'present'
TAUS = tuple(tenths / 10 for tenths in range(-4, 5))  # of GoCA's released settings
WITH_WORD = ('voc21', 'voc20', 'ade150', 'coco-object', 'coco-object80')  # data sets for which these add the word background


class Asked(NamedTuple):
    """Options of `padseg eval`.

    dataset, root, split: a data set below a folder; or labels: a folder of label maps. num_classes, ignore, background: for ground truth
    that does not define them itself; regions: it has no classes. pred: label maps to score instead of a model's. sweep: thresholds as text.
    tau_sweep: try TAUS.
    """

    dataset: str | None
    root: Path | None
    split: str | None
    pred: Path | None
    labels: Path | None
    num_classes: int | None
    ignore: int
    background: int | None
    regions: bool
    protocol: str | None
    compare: str | None
    raw_ids: bool
    resize: bool
    allow_missing: bool
    sweep: str | None
    tau_sweep: bool
    workers: int
    out: Path | None
    overwrite: bool


class Contender(NamedTuple):
    """The method that makes the predictions, a key of METHODS, with its options; model … compile, lora, quantize as for `padseg.load`.

    names: which names to give to a method that takes class names, 'present' (the default) or 'all'.
    """

    method: str
    options: MethodOptions
    model: str
    revision: str | None
    device: str | None
    dtype: str | None
    vae: str | None
    compile: bool
    names: str | None
    lora: str | None = None
    lora_scale: float = 1.0
    quantize: str | None = None


class Ground(NamedTuple):
    """Ground truth and rules. protocol: name of the rules, some of which may have been changed; preds: stored label maps by picture name.

    warning: what to tell the user about the rules, if anything.
    """

    dataset: Dataset
    protocol: str
    rules: Protocol
    preds: dict[str, Path]
    thresholds: tuple[float, ...]
    warning: str | None


class Evaluation(NamedTuple):
    """What to evaluate. source: description of where predictions come from; missing: listed pictures that are left out.

    out: folder for records and reports, or None; thresholds: the predictor's, if it has several.
    """

    task: Task
    protocol: str
    source: dict[str, Any]
    predictor: Predict | None = None
    thresholds: tuple[float, ...] = ()
    missing: int = 0
    out: Path | None = None
    workers: int = 1
    overwrite: bool = False


def ground_of(asked: Asked) -> Ground:
    """Return the ground truth and rules. Raises UsageError for values that are not allowed, NoImages if there is nothing."""
    name = asked.protocol or DEFAULT
    whole = asked.pred and not asked.protocol  # there is no telling what part of the picture the label maps were made from
    rules = protocol(name, compare=asked.compare or ('native' if whole else None), ids='as they are' if asked.raw_ids else None)
    preds = stored(asked.pred) if asked.pred else {}
    if asked.labels:
        dataset = label_folder(asked.labels, asked.num_classes, asked.ignore, asked.background, preds)
    else:
        dataset = opened_dataset(asked, rules.raw_labels)
    if not dataset.classes:
        name, rules = 'partitions', protocol(DEFAULT, compare=asked.compare or 'native', geometry='whole')
    thresholds = numbers(asked.sweep)
    if thresholds and (dataset.classes or asked.pred):
        raise UsageError('--sweep is for a model on a data set without classes, such as bsds500')
    if asked.tau_sweep and (asked.pred or not dataset.classes):
        raise UsageError('--tau-sweep is for GoCA on a data set with classes')
    return Ground(dataset, name, rules, preds, TAUS if asked.tau_sweep else thresholds, warning_of(dataset, rules))


def warning_of(dataset: Dataset, rules: Protocol) -> str | None:
    """What to say of figures by these rules, if anything."""
    row = WARNINGS.get(rules.matching)
    return f'{row}; {CONTEXT}' if row and dataset.name == 'context60' else row


def opened_dataset(asked: Asked, raw_labels: bool = False) -> Dataset:
    """Open the data set below root; options can replace a padseg.toml."""
    assert asked.dataset is not None and asked.root is not None
    if asked.dataset == FOLDER and (asked.num_classes or asked.regions):  # instead of padseg.toml
        own = FolderSettings(num_classes=asked.num_classes, ignore_index=asked.ignore, background=asked.background)
        return open_folder(asked.root, asked.split, own, asked.allow_missing)
    return open_dataset(asked.dataset, asked.root, asked.split, raw_labels, asked.allow_missing)


def of_stored(asked: Asked, ground: Ground) -> Evaluation:
    """Set up the evaluation of stored label maps. NoImages for unpaired label maps or ground truths, unless allowed."""
    assert asked.pred is not None
    dataset, preds = paired(ground.dataset, ground.preds, asked.allow_missing)
    return Evaluation(
        Task(dataset, ground.rules, preds, asked.resize, asked.allow_missing),
        ground.protocol,
        {'folder': str(asked.pred.resolve())},
        missing=dataset.missing + len(ground.dataset.samples) - len(dataset.samples),
        out=asked.out,
        workers=asked.workers,
        overwrite=asked.overwrite,
    )


def of_method(asked: Asked, ground: Ground, contender: Contender) -> Evaluation:
    """Set up the evaluation of a method. UsageError if the ground truth or rules do not suit its output."""
    method = method_named(contender.method)
    check_task(ground, contender, method)
    contender = contender._replace(options=as_released(contender.options, ground, method))
    how = {name: getattr(contender, name) for name in ('revision', 'device', 'dtype', 'vae', 'compile', 'lora', 'lora_scale', 'quantize')}
    backbone = open_backbone(method, contender.options, contender.model, **how)
    return Evaluation(
        Task(ground.dataset, ground.rules, lenient=asked.allow_missing, beside=beside(ground, method)),
        ground.protocol,
        {
            **source_of(contender, method, backbone),
            **numbers_of(ground, method),
            **told_by(ground, contender),
            **swept_by(ground, contender, backbone),
        },
        predictor_of(asked, ground, contender, method, backbone),
        ground.thresholds,
        ground.dataset.missing,
        asked.out,
        overwrite=asked.overwrite,
    )


def check_task(ground: Ground, contender: Contender, method: Method) -> None:
    classes = method.TASK == 'classes'
    if classes and not ground.dataset.classes:
        raise UsageError(f'{contender.method} needs ground truth with classes')
    if classes and ground.rules.matching != 'none':
        raise UsageError(f'{ground.protocol} is for regions, but {contender.method} gives classes: score it with --protocol seg4diff-ovss')
    if not classes and ground.dataset.classes and ground.rules.matching == 'none':
        raise UsageError(f'{ground.protocol} scores named regions, but {contender.model} alone gives no names: use --pred')
    if not classes and contender.names:
        raise UsageError(f'--names is for methods that take class names; {contender.method} takes none')
    if ground.thresholds and not (method.BACKGROUND_BY_RULE if ground.dataset.classes else swept_method(method)):
        raise UsageError(f'{contender.method} has no threshold for {"--tau-sweep" if ground.dataset.classes else "--sweep"}')


def as_released(options: Any, ground: Ground, method: Method) -> Any:
    """Options of a method for a data set: those of its paper, where they are open; by GoCA's protocol, with background as a word of the
    prompt where the released code puts it there.
    """
    of_paper = getattr(method, 'DATASETS', {}).get(ground.dataset.name, {})
    options = filled(options, {**of_paper, **getattr(method, 'PROTOCOLS', {}).get(ground.protocol, {})})
    by_rule = method.BACKGROUND_BY_RULE and ground.protocol == 'goca' and ground.dataset.name in WITH_WORD
    if by_rule and not getattr(options, 'background_words', ()):
        return dataclasses.replace(options, background_words=('background',))
    return options


def seen_as(options: Any, rules: Protocol) -> Any:
    """The options with a protocol's geometry, for a method that has one."""
    return dataclasses.replace(options, geometry=rules.geometry) if 'geometry' in options.__dataclass_fields__ else options


def beside(ground: Ground, method: Method) -> tuple[str, ...]:
    """Rules for unlabelled pixels by which a method's predictions are scored, too."""
    return ('class', 'ignored') if method.BACKGROUND_BY_RULE and ground.rules.void == 'class' else ()


def predictor_of(asked: Asked, ground: Ground, contender: Contender, method: Method, backbone: Backbone | None) -> Predict:
    from padseg.evaluation.predict import naming_for, predict_classes, predict_regions

    if method.TASK == 'classes':
        names = contender.names or PRESENT
        classes = ground.dataset.classes
        if not method.BACKGROUND_BY_RULE:
            background = ground.dataset.background
            naming = naming_for(method, contender.options, ground.protocol, background)
            return predict_classes(method, backbone, contender.options, classes, background, names, asked.out, (), ground.rules, naming)
        background = scored_classes(classes, ground.dataset.background, ground.rules).background
        return predict_classes(method, backbone, contender.options, classes, background, names, asked.out, ground.thresholds)
    prepared = method.prepare(backbone, contender.options)
    return predict_regions(method, prepared, ground.thresholds, asked.out, bool(ground.thresholds), ground.rules)


def source_of(contender: Contender, method: Method, backbone: Backbone | None) -> dict[str, Any]:
    """Describe the method, its model and its settings for scores.json."""
    source: dict[str, Any] = {} if contender.method in DEFAULTS.values() else {'method': contender.method}
    if backbone:
        dtype = str(backbone.dtype).removeprefix('torch.')
        source |= {**backbone.identity.recorded(), 'device': str(backbone.device), 'dtype': dtype, 'compiled': backbone.compiled}
        source |= {'quantize': backbone.quantize} if backbone.quantize else {}
    if method.TASK == 'classes':
        source['names'] = contender.names or PRESENT
    return source | method.recorded(contender.options, backbone.spec if backbone else None)


def numbers_of(ground: Ground, method: Method) -> dict[str, str]:
    """How regions are numbered where that decides figures."""
    return {'numbers': 'of proposals, from 0'} if hasattr(method, 'proposals') and ground.rules.ids == 'as they are' else {}


def told_by(ground: Ground, contender: Contender) -> dict[str, Any]:
    """What the protocol tells the method beside its options."""
    from padseg.evaluation.predict import naming_for

    told = naming_for(method_named(contender.method), contender.options, ground.protocol, ground.dataset.background)
    return {'told': {**told._asdict(), 'background': list(told.background)}} if told else {}


def swept_by(ground: Ground, contender: Contender, backbone: Backbone | None) -> dict[str, str]:
    """Which option the thresholds are tried for."""
    sweeping = swept_method(method_named(contender.method))
    options: Any = contender.options
    if not ground.thresholds or ground.dataset.classes or sweeping is None or backbone is None:
        return {}
    return {'swept': sweeping.swept(options.resolve(backbone.spec))}


def numbers(text: str | None) -> tuple[float, ...]:
    """Parse thresholds from a text such as 0.01,0.02. UsageError for anything else."""
    try:
        values = tuple(float(part) for part in (text or '').split(',') if part)
    except ValueError as error:
        raise UsageError(f'--sweep is a list of thresholds such as 0.01,0.02; got {text}') from error
    if not all(0 <= value < math.inf for value in values):
        raise UsageError(f'thresholds are finite numbers >= 0; got {text}')
    return values


def check_of(asked: Asked, progress: Progress) -> Check:
    """Check what the data set below root holds, without a model."""
    dataset = opened_dataset(asked)
    with contextlib.closing(progress):
        return check_dataset(dataset, watched(dataset.samples, progress))


def watched(samples: Sequence[Sample], progress: Progress) -> Iterator[Sample]:
    """Yield the samples, counting each as done when the next one is requested."""
    progress.start(len(samples))
    for sample in samples:
        yield sample
        progress.step()
