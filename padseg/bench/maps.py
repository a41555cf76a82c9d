"""Seconds and memory of the token maps of a picture, for models of published shapes with random weights: bin/bench maps."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import click
import torch
from torch import nn

from padseg.backbones import DTYPES, Backbone, Identity, family_of
from padseg.backbones.parts import cut_model
from padseg.backbones.spec import BACKBONES, CELL, FAMILY_FACTS
from padseg.bench.cards import needs_of
from padseg.bench.measure import between, finish_bench, fresh, measured_on, output_flags, peak, spread, surroundings
from padseg.bench.model import default_dtype
from padseg.bench.setting import QUIET, bench_picture
from padseg.bench.sizes import SHAPES
from padseg.methods import seg4diff, stages
from padseg.methods.stages.token_maps import latent_token_maps
from padseg.types import Prompt

WAYS = ('maps', 'whole')
WARM_UP = 64  # side in pixels
SMALL: dict[str, dict[str, Any]] = {  # for tests, by family
    'sd3': {'num_layers': 3, 'num_attention_heads': 2, 'caption_projection_dim': 128, 'joint_attention_dim': 64},
    'flux': {'num_layers': 2, 'num_single_layers': 2, 'num_attention_heads': 2, 'joint_attention_dim': 64, 'pooled_projection_dim': 32},
    'flux2': {'num_layers': 2, 'num_single_layers': 2, 'num_attention_heads': 2, 'joint_attention_dim': 64},
    'auraflow': {
        'num_mmdit_layers': 2,
        'num_single_dit_layers': 2,
        'num_attention_heads': 2,
        'attention_head_dim': 16,
        'joint_attention_dim': 64,
        'caption_projection_dim': 32,
    },
    'zimage': {'n_layers': 3, 'n_refiner_layers': 1, 'dim': 256, 'n_heads': 2, 'n_kv_heads': 2, 'cap_feat_dim': 64},
}
SMALL_VAE = {'block_out_channels': (8, 8, 16, 16), 'norm_num_groups': 4}
DYNAMIC = ('flux', 'flux2')  # families whose schedule depends on the size of the picture


class MapsSetting(NamedTuple):
    """Settings of one process."""

    model: str
    side: int
    dtype: str
    small: bool


class Taken(NamedTuple):
    """seconds: of a picture; own: of them, processor time, which other programs change less; peak, base: the highest memory of the process
    in MiB, and that before there was a model."""

    seconds: float
    own: float
    peak: float
    base: float


@click.command('maps')
@click.option('--model', type=click.Choice(tuple(SHAPES)), default='sd3', show_default=True, help='whose published shapes to measure')
@click.option('--side', type=click.IntRange(64), default=512, show_default=True, help='of the picture, in pixels')
@click.option('--dtype', type=click.Choice(DTYPES), default='float32', show_default=True, help='of weights and activations')
@click.option('--only', type=click.Choice(WAYS), multiple=True, help='measure only these (default: both)')
@click.option('--scale-down', is_flag=True, help='a small model of the same class instead, for tests')
@click.option('--repeats', type=click.IntRange(1), default=1, show_default=True, help='repetitions, each in fresh processes')
@output_flags
def command(model: str, side: int, dtype: str, only: tuple[str, ...], scale_down: bool, repeats: int, record: bool, as_json: bool) -> None:
    """Measure the maps of a picture, from the VAE's encoder to the expert block, beside the encoder and the whole network.

    For the maps, weights are as many as padseg loads. In the whole network all blocks of a kind share one block's weights, so that it fits
    into memory; its time is the same, its memory is not given.
    """
    os.environ |= QUIET  # inherited by the processes
    setting = MapsSetting(model, side, dtype, scale_down)
    turns = [{way: fresh(taken, way, setting) for way in (only or WAYS)} for _ in range(repeats)]
    case = f'{"small" if scale_down else "full"}-{model}-{side}-{dtype}'
    finish_bench('maps', case, summary(setting, turns), record, as_json, in_words)


@torch.no_grad()
def taken(way: str, setting: MapsSetting) -> Taken:
    """Measure one way in this process."""
    read(way, random_backbone(setting._replace(small=True), whole=way == 'whole'), WARM_UP)  # imports, and starts threads
    base = peak()
    backbone = random_backbone(setting, whole=way == 'whole')
    start, before = time.perf_counter(), time.process_time()
    read(way, backbone, setting.side)
    return Taken(time.perf_counter() - start, time.process_time() - before, peak(), base)


def read(way: str, backbone: Backbone, side: int) -> None:
    """Encode a picture and make its maps, or run the whole network."""
    options = seg4diff.Options(side=side).resolve(backbone.spec)
    latent = stages.encode(bench_picture(side, 0), backbone, options)
    if way == 'maps':
        latent_token_maps([latent], backbone, options)
    else:
        backbone.denoise(latent.z, latent.timestep, backbone.null_prompt)


def random_backbone(setting: MapsSetting, whole: bool) -> Backbone:
    """A model with the weights that maps need, or all of it with the blocks of a kind sharing theirs; without text encoders."""
    import diffusers

    shape, spec = SHAPES[setting.model], BACKBONES[setting.model]
    family = family_of(spec)
    config = {**shape.transformer, **(SMALL[spec.family] if setting.small else {})}
    kind, dtype = getattr(diffusers, family.LAYOUT.network), getattr(torch, setting.dtype)
    with torch.device('meta'):
        depths = {name: kind(**config).config[name] for name in FAMILY_FACTS[spec.family].depths}
    layers = sum(depths.values())
    spec = spec._replace(layers=layers, layer=min(spec.layer, layers - 1))
    torch.manual_seed(0)
    exact = family.needs_exact_vae(config)
    with default_dtype(dtype):
        network = kind(**{**config, **(dict.fromkeys(depths, 2) if whole else needed(depths, spec.layer))}).eval()
        vae_config = {**shape.vae, **(SMALL_VAE if setting.small else {})}
        vae = getattr(diffusers, family.LAYOUT.vae)(**vae_config).to(torch.float32 if exact else dtype).eval()
    if whole:
        repeat_blocks(network, family.blocks(network), list(depths.values()))
    else:
        cut_model(family, network, family.LAYOUT.denoiser, spec.layer)
    cut_model(family, vae, 'vae', spec.layer)
    patch = family.size(network.config).patch
    multiple = patch * CELL
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=spec.family in DYNAMIC)
    return Backbone(
        spec=spec,
        identity=Identity(setting.model, '', None, '', '', ''),
        family=family,
        transformer=network,
        vae=vae,
        scheduler=scheduler,
        null_prompt=random_prompt(family, spec.sequence, network.config, dtype),
        layers=layers if whole else spec.layer + 1,
        whole=whole,
        patch=patch,
        multiple=multiple,
        limit=family.size(network.config).limit * multiple,
    )


def needed(depths: dict[str, int], layer: int) -> dict[str, int]:
    """How many blocks of each kind are built: those up to the one behind a layer, as the very last block differs in some models."""
    left, counts = layer + 2, {}
    for name, depth in depths.items():
        counts[name] = min(depth, left)
        left -= counts[name]
    return counts


def repeat_blocks(network: Any, blocks: Sequence[nn.Module], counts: Sequence[int]) -> None:
    """Give a network with two blocks of each kind `counts` of them: all but the last share the first one's weights."""
    lists = [module for module in network.children() if isinstance(module, nn.ModuleList) and any(block in blocks for block in module)]
    for found, count in zip(lists, counts, strict=True):
        first, last = found
        others = [copy.deepcopy(first, {id(weight): weight for weight in first.parameters()}) for _ in range(count - 2)]
        network.register_module(name_of(network, found), nn.ModuleList([first, *others, last]))


def name_of(network: nn.Module, child: nn.Module) -> str:
    return next(name for name, other in network.named_children() if other is child)


def random_prompt(family: Any, slots: int, config: Any, dtype: torch.dtype) -> Prompt:
    """Random embeddings in the shapes of the empty prompt, all of whose slots are read."""
    shapes = family.prompt_shapes(slots, config)
    tensors = {name: torch.ones(shape) if name == 'mask' else torch.randn(shape) for name, shape in shapes.items()}
    embeds, pooled, mask = (tensors[name].to(dtype) if name in tensors else None for name in ('embeds', 'pooled', 'mask'))
    assert embeds is not None and pooled is not None
    picked = tuple(range(slots if mask is None else mask.shape[1]))
    return Prompt(embeds, pooled, picked, tuple(map(str, picked)), mask=mask)


def summary(setting: MapsSetting, turns: list[dict[str, Taken]]) -> dict[str, Any]:
    ways = {
        way: {name: spread([getattr(turn[way], name) for turn in turns]) for name in Taken._fields if name != 'peak' or way == 'maps'}
        for way in turns[0]
    }
    both = {'ratio': spread([turn['whole'].own / turn['maps'].own for turn in turns])} if len(ways) == len(WAYS) else {}
    form = 'float32' if setting.dtype == 'float32' else 'bfloat16'
    reckoned = {} if setting.small else {'reckoned': needs_of(setting.model, setting.side)[form].total / 2**20}  # as by `padseg doctor`
    return {**setting._asdict(), 'repeats': len(turns), 'ways': ways, **both, **reckoned, **surroundings()}


def in_words(measured: dict[str, Any]) -> str:
    lines = [
        f'{measured["model"]}, {measured["side"]} x {measured["side"]} pixels, {measured["dtype"]}, random weights, {measured_on(measured)}'
    ]
    for way, taken in measured['ways'].items():
        lines.append(f'{way:8}{between(taken["seconds"]):>22} s   of the processor {between(taken["own"])} s')
    if 'maps' in measured['ways']:
        of_maps = measured['ways']['maps']
        most, base = of_maps['peak']['median'], of_maps['base']['median']
        lines.append(
            f'memory of the maps {most - base:.0f} MiB beyond {base:.0f} MiB of libraries; reckoned {measured["reckoned"]:.0f} MiB'
        )
    if 'ratio' in measured:
        lines.append(f'the whole takes {between(measured["ratio"])} times the processor time of the maps')
    return '\n'.join(lines)
