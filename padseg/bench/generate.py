"""A step of sampling with every guidance, compared with plain classifier-free guidance, on random weights: bin/bench generate."""

from __future__ import annotations

import copy
import os
import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import click
import torch

from padseg.backbones import DTYPES, Backbone
from padseg.bench.goca import NETWORKS, SMALL, random_network
from padseg.bench.measure import between, finish_bench, fresh, measured_on, output_flags, row_of_numbers, spread, surroundings
from padseg.bench.model import SIZES
from padseg.bench.setting import QUIET, memory, synchronize
from padseg.generation.guidance import guide_of
from padseg.generation.sample import Call, Texts, nothing, predict
from padseg.generation.settings import SamplingSettings
from padseg.types import Prompt, Tokens

PLAIN = 'cfg'
BOUNDS = {'perturbed': 1.55, 's-cfg': 1.05, 'goca-s-cfg': 1.3}  # times the time of plain guidance
MOST = 512.0  # MiB beyond plain guidance
WORDS = 12  # tokens of the random prompt that are of words
STEPS, WARM_UP = 28, 64
SCALE = 7.5


class GenerateSetting(NamedTuple):
    """Settings of one process. steps: of plain guidance and of another one in turn."""

    model: str
    small: bool
    side: int
    batch: int
    device: str
    dtype: str
    steps: int
    shared: bool = False


class Taken(NamedTuple):
    """seconds: of the fastest step; own: of them, processor time, which other programs change less; to_plain: by plain steps between its
    own; peak: memory in MiB, of the GPU on one."""

    seconds: float
    own: float
    to_plain: float
    peak: float


@click.command('generate')
@click.option('--model', type=click.Choice(('sd1.5', 'sd3')), default='sd1.5', show_default=True, help='whose shapes to measure')
@click.option('--scale-down', is_flag=True, help='a small model instead, for tests')
@click.option('--side', type=click.IntRange(WARM_UP), help="side of the picture in pixels (default: the model's own)")
@click.option('--batch', type=click.IntRange(1), default=1, show_default=True, help='pictures at once')
@click.option('--device', default='cpu', show_default=True, help='cpu or cuda')
@click.option('--dtype', type=click.Choice(DTYPES), default='float32', show_default=True, help='of weights and activations')
@click.option('--steps', type=click.IntRange(1), default=2, show_default=True, help='steps in each process, in turn with plain ones')
@click.option('--only', type=click.Choice(tuple(BOUNDS)), multiple=True, help='these guidances beside the plain one (default: all)')
@click.option('--share-blocks', is_flag=True, help="let all blocks of SD3 but the last have one block's weights: 1.5 GB instead of 8 GB")
@click.option('--repeats', type=click.IntRange(1), default=3, show_default=True, help='repetitions, each in fresh processes')
@output_flags
def command(
    model: str,
    scale_down: bool,
    side: int | None,
    batch: int,
    device: str,
    dtype: str,
    steps: int,
    only: tuple[str, ...],
    share_blocks: bool,
    repeats: int,
    record: bool,
    as_json: bool,
) -> None:
    """Measure a step of sampling with every guidance: time, and memory beyond that of plain classifier-free guidance.

    The bounds are for models of full size: time at most 1.55 x for perturbed guidance (a batch of three, not two), 1.05 x for S-CFG, 1.3 x
    for GoCA with S-CFG, and at most 512 MiB more.
    """
    os.environ |= QUIET  # inherited by the processes
    own = WARM_UP if scale_down else {'sd1.5': 512, 'sd3': 1024}[model]
    if share_blocks and model != 'sd3':
        raise click.UsageError('--share-blocks is for --model sd3')
    setting = GenerateSetting(model, scale_down, side or own, batch, device, dtype, steps, share_blocks)
    turns = [{name: fresh(taken, name, setting) for name in (PLAIN, *(only or BOUNDS))} for _ in range(repeats)]
    case = f'{"small" if scale_down else "full"}-{model}-{setting.side}-{dtype}'
    finish_bench('generate', case, summary(setting, turns), record, as_json, in_words)


def backbone_of(setting: GenerateSetting) -> Backbone:
    """A network alone with random weights."""
    if setting.model == 'sd3':
        kind, configuration = 'SD3Transformer2DModel', SIZES['small' if setting.small else 'full'].transformer
        heads = configuration['num_attention_heads'] * configuration['attention_head_dim']
        configuration = {**configuration, 'caption_projection_dim': heads}
        if setting.shared:
            count = configuration['num_layers']
            backbone = random_network('sd3', kind, {**configuration, 'num_layers': 2}, setting.device, partial(repeat_block, count=count))
            backbone.transformer.to(getattr(torch, setting.dtype))
            return backbone
    else:
        kind, configuration = NETWORKS[setting.model]
        configuration = {**configuration, **SMALL[setting.model]} if setting.small else configuration
    backbone = random_network(setting.model, kind, configuration, setting.device)
    if setting.dtype != 'float32':
        backbone.transformer.to(getattr(torch, setting.dtype))
    return backbone


def repeat_block(network: Any, count: int) -> None:
    """Give a network of two blocks `count` of them: the first ones share its weights, which takes as long as if each had its own."""
    first, last = network.transformer_blocks
    others = [copy.deepcopy(first, {id(weight): weight for weight in first.parameters()}) for _ in range(count - 2)]
    network.transformer_blocks = torch.nn.ModuleList([first, *others, last])


def random_texts(backbone: Backbone, batch: int) -> Texts:
    """Random embeddings of a prompt of WORDS tokens, and of the empty prompt."""
    slots, generator = backbone.spec.sequence, torch.Generator().manual_seed(1)
    shapes = backbone.family.prompt_shapes(slots, backbone.transformer.config)

    def prompt(rows: int) -> Prompt:
        parts = (torch.randn((rows, *shapes[name][1:]), generator=generator) for name in ('embeds', 'pooled'))
        embeds, pooled = (part.to(backbone.device, backbone.dtype) for part in parts)
        return Prompt(embeds, pooled, (), ())

    spans = ((0, 0), *((2 * number, 2 * number + 1) for number in range(WORDS)), (0, 0))
    tokens = Tokens(0, slots, spans, (True, *(False,) * WORDS, True))
    return Texts(prompt(1), prompt(batch), ({'clip': tokens},) * batch)


@torch.no_grad()
def taken(guidance: str, setting: GenerateSetting) -> Taken:
    """Warm up on a small picture, then measure steps with one guidance, and plain ones between them.

    What else the machine does changes both of a pair alike.
    """
    backbone = backbone_of(setting)
    texts = random_texts(backbone, setting.batch)
    names = dict.fromkeys((PLAIN, guidance))
    guides = {name: guide_of(backbone, SamplingSettings(guidance=name, scale=SCALE).resolve(backbone.spec)) for name in names}
    found: list[dict[str, tuple[float, float]]] = []
    for side in (min(WARM_UP, setting.side), *[setting.side] * setting.steps):
        cells = side * backbone.patch // backbone.multiple
        z = torch.randn(setting.batch, backbone.family.size(backbone.transformer.config).channels, cells, cells).to(backbone.device)
        found.append({})
        for name, guide in guides.items():
            synchronize(setting.device)
            start, before = time.perf_counter(), time.process_time()
            guide(lambda prompts, call: predict(backbone, nothing, prompts, call), Call(14, STEPS, 500.0, z), texts)
            synchronize(setting.device)
            found[-1][name] = time.perf_counter() - start, time.process_time() - before
    by = 1 if setting.device == 'cpu' else 0
    ratio = statistics.median(turn[guidance][by] / turn[PLAIN][by] for turn in found[1:])
    seconds, own = (min(turn[guidance][kind] for turn in found[1:]) for kind in range(2))
    return Taken(seconds, own, ratio, memory(setting.device))


def summary(setting: GenerateSetting, turns: list[dict[str, Taken]]) -> dict[str, Any]:
    """All figures, with the values of all repeats. Time is compared by the processor's on a CPU, by the clock on a GPU."""
    names = [name for name in BOUNDS if name in turns[0]]
    ratios = {name: spread([turn[name].to_plain for turn in turns]) for name in names}
    beyond = {name: [turn[name].peak - turn[PLAIN].peak for turn in turns] for name in names}
    middle = {name: spread(values)['median'] for name, values in beyond.items()}
    return {
        **surroundings(setting.device),
        **setting._asdict(),
        'device': surroundings(setting.device)['device'],
        'seconds': {name: [turn[name].seconds for turn in turns] for name in turns[0]},
        'processor_seconds': {name: [turn[name].own for turn in turns] for name in turns[0]},
        'peak_mib': {name: [turn[name].peak for turn in turns] for name in turns[0]},
        'beyond_plain_mib': beyond,
        'to_plain': ratios,
        'held': {name: ratios[name]['median'] <= bound and middle[name] <= MOST for name, bound in BOUNDS.items() if name in names},
    }


def in_words(measured: dict[str, Any]) -> str:
    """A table: medians with minimum and maximum, and which bounds hold."""
    kind = ('small model' if measured['small'] else 'full size') + (', blocks share weights' if measured['shared'] else '')
    side = measured['side']
    lines = [
        f'{measured["model"]}, {kind}, {measured["batch"]} of {side} x {side}, {measured["dtype"]}; {measured_on(measured)}',
        f'{"":22}' + ''.join(f'{name:>28}' for name in measured['seconds']),
        row_of_numbers('a step, s', *measured['seconds'].values()),
        row_of_numbers('  processor time, s', *measured['processor_seconds'].values()),
        row_of_numbers('peak memory, MiB', *measured['peak_mib'].values(), digits=0),
        f'{"  beyond plain":22}{"":28}' + row_of_numbers('', *measured['beyond_plain_mib'].values(), digits=0)[22:],
    ]
    for name, bound in BOUNDS.items():
        if name not in measured['held']:
            continue
        held = 'within' if measured['held'][name] else 'NOT within'
        lines.append(f'{name} takes {between(measured["to_plain"][name], 3)} x plain guidance; {held} {bound} x and {MOST:.0f} MiB')
    return '\n'.join(lines)
