"""The encoders of large VAEs on a CPU: by diffusers' own modules and by padseg, in turns in one process: bin/bench encoder."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import click
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from padseg.backbones.cpu_attention import by_rows
from padseg.backbones.cpu_encoder import CpuEncoder
from padseg.backbones.cpu_norm import exact_norms
from padseg.bench import flops
from padseg.bench.measure import between, finish_bench, measured_on, output_flags, peak, row_of_numbers, spread, surroundings
from padseg.bench.sizes import SDXL_VAE, VAE

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    'sd3': ('AutoencoderKL', VAE),
    'flux2': ('AutoencoderKLFlux2', {}),
    'sd1.5': ('AutoencoderKL', VAE | SDXL_VAE),
}
PRODUCT = 2048  # side of the matrices whose product gives the ceiling
PRODUCTS = 2  # to time in each turn
NAMED = ('conv2d', 'group_norm', 'silu', 'scaled_dot_product_attention', 'linear', 'pad', 'add', 'div')


class Profile(TorchFunctionMode):
    """Adds up the processor seconds of each function of torch that is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time()
        result = func(*args, **(kwargs or {}))
        name = getattr(func, '__name__', '')
        self.seconds[name if name in NAMED else 'rest'] += time.process_time() - start
        return result


@click.command('encoder')
@click.option('--model', 'models', type=click.Choice(list(SHAPES)), multiple=True, default=tuple(SHAPES), help='whose VAE; all by default')
@click.option('--side', 'sides', type=click.IntRange(64), multiple=True, default=(512, 1024), show_default=True, help='side of the picture')
@click.option(
    '--dtype', type=click.Choice(('float32', 'bfloat16')), default='float32', show_default=True, help='of weights and activations'
)
@click.option('--repeats', type=click.IntRange(1), default=3, show_default=True, help='turns')
@output_flags
def command(models: Sequence[str], sides: Sequence[int], dtype: str, repeats: int, record: bool, as_json: bool) -> None:
    """Measure VAE encoders of the exact shapes of SD3, FLUX.2 and Stable Diffusion 1.5, with random weights, on the CPU.

    Seconds are those of all processors together, so that other programs disturb little; the rate of a matrix product is measured
    likewise, in between.
    """
    cases = {}
    for model in models:
        vae = random_vae(model, getattr(torch, dtype))
        for side in sorted(sides):  # the peak of memory only rises
            cases[f'{model} {side}'] = measure(vae, side, repeats)
    measured = {'dtype': dtype, 'product': PRODUCT, **surroundings(), 'cases': cases}
    finish_bench('encoder', f'{"-".join(models)}-{"-".join(map(str, sorted(sides)))}-{dtype}', measured, record, as_json, in_words)


def random_vae(model: str, dtype: torch.dtype) -> Any:
    """The VAE of this model without its decoder."""
    import diffusers

    name, settings = SHAPES[model]
    torch.manual_seed(0)
    vae: Any = getattr(diffusers, name)(**settings).eval().requires_grad_(False)
    vae.decoder = vae.post_quant_conv = None
    return vae.to(dtype=dtype, memory_format=torch.channels_last)


@torch.no_grad()
def measure(vae: Any, side: int, repeats: int, product: int = PRODUCT) -> dict[str, Any]:
    """Time both ways on a picture of noise. The fast one goes first, so that its own peak of memory is seen."""
    drawn = torch.rand((1, 3, side, side), generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = drawn.to(vae.dtype, memory_format=torch.channels_last)
    ways: dict[str, Callable[[Tensor], Tensor]] = {'padseg': CpuEncoder(vae.encoder), 'modules': vae.encoder}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    results: dict[str, Tensor] = {}
    rates: list[float] = []
    profile = Profile()
    before = peak()
    for turn in range(repeats):
        for name, run in ways.items():
            rates += [product_rate(product, vae.dtype) for _ in range(PRODUCTS)]
            with by_rows(), exact_norms(), profile if name == 'modules' and turn == 0 else nullcontext():
                start = time.process_time()
                results[name] = run(pixels)
                seconds[name].append(time.process_time() - start)
            peaks.setdefault(name, peak() - before)
    needed, ceiling = flops.encoder(vae.config, side, side), max(rates)
    exact = results['modules'].float()
    return {
        'operations': needed,
        'ceiling': ceiling,
        'rates': rates,
        'seconds': seconds,
        'share': {name: needed / statistics.median(taken) / ceiling for name, taken in seconds.items()},
        'share_of_median_rate': {name: needed / statistics.median(taken) / statistics.median(rates) for name, taken in seconds.items()},
        'profile': dict(profile.seconds),
        'peak_mib': peaks,
        'difference': float((results['padseg'].float() - exact).square().mean().sqrt() / exact.std()),
    }


def product_rate(side: int, dtype: torch.dtype) -> float:
    """Operations per processor second of a square matrix product."""
    factor = torch.rand(side, side).to(dtype)
    start = time.process_time()
    factor @ factor
    return flops.linear(side, side, side) / (time.process_time() - start)


def in_words(measured: dict[str, Any]) -> str:
    """Format the figures of each case: medians with minimum and maximum."""
    lines = [f'{measured["dtype"]}; processor seconds; {measured_on(measured)}']
    for name, case in measured['cases'].items():
        ways = list(case['seconds'])
        parts = sorted(case['profile'].items(), key=lambda part: -part[1])
        lines += [
            f'{name}: {case["operations"] / 1e12:.2f} TFLOP; matrix product {case["ceiling"] / 1e9:.0f} GFLOP/s at best, '
            f'median {statistics.median(case["rates"]) / 1e9:.0f}',
            f'{"":22}' + ''.join(f'{way:>28}' for way in ways),
            row_of_numbers('  seconds', *(case['seconds'][way] for way in ways)),
            f'{"  share of matmul rate":22}' + ''.join(f'{case["share"][way]:28.1%}' for way in ways),
            f'{"  of its median":22}' + ''.join(f'{case["share_of_median_rate"][way]:28.1%}' for way in ways),
            row_of_numbers('  memory, MiB', *([case['peak_mib'][way]] for way in ways), digits=0),
            '  modules: ' + ', '.join(f'{part} {value:.2f} s' for part, value in parts),
            f'  differ by {case["difference"]:.1e} standard deviations (RMS); '
            f'{between(spread([a / b for a, b in zip(case["seconds"]["modules"], case["seconds"]["padseg"], strict=True)]))} x as fast',
        ]
    return '\n'.join(lines)
