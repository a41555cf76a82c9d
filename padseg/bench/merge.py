"""The stages after the model: distances, merging, label maps and refinements, compared with plain loops: bin/bench merge."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click
import cv2
import numpy as np
import torch
from skimage.measure import label as connected_components

from padseg.bench.measure import finish_bench, fresh, measured_on, output_flags, peak, surface, surroundings
from padseg.methods.stages.attention import token_attention
from padseg.methods.stages.enlarging import upsample
from padseg.methods.stages.labels import label_map, scaled_proposals
from padseg.methods.stages.proposals import EPS, merge, normalise, spatial, symmetric_kl
from padseg.methods.stages.superpixels import superpixels_of
from padseg.types import Attention, Frame, LabelMap, Proposals, TokenMaps

if TYPE_CHECKING:
    from torch import Tensor

    from padseg.types import Array, Image

T = TypeVar('T')

SIDE = 64  # of the maps, as in SD3 at 1024 pixels
HEADS, TEXT = 24, 154  # attention heads and text tokens of SD3
KINDS = 25  # groups of maps further apart than THRESHOLD, and so the number of proposals
NOISE = 0.02  # within a group
THRESHOLD, NORMALISATION = 0.1, 'sum'
RELEASED_THRESHOLD = 0.005  # at which the released normalisation has the same groups
SMALL = (481, 321)
REFINED: dict[str, Any] = {'components': True, 'min_area': 0.005}
SCALE = 300.0  # of the superpixels
REPEATS = 7  # of a step, if there is time
STEPS = {
    'distances': 'distances between all maps',
    'merge': 'merging, with the distances',
    'merge_released': 'the same, normalised as released',
    'label_map': 'label map',
    'superpixels': 'superpixels, by scikit-image',
    'refined': 'label map, refined',
}


@click.command('merge')
@click.option('--maps', type=click.IntRange(min=1), default=77, show_default=True, help=f'token maps of {SIDE} x {SIDE}')
@click.option('--size', type=(int, int), default=(4000, 3000), show_default=True, help='width and height of the large picture')
@click.option('--seconds', type=click.FloatRange(min=0), default=1.0, show_default=True, help='repeat a step no longer than this')
@output_flags
def command(maps: int, size: tuple[int, int], seconds: float, record: bool, as_json: bool) -> None:
    """Measure the way from token maps to label map on one core: time of each step, compared with plain loops, and memory.

    "Refined" means with superpixels, components and a minimum area. Memory is measured for the label map, on top of the rest of the
    process, and for computing the maps from the float32 queries and keys of SD3's expert block.
    """
    pictures = {f'{width} x {height}': fresh(merge_steps, maps, (height, width), seconds) for width, height in (SMALL, size)}
    memory = {
        'proposals': fresh(memory_of, KINDS, size[::-1], False),
        'three_times_as_many': fresh(memory_of, 3 * KINDS, size[::-1], False),
        'plainly': fresh(memory_of, KINDS, size[::-1], True),
        'attention': fresh(memory_of_attention, maps),
    }
    measured = {
        'maps': maps,
        **surroundings(),
        'pictures': pictures,
        'memory_mib': memory,
    }
    finish_bench('merge', f'{maps}-maps', measured, record, as_json, in_words)


def merge_steps(maps: int, size: tuple[int, int], seconds: float) -> dict[str, dict[str, float]]:
    """Time each step: milliseconds of ours, of the plain version, and their ratio. Raises ClickException if their results differ."""
    one_core()
    tokens, picture = random_maps(maps, size), noisy_picture(size)
    inside = superpixels_of(picture, SCALE)
    normalised = normalise(tokens.maps, NORMALISATION).flatten(1)
    proposals = merge(tokens, THRESHOLD, NORMALISATION)
    shares = spatial(normalised)
    return {
        'label_map': compared(lambda: label_map(proposals), lambda: plain_label_map(proposals), seconds),
        'superpixels': {'ours': fastest(lambda: superpixels_of(picture, SCALE), seconds)[0]},
        'refined': compared(lambda: label_map(proposals, inside, **REFINED), lambda: plain_refined(proposals, inside, **REFINED), seconds),
        'distances': compared(lambda: symmetric_kl(shares), lambda: plain_distances(shares), seconds),
        **{
            name: compared(partial(merge, tokens, threshold, by), partial(plain_merge, tokens, threshold, by), seconds)
            for name, threshold, by in (('merge', THRESHOLD, NORMALISATION), ('merge_released', RELEASED_THRESHOLD, 'released'))
        },
    }


def one_core() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def random_maps(count: int, size: tuple[int, int]) -> TokenMaps:
    """Draw smooth maps in KINDS distinct groups, with little noise within a group: (count, SIDE, SIDE). size: of the picture, (H, W)."""
    rng = np.random.default_rng(0)
    kinds = np.concatenate([surface(rng, SIDE) for _ in range(3)], 2).transpose(2, 0, 1)[np.arange(count) % KINDS]
    maps = np.exp(kinds + NOISE * rng.standard_normal(kinds.shape))
    return TokenMaps(torch.tensor(maps / maps.sum(0), dtype=torch.float32), tuple(map(str, range(count))), Frame(size, (0, 0, *size)))


def noisy_picture(size: tuple[int, int]) -> Image:
    """Draw smooth colours with noise: (H, W, 3). size: (H, W)."""
    rng = np.random.default_rng(1)
    colours = cv2.resize(surface(rng, SIDE)[..., :3], size[::-1], interpolation=cv2.INTER_CUBIC)
    return (128 + 60 * colours + rng.normal(0, 8, colours.shape)).clip(0, 255).astype(np.uint8)


def compared(ours: Callable[[], T], plain: Callable[[], T], seconds: float) -> dict[str, float]:
    """Time both versions: milliseconds each, and the ratio of plain to ours. Raises ClickException if their results differ."""
    (quick, result), (slow, expected) = fastest(ours, seconds), fastest(plain, seconds)
    if not same_maps(result, expected):
        raise click.ClickException('the plain version gives a different result')
    return {'ours': quick, 'plain': slow, 'ratio': slow / quick}


def fastest(function: Callable[[], T], seconds: float) -> tuple[float, T]:
    """Return the CPU time of the fastest of REPEATS calls, or of as many as take so many seconds, in milliseconds; and the result."""
    times: list[float] = []
    while not times or (len(times) < REPEATS and sum(times) < 1000 * seconds):
        start = time.process_time()
        result = function()
        times.append(1000 * (time.process_time() - start))
    return min(times), result


def same_maps(one: object, other: object) -> bool:
    if isinstance(one, LabelMap) and isinstance(other, LabelMap):
        return np.array_equal(one.labels, other.labels) and one.tokens == other.tokens
    if isinstance(one, Proposals) and isinstance(other, Proposals):
        return one.members == other.members and torch.allclose(one.maps, other.maps, rtol=1e-9)
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def plain_distances(shares: Tensor) -> Tensor:
    """Compare every map with all others, one map at a time: (T, N) -> (T, T)."""
    logs = shares.clamp_min(EPS).log()
    rows = [((own * (log - logs)).sum(1) + (shares * (logs - log)).sum(1)) / 2 for own, log in zip(shares, logs, strict=True)]
    return torch.stack(rows)


def plain_merge(tokens: TokenMaps, threshold: float = THRESHOLD, normalisation: str = NORMALISATION) -> Proposals:
    """Merge anchor by anchor, computing the distances to all maps for each."""
    normalised = normalise(tokens.maps, normalisation)
    shares = normalised / normalised.sum((1, 2), keepdim=True)
    taken: set[int] = set()
    groups, merged = [], []
    for anchor, own in enumerate(shares):
        if anchor not in taken:
            logs = (own.clamp_min(EPS) / shares.clamp_min(EPS)).log()  # (T, h, w)
            near = ((own * logs).sum((1, 2)) - (shares * logs).sum((1, 2))) / 2 < threshold  # (T,)
            group = tuple(token for token in range(len(shares)) if token == anchor or near[token])
            taken.update(group)
            groups.append(group)
            merged.append(sum((normalised[token] for token in group), torch.zeros_like(own)) / len(group))
    return Proposals(torch.stack(merged), tuple(groups), tokens.frame)


def plain_label_map(proposals: Proposals) -> LabelMap:
    """Enlarge all proposals at once, then pass over the pixels once per region."""
    winner = np.stack([upsample(values, proposals.frame.size) for values in scaled_proposals(proposals)]).argmax(0)
    return in_order(winner, proposals, winner)


def plain_refined(proposals: Proposals, inside: Array, components: bool, min_area: float) -> LabelMap:
    """Refine on full-size proposals: average all of them over the superpixels, and pass over all pixels for each absorbed region."""
    values = [upsample(proposal, proposals.frame.size).ravel() for proposal in scaled_proposals(proposals)]
    index = np.unique(inside, return_inverse=True)[1].ravel()
    means = [np.bincount(index, shares) / np.bincount(index) for shares in values]
    winner = np.argmax(means, 0)[index].reshape(inside.shape)
    regions = connected_components(winner + 1, connectivity=1) if components else winner + 1
    return in_order(plain_absorb(regions, min_area * regions.size), proposals, winner, regions)


def in_order(numbers: Array, proposals: Proposals, winner: Array, before: Array | None = None) -> LabelMap:
    """Number the regions by first appearance. before: the regions as they were before they absorbed others."""
    labels = np.zeros(numbers.shape, np.int32)
    names, places = np.unique(numbers, return_index=True)
    tokens = []
    for name in names[np.argsort(places)]:
        tokens.append(proposals.members[winner[(numbers if before is None else before) == name][0]])
        labels[numbers == name] = len(tokens)
    return LabelMap(labels, tuple(tokens))


def plain_absorb(regions: Array, smallest: float) -> Array:
    """Merge the smallest region into the neighbour with the longest shared border until none is too small, recounting every time."""
    regions = regions.astype(np.int32)
    while True:
        areas = np.bincount(regions.ravel())
        small = [(area, name) for name, area in enumerate(areas.tolist()) if 0 < area < smallest]
        if len(small) == 0 or np.count_nonzero(areas) == 1:
            return regions
        name = min(small)[1]
        lengths = np.zeros(len(areas), int)
        for first, second in ((regions[:, :-1], regions[:, 1:]), (regions[:-1], regions[1:])):
            lengths += np.bincount(second[first == name], minlength=len(areas)) + np.bincount(first[second == name], minlength=len(areas))
        lengths[name] = 0
        regions[regions == name] = max(np.flatnonzero(lengths), key=lambda other: (lengths[other], areas[other], -other))


def memory_of(count: int, size: tuple[int, int], plainly: bool) -> float:
    """Memory, in MiB, that a label map (H, W) of `count` proposals takes."""
    one_core()
    proposals = Proposals(random_maps(count, size).maps.double(), tuple((number,) for number in range(count)), Frame(size, (0, 0, *size)))
    before = peak()
    if plainly:
        plain_label_map(proposals)
    else:
        label_map(proposals)
    return peak() - before


def memory_of_attention(maps: int) -> float:
    """Memory, in MiB, to compute `maps` token maps, on top of the queries and keys: HEADS heads, SIDE² image and `text_tokens`."""
    one_core()
    query, key = torch.randn(2, 1, HEADS, SIDE**2 + text_tokens(maps), 64)
    token_attention(Attention(query[:, :1], key[:, :1]), 1, (0,))  # warm up
    before = peak()
    token_attention(Attention(query, key), SIDE**2, range(SIDE**2, SIDE**2 + maps))
    return peak() - before


def text_tokens(maps: int) -> int:
    """Those of SD3, or more for models with more maps."""
    return max(TEXT, maps)


def in_words(measured: dict[str, Any]) -> str:
    """Format the figures, one line each, with the plain version and the ratio."""
    lines = [f'{measured["maps"]} maps of {SIDE} x {SIDE}; one core of: {measured_on(measured)}']
    for size, taken in measured['pictures'].items():
        lines.append(f'picture of {size:12} {"ms":>12} {"plainly":>10} {"ratio":>9}')
        for step, words in STEPS.items():
            one = taken[step]
            beside = f' {one["plain"]:10.2f} {one["ratio"]:7.1f} x' if 'plain' in one else ''
            lines.append(f'  {words:28} {one["ours"]:8.2f}{beside}')
    memory = measured['memory_mib']
    rows = ((f'{KINDS} proposals', 'proposals'), (f'{3 * KINDS} proposals', 'three_times_as_many'), (f'{KINDS}, plainly', 'plainly'))
    tokens = SIDE**2 + text_tokens(measured['maps'])
    attention = f'memory to compute the maps from {HEADS} heads and {tokens} tokens: {memory["attention"]:.1f} MiB'
    return '\n'.join([*lines, f'memory at {size}', *(f'  {words:28} {memory[name]:8.1f} MiB' for words, name in rows), attention])
