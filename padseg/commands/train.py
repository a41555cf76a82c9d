"""`padseg train`: fine-tune a model by LoRA, so that its token maps align with masks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from padseg.commands.flags import Several, hide_bars
from padseg.methods.options import kind_of
from padseg.system.files import full_disk
from padseg.system.ledger import check_output
from padseg.system.text import say, warn
from padseg.train.lora_settings import PRESETS, LoraSettings, preset

if TYPE_CHECKING:
    from padseg.train.lora import Validate

POSITIVE = click.IntRange(min=1)
FOLDER = click.Path(path_type=Path)


def setting_flags() -> list[click.Option]:
    """A flag for each setting; without it, the setting is the preset's."""
    return [setting_flag(field) for field in dataclasses.fields(LoraSettings)]


def setting_flag(field: dataclasses.Field[Any]) -> click.Option:
    kind, several = kind_of(LoraSettings, field.name)
    name, choices = field.name.replace('_', '-'), field.metadata.get('choices')
    accepted = Several(kind) if several else click.Choice(choices) if choices else kind
    flag = f'--{name}/--no-{name}' if kind is bool else f'--{name}'
    return click.Option([flag], type=accepted, default=None, help=f'{field.metadata["help"]} ({defaults(field)})')


def defaults(field: dataclasses.Field[Any]) -> str:
    """The presets' values in words: one if they agree."""
    if 'default' in field.metadata:
        return f'default: {field.metadata["default"]}'
    values = {name: in_words(getattr(settings, field.name)) for name, settings in PRESETS.items()}
    if len(set(values.values())) == 1:
        return f'default: {values["paper"]}'
    return 'presets: ' + ', '.join(f'{name} {value}' for name, value in values.items())


def in_words(value: Any) -> str:
    return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)


@click.command('train')
@click.option(
    '--model', default='tiny', show_default=True, help='a model of the family of SD3: a name of `padseg models`, a hub id, or a folder'
)
@click.option('--data', multiple=True, metavar='SOURCE', required=True, help='annotated pictures, see docs/train-lora.md; may be repeated')
@click.option('--captions', type=FOLDER, help='a JSON file of captions for the pictures of all sources')
@click.option('--leave-out', is_flag=True, help='go on without pictures that cannot be read')
@click.option('--out', type=FOLDER, default='runs/lora', show_default=True, help='folder for the LoRA, checkpoint, curves and sheets')
@click.option(
    '--preset',
    'name',
    type=click.Choice(tuple(PRESETS)),
    default='paper',
    show_default=True,
    help='settings that are not given, as in the paper or the released code',
)
@click.option('--check', is_flag=True, help='only look at the data: numbers, sizes, void, classes')
@click.option('--max-steps', type=POSITIVE, help='stop after so many steps in all; the same command without it continues')
@click.option('--time-limit', type=click.FloatRange(min=0), metavar='MINUTES', help='stop after the first step that ends later than this')
@click.option(
    '--at-once',
    type=POSITIVE,
    default=1,
    show_default=True,
    help='pictures per forward pass; a batch is made of as many passes as it takes',
)
@click.option('--checkpointing', is_flag=True, help='recompute blocks in the backward pass: less memory, more time, the same result')
@click.option('--precision', type=click.Choice(('no', 'bf16', 'fp16')), help='mixed precision (default: bf16 on CUDA, else no)')
@click.option('--revision', help='branch, tag or commit on the hub')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best available)')
@click.option('--dtype', help='of the frozen model: float32, bfloat16 or float16 (default: bfloat16 on a GPU, else float32)')
@click.option('--keep-texts', is_flag=True, help="keep embeddings of prompts in padseg's cache, 2.5 MB each for SD3")
@click.option('--save-every', type=POSITIVE, default=250, show_default=True, help='steps between checkpoints and sheets of token maps')
@click.option('--shown', type=click.IntRange(min=0), default=4, show_default=True, help='pictures on a sheet')
@click.option('--eval', 'dataset', metavar='DATASET', help='validate on a data set of `padseg eval`; the best LoRA is kept in OUT/best')
@click.option('--eval-root', type=FOLDER, help='folder with it')
@click.option('--eval-split', help='part of it (default: the one usually reported)')
@click.option('--eval-protocol', help='as --protocol of `padseg eval`')
@click.option('--eval-every', type=POSITIVE, default=250, show_default=True, help='steps between validations')
@click.option('--eval-limit', type=POSITIVE, help='pictures to validate on, spread evenly')
@click.option('--eval-plain', is_flag=True, help='of plain token maps, without superpixels and whatever else refines them')
@click.option(
    '--held', multiple=True, metavar='SOURCE', help='pictures held out, whose flow-matching loss is validated too; may be repeated'
)
@click.option('--quiet', '-q', is_flag=True, callback=hide_bars, help='no progress on stderr')
def command(
    name: str,
    data: tuple[str, ...],
    captions: Path | None,
    leave_out: bool,
    check: bool,
    dataset: str | None,
    eval_root: Path | None,
    eval_split: str | None,
    eval_protocol: str | None,
    eval_every: int,
    eval_limit: int | None,
    eval_plain: bool,
    held: tuple[str, ...],
    **given: Any,
) -> int:
    """Fine-tune a model by LoRA on annotated pictures, so that its token maps align with masks (MAGNET).

    Running the same command again resumes a stopped training exactly. For several GPUs, start it by `accelerate launch -m padseg train …`
    or `torchrun -m padseg train …`. Results: OUT/lora, a folder for --lora and for diffusers, with a model card; OUT/best, the same of the
    best validation; train.csv and train.png, losses; validation.csv and validation.png, scores; sheets/, token maps before and during
    training; train.pt, the checkpoint.
    """
    if bool(dataset) != bool(eval_root):
        raise click.UsageError('--eval needs --eval-root, the folder with the data set, and the other way round.')
    fields = {field.name for field in dataclasses.fields(LoraSettings)}
    changed = {field: given.pop(field) for field in fields}
    settings = preset(name, **{field: value for field, value in changed.items() if value is not None})
    from padseg.train.annotated import open_annotated, summary

    annotated = open_annotated(data, captions, leave_out=leave_out)
    if check:
        say(*summary(annotated))
        return 0
    from padseg.train.lora import LoraRun, train_lora

    if not given['quiet']:
        warn(*summary(annotated))
    parts: list[Validate] = []
    if dataset and eval_root:
        from padseg.train.lora_validation import validation

        parts.append(validation(dataset, eval_root, eval_split, eval_protocol, eval_plain, eval_limit))
    if held:
        from padseg.train.lora_validation import loss_on

        parts.append(loss_on(open_annotated(held, captions, leave_out=leave_out), settings, given['at_once']))
    check_output(given['out'], ('train.pt', 'train.csv', 'train.png', 'validation.csv', 'validation.png'))
    with full_disk(given['out']):
        folder = train_lora(LoraRun(settings=settings, check_every=eval_every, **given), annotated, parts)
    if not given['quiet']:
        warn(f'LoRA in {folder}')
    return 0


command.params += setting_flags()
