"""`padseg train-tiny`: train the embedded model, from scratch or further."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from padseg.system.files import full_disk
from padseg.system.ledger import check_output
from padseg.system.text import warn
from padseg.train.settings import TrainingSettings, without_masks

POSITIVE = click.IntRange(min=1)
DEFAULTS = TrainingSettings()


@click.command('train-tiny', context_settings={'show_default': True})
@click.option('--out', type=click.Path(path_type=Path), default='runs/tiny', help='folder for checkpoints, curves and the model')
@click.option('--data', multiple=True, metavar='FOLDER[=WEIGHT[=VOID]]', help='annotated photographs; may be repeated')
@click.option('--vae-steps', type=POSITIVE, default=DEFAULTS.vae_steps, help='steps with the autoencoder alone')
@click.option('--steps', type=POSITIVE, default=DEFAULTS.together.steps, help='then steps with all parts together')
@click.option(
    '--transformer-steps', type=click.IntRange(min=0), default=DEFAULTS.transformer.steps, help='then steps without the autoencoder'
)
@click.option(
    '--further-steps', type=click.IntRange(min=0), default=DEFAULTS.further.steps, help='then steps with large batches, for a GPU'
)
@click.option(
    '--painting-steps',
    type=click.IntRange(min=0),
    default=DEFAULTS.painting.steps,
    help='then steps for a copy that learns to paint captions, and as many to learn from it',
)
@click.option(
    '--start', type=click.Path(exists=True, path_type=Path), help='a model made by this command, to train further in the last stages only'
)
@click.option('--batch', type=POSITIVE, default=DEFAULTS.size, help='new images per step, after the stage of the autoencoder alone')
@click.option('--seed', type=int, default=DEFAULTS.seed, help='seed of all random numbers')
@click.option('--masks/--no-masks', default=True, help='--no-masks trains a baseline with flow matching alone, at every step')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best available)')
@click.option('--workers', type=click.IntRange(min=0), default=1, help='processes that prepare examples')
@click.option('--save-every', type=POSITIVE, default=250, help='steps between checkpoints')
@click.option('--report', is_flag=True, help='measure the model of --start, or else OUT/model, instead of training; writes OUT/report')
@click.option(
    '--measure', multiple=True, metavar='NAME=ROOT', help='with --report: a data set, bsds500, camvid or regions; may be repeated'
)
@click.option(
    '--renew',
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='with --report: a Markdown file whose marked tables become those of the report; may be repeated',
)
def command(
    out: Path,
    data: tuple[str, ...],
    vae_steps: int,
    steps: int,
    transformer_steps: int,
    further_steps: int,
    painting_steps: int,
    start: Path | None,
    batch: int,
    seed: int,
    masks: bool,
    device: str | None,
    workers: int,
    save_every: int,
    report: bool,
    measure: tuple[str, ...],
    renew: tuple[Path, ...],
) -> int:
    """Train the embedded model, from scratch or further.

    The training data are synthetic scenes and, with --data, annotated photographs:
    FOLDER has images/x.jpg with labels/x.png, or x_0.png, x_1.png, … from several annotators; with splits, images/train and labels/train.
    WEIGHT is the relative sampling frequency, VOID the label to ignore. Running the same command again resumes a stopped training.
    Results: OUT/model, a folder for --model; for each stage, a checkpoint, loss curves and, but for painting, a sheet of predictions.

    With --report nothing is trained: OUT/report gets the figures of a model, each printed by a command of padseg, and a sheet of samples.
    """
    if not report and (measure or renew):
        raise click.UsageError('--measure and --renew are for --report')
    if report:
        from padseg.train.report import make_report

        check_output(out)
        with full_disk(out):
            written = make_report(start or out / 'model', out / 'report', roots(measure), renew)
        warn(f'report in {written}')
        return 0
    from padseg.train.tiny import train_tiny

    settings = dataclasses.replace(
        DEFAULTS,
        seed=seed,
        size=batch,
        vae_steps=vae_steps,
        together=dataclasses.replace(DEFAULTS.together, steps=steps),
        transformer=dataclasses.replace(DEFAULTS.transformer, steps=transformer_steps),
        further=dataclasses.replace(DEFAULTS.further, steps=further_steps),
        painter=dataclasses.replace(DEFAULTS.painter, steps=painting_steps),
        painting=dataclasses.replace(DEFAULTS.painting, steps=painting_steps),
    )
    check_output(out)
    with full_disk(out):
        model = train_tiny(out, settings if masks else without_masks(settings), data, start, device, workers, save_every)
    warn(f'model in {model}')
    return 0


def roots(measure: tuple[str, ...]) -> dict[str, Path]:
    """Roots of data sets by name, from NAME=ROOT."""
    pairs = [each.partition('=') for each in measure]
    for each, (_, _, root) in zip(measure, pairs, strict=True):
        if not root or not Path(root).is_dir():
            raise click.UsageError(f'--measure is NAME=ROOT, with an existing folder; got {each}')
    return {name: Path(root) for name, _, root in pairs}
