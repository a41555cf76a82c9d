"""`padseg doctor`: check that a run would find everything it needs, and say what to do if not."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from padseg.backbones import DTYPES
from padseg.errors import ModelUnavailable, UsageError
from padseg.methods import check_settings
from padseg.system.disk import free_space, human
from padseg.system.machine import memory_available, memory_in_all, usable_cpus
from padseg.system.text import say
from padseg.system.versions import versions

if TYPE_CHECKING:
    from padseg.backbones.availability import Memory, State
    from padseg.backbones.fits import Need
    from padseg.backbones.source import Source


@click.command('doctor')
@click.option('--model', default='tiny', show_default=True, help='a model of `padseg models`, a hub id, or a folder')
@click.option('--revision', help='branch, tag or commit on the hub')
@click.option('--device', help='cpu, cuda, cuda:1, mps, … (default: the best available)')
@click.option('--dtype', help='float32, bfloat16 or float16 (default: depends on the device)')
@click.option('--out', type=click.Path(path_type=Path), default='.', show_default=True, help='where results would be written')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object')
def command(model: str, revision: str | None, device: str | None, dtype: str | None, out: Path, as_json: bool) -> int:
    """Check that a run would find everything it needs.

    Checks versions, processors, disk, memory, and whether the model can be loaded. Downloads nothing.

    Exit code 0: a run can load the model, from disk or from the hub. 4: it cannot; the last lines say what to do.
    """
    report = examine(model, revision, device, dtype, out)
    say(*[json.dumps(as_object(report))] if as_json else as_lines(report))
    return 0 if report.state.usable else ModelUnavailable.exit_code


class Diagnosis(NamedTuple):
    """The resources that a run would have. Sizes are in bytes; None means unknown."""

    versions: dict[str, str]
    platform: str
    cpus: int
    threads: int
    gpus: list[str]
    mps: bool
    device: str
    dtype: str | None
    device_memory: int | None  # free on the device, unless that is the CPU
    memory: int | None
    memory_free: int | None
    needed: Memory | None
    cards: dict[str, Need] | None
    out: str
    disk_free: int
    cache: str
    cache_free: int
    offline: bool
    token: bool
    model: str
    state: State
    warnings: list[str]


def examine(model: str, revision: str | None, device: str | None, dtype: str | None, out: Path) -> Diagnosis:
    """Query the machine and the hub, without downloading or reading weights. Raises UsageError for an unknown model, device or dtype."""
    import torch
    from huggingface_hub import constants, get_token, is_offline_mode

    from padseg.backbones.availability import chosen_dtype, model_state, reckon_cards, reckon_memory
    from padseg.backbones.parts import choose_device

    if dtype not in (None, *DTYPES):
        raise UsageError(f'dtype is one of {", ".join(DTYPES)}; got {dtype}')
    place = choose_device(device)
    state, source = model_state(model, revision)
    state = with_settings(state, source)
    kind = dtype or (chosen_dtype(place, source) if source or place.type == 'cpu' else None)
    report = Diagnosis(
        versions=versions(),
        platform=platform.platform(),
        cpus=usable_cpus(),
        threads=torch.get_num_threads(),
        gpus=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        mps=torch.backends.mps.is_available(),
        device=str(place),
        dtype=kind,
        device_memory=torch.cuda.mem_get_info(place)[0] if place.type == 'cuda' else None,
        memory=memory_in_all(),
        memory_free=memory_available(),
        needed=reckon_memory(source, place, kind) if source and kind else None,
        cards=reckon_cards(source) if source else None,
        out=str(out),
        disk_free=free_space(out),
        cache=constants.HF_HUB_CACHE,
        cache_free=free_space(Path(constants.HF_HUB_CACHE)),
        offline=is_offline_mode(),
        token=get_token() is not None,
        model=model,
        state=state,
        warnings=[],
    )
    return report._replace(warnings=shortages(report))


def with_settings(state: State, source: Source | None) -> State:
    """Return the state, or a failed one if the method settings in the model's folder are invalid."""
    try:
        if source:
            check_settings(source.spec)
    except ModelUnavailable as error:
        return state._replace(state=error.state, message=str(error))
    return state


def shortages(report: Diagnosis) -> list[str]:
    """Return a line with a remedy for each shortage of disk, memory or device memory."""
    lines = []
    if report.needed and report.device_memory is not None and report.device_memory < report.needed.device:
        lines.append(
            f'{report.device} has {human(report.device_memory)} free, but the weights alone take {human(report.needed.device)}: '
            'free some, or use `--dtype float16` or `--device cpu`'
        )
    memory = min((size for size in (report.memory, report.memory_free) if size is not None), default=None)
    if report.needed and memory is not None and memory < report.needed.host:
        lines.append(
            f'{human(memory)} of memory is free, but the weights alone take {human(report.needed.host)}: `--dtype bfloat16` halves them'
        )
    if report.state.download and report.cache_free < report.state.download:
        lines.append(
            f'{report.cache} has {human(report.cache_free)} free, but the download takes {human(report.state.download)}: '
            'set HF_HOME to another disk'
        )
    return lines


def as_object(report: Diagnosis) -> dict[str, Any]:
    """Return the report as one JSON object."""
    values = report._asdict()
    values['state'] = report.state._asdict()
    values['cards'] = {form: {**need._asdict(), 'card': need.card} for form, need in report.cards.items()} if report.cards else None
    values['needed'] = report.needed._asdict() if report.needed else None
    return values


def as_lines(report: Diagnosis) -> list[str]:
    """Format the report as text, one line per item."""
    sizes = {
        'memory': f'{known(report.memory)} in total, {known(report.memory_free)} free',
        'weights': 'unknown until the model is on this machine'
        if report.needed is None
        else f'{human(report.needed.device)} on {report.device}, up to {human(report.needed.host)} of memory while loading'
        ' (estimated from their shapes; pictures need more)',
    }
    if report.cards:
        sizes['a picture'] = '; '.join(on_card(form, need) for form, need in report.cards.items())
    token = 'a token' if report.token else 'no token'
    rows = {
        'versions': ', '.join(f'{name} {number}' for name, number in report.versions.items()),
        'platform': report.platform,
        'CPUs': f'{report.cpus}, {report.threads} threads',
        'GPUs': ', '.join([*report.gpus, *(['MPS'] if report.mps else [])]) or 'none usable by torch',
        'device': f'{report.device} ({report.dtype or "float16 for large models, else float32"})',
        **sizes,
        'disk': f'{human(report.disk_free)} free at {report.out}',
        'hub': f'{token}, {"offline" if report.offline else "online"}, cache {report.cache} ({human(report.cache_free)} free)',
        'model': f'{report.model}: {report.state.state}',
        '': report.state.message,
    }
    width = max(map(len, rows))
    return [f'{name:{width}}  {value}' for name, value in rows.items()] + [f'{"warning":{width}}  {line}' for line in report.warnings]


def on_card(form: str, need: Need) -> str:
    """What a picture of the model's own size needs with one form of weights, and the smallest card for it."""
    card = f'fits a GPU with {need.card} GiB' if need.card else 'more than 24 GiB'
    return f'{form} {human(need.total)}, {card}'


def known(size: int | None) -> str:
    return 'unknown' if size is None else human(size)
