"""What an analysis is asked for: a model, and pictures to read it on, real ones or some that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from padseg.analysis import expert, grid, perturb
from padseg.analysis.expert import Expert
from padseg.analysis.grid import Grid
from padseg.analysis.measure import STEPS
from padseg.analysis.recording import Made, Pictures, Source, Subject, subjects
from padseg.backbones import Backbone, load
from padseg.backbones.blur import Blur
from padseg.backbones.source import family_named
from padseg.backbones.texts import kept_texts
from padseg.errors import UsageError
from padseg.evaluation.similarity import PictureModel, load_clip, load_dino
from padseg.generation.pictures import GenerationJob
from padseg.generation.prompts import Item, items, parse_seeds, read_prompts
from padseg.generation.sample import Sampler
from padseg.generation.settings import SamplingSettings
from padseg.methods.open_vocabulary import LabelOptions
from padseg.methods.options import in_list, plain_settings, refuse_family, require
from padseg.methods.seg4diff import FAMILIES, Options
from padseg.run.selection import Selection
from padseg.system.progress import Progress

REAL = ('labels', 'classes', 'text')  # that only real pictures have
MADE = ('seeds', 'scale', 'denoising_steps', 'size')  # that only pictures in the making have
Ready = Callable[[], None]
ARMS = {'sd3': ('l', 'g', 'l+g')}  # text encoders that are compared, without T5, which models may lack


@dataclass(frozen=True)
class Wanted:
    """The pictures to read. images: a folder of real ones; or prompts: a file of texts to make them from. The rest is None if not given.

    labels: a folder of label maps; classes: names of their values; text: for all pictures; seeds: as in `parse_seeds`; scale: of
    classifier-free guidance; denoising_steps, size: of pictures in the making; steps: noise levels to read, counted from the end of the
    schedule, from 1; count: the most pictures.
    """

    images: Path | None
    prompts: Path | None
    labels: Path | None = None
    classes: Sequence[str] = ()
    text: str | None = None
    seeds: str | None = None
    scale: float | None = None
    denoising_steps: int | None = None
    size: int | None = None
    steps: Sequence[int] = ()
    count: int = 50


def nothing() -> None:
    """The usual `ready`."""


class Asked(NamedTuple):
    """A loaded model and where to read it. settings: all that decides the results, for a record."""

    backbone: Backbone
    source: Source
    settings: dict[str, Any]


def opened(wanted: Wanted, how: Mapping[str, Any], progress: Progress, last_too: bool = True, ready: Ready = nothing) -> Asked:
    """Find the pictures, then load the model. how: arguments of `load`; last_too: read the noisiest step too, if no steps are given.

    ready: called before the model is loaded.

    Raises UsageError for what does not fit together, NoImages without pictures, ModelUnavailable.
    """
    require(
        (wanted.images is None) != (wanted.prompts is None), 'give either --dir, for real pictures, or --prompts, for pictures to be made'
    )
    if wanted.prompts is not None:
        refuse_others(wanted, REAL, '--prompts')
        made, settings = to_be_made(wanted)
        refuse_unsupported(how)
        ready()
        backbone = loaded(how)
        return in_the_making(made, wanted, settings.resolve(backbone.spec), backbone, progress, last_too)
    assert wanted.images is not None
    refuse_others(wanted, MADE, '--dir')
    found = subjects(wanted.images, wanted.labels, wanted.classes, wanted.text, wanted.count)
    refuse_unsupported(how)
    ready()
    return of_pictures(found, wanted, loaded(how), progress, last_too)


def refuse_others(wanted: Wanted, names: Sequence[str], flag: str) -> None:
    """Raise UsageError for what only the other kind of picture has."""
    given = [f'--{name.replace("_", "-")}' for name in names if getattr(wanted, name) not in (None, ())]
    require(not given, f'{in_list(given).replace("--classes", "--classes-file")} cannot be used with {flag}')


def refuse_unsupported(how: Mapping[str, Any]) -> None:
    """Raise UsageError for a model of a family without joint attention. how: arguments of `load`."""
    refuse_family('analyze', FAMILIES, how['model'], family_named(how['model'], how.get('revision')))


def loaded(how: Mapping[str, Any]) -> Backbone:
    """The whole model."""
    return load(**how, whole=True)


def of_pictures(found: Sequence[Subject], wanted: Wanted, backbone: Backbone, progress: Progress, last_too: bool) -> Asked:
    options = Options().resolve(backbone.spec)
    steps = wanted_steps(wanted, options.step, backbone.spec.steps, last_too)
    settings = {'steps': list(steps), 'geometry': options.geometry, 'side': options.side, 'seed': options.seed}
    texts = {'pictures': [{'name': subject.name, 'text': subject.text} for subject in found]}
    return Asked(backbone, Pictures(found, backbone, options, steps, progress), settings | texts)


def in_the_making(
    made: Sequence[Item], wanted: Wanted, settings: SamplingSettings, backbone: Backbone, progress: Progress, last_too: bool
) -> Asked:
    steps = wanted_steps(wanted, Options().resolve(backbone.spec).step, settings.steps, last_too)
    recorded = {'steps': list(steps), 'sampling': sampling_record(settings), 'pictures': [item._asdict() for item in made]}
    return Asked(backbone, Made(made, sampler_of(backbone), settings, steps, progress), recorded)


def wanted_steps(wanted: Wanted, own: int, length: int, last_too: bool) -> tuple[int, ...]:
    """The noise levels to read: those given, or the model's own and the noisiest. UsageError for one that the schedule does not have."""
    steps = tuple(dict.fromkeys(wanted.steps or ((min(own, length), length) if last_too else (min(own, length),))))
    if not all(1 <= step <= length for step in steps):
        raise UsageError(f'steps are in 1..{length}, counted from the end of the schedule; got {in_list(steps)}')
    return steps


def to_be_made(wanted: Wanted, **perturbed: Any) -> tuple[list[Item], SamplingSettings]:
    """The pictures to make, and how: with classifier-free guidance; what is not given is left open. UsageError for what is out of range."""
    assert wanted.prompts is not None
    given: dict[str, Any] = {'scale': wanted.scale, 'steps': wanted.denoising_steps, 'size': wanted.size, **perturbed}
    settings = SamplingSettings(guidance='cfg', **given)
    return items(read_prompts(wanted.prompts), parse_seeds(wanted.seeds or '0'))[: wanted.count], settings


def sampling_record(settings: SamplingSettings) -> dict[str, Any]:
    return {name: value for name, value in plain_settings(settings).items() if not name.startswith('perturb')}


def sampler_of(backbone: Backbone) -> Sampler:
    """Make pictures with the text encoders that real pictures are read with too."""
    return Sampler(backbone, kept_texts(backbone, True))


def layer_of(backbone: Backbone, layer: int | None) -> int:
    """The block to read, by default the expert block. UsageError for one that the model does not have."""
    chosen = backbone.spec.layer if layer is None else layer
    require(chosen < backbone.layers, f'layer is in 0..{backbone.layers - 1} for {backbone.identity.model}; got {chosen}')
    return chosen


class Blurred(NamedTuple):
    """What compares pictures with blurred blocks. items: the pictures; jobs: see `perturb.arms`; settings: for a record."""

    sampler: Sampler
    items: list[Item]
    jobs: dict[int | None, GenerationJob]
    clip: PictureModel
    dino: PictureModel
    settings: dict[str, Any]


def blurred_pictures(
    prompts: Path,
    layers: Sequence[int],
    blur_size: int,
    blur_sigma: float,
    pad: str,
    renorm: bool,
    slots: int | None,
    prompt_branch_only: bool,
    clip: str,
    dino: str,
    overwrite: bool,
    how: Mapping[str, Any],
    out: Path,
    ready: Ready = nothing,
    **wanted: Any,
) -> Blurred:
    """Load what `padseg analyze perturb` needs; arguments are its, but for `out`, the folder for the pictures. ready: as for `opened`."""
    asked_blur = {'perturb_size': blur_size, 'perturb_sigma': blur_sigma, 'perturb_pad': pad, 'perturb_renorm': renorm}
    asked = Wanted(images=None, prompts=prompts, **wanted)
    made, asked_settings = to_be_made(asked, **asked_blur)
    blur = Blur((), blur_size, blur_sigma, pad, renorm, slots)
    ready()
    device = how['device']
    clip_model = load_clip(clip, device, remedy='name a folder with --clip PATH')
    dino_model = load_dino(dino, device, remedy='name a folder with --dino PATH')
    backbone = loaded(how)
    settings = asked_settings.resolve(backbone.spec)
    chosen = list(dict.fromkeys(layer_of(backbone, layer) for layer in layers)) or list(range(backbone.layers))
    texts, seeds = tuple(dict.fromkeys(item.prompt for item in made)), parse_seeds(asked.seeds or '0')
    job = GenerationJob(texts, seeds, out, asked_settings, overwrite=overwrite, selection=Selection(limit=asked.count), **how)
    recorded = {
        'sampling': sampling_record(settings),
        'pictures': [item._asdict() for item in made],
        'layers': chosen,
        'blur': {**blur._asdict(), 'layers': None, 'both_branches': not prompt_branch_only},
        'clip': {'name': clip, 'weights': clip_model.weights},
        'dino': {'name': dino, 'weights': dino_model.weights},
    }
    jobs = perturb.arms(job, chosen, blur, not prompt_branch_only)
    return Blurred(sampler_of(backbone), made, jobs, clip_model, dino_model, recorded)


def best_of_grid(
    images: Path,
    labels: Path,
    classes: Sequence[str],
    val_dir: Path | None,
    val_labels: Path | None,
    train_share: float,
    encoders: Sequence[str],
    steps: Sequence[int],
    names: str,
    prompt: str,
    scores: str | None,
    unused: str,
    count: int,
    how: Mapping[str, Any],
    progress: Progress,
    ready: Ready = nothing,
) -> tuple[Backbone, dict[str, Any], Grid]:
    """Measure a grid; arguments as of `padseg analyze grid`; ready: as for `opened`. Also model, and settings."""
    require((val_dir is None) == (val_labels is None), 'give --val-dir and --val-labels together')
    train = subjects(images, labels, classes, '', count)
    val = subjects(val_dir, val_labels, classes, '', count) if val_dir else []
    if not val:
        train, val = grid.halves(train, train_share)
        require(bool(train and val), 'there are too few pictures to choose by some and to report on others')
    given: dict[str, Any] = {'prompt': prompt, 'scores': scores, 'unused': unused}
    options = LabelOptions(**given)
    ready()
    backbone = loaded(how)
    arms = tuple(encoders) or ARMS.get(backbone.spec.family, (backbone.spec.encoders,))
    levels = tuple(steps) or tuple(step for step in STEPS if step <= backbone.spec.steps)
    for arm in arms:
        replace(options, encoders=arm, steps=levels).resolve(backbone.spec)  # refuses what the model does not have
    found = grid.measure(train, val, backbone, classes, options, arms, levels, names, progress)
    recorded = {
        'encoders': list(arms),
        'steps': list(levels),
        'names': names,
        'prompt': prompt,
        'scores': scores,
        'unused': unused,
        'train': [subject.name for subject in train],
        'val': [subject.name for subject in val],
        'best': found.best._asdict(),
        'own': found.own._asdict(),
    }
    return backbone, recorded, found


def found_expert(
    images: Path,
    labels: Path | None,
    steps: Sequence[int],
    normalisations: Sequence[str],
    tokens: str | None,
    count: int,
    how: Mapping[str, Any],
    progress: Progress,
    ready: Ready = nothing,
) -> tuple[Backbone, dict[str, Any], Expert]:
    """Look for the expert block; arguments as of `padseg analyze expert`; ready: as for `opened`. Also model, and settings."""
    found = subjects(images, labels, (), '', count)
    for normalisation in normalisations:
        Options(normalisation=normalisation)  # refuses unknown names
    refuse_unsupported(how)
    ready()
    backbone = loaded(how)
    levels = wanted_levels(steps, backbone)
    given: dict[str, Any] = {'tokens': tokens}
    options = Options(**given).resolve(backbone.spec)
    measured = expert.measure(found, backbone, levels, normalisations, progress, options)
    recorded = {
        'steps': sorted({cell.step for cell in measured.figures}),
        'normalisations': list(dict.fromkeys(cell.normalisation for cell in measured.figures)),
        'thresholds': list(measured.thresholds),
        'labelled': measured.labelled,
        'tokens': options.tokens,
        'geometry': options.geometry,
        'side': options.side,
        'seed': options.seed,
        'pictures': [subject.name for subject in found],
        'best': {**measured.best._asdict(), 'threshold': measured.threshold},
        'own': {**measured.own[0]._asdict(), 'threshold': measured.own[1]},
    }
    return backbone, recorded, measured


def wanted_levels(steps: Sequence[int], backbone: Backbone) -> tuple[int, ...]:
    """Noise levels to look at: those given, or every other one of STEPS. UsageError for one that the schedule does not have."""
    levels = tuple(dict.fromkeys(steps)) or tuple(step for step in STEPS[::2] if step <= backbone.spec.steps)
    Options(step=max(levels)).resolve(backbone.spec)
    Options(step=min(levels))
    return levels
