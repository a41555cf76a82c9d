"""DiffSeg, DiffCut and ConceptAttention on networks of full size with random weights, beside the obvious way: bin/bench neighbours."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from torch.overrides import TorchFunctionMode

from padseg.backbones import Backbone
from padseg.backbones.noise import flow_level_at
from padseg.backbones.recorder import Request, requests_of, watch
from padseg.backbones.third_stream import Places, length_of, places_of, with_concepts
from padseg.bench.goca import NETWORKS, SMALL, random_network, random_prompt
from padseg.bench.measure import (
    between,
    finish_bench,
    fresh,
    measured_on,
    output_flags,
    peak,
    row_of_numbers,
    spread,
    surface,
    surroundings,
)
from padseg.bench.model import SIZES, random_vae
from padseg.bench.setting import QUIET, bench_picture
from padseg.evaluation.metrics import compact
from padseg.methods import concepts, diffcut, diffseg, stages
from padseg.methods.stages import anchor_merging as merging, normalised_cut as cuts
from padseg.methods.stages.concept_maps import Concepts, Reading, concept_maps, scores_of
from padseg.types import Array, Attention, Image, Latent

SSD: dict[str, Any] = {  # as published; the rest is as in SDXL
    'mid_block_type': 'UNetMidBlock2D',
    'transformer_layers_per_block': [[1], [2, 2], [4, 4]],
    'reverse_transformer_layers_per_block': [[4, 4, 10], [2, 1, 1], 1],
}
SMALL_SSD: dict[str, Any] = {
    'block_out_channels': (8, 16, 16),
    'norm_num_groups': 4,
    'transformer_layers_per_block': [[1], [2, 2], [2, 2]],
    'reverse_transformer_layers_per_block': [[2, 2, 3], [2, 1, 1], 1],
    'cross_attention_dim': 24,
    'attention_head_dim': (2, 4, 4),
    'addition_time_embed_dim': 8,
    'projection_class_embeddings_input_dim': 12 + 6 * 8,
}
SCHEDULE = {
    'beta_start': 0.00085,
    'beta_end': 0.012,
    'beta_schedule': 'scaled_linear',
    'num_train_timesteps': 1000,
    'steps_offset': 1,
    'clip_sample': False,
    'set_alpha_to_one': False,
}
VAE = {'full': ((128, 256, 512, 512), 32), 'small': ((8, 8, 16, 16), 4)}  # channels, groups
MODELS = {'diffseg': 'sd1.4', 'diffcut': 'ssd-1b', 'concepts': 'sd3'}  # which fit into memory
SMALL_SIDE, SMALL_TOKENS, SMALL_CHANNELS = 64, 8, 16  # sides in pixels and in tokens
TOKENS = {'diffseg': 64, 'diffcut': 32}  # along a side, of the papers
CHANNELS = 1280  # of SSD-1B's features
ANCHORS, THRESHOLD, PASSES, TAU, ALPHA = 16, 0.9, 3, 0.5, 10.0
AT_ONCE = 8  # anchors that the obvious way compares at a time: all of them would take 17 GB
NAMES = 6
LEVEL = 0.602
LIMIT = {'diffseg': 1e-4, 'diffcut': 0.0, 'concepts': 1e-4}  # on what both ways may differ by
BYTES = 4  # of a float32


class NeighbourSetting(NamedTuple):
    """Settings of one process. size: full or small; side: of the picture in pixels; blocks: of ConceptAttention's network, None for all."""

    method: str
    size: str
    side: int
    blocks: int | None = None


class Taken(NamedTuple):
    """seconds: of a picture or a stage; own: of them, processor time; peak: memory of the process in MiB; found: what is compared."""

    seconds: float
    own: float
    peak: float
    found: Array | None


@click.command('neighbours')
@click.option('--method', type=click.Choice(tuple(MODELS)), default='diffseg', show_default=True, help='which method to measure')
@click.option('--size', type=click.Choice(('full', 'small')), default='full', show_default=True, help='as published, or small for tests')
@click.option('--side', type=click.IntRange(SMALL_SIDE), help="side of the picture in pixels (default: the paper's)")
@click.option('--blocks', type=click.IntRange(1), help='concepts: so many blocks of the network, where memory is short (default: all)')
@click.option('--repeats', type=click.IntRange(1), default=1, show_default=True, help='repetitions, each in fresh processes')
@output_flags
def command(method: str, size: str, side: int | None, blocks: int | None, repeats: int, record: bool, as_json: bool) -> None:
    """Measure DiffSeg, DiffCut or ConceptAttention in float32 on random weights: seconds and memory a picture, without encoding texts.

    `forward` is the VAE and the whole network alone. The obvious way keeps the attention maps of all heads, compares maps by their full
    difference, cuts by full eigenvectors and one threshold after another, or masks all pairs of tokens. `stage` is the merging or the
    cutting alone, on made-up regions of the paper's size.
    """
    os.environ |= QUIET  # inherited by the processes
    own = {'diffseg': 512, 'diffcut': 1024, 'concepts': 1024}[method]
    setting = NeighbourSetting(method, size, side or (own if size == 'full' else SMALL_SIDE), blocks if method == 'concepts' else None)
    turns = [{name: fresh(taken, name, setting) for name in ways(method)} for _ in range(repeats)]
    measured = summary(setting, turns)
    some = f'-{setting.blocks}-blocks' if setting.blocks else ''
    finish_bench('neighbours', f'{size}-{method}-{setting.side}{some}', measured, record, as_json, in_words)
    if not measured['difference'] <= LIMIT[method]:
        raise click.ClickException(f'both ways differ by {measured["difference"]:.2g}')


def ways(method: str) -> list[str]:
    return ['forward', 'ours', 'obvious', *(['stage ours', 'stage obvious'] if method in TOKENS else [])]


def taken(way: str, setting: NeighbourSetting) -> Taken:
    """Measure one way of a method, or of its stage alone."""
    run = prepared_stage(way, setting) if way.startswith('stage') else prepared_picture(way, setting)
    start, before = time.perf_counter(), time.process_time()
    found = run()
    return Taken(time.perf_counter() - start, time.process_time() - before, peak(), found)


def prepared_picture(way: str, setting: NeighbourSetting) -> Callable[[], Array | None]:
    """A network with random weights and a picture, and what to do with them."""
    backbone = random_model(setting.method, setting.size, setting.blocks)
    picture = bench_picture(setting.side, 0)
    known: dict[tuple[str, str], Callable[..., Array | None]] = {
        ('diffseg', 'ours'): partial(region_labels, diffseg),
        ('diffcut', 'ours'): partial(region_labels, diffcut),
        ('concepts', 'ours'): concept_scores,
        ('diffseg', 'obvious'): obvious_diffseg,
        ('diffcut', 'obvious'): obvious_diffcut,
        ('concepts', 'obvious'): obvious_concepts,
    }
    run = known.get((setting.method, way), forward)
    return lambda: run(picture, backbone, setting)


def random_model(method: str, size: str, blocks: int | None = None) -> Backbone:
    """A backbone with a VAE's encoder, a schedule and a random prompt; without text encoders."""
    from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler

    full = size == 'full'
    if method == 'concepts':
        configuration = {**SIZES[size].transformer, **({'num_layers': blocks} if blocks else {})}
        width = configuration['num_attention_heads'] * configuration['attention_head_dim']
        backbone = random_network('sd3', 'SD3Transformer2DModel', {**configuration, 'caption_projection_dim': width}, 'cpu')
        vae, scheduler = random_vae(SIZES[size].vae), FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        small = SMALL['sd1.5'] if method == 'diffseg' else SMALL_SSD
        published = NETWORKS['sd1.5'][1] if method == 'diffseg' else {**NETWORKS['sdxl'][1], **SSD}
        kind = 'UNet2DConditionModel'
        backbone = random_network(MODELS[method], kind, published if full else {**published, **small}, 'cpu')
        channels, groups = VAE[size]
        blocks = len(channels)
        vae = AutoencoderKL(
            down_block_types=('DownEncoderBlock2D',) * blocks,
            up_block_types=('UpDecoderBlock2D',) * blocks,
            block_out_channels=channels,
            layers_per_block=2,
            norm_num_groups=groups,
        )
        scheduler = DDIMScheduler(**SCHEDULE)
    vae.decoder = vae.post_quant_conv = None  # which padseg does not load
    prompt = random_prompt(backbone)
    pooled = backbone.family.prompt_shapes(backbone.spec.sequence, backbone.transformer.config)['pooled']
    prompt = prompt._replace(pooled=torch.zeros(pooled), picked=(0,), names=('start',))
    return dataclasses.replace(backbone, vae=vae.eval(), scheduler=scheduler, null_prompt=prompt)


@torch.no_grad()
def forward(picture: Image, backbone: Backbone, setting: NeighbourSetting) -> None:
    """Nothing but the VAE and the whole network."""
    latent = latent_of(picture, backbone, setting)
    backbone.denoise(latent.z, latent.timestep, backbone.null_prompt)


def latent_of(picture: Image, backbone: Backbone, setting: NeighbourSetting) -> Latent:
    """As the method has it."""
    if setting.method == 'concepts':
        options = concepts.Options(side=setting.side)
        return stages.encode_levels(picture, backbone, options, lambda tokens: [flow_level_at(LEVEL)])[0]
    if setting.method == 'diffseg':
        return stages.encode_without_noise(picture, backbone, diffseg.Options(side=setting.side), 300)
    return stages.encode_steps(picture, backbone, diffcut.Options(side=setting.side), (50,))[0]


def region_labels(method: Any, picture: Image, backbone: Backbone, setting: NeighbourSetting) -> Array:
    """As `padseg run` has them."""
    prepared = method.prepare(backbone, method.Options(side=setting.side))
    return np.asarray(method.labels(picture, method.maps([picture], prepared)[0], prepared).labels)


# DiffSeg


@torch.no_grad()
def obvious_diffseg(picture: Image, backbone: Backbone, setting: NeighbourSetting) -> Array:
    """Keep the maps of all heads of all layers, then add them up, compare and enlarge by the paper's formulas."""
    latent = latent_of(picture, backbone, setting)
    grids = {layer: backbone.grid(layer, tuple(latent.z.shape)) for layer in range(backbone.layers)}
    requests = {layer: Request(backbone.self_attention_module(layer), maps_of_heads) for layer in grids}
    with watch(requests, stop=False) as kept:
        backbone.denoise(latent.z, latent.timestep, backbone.null_prompt)
    finest = max(grids.values(), key=math.prod)
    maps = torch.zeros(math.prod(finest), math.prod(finest))
    sides = {grid: math.sqrt(math.prod(grid)) for grid in set(grids.values())}
    for grid, side in sides.items():
        mean = torch.stack([kept[layer] for layer in grids if grids[layer] == grid]).mean((0, 1))  # (N_s, N_s)
        large = interpolate(mean.unflatten(1, grid)[:, None], finest, mode='bilinear')[:, 0].flatten(1)
        large = large / large.sum(1, keepdim=True)
        queries = interpolate(large.T.unflatten(1, grid)[None], finest, mode='nearest')[0].flatten(1).T
        maps += side / sum(sides.values()) * queries
    proposals = merged_obviously(maps, merging.anchors(finest, ANCHORS))
    enlarged = interpolate(proposals.unflatten(1, finest)[None], picture.shape[:2], mode='bilinear')[0]
    return np.asarray(enlarged.argmax(0) + 1)


def maps_of_heads(seen: Attention) -> Tensor:
    return (seen.query @ seen.key.transpose(2, 3) / math.sqrt(seen.query.shape[3])).softmax(3)[0]


def merged_obviously(maps: Tensor, points: Tensor) -> Tensor:
    """All differences of the logarithms of AT_ONCE anchors and all maps at once: (N, N), (M,) -> (M', N)."""
    logs = maps.log()
    means = []
    for some in points.split(AT_ONCE):
        apart = logs[some, None] - logs  # (AT_ONCE, N, N)
        distances = ((maps[some, None] * apart).sum(2) - (maps * apart).sum(2)) / 2
        means += [maps[near].mean(0) for near in distances < THRESHOLD]
    for _ in range(PASSES - 1):
        waiting, merged = torch.ones(len(means), dtype=torch.bool), []
        every = torch.stack(means)
        for number, own in enumerate(means):
            if waiting[number]:
                apart = own.log() - every.log()
                near = ((own * apart).sum(1) - (every * apart).sum(1)) / 2 < THRESHOLD
                near[number] = True
                waiting &= ~near
                merged.append(every[near].mean(0))
        means = merged
    return torch.stack(means)


# DiffCut


@torch.no_grad()
def obvious_diffcut(picture: Image, backbone: Backbone, setting: NeighbourSetting) -> Array:
    """Run the whole network, cut by full eigenvectors, and enlarge features in place of their products, to 4 x 4 pixels a token."""
    latent = latent_of(picture, backbone, setting)
    names = backbone.layer_names()
    layer = max(number for number, name in enumerate(names) if name.startswith('down-'))
    outputs: list[Tensor] = []
    module = backbone.self_attention_module(layer)
    handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    backbone.denoise(latent.z, latent.timestep, backbone.null_prompt)
    handle.remove()
    features = normalize(outputs[0][0].double(), dim=1)  # (N, C)
    regions = cut_obviously(features.numpy(), TAU)
    means = torch.stack([features[torch.from_numpy(regions == number)].mean(0) for number in range(regions.max() + 1)])
    height, width = backbone.grid(layer, tuple(latent.z.shape))
    large = interpolate(features.T.unflatten(1, (height, width))[None].float(), (4 * height, 4 * width), mode='bilinear')[0]
    return np.asarray((means.float() @ large.flatten(1)).argmax(0).unflatten(0, large.shape[1:]) + 1)


def cut_obviously(features: Array, tau: float) -> Array:
    """Every node by all eigenvectors and one threshold after another, as the paper's formulas have it: (N, C) -> (N,)."""
    weights = cuts.affinity(features, ALPHA)
    labels = np.zeros(len(weights), np.int64)
    waiting, count = [np.arange(len(weights))], 0
    while waiting:
        tokens = waiting.pop()
        if len(tokens) < 2:
            continue
        own = weights[np.ix_(tokens, tokens)]
        degrees = own.sum(1)
        laplacian = np.diag(degrees) - own
        root = 1 / np.sqrt(degrees)
        vector = root * eigh(root[:, None] * laplacian * root)[1][:, 1]
        vector = vector * np.sign(vector[np.abs(vector).argmax()])
        best, side = np.inf, vector > 0
        for threshold in np.linspace(cuts.SHRUNK * vector.min(), cuts.SHRUNK * vector.max(), cuts.CANDIDATES):
            share = degrees[vector > threshold].sum() / degrees.sum()
            z = np.where(vector > threshold, 2.0, -2.0 * share / (1 - share))
            value = z @ laplacian @ z / (z @ np.diag(degrees) @ z)
            if value < best - cuts.EQUAL:
                best, side = value, vector > threshold
        if best < tau:
            count += 1
            labels[tokens[side]] = count
            waiting += [tokens[~side], tokens[side]]
    return np.unique(labels, return_inverse=True)[1]


# ConceptAttention


def read_concepts(backbone: Backbone) -> tuple[Reading, Concepts]:
    """The settings of SD3, and random names of one token."""
    options = concepts.Options().resolve(backbone.spec)
    width = backbone.null_prompt.embeds.shape[2]
    embeds = torch.randn(1, NAMES, width, generator=torch.Generator().manual_seed(3))
    return concepts.reading_of(backbone, options, None), Concepts(embeds, torch.eye(NAMES, dtype=torch.float64))


def concept_scores(picture: Image, backbone: Backbone, setting: NeighbourSetting) -> Array:
    reading, names = read_concepts(backbone)
    latent = latent_of(picture, backbone, setting)
    maps = concept_maps([latent], backbone, backbone.null_prompt, names, reading).maps[0]
    enlarged(maps, picture)
    return np.asarray(maps)


@torch.no_grad()
def obvious_concepts(picture: Image, backbone: Backbone, setting: NeighbourSetting) -> Array:
    """One mask for all pairs of tokens, and the whole softmax of every head written out. No layer's is kept, as that would not fit."""
    reading, names = read_concepts(backbone)
    latent = latent_of(picture, backbone, setting)
    prompt = backbone.null_prompt
    grid = backbone.grid(0, tuple(latent.z.shape))
    together = with_concepts(prompt, names.embeds)
    places = places_of(backbone, together, math.prod(grid))
    read = partial(scores_of, places=places, shares=names.shares, reading=reading)
    with _Explicit(places), watch(requests_of(backbone, reading.layers, read, ('queries', 'keys', 'output')), stop=False) as kept:
        backbone.denoise(latent.z, latent.timestep, together, reading.guidance)
    maps = torch.stack([kept[layer] for layer in reading.layers]).mean(0)[0].unflatten(1, grid)
    enlarged(maps, picture)
    return np.asarray(maps)


class _Explicit(TorchFunctionMode):
    """Writes joint attention out, under a mask of all pairs of tokens."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.total = places.total
        self.mask = torch.zeros(places.total, places.total)
        self.mask[:, places.concepts] = -torch.inf
        self.mask[places.concepts, places.prompt] = -torch.inf
        self.mask[places.concepts, places.concepts] = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or length_of(*args, **kwargs) != self.total:
            return func(*args, **kwargs)
        return self.written_out(*args, **kwargs)

    def written_out(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return (query @ key.transpose(2, 3) / math.sqrt(query.shape[3]) + self.mask).softmax(3) @ value


def enlarged(maps: Tensor, picture: Image) -> Array:
    """The strongest name of every pixel."""
    return np.asarray(interpolate(maps[None].float(), picture.shape[:2], mode='bilinear')[0].argmax(0))


# the stages alone


def prepared_stage(way: str, setting: NeighbourSetting) -> Callable[[], Array]:
    """Made-up regions of the paper's size, and what to do with them."""
    side = TOKENS[setting.method] if setting.size == 'full' else SMALL_TOKENS
    regions = surface(np.random.default_rng(0), side).argmax(2).ravel()
    if setting.method == 'diffseg':
        maps, points = made_up_maps(regions), merging.anchors((side, side), ANCHORS)
        if way == 'stage ours':
            return lambda: np.asarray(merging.merged(maps, points, (THRESHOLD,) * PASSES))
        return lambda: np.asarray(merged_obviously(maps, points))
    features = made_up_features(regions, CHANNELS if setting.size == 'full' else SMALL_CHANNELS)
    if way == 'stage ours':
        return lambda: cuts.token_labels(cuts.cut_tree(cuts.affinity(features, ALPHA), TAU), TAU)
    return lambda: cut_obviously(features, TAU)


def made_up_maps(regions: Array) -> Tensor:
    """Maps that attend mostly to their own region: (N,) -> (N, N)."""
    generator = torch.Generator().manual_seed(4)
    names = torch.from_numpy(regions)
    maps = (names[:, None] == names) + 0.02
    maps *= 0.5 + torch.rand(maps.shape, generator=generator)
    return maps / maps.sum(1, keepdim=True)


def made_up_features(regions: Array, channels: int) -> Array:
    """Features of length 1 near to that of their region: (N,) -> (N, C)."""
    rng = np.random.default_rng(5)
    return cuts.unit(rng.standard_normal((regions.max() + 1, channels))[regions] + 0.3 * rng.standard_normal((len(regions), channels)))


def summary(setting: NeighbourSetting, turns: list[dict[str, Taken]]) -> dict[str, Any]:
    """All figures, with the values of all repeats. Memory is in MiB, what is reckoned in bytes."""
    first = turns[0]
    prefix = 'stage ' if 'stage ours' in first else ''
    return {
        **surroundings(),
        **setting._asdict(),
        'model': MODELS[setting.method],
        'seconds': {name: [turn[name].seconds for turn in turns] for name in first},
        'processor_seconds': {name: [turn[name].own for turn in turns] for name in first},
        'peak_mib': {name: [turn[name].peak for turn in turns] for name in first},
        'ours_to_forward': spread([turn['ours'].own / turn['forward'].own for turn in turns]),
        'obvious_to_ours': spread([turn['obvious'].own / turn['ours'].own for turn in turns]),
        'stage_obvious_to_ours': spread([turn['stage obvious'].own / turn['stage ours'].own for turn in turns]) if prefix else None,
        'difference': difference(setting.method, first[f'{prefix}ours'].found, first[f'{prefix}obvious'].found),
        'reckoned': reckoned(setting),
    }


def difference(method: str, one: Array | None, other: Array | None) -> float:
    """Of maps, by their maximum, inf if their number differs; of regions the share of tokens in others, whatever their numbers."""
    assert one is not None and other is not None
    if one.shape != other.shape:
        return math.inf
    if method == 'diffcut':
        return float((compact(one) != compact(other)).mean())
    return float(np.abs(one - other).max() / np.abs(other).max())


def reckoned(setting: NeighbourSetting) -> dict[str, int]:
    """Bytes of what the obvious way does not hold at once here, as it would not fit."""
    if setting.size != 'full':
        return {}
    if setting.method == 'diffseg':
        return {'all distances as one array': BYTES * ANCHORS**2 * TOKENS['diffseg'] ** 4}
    if setting.method == 'concepts':
        size = SIZES['full'].transformer
        tokens = (setting.side // 16) ** 2 + 2 * 77 + NAMES
        return {'maps of all heads and layers': BYTES * size['num_layers'] * size['num_attention_heads'] * tokens**2}
    return {}


def in_words(measured: Mapping[str, Any]) -> str:
    """A table: medians with minimum and maximum."""
    names = [name for name in measured['seconds'] if not name.startswith('stage')]
    parts = [name for name in measured['seconds'] if name.startswith('stage')]
    side = measured['side']
    size = f'{measured["size"]} size, {measured["blocks"]} blocks' if measured['blocks'] else f'{measured["size"]} size'
    lines = [f'{measured["method"]}, {measured["model"]}, {size}, {side} x {side}, float32; {measured_on(dict(measured))}']
    for title, columns in (('a picture', names), ('the stage alone', parts)):
        if columns:
            lines += [
                f'{title:22}' + ''.join(f'{name.removeprefix("stage "):>28}' for name in columns),
                row_of_numbers('seconds', *(measured['seconds'][name] for name in columns)),
                row_of_numbers('  processor time, s', *(measured['processor_seconds'][name] for name in columns)),
                row_of_numbers('peak memory, MiB', *(measured['peak_mib'][name] for name in columns), digits=0),
            ]
    lines.append(f'a picture takes {between(measured["ours_to_forward"])} x the processor time of the forward pass alone')
    lines.append(f'the obvious way takes {between(measured["obvious_to_ours"])} x that of ours')
    if measured['stage_obvious_to_ours']:
        lines.append(f'  of the stage alone {between(measured["stage_obvious_to_ours"])} x')
    lines.append(f'both ways differ by {measured["difference"]:.1e}')
    lines += [f'{name}: {size / 1e9:.1f} GB' for name, size in measured['reckoned'].items()]
    return '\n'.join(lines)
