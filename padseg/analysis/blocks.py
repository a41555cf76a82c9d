"""What the blocks of a transformer do with a picture: how well each groups it, where attention goes, how long values are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from padseg.backbones import Backbone
from padseg.backbones.recorder import watch
from padseg.errors import UsageError
from padseg.evaluation.metrics import ClassCounts, class_scores, class_table, counts_of, region_scores, widened
from padseg.methods.open_vocabulary import LabelOptions, prepare
from padseg.methods.seg4diff import Options
from padseg.methods.stages.attention import token_attention
from padseg.methods.stages.labels import label_map, upsample
from padseg.methods.stages.latents import encode_steps
from padseg.methods.stages.proposals import merge
from padseg.methods.stages.scores import means, scale_scores
from padseg.types import Array, Frame, Image, Latent, QueryKey, TokenMaps

ENLARGED = 4  # pixels a side that an image token has when label maps are compared
THRESHOLDS = tuple(np.geomspace(0.01, 5, 8).tolist())  # of merging; blocks differ in how far their maps are apart


class Forward(NamedTuple):
    """One forward. queries: of each block, with its keys; values: (L, D) of each block, tokens in the order of keys; grid: (h, w)
    image tokens.
    """

    queries: dict[int, QueryKey]
    values: dict[int, Tensor]
    grid: tuple[int, int]


class Cell(NamedTuple):
    """Where maps were read. step: from the end of the schedule, from 1; layer: block, from 0; head: one of them, or None for their mean."""

    step: int
    layer: int
    head: int | None


@torch.no_grad()
def record(latent: Latent, backbone: Backbone) -> Forward:
    """Queries, keys and values of all blocks from one forward on a latent (1, C, H', W'). UsageError if the model was not read whole."""
    if backbone.layers < backbone.spec.layers:
        raise UsageError(f'only blocks 0..{backbone.layers - 1} of {backbone.spec.layers} were read: load(whole=True) reads all')
    h, w = (length // backbone.patch for length in latent.z.shape[2:])
    modules = {layer: backbone.attention_module(layer) for layer in range(backbone.layers)}
    with values_of(modules) as values, watch(modules) as queries:
        backbone.denoise(latent.z, latent.timestep)
    first = backbone.first_image_token
    parts = {layer: found if first == 0 else found[::-1] for layer, found in values.items()}  # image first, or text
    joint = {layer: torch.cat(found, 1)[0].float() for layer, found in parts.items()}  # (L, D)
    return Forward(queries, joint, (h, w))


@contextmanager
def values_of(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, list[Tensor]]]:
    """The values of each layer's image and text tokens, (B, N, D) each; of all tokens where a block has one projection for both."""
    values: dict[int, list[Tensor]] = {layer: [] for layer in modules}
    handles = []
    for layer, module in modules.items():
        for name in ('to_v', 'add_v_proj'):
            projection = getattr(module, name, None)
            if projection is not None:
                handles.append(projection.register_forward_hook(lambda _, __, out, kept=values[layer]: kept.append(out)))
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def token_groups(forward: Forward, backbone: Backbone) -> dict[str, list[int]]:
    """Numbers of the tokens of each kind: image; first, the first text token that is read; pads, the others that are; and the rest."""
    start, image_tokens, tokens = backbone.first_image_token, forward.grid[0] * forward.grid[1], len(forward.values[0])
    first, *pads = backbone.text_columns(image_tokens)
    groups = {'image': list(range(start, start + image_tokens)), 'first': [first], 'pads': pads}
    known = {token for group in groups.values() for token in group}
    rest = [token for token in range(tokens) if token not in known]  # of SD3: the places of T5's tokens
    return {**groups, 'rest': rest} if rest else groups


def attention_shares(seen: QueryKey, groups: Mapping[str, Sequence[int]]) -> Array:
    """How attention is shared out: (G, G), row = tokens that look, column = tokens looked at, mean over heads and over the row's tokens.

    The groups hold every token once, so rows sum to 1; a block without preference would give each column its part of the tokens. Image
    to text, as Seg4Diff's Sec. 3 has it, is the row of the image summed over the groups of text.
    """
    tokens = seen.key.shape[2]
    if sorted(token for group in groups.values() for token in group) != list(range(tokens)):
        raise ValueError('every token belongs to one group')
    whole = token_attention(seen, tokens, range(tokens))[0].cpu().numpy()  # (L, L)
    return np.array([[whole[np.ix_(rows, columns)].sum(1).mean() for columns in groups.values()] for rows in groups.values()])


def value_norms(values: Tensor, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Mean Euclidean norm of the values (L, D), heads side by side, of each group of tokens (Seg4Diff, Fig. 4)."""
    norms = values.norm(dim=1)
    return {name: float(norms[list(tokens)].mean()) for name, tokens in groups.items()}


def cell_maps(forward: Forward, layer: int, backbone: Backbone) -> dict[int | None, Tensor]:
    """The maps of the text tokens that are read in a block, of each head and, under None, their mean: (T, h, w) float32 each."""
    h, w = forward.grid
    seen, columns = forward.queries[layer], backbone.text_columns(h * w)
    each = [token_attention(seen, h * w, columns, first=backbone.first_image_token, head=head)[0] for head in range(seen.query.shape[1])]
    heads: dict[int | None, Tensor] = {head: maps.T.unflatten(1, (h, w)) for head, maps in enumerate(each)}
    return {None: torch.stack([*heads.values()]).mean(0), **heads}


def coverings(maps: Tensor, truth: Array, normalisation: str, thresholds: Sequence[float] = THRESHOLDS) -> Array:
    """Covering of the truth by the merged maps (T, h, w) at each threshold, without refinement: (thresholds,) in 0..1.

    truth: (H, W) regions. Both are compared at ENLARGED pixels an image token.
    """
    size = (maps.shape[1] * ENLARGED, maps.shape[2] * ENLARGED)
    seen = cv2.resize(truth.astype(np.int32), size[::-1], interpolation=cv2.INTER_NEAREST)
    read = TokenMaps(maps, tuple(map(str, range(len(maps)))), Frame(size, (0, 0, *size)))
    found = [label_map(merge(read, threshold, normalisation)).labels for threshold in thresholds]
    return np.array([region_scores(seen, labels).covering for labels in found])


def grouping(image: Image, truth: Array, backbone: Backbone, options: Options, steps: Sequence[int] = ()) -> dict[Cell, Array]:
    """Coverings of a picture's truth (H, W) by the maps of every block: each head at the options' step, means of heads at the others.

    The model must see the whole picture (geometry `whole` or `stretch`). Returns (thresholds,) for each cell.
    """
    resolved = options.resolve(backbone.spec)
    if resolved.geometry not in ('whole', 'stretch'):
        raise UsageError(f'geometry is whole or stretch here; got {resolved.geometry}')
    found = {}
    wanted = [resolved.step, *(step for step in steps if step != resolved.step)]
    for step, latent in zip(wanted, encode_steps(image, backbone, resolved, wanted), strict=True):
        forward = record(latent, backbone)
        for layer in range(backbone.layers):
            for head, maps in cell_maps(forward, layer, backbone).items():
                if head is None or step == resolved.step:
                    found[Cell(step, layer, head)] = coverings(maps, truth, resolved.normalisation)
    return found


def mean_iou(counts: Iterable[dict[Cell, ClassCounts]]) -> dict[Cell, float]:
    """mIoU over the classes that the truth has, pixels of all pictures added up, of each cell: in 0..1."""
    total: dict[Cell, ClassCounts] = {}
    for each in counts:
        for cell, one in each.items():
            total[cell] = total[cell].plus(one) if cell in total else one
    return {cell: class_scores(one, absent='left-out').miou for cell, one in total.items()}


def best(scores: Sequence[dict[Cell, Array]]) -> dict[Cell, float]:
    """The mean over pictures at the threshold that is best for all of them, of each cell: in 0..1."""
    return {cell: float(np.mean([each[cell] for each in scores], axis=0).max()) for cell in scores[0]}


def word_counts(image: Image, truth: Array, backbone: Backbone, classes: Sequence[str], options: LabelOptions) -> dict[Cell, ClassCounts]:
    """How well the words of a prompt find their classes in every block, by each head and by their mean, from one forward a prompt.

    truth: (H, W), numbers of classes from 0, others are void. The names are those of the classes in the picture, as in Seg4Diff's Sec. 4.3;
    pixels are compared without refinement, at the first of the options' steps.
    """
    there = [number for number in np.unique(truth).tolist() if 0 <= number < len(classes)]
    found: dict[Cell, ClassCounts] = {}
    if not there:
        return found
    for cell, maps in named_maps(image, backbone, [classes[number] for number in there], options).items():
        height, width = truth.shape
        enlarged = np.stack([upsample(values, (height, width)) for values in maps.cpu().numpy()])  # (C', H, W)
        pred = np.array(there)[enlarged.argmax(0)]
        table = widened(class_table(truth, pred, len(classes), compacted=False))  # (C, C)
        found[cell] = counts_of(table, np.arange(len(classes)))
    return found


def named_maps(image: Image, backbone: Backbone, classes: Sequence[str], options: LabelOptions) -> dict[Cell, Tensor]:
    """The scores of classes in every block, by each head and by their mean: (C, h, w) each. One forward for each prompt."""
    naming = prepare(backbone, options, classes)
    resolved = naming.options
    step = resolved.steps[0]
    (latent,) = encode_steps(image, backbone, resolved, (step,))
    parts: dict[Cell, list[Tensor]] = {}
    for prompt in naming.prompts:
        reading = dataclasses.replace(backbone, prompt=prompt)
        forward = record(latent, reading)
        for layer in range(backbone.layers):
            for head, maps in cell_maps(forward, layer, reading).items():
                parts.setdefault(Cell(step, layer, head), []).append(means(maps, prompt, resolved.scores))
    return {cell: scale_scores(torch.cat(maps), len(classes), resolved.scores)[: len(classes)] for cell, maps in parts.items()}


def anatomy(latent: Latent, backbone: Backbone) -> dict[str, Any]:
    """Shares of attention (layers, G, G) and norms of values (layers, G) of every block, with the groups' names and sizes."""
    forward = record(latent, backbone)
    layers, groups = range(backbone.layers), token_groups(forward, backbone)
    return {
        'groups': [*groups],
        'tokens': [len(tokens) for tokens in groups.values()],
        'shares': np.stack([attention_shares(forward.queries[layer], groups) for layer in layers]),
        'norms': np.array([[*value_norms(forward.values[layer], groups).values()] for layer in layers]),
    }
