"""Measures of each transformer block on a picture: how well its maps group pixels, where attention goes, and the norms of values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from padseg.backbones import Backbone
from padseg.backbones.recorder import QUERIES_AND_KEYS, What, requests_of, watch
from padseg.errors import UsageError
from padseg.evaluation.metrics import ClassCounts, class_scores, class_table, counts_of, region_scores, widened
from padseg.methods.open_vocabulary import LabelOptions, prepare
from padseg.methods.seg4diff import Options
from padseg.methods.stages.attention import token_attention
from padseg.methods.stages.enlarging import upsample
from padseg.methods.stages.labels import label_map
from padseg.methods.stages.latents import encode_steps
from padseg.methods.stages.proposals import merge_each
from padseg.methods.stages.scores import means, scale_scores
from padseg.methods.stages.token_maps import read_prompt
from padseg.types import Array, Attention, Frame, Image, Latent, Prompt, TokenMaps

T = TypeVar('T')
K = TypeVar('K')
ENLARGED = 4  # side of an image token in pixels when label maps are compared
THRESHOLDS = tuple(np.geomspace(0.01, 5, 8).tolist())  # for merging; distances between maps differ from block to block


class Cell(NamedTuple):
    """Where maps come from. step: counted from the end of the schedule, from 1; layer: block, from 0; head: None for the mean of heads."""

    step: int
    layer: int
    head: int | None


@torch.no_grad()
def every_block(
    latent: Latent, backbone: Backbone, prompt: Prompt, reduce: Callable[[Attention], T], what: tuple[What, ...] = QUERIES_AND_KEYS
) -> list[T]:
    """Apply `reduce` to the attention of every block, in one forward pass on a latent (1, C, H', W').

    Raises UsageError if the model was not loaded whole.
    """
    if backbone.layers < backbone.spec.layers:
        raise UsageError(f'only blocks 0..{backbone.layers - 1} of {backbone.spec.layers} were loaded: use load(whole=True)')
    layers = range(backbone.layers)
    with watch(requests_of(backbone, layers, reduce, what)) as kept:
        backbone.denoise(latent.z, latent.timestep, prompt)
    return [kept[layer] for layer in layers]


def grid_of(latent: Latent, backbone: Backbone) -> tuple[int, int]:
    """Return the token grid (h, w) of a latent."""
    height, width = latent.z.shape[2:]
    return height // backbone.patch, width // backbone.patch


def token_groups(backbone: Backbone, prompt: Prompt, image_tokens: int) -> dict[str, list[int]]:
    """Group the token indices by kind.

    image: image tokens; first: the first of the text tokens whose maps are read; pads: the others of them; template: those of them that are
    of a template of more than a start and an end; registers: those that stand for no text; rest: all remaining tokens, if there are any.
    """
    start, tokens = backbone.first_image_token(prompt), image_tokens + prompt.embeds.shape[1]
    columns = backbone.text_columns(prompt, image_tokens)
    registers = prompt.kinds.count('register')  # before the text
    first, *pads = columns[registers:]
    groups = {'image': list(range(start, start + image_tokens)), 'first': [first], 'pads': pads}
    if registers:
        groups['registers'] = columns[:registers]
    if prompt.kinds.count('template') > 2:
        kinds = dict(zip(pads, prompt.kinds[1:], strict=True))
        groups |= {
            'pads': [token for token in pads if kinds[token] == 'pad'],
            'template': [token for token in pads if kinds[token] != 'pad'],
        }
    known = {token for group in groups.values() for token in group}
    rest = [token for token in range(max(tokens, max(known))) if token not in known]  # T5's tokens in SD3; what fills up Z-Image's image
    return {**groups, 'rest': rest} if rest else groups


def attention_shares(seen: Attention, groups: Mapping[str, Sequence[int]]) -> Array:
    """Attention between groups of tokens: (G, G), rows = queries, columns = keys, averaged over heads and over the queries of a group.

    Every token is in exactly one group (else ValueError), so rows sum to 1. Uniform attention would give each column its share of the
    tokens. Image-to-text attention as in Seg4Diff, Sec. 3, is the image row summed over the text groups.
    """
    tokens = seen.key.shape[2]
    if sorted(token for group in groups.values() for token in group) != list(range(tokens)):
        raise ValueError('every token must belong to exactly one group')
    whole = token_attention(seen, tokens, range(tokens))[0].cpu().numpy()  # (L, L)
    return np.array([[whole[np.ix_(rows, columns)].sum(1).mean() for columns in groups.values()] for rows in groups.values()])


def value_norms(values: Tensor, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Mean Euclidean norm of the values (heads, L, d), with heads concatenated, in each group of tokens (Seg4Diff, Fig. 4)."""
    norms = values.transpose(0, 1).flatten(1).float().norm(dim=1)  # (L,)
    return {name: float(norms[list(tokens)].mean()) for name, tokens in groups.items()}


def block_maps(latent: Latent, backbone: Backbone, prompt: Prompt, reduce: Callable[[dict[int | None, Tensor]], T]) -> list[T]:
    """Apply `reduce` to the maps of every block (see `head_maps`), in one forward pass."""
    grid, first = grid_of(latent, backbone), backbone.first_image_token(prompt)
    columns = backbone.text_columns(prompt, grid[0] * grid[1])
    return every_block(latent, backbone, prompt, lambda seen: reduce(head_maps(seen, grid, columns, first)))


def head_maps(seen: Attention, grid: tuple[int, int], columns: Sequence[int], first: int) -> dict[int | None, Tensor]:
    """Return the maps of these key columns for each head and, under None, for the mean of heads: (T, h, w) float32 each.

    first: index of the first image token.
    """
    queries, heads = grid[0] * grid[1], range(seen.query.shape[1])
    maps: dict[int | None, Tensor] = {
        head: token_attention(seen, queries, columns, first=first, head=head)[0].T.unflatten(1, grid) for head in heads
    }
    return {None: torch.stack([*maps.values()]).mean(0), **maps}


def coverings(maps: Tensor, truth: Array, normalisation: str, thresholds: Sequence[float] = THRESHOLDS) -> Array:
    """Covering of the ground truth by the merged maps (T, h, w) at each threshold, without refinement: (thresholds,) in 0..1.

    truth: (H, W) regions. Both are compared at ENLARGED x ENLARGED pixels per image token.
    """
    return covered(regions_at(maps, normalisation, thresholds, ENLARGED), truth)


def covered(found: Sequence[Array], truth: Array) -> Array:
    """Covering of the ground truth (H, W) by each of several label maps (h, w) of one size, at which they are compared: values in 0..1."""
    seen = cv2.resize(truth.astype(np.int32), found[0].shape[::-1], interpolation=cv2.INTER_NEAREST)
    return np.array([region_scores(seen, labels).covering for labels in found])


def regions_at(maps: Tensor, normalisation: str, thresholds: Sequence[float], scale: int) -> list[Array]:
    """Label maps of the merged maps (T, h, w) at each threshold, without refinement: (scale h, scale w) int32 each."""
    size = (maps.shape[1] * scale, maps.shape[2] * scale)
    read = TokenMaps(maps, tuple(map(str, range(len(maps)))), Frame(size, (0, 0, *size)))
    found: list[Array] = []
    before = None
    for proposals in merge_each(read, thresholds, normalisation):
        found.append(found[-1] if before == proposals.members else label_map(proposals).labels)
        before = proposals.members
    return found


def grouping(image: Image, truth: Array, backbone: Backbone, options: Options, steps: Sequence[int] = ()) -> dict[Cell, Array]:
    """Coverings of the ground truth (H, W) by the maps of every block: (thresholds,) for each cell.

    Each head is measured at the step of the options, and only the mean of heads at the other steps. The model must see the whole picture:
    raises UsageError unless geometry is `whole` or `stretch`.
    """
    resolved = options.resolve(backbone.spec)
    if resolved.geometry not in ('whole', 'stretch'):
        raise UsageError(f'analysis needs geometry whole or stretch; got {resolved.geometry}')
    by_cell: dict[Cell, Array] = {}
    prompt = read_prompt(backbone, resolved.tokens)
    wanted = [resolved.step, *(step for step in steps if step != resolved.step)]
    for step, latent in zip(wanted, encode_steps(image, backbone, resolved, wanted), strict=True):
        reduce = partial(head_coverings, truth=truth, normalisation=resolved.normalisation, heads=step == resolved.step)
        for layer, scores in enumerate(block_maps(latent, backbone, prompt, reduce)):
            by_cell |= {Cell(step, layer, head): covering for head, covering in scores.items()}
    return by_cell


def head_coverings(maps: dict[int | None, Tensor], truth: Array, normalisation: str, heads: bool) -> dict[int | None, Array]:
    """Coverings for the mean of heads and, if `heads`, for each head."""
    return {head: coverings(own, truth, normalisation) for head, own in maps.items() if heads or head is None}


def mean_iou(counts: Iterable[Mapping[K, ClassCounts]]) -> dict[K, float]:
    """mIoU of each cell, in 0..1: pixels are summed over pictures, classes absent from the ground truth are left out."""
    total: dict[K, ClassCounts] = {}
    for by_cell in counts:
        for cell, one in by_cell.items():
            total[cell] = total[cell].plus(one) if cell in total else one
    return {cell: class_scores(one, absent='left-out').miou for cell, one in total.items()}


def best(scores: Sequence[dict[Cell, Array]]) -> dict[Cell, float]:
    """Mean score of each cell over pictures, in 0..1, at the one threshold that maximises it."""
    return {cell: float(np.mean([by_cell[cell] for by_cell in scores], axis=0).max()) for cell in scores[0]}


def word_counts(image: Image, truth: Array, backbone: Backbone, classes: Sequence[str], options: LabelOptions) -> dict[Cell, ClassCounts]:
    """Count how well the words of a prompt find their classes in every block, for each head and for the mean of heads.

    truth: (H, W) class indices from 0; other values are void. Prompts name the classes in the picture, as in Seg4Diff, Sec. 4.3. Pixels are
    compared without refinement, at the first step of the options. There is one forward pass per prompt.
    """
    numbers = shown_classes(truth, classes)
    if not numbers:
        return {}
    maps = named_maps(image, backbone, [classes[number] for number in numbers], options)
    return {cell: counted(truth, scores.cpu().numpy(), numbers, len(classes)) for cell, scores in maps.items()}


def shown_classes(truth: Array, classes: Sequence[str]) -> list[int]:
    """Numbers of the classes in a label map (H, W) of class indices from 0; other values are void."""
    return [number for number in np.unique(truth).tolist() if 0 <= number < len(classes)]


def counted(truth: Array, scores: Array, numbers: Sequence[int], classes: int) -> ClassCounts:
    """Compare a label map (H, W) with the class of the highest score (C', h, w) at its size. numbers: of the C' classes, from 0."""
    height, width = truth.shape
    enlarged = np.stack([upsample(values, (height, width)) for values in scores])  # (C', H, W)
    pred = np.array(numbers)[enlarged.argmax(0)]
    table = widened(class_table(truth, pred, classes, compacted=False))  # (C, C)
    return counts_of(table, np.arange(classes))


def named_maps(image: Image, backbone: Backbone, classes: Sequence[str], options: LabelOptions) -> dict[Cell, Tensor]:
    """Class scores in every block, for each head and for the mean of heads: (C, h, w) each, from one forward pass per prompt."""
    naming = prepare(backbone, options, classes)
    resolved = naming.options
    step = resolved.steps[0]
    (latent,) = encode_steps(image, backbone, resolved, (step,))
    parts: dict[Cell, list[Tensor]] = {}
    for prompt in naming.prompts:
        reduce = partial(head_means, prompt=prompt, scores=resolved.scores)
        for layer, scores in enumerate(block_maps(latent, backbone, prompt, reduce)):
            for head, maps in scores.items():
                parts.setdefault(Cell(step, layer, head), []).append(maps)
    return {cell: scale_scores(torch.cat(maps), len(classes), resolved.scores)[: len(classes)] for cell, maps in parts.items()}


def head_means(maps: dict[int | None, Tensor], prompt: Prompt, scores: str) -> dict[int | None, Tensor]:
    """Average the maps of a prompt's tokens into maps of its names: (C, h, w) each."""
    return {head: means(own, prompt, scores) for head, own in maps.items()}


def anatomy(latent: Latent, backbone: Backbone) -> dict[str, Any]:
    """Measure attention shares (layers, G, G) and norms of values (layers, G) of every block, with the names and sizes of the groups."""
    prompt, grid = backbone.null_prompt, grid_of(latent, backbone)
    groups = token_groups(backbone, prompt, grid[0] * grid[1])

    def shares_and_norms(seen: Attention) -> tuple[Array, list[float]]:
        assert seen.value is not None  # requested below
        return attention_shares(seen, groups), [*value_norms(seen.value[0], groups).values()]

    shares, norms = zip(*every_block(latent, backbone, prompt, shares_and_norms, ('values',)), strict=True)
    return {
        'groups': [*groups],
        'tokens': [len(tokens) for tokens in groups.values()],
        'shares': np.stack(shares),
        'norms': np.array(norms),
    }
