"""GoCA on networks of full size with random weights, compared with the plain forward pass and with the obvious way: bin/bench goca."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from padseg.backbones import DTYPES, Backbone, Identity, family_of
from padseg.backbones.recorder import Request, What, watch
from padseg.backbones.spec import BACKBONES, CELL
from padseg.bench.measure import between, finish_bench, fresh, measured_on, output_flags, row_of_numbers, spread, surroundings
from padseg.bench.model import SHARPER
from padseg.bench.setting import QUIET, memory, synchronize
from padseg.methods.goca import GocaOptions, plan_of
from padseg.methods.stages.aggregation import Grid, propagated
from padseg.methods.stages.cross_maps import MOST_PIXELS, Plan, aggregated, result_grid
from padseg.types import Array, Attention, Frame, Latent, Prompt

# configurations as published, where they differ from the class's own
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    'sd1.5': ('UNet2DConditionModel', {'sample_size': 64, 'cross_attention_dim': 768, 'attention_head_dim': 8}),
    'sdxl': (
        'UNet2DConditionModel',
        {
            'sample_size': 128,
            'block_out_channels': (320, 640, 1280),
            'down_block_types': ('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
            'up_block_types': ('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
            'transformer_layers_per_block': (1, 2, 10),
            'cross_attention_dim': 2048,
            'attention_head_dim': (5, 10, 20),
            'use_linear_projection': True,
            'addition_embed_type': 'text_time',
            'addition_time_embed_dim': 256,
            'projection_class_embeddings_input_dim': 2816,
        },
    ),
    'pixart-sigma': (
        'PixArtTransformer2DModel',
        {'sample_size': 128, 'caption_channels': 4096, 'interpolation_scale': 2, 'use_additional_conditions': False},
    ),
    'flux': ('FluxTransformer2DModel', {'guidance_embeds': True}),
}
MEASURED = ('sd1.5', 'pixart-sigma')
SMALL: dict[str, dict[str, Any]] = {
    'sd1.5': {'block_out_channels': (8, 8, 16, 16), 'norm_num_groups': 4, 'cross_attention_dim': 24, 'attention_head_dim': 2},
    'pixart-sigma': {
        'num_layers': 4,
        'num_attention_heads': 2,
        'attention_head_dim': 12,
        'cross_attention_dim': 24,
        'caption_channels': 32,
    },
}
SMALL_SIDE, WARM_UP = 64, 128  # sides in pixels
RECKONED_SIDE = 1024
FLUX_TEXT = 512  # tokens of its pipeline
WORDS = 30  # tokens of the random prompt that are no pads, where pads are masked
MOST = 12e9  # bytes that the obvious way may keep; with network and copies it takes 6 GB more
LIMIT = 1e-4  # on the difference of maps, by their maximum
BYTES = 4  # of a float32
PASSES = 5  # on a GPU, of which the fastest counts
EVERY: tuple[What, ...] = ('queries', 'keys', 'values', 'output')

Found = tuple[Tensor, Tensor]  # (n, h, w) maps and (N, N) mean self-attention
Way = Callable[[Latent, Backbone, Prompt, Plan], Found | None]


class GocaSetting(NamedTuple):
    """Settings of one process. read: layers whose maps are aggregated."""

    model: str
    size: str
    side: int
    read: tuple[int, ...]
    device: str
    dtype: str


class Taken(NamedTuple):
    """seconds: of a forward pass; own: of them, processor time, which other programs change less; peak: memory in MiB, of the GPU on one;
    maps: (2, n, h, w), aggregated and refined, or None."""

    seconds: float
    own: float
    peak: float
    maps: Array | None


class Layer(NamedTuple):
    """Shape of a layer's attention: N pixels, n text tokens, H heads, C channels."""

    pixels: int
    text: int
    heads: int
    channels: int


@click.command('goca')
@click.option('--model', type=click.Choice(MEASURED), default='sd1.5', show_default=True, help='whose shapes to measure')
@click.option('--size', type=click.Choice(('full', 'small')), default='full', show_default=True, help='as published, or small for tests')
@click.option('--side', type=click.IntRange(SMALL_SIDE), help="side of the picture in pixels (default: the model's own)")
@click.option(
    '--layers', type=click.IntRange(0), help='layers that the obvious way reads, 0 to leave it out (default: as many as keep 12 GB at most)'
)
@click.option('--device', default='cpu', show_default=True, help='cpu or cuda')
@click.option('--dtype', type=click.Choice(DTYPES), default='float32', show_default=True, help='of weights and activations')
@click.option('--repeats', type=click.IntRange(1), default=3, show_default=True, help='repetitions, each in fresh processes')
@output_flags
def command(
    model: str,
    size: str,
    side: int | None,
    layers: int | None,
    device: str,
    dtype: str,
    repeats: int,
    record: bool,
    as_json: bool,
) -> None:
    """Measure GoCA's aggregation on random weights: time and memory beyond those of the plain forward pass.

    The obvious way keeps the maps of all heads of all layers, then aggregates them by the paper's formulas. It must find the same maps. If
    it cannot keep all layers, it reads those around the dense feature's, and ours is measured on these, too. For SDXL and Flux, what both
    ways keep is reckoned from shapes.
    """
    os.environ |= QUIET  # inherited by the processes
    unfilled = random_backbone(model, size, 'meta')
    everything, dense = tuple(range(unfilled.layers)), goca_plan(unfilled).dense
    setting = GocaSetting(model, size, side or (unfilled.spec.side if size == 'full' else SMALL_SIDE), everything, device, dtype)
    read = around(dense, layers_of(unfilled, setting.side), layers)
    ways = {'plain': (plain, everything), 'ours': (ours, everything)}
    if read:
        ways |= {'same_layers': (ours, read)} if read != everything else {}
        ways['obvious'] = (obvious, read)
    turns = [{name: fresh(taken, way, setting._replace(read=some)) for name, (way, some) in ways.items()} for _ in range(repeats)]
    measured = summary(setting, read, turns)
    finish_bench(
        'goca', f'{size}-{model}-{setting.side}' + (f'-{dtype}' if dtype != 'float32' else ''), measured, record, as_json, in_words
    )
    if dtype == 'float32' and not (measured['difference'] or 0.0) <= LIMIT:
        raise click.ClickException(f'the maps differ by {measured["difference"]:.2g} of their maximum')


def random_backbone(model: str, size: str = 'full', device: str = 'cpu') -> Backbone:
    """A network alone, with sharper attention than random weights give. On the device `meta` it has shapes but no values."""
    kind, published = NETWORKS[model]
    return random_network(model, kind, published if size == 'full' else {**published, **SMALL[model]}, device)


def random_network(
    model: str, kind: str, configuration: dict[str, Any], device: str, adapt: Callable[[Any], None] = lambda network: None
) -> Backbone:
    """As `random_backbone`, of diffusers' class `kind`. model: whose row has the other facts; adapt: changes the network."""
    import diffusers

    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        network = getattr(diffusers, kind)(**configuration).eval()
        for name, weight in network.named_parameters():
            if name.endswith(('to_q.weight', 'to_k.weight')):
                weight.mul_(SHARPER)
    adapt(network)
    family = family_of(BACKBONES[model])
    layers = len(family.blocks(network))
    spec = BACKBONES[model]._replace(layers=layers, layer=min(BACKBONES[model].layer, layers - 1))
    patch = family.size(network.config).patch
    return Backbone(
        spec=spec,
        identity=Identity(model, '', None, '', '', ''),
        family=family,
        transformer=network,
        vae=None,
        scheduler=None,
        null_prompt=Prompt(torch.zeros(1, 0, 0), torch.zeros(1, 0), (), ()),
        layers=layers,
        whole=True,
        patch=patch,
        multiple=patch * CELL,
        limit=family.size(network.config).limit * patch * CELL,
    )


def goca_plan(backbone: Backbone, read: Sequence[int] | None = None) -> Plan:
    """GoCA's preset for the model, or of it what can be done with the layers `read`."""
    plan = plan_of(backbone, GocaOptions().resolve(backbone.spec))
    if read is None or len(read) == backbone.layers:
        return plan
    return plan._replace(cross=tuple(read), refine=tuple(layer for layer in plan.refine if layer in read) or tuple(read))


def layers_of(backbone: Backbone, side: int) -> list[Layer]:
    """Shapes of all layers for square pictures of this side in pixels."""
    text = FLUX_TEXT if backbone.spec.family == 'flux' else backbone.spec.sequence
    attention: list[Any] = [backbone.attention_module(layer) for layer in range(backbone.layers)]
    grids = [backbone.grid(layer, (1, 1, side // CELL, side // CELL)) for layer in range(backbone.layers)]
    return [Layer(math.prod(grid), text, one.heads, one.to_q.out_features) for grid, one in zip(grids, attention, strict=True)]


def kept_by_obvious(layers: Sequence[Layer]) -> int:
    """Bytes: (H, N, n + N) maps and (N, C) outputs of all layers, and the largest (N, H, C) of Eq. 6."""
    kept = sum(one.heads * one.pixels * (one.text + one.pixels) + one.pixels * one.channels for one in layers)
    return BYTES * (kept + max(one.pixels * one.heads * one.channels for one in layers))


def kept_by_ours(layers: Sequence[Layer], dense: int) -> int:
    """Bytes when the layer `dense` has run: (N, n) and (N, N) of the layers up to there, none larger than the result's grid, each (N, N) in
    the smaller of its grid and that of the dense feature; the dense feature's (N, N); and the result's (N, N), if it is of another grid."""
    finest, own = max(one.pixels for one in layers if one.pixels <= MOST_PIXELS), layers[dense].pixels
    waiting = sum(min(one.pixels, finest) * one.text + min(one.pixels, own) ** 2 for one in layers[: dense + 1])
    return BYTES * (waiting + own**2 + (finest**2 if finest != own else 0))


def around(dense: int, layers: Sequence[Layer], count: int | None) -> tuple[int, ...]:
    """So many layers around the dense feature's; by default all of which the obvious way keeps no more than MOST bytes."""
    nearest = sorted(range(len(layers)), key=lambda layer: (abs(layer - dense), layer))
    if count is None:
        fitting = [some for some in range(1, len(layers) + 1) if kept_by_obvious([layers[layer] for layer in nearest[:some]]) <= MOST]
        count = max(fitting, default=0)
    return tuple(sorted(nearest[:count]))


def plain(latent: Latent, backbone: Backbone, prompt: Prompt, plan: Plan) -> None:
    with torch.no_grad():
        backbone.denoise(latent.z, latent.timestep, prompt)


def ours(latent: Latent, backbone: Backbone, prompt: Prompt, plan: Plan) -> Found:
    found = aggregated([latent], backbone, prompt, plan)
    return found.maps[0], found.self_map[0]


def taken(run: Way, setting: GocaSetting) -> Taken:
    """Warm up, on a CPU on a small picture, then measure one way."""
    backbone = random_backbone(setting.model, setting.size, setting.device)
    backbone.transformer.to(getattr(torch, setting.dtype))
    plan, prompt = goca_plan(backbone, setting.read), random_prompt(backbone)
    on_cpu = setting.device == 'cpu'
    run(random_latent(min(WARM_UP, setting.side) if on_cpu else setting.side, backbone), backbone, prompt, plan)
    latent, times = random_latent(setting.side, backbone), []
    for _ in range(1 if on_cpu else PASSES):
        synchronize(setting.device)
        start, before = time.perf_counter(), time.process_time()
        found = run(latent, backbone, prompt, plan)
        synchronize(setting.device)
        times.append((time.perf_counter() - start, time.process_time() - before))
    most = memory(setting.device)
    return Taken(*min(times), most, torch.stack((found[0], propagated(*found))).float().cpu().numpy() if found else None)


def random_prompt(backbone: Backbone) -> Prompt:
    slots, generator = backbone.spec.sequence, torch.Generator().manual_seed(1)
    shapes = backbone.family.prompt_shapes(slots, backbone.transformer.config)
    embeds = torch.randn(shapes['embeds'], generator=generator).to(backbone.device, backbone.dtype)
    mask = (torch.arange(slots) < WORDS).to(backbone.device, backbone.dtype)[None] if 'mask' in shapes else None
    return Prompt(embeds, torch.zeros(1, 0), (), (), mask=mask)


def random_latent(side: int, backbone: Backbone) -> Latent:
    z = torch.randn(1, 4, side // CELL, side // CELL, generator=torch.Generator().manual_seed(2))
    return Latent(z.to(backbone.device, backbone.dtype), 0.3, 100.0, Frame((side, side), (0, 0, side, side)))


class AllHeads(NamedTuple):
    """attention: (H, N, L); z: (H, N, d), if it was asked for; query: (H, N, d)."""

    attention: Tensor
    z: Tensor | None
    query: Tensor


def all_heads(seen: Attention) -> AllHeads:
    scores = seen.query @ seen.key.transpose(2, 3) / math.sqrt(seen.query.shape[3])
    attention = (scores if seen.mask is None else scores + seen.mask).softmax(3)
    return AllHeads(attention[0], None if seen.output is None else seen.output[0], seen.query[0])


@torch.no_grad()
def obvious(latent: Latent, backbone: Backbone, prompt: Prompt, plan: Plan) -> Found:
    """The obvious way, for models with cross-attention and the rule `dot`: keep everything, then aggregate."""
    grids = {layer: backbone.grid(layer, tuple(latent.z.shape)) for layer in range(backbone.layers)}
    finest = result_grid(grids.values())
    requests = {}
    for layer in {*plan.cross, *plan.refine, plan.dense}:
        requests[layer, 'cross'] = Request(backbone.attention_module(layer, EVERY), all_heads, EVERY)
        requests[layer, 'self'] = Request(backbone.self_attention_module(layer), all_heads)
    with watch(requests, stop=False) as kept:
        backbone.denoise(latent.z, latent.timestep, prompt)

    feature = kept[plan.dense, 'cross'].query.transpose(0, 1).flatten(1)  # (N, C)
    dense = (feature @ feature.T / math.sqrt(feature.shape[1])).softmax(1)  # Eq. 8
    maps, total = feature.new_zeros(prompt.embeds.shape[1], *finest), feature.new_zeros(())
    for layer in plan.cross:
        attention, z, _ = kept[layer, 'cross']
        projection = backbone.output_projection(layer)
        assert projection is not None and z is not None
        o_h = torch.einsum('chd,hnd->nhc', projection[0].unflatten(1, (len(z), -1)), z)  # (N, H, C)
        products = torch.einsum('nhc,nc->nh', o_h, o_h.sum(1))
        shares = products / products.sum(1, keepdim=True)  # Eq. 6
        cross = torch.einsum('nh,hnt->tn', shares, attention).unflatten(1, grids[layer])  # Eq. 7
        own = kept[layer, 'self'].attention.mean(0)
        weight = (dense * to_grid(own, grids[layer], grids[plan.dense])).sum()  # Eq. 9
        maps += weight * interpolate(cross[None], finest, mode='bilinear')[0]
        total += weight
    maps = (maps / total).clamp_min(0)  # Eq. 10
    refining = [to_grid(kept[layer, 'self'].attention.mean(0), grids[layer], finest) for layer in plan.refine]
    return maps / maps.sum(0), torch.stack(refining).mean(0)


def to_grid(own: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Resize self-attention, keys bilinearly and queries by nearest neighbour: (N, N) -> (N', N')."""
    keys = interpolate(own.unflatten(1, grid)[None], to, mode='bilinear')[0].flatten(1)  # (N, N')
    return interpolate(keys.T.unflatten(1, grid)[None], to, mode='nearest')[0].flatten(1).T


def summary(setting: GocaSetting, read: tuple[int, ...], turns: list[dict[str, Taken]]) -> dict[str, Any]:
    """Collect all figures for the JSON report, with the values of all repeats. Memory is in MiB, what is reckoned in bytes."""
    beside = 'same_layers' if 'same_layers' in turns[0] else 'ours'
    others = [name for name in turns[0] if name != 'plain']
    compared = 'obvious' in turns[0]

    def spent(one: Taken) -> float:
        return one.own if setting.device == 'cpu' else one.seconds

    return {
        **setting._asdict(),
        'read': read,
        'layers': len(setting.read),
        **surroundings(setting.device),
        'device': surroundings(setting.device)['device'],
        'seconds': {name: [turn[name].seconds for turn in turns] for name in turns[0]},
        'processor_seconds': {name: [turn[name].own for turn in turns] for name in turns[0]},
        'peak_mib': {name: [turn[name].peak for turn in turns] for name in turns[0]},
        'beyond_plain_mib': {name: [turn[name].peak - turn['plain'].peak for turn in turns] for name in others},
        'ours_to_plain': spread([spent(turn['ours']) / spent(turn['plain']) for turn in turns]),
        'obvious_to_ours': spread([spent(turn['obvious']) / spent(turn[beside]) for turn in turns]) if compared else None,
        'difference': difference(turns[0][beside].maps, turns[0]['obvious'].maps) if compared else None,
        'reckoned': {f'{name} {RECKONED_SIDE}': reckoned(name, 'full', RECKONED_SIDE) for name in NETWORKS}
        | {f'{setting.model} {setting.side}': reckoned(setting.model, setting.size, setting.side)},
    }


@cache
def reckoned(model: str, size: str, side: int) -> dict[str, int]:
    backbone = random_backbone(model, size, 'meta')
    layers = layers_of(backbone, side)
    return {'ours': kept_by_ours(layers, goca_plan(backbone).dense), 'obvious': kept_by_obvious(layers)}


def difference(one: Array | None, other: Array | None) -> float:
    """The largest difference of maps, by their maximum: of the aggregated or of the refined, whichever is larger."""
    assert one is not None and other is not None
    return float(np.max(np.abs(one - other).max((1, 2, 3)) / other.max((1, 2, 3))))


def in_words(measured: dict[str, Any]) -> str:
    """Format a table of the plain forward pass and the others: medians with minimum and maximum."""
    seconds, beyond, some = measured['seconds'], measured['beyond_plain_mib'], f'{len(measured["read"])} of {measured["layers"]} layers'
    headings = {'plain': 'plain', 'ours': 'ours', 'same_layers': f'ours, {some}', 'obvious': f'obvious, {some}'}
    kind = 'processor time' if measured['device'] == 'cpu' else 'time'
    lines = [
        f'{measured["model"]}, {measured["size"]} size, {measured["side"]} pixels, {measured["dtype"]}; {measured_on(measured)}',
        f'{"":22}' + ''.join(f'{headings[name]:>28}' for name in seconds),
        row_of_numbers('forward pass, s', *seconds.values()),
        row_of_numbers('  processor time, s', *measured['processor_seconds'].values()),
        row_of_numbers('peak memory, MiB', *measured['peak_mib'].values(), digits=0),
        f'{"  beyond plain":22}{"":28}' + row_of_numbers('', *beyond.values(), digits=0)[22:],
        f'ours takes {between(measured["ours_to_plain"], 3)} x the {kind} of the plain forward pass',
    ]
    if measured['obvious_to_ours']:
        lines.append(
            f'the obvious way takes {between(measured["obvious_to_ours"])} x that of ours; '
            f'maps differ by at most {measured["difference"]:.1e} of their maximum'
        )
    else:
        lines.append('the obvious way was left out')
    lines.append(f'{"kept, from shapes, GB":22}{"ours":>28}{"obvious":>28}')
    lines += [f'{name:22}{kept["ours"] / 1e9:28.3f}{kept["obvious"] / 1e9:28.1f}' for name, kept in measured['reckoned'].items()]
    return '\n'.join(lines)
