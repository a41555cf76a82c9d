"""GoCA's aggregation of all cross-attention maps of one forward pass to maps of classes, Sec. 3.1 to 3.4, on plain tensors.

Axes: B pictures, H heads of width d, C = H d channels, n text tokens, (h, w) the grid of a layer, N = h w its pixels in row-major order.
Results have the dtype of their inputs. Where nothing can be divided, shares are equal and maps are 0, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from padseg.methods.stages.captions import Roles
from padseg.types import Attention

Grid = tuple[int, int]  # (h, w) in tokens
CELLS_CPU, CELLS_GPU = 2**21, 2**24  # attention weights that exist at any time: 8 MB, which a processor's cache nearly holds, and 64 MB
CELLS_HEAD = 2**19  # the same of one head on a CPU: 2 MB
SAFE, TINY = 92.0, 1e-30  # 2^SAFE is far from overflow; sums of powers above TINY are as exact as others
LOG2_E = 1 / math.log(2)
ROWS = 512  # of two affinities, compared at a time
ADDED_TO_UNION = 1e-4  # by the released code
BLUR_TAPS, BLUR_SIGMA = 5, 1.1  # torchvision's sigma for this many taps


# Section 3.1: the maps of one layer


class Heads(NamedTuple):
    """How the maps of a layer's heads are weighted. by: a key of the options; weight: (C, C) of the output projection, as (out, in).

    spectral: also weigh a head by the spectral norm of V W^T (VW). text_only: z is the attention to the text alone, not the layer's output.
    """

    by: str
    weight: Tensor | None = None
    spectral: bool = False
    text_only: bool = False


def cross_map(seen: Attention, columns: Sequence[int], heads: Heads, first: int = 0, count: int | None = None) -> Tensor:
    """The attention of `count` image tokens, from query `first` on, to the text at `columns`, aggregated over heads: (B, N, n) float32."""
    return layer_maps(seen, columns, heads, first, count)[0]


def self_map(seen: Attention, grid: Grid, to: Grid, first: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mean over heads of the attention among image tokens, which lie from `first` on, with pixels left out as in `smaller`."""
    return layer_maps(seen, (), None, first, math.prod(grid), (grid, to, dtype))[1]


def layer_maps(
    seen: Attention,
    columns: Sequence[int],
    heads: Heads | None,
    first: int = 0,
    count: int | None = None,
    among: tuple[Grid, Grid, torch.dtype] | None = None,
    image_keys: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Both maps of a layer whose queries meet text and image keys in one softmax, from a single pass: those of `cross_map` and `self_map`.

    Either is empty if it is not asked for. Weights of some queries exist at any time, of all heads; everything is float32. image_keys: the
    first image token among the keys, where the queries are those of the smaller grid already.
    """
    query, key = seen.query, seen.key
    count = query.shape[2] - first if count is None else count
    empty = key.new_empty(0, dtype=torch.float32)
    if not heads:
        return empty, image_map(seen, first, *among) if among else empty
    if among and image_keys is None and smaller_grid(*among[:2]) != among[0]:  # other queries are read for one than for the other
        return layer_maps(seen, columns, heads, first, count)[0], image_map(seen, first, *among)
    keys = key.float().transpose(2, 3)  # (B, H, d, L)
    projection = projection_of(heads.weight, count) if heads.weight is not None and heads.by != 'average' else None
    together = list(columns) == list(range(columns[0], columns[-1] + 1))  # as in all families; a slice needs no copy
    picked: slice | list[int] = slice(columns[0], columns[-1] + 1) if together else list(columns)
    values = seen.value[:, :, picked].float() if seen.value is not None else None  # (B, H, n, d)
    spectral = spectral_norms(values, projection) if heads.spectral and values is not None and projection else None
    cross, among_image = [], []
    start = first if image_keys is None else image_keys
    image = slice(start, start + math.prod(among[0])) if among else None
    read = parts_by_head if key.device.type == 'cpu' else parts_of_heads
    for rows in torch.arange(first, first + count, device=key.device).split(chunk_of(query, key, by_head=read is parts_by_head)):
        text, mean = read(seen, keys, rows, picked, image)  # (B, H, rows, n), (B, rows, N)
        z = (text @ values) if heads.text_only and values is not None else None
        if z is None and seen.output is not None:
            z = seen.output[:, :, rows].float()
        weights = head_weights(z, projection, heads.by, spectral) if projection and z is not None else None
        cross.append(aggregate_heads(text, weights))
        if among:
            among_image.append(resized_keys(mean, among[0], smaller_grid(*among[:2])).to(among[2]))
    return torch.cat(cross, 1), torch.cat(among_image, 1) if among else empty


def image_map(seen: Attention, first: int, grid: Grid, to: Grid, dtype: torch.dtype) -> Tensor:
    """See `self_map`."""
    kept = smaller_grid(grid, to)
    queries = first + source_pixels(grid, kept).to(seen.key.device)
    result = torch.empty((len(seen.key), len(queries), math.prod(kept)), dtype=dtype, device=seen.key.device)
    means = head_means(seen, queries) if seen.mask is None and seen.key.device.type == 'cpu' else softmax_means(seen, queries)
    for number, rows, mean in means:
        result[number, rows] = resized_keys(mean[..., first : first + math.prod(grid)], grid, kept)
    return result


def chunk_of(query: Tensor, key: Tensor, by_head: bool = False) -> int:
    """How many queries are read at a time, of all pictures and heads or of one head of one picture."""
    if by_head:
        return max(1, CELLS_HEAD // key.shape[2])
    cells = CELLS_CPU if key.device.type == 'cpu' else CELLS_GPU
    return max(1, cells // (query.shape[0] * query.shape[1] * key.shape[2]))


def parts_of_heads(seen: Attention, keys: Tensor, rows: Tensor, text: slice | list[int], image: slice | None) -> tuple[Tensor, Tensor]:
    """Of the attention weights of some queries, those to the text, (B, H, rows, n), and the mean over heads of those to the image,
    (B, rows, N), which is empty if it is not asked for. keys: (B, H, d, L) float32."""
    shares = softmax_rows(seen, keys, rows)
    return shares[..., text], keys.new_empty(0) if image is None else shares[..., image].mean(1)


def parts_by_head(seen: Attention, keys: Tensor, rows: Tensor, text: slice | list[int], image: slice | None) -> tuple[Tensor, Tensor]:
    """The same from one head after another: products of many rows are faster on a CPU than many products of few."""
    of_text, means = [], []
    for number in range(len(keys)):
        total = None
        for head in range(keys.shape[1]):
            part = np.s_[number : number + 1, head : head + 1]
            mask = seen.mask if seen.mask is None else seen.mask[(None,) * (4 - seen.mask.ndim)]
            own = None if mask is None else mask.expand(len(keys), keys.shape[1], -1, -1)[part]
            shares = softmax_rows(seen._replace(query=seen.query[part], mask=own), keys[part], rows)[0, 0]  # (rows, L)
            of_text.append(shares[:, text])
            if image is not None:
                total = shares[:, image].clone() if total is None else total.add_(shares[:, image])
        if total is not None:
            means.append(total.div_(keys.shape[1]))
    return torch.stack(of_text).unflatten(0, keys.shape[:2]), torch.stack(means) if means else keys.new_empty(0)


def softmax_rows(seen: Attention, keys: Tensor, rows: Tensor) -> Tensor:
    """The attention weights of some queries over all keys: (B, H, rows, L) float32. keys: (B, H, d, L) float32."""
    query = seen.query[:, :, rows].float() * seen.query.shape[-1] ** -0.5
    scores = query @ keys  # (B, H, rows, L)
    if seen.mask is not None:
        mask = seen.mask[(None,) * (4 - seen.mask.ndim)]
        scores += mask[:, :, rows] if mask.shape[2] > 1 else mask
    return scores.softmax(-1)


def softmax_means(seen: Attention, queries: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield pictures, some of the queries, and the mean over heads of their `softmax_rows`, (B, rows, L) float32."""
    keys, start = seen.key.float().transpose(2, 3), 0
    for some in queries.split(chunk_of(seen.query, seen.key)):
        yield slice(None), slice(start, start + len(some)), softmax_rows(seen, keys, some).mean(1)
        start += len(some)


def head_means(seen: Attention, queries: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """`softmax_means` of attention without a mask on a CPU, in half the time; what it yields is overwritten by the next.

    Heads come one after another, so that their scores stay in the cache, and the largest score of a row is not searched: it is at most
    |q| |k|. What this exceeds SAFE by is taken off the scores by one more channel of queries and keys. Powers are of 2, as torch computes
    them in a third of the time that powers of e take; queries are scaled accordingly.
    """
    query = seen.query[:, :, queries].float() * (LOG2_E * seen.query.shape[-1] ** -0.5)  # (B, H, Q, d)
    key = seen.key.float().transpose(2, 3)  # (B, H, d, L)
    longest = key.norm(dim=2).amax(2)[..., None, None]  # (B, H, 1, 1)
    excess = (query.norm(dim=3, keepdim=True) * longest - SAFE).clamp_min(0)  # (B, H, Q, 1)
    query, key = torch.cat((query, -excess), 3), torch.cat((key, torch.ones_like(key[:, :, :1])), 2)
    chunk = min(len(queries), max(1, CELLS_HEAD // key.shape[3]))
    powers, mean = torch.empty((2, chunk, key.shape[3]))
    for number in range(len(query)):
        for start in range(0, len(queries), chunk):
            rows = slice(start, start + chunk)
            count = len(queries[rows])
            if not head_mean(query[number, :, rows], key[number], powers[:count], mean[:count]):
                one = seen._replace(query=seen.query[number : number + 1])
                mean[:count] = softmax_rows(one, seen.key[number : number + 1].float().transpose(2, 3), queries[rows]).mean(1)
            yield slice(number, number + 1), rows, mean[None, :count]


def head_mean(query: Tensor, key: Tensor, powers: Tensor, mean: Tensor) -> bool:
    """Write the mean over heads of softmax(query key / log2 e), (H, Q, d) and (H, d, L), to `mean`, (Q, L); scores are at most SAFE.

    False if a sum is too small to be exact, as the largest score is far smaller, or if something is not finite. powers: (Q, L), is
    overwritten.
    """
    for head in range(len(query)):
        torch.mm(query[head], key[head], out=powers)
        sums = powers.exp2_().sum(1, keepdim=True)  # (Q, 1)
        if not (sums > TINY).all():
            return False
        share = 1 / (len(query) * sums)
        torch.mul(powers, share, out=mean) if head == 0 else mean.addcmul_(powers, share)
    return True


class Projection(NamedTuple):
    """An output projection W, (C, C) as (out, in), by which heads are compared. gram: M = W^T W, if there are more pixels than channels."""

    weight: Tensor
    gram: Tensor | None = None


def projection_of(weight: Tensor, pixels: int) -> Projection:
    """Prepare a projection for so many pixels: whichever of W^T (W z) and M z takes less work."""
    weight = weight.float() if weight.dtype != torch.float64 else weight
    return Projection(weight, weight.T @ weight if pixels > len(weight) else None)


def head_products(z: Tensor, projection: Projection) -> Tensor:
    """Eq. 6: <o_h, o> with o_h = W_h z_h and o their sum, for each pixel: (B, H, N, d) -> (B, H, N).

    It is z_h . (W^T W z)_h, so that no (N, H, C) tensor is needed. The sum over heads is |o|^2; single products can be negative.
    """
    weight, gram = projection
    pixels = z.transpose(1, 2).flatten(2)  # (B, N, C)
    mixed = pixels @ weight.T @ weight if gram is None else pixels @ gram
    return (z * mixed.unflatten(2, (z.shape[1], -1)).transpose(1, 2)).sum(-1)


def head_norms(z: Tensor, projection: Projection) -> Tensor:
    """|o_h| for each pixel: (B, H, N, d) -> (B, H, N)."""
    return ((z @ head_blocks(projection, z.shape[1])) * z).sum(-1).clamp_min(0).sqrt()


def head_blocks(projection: Projection, heads: int) -> Tensor:
    """W_h^T W_h of each head: (H, d, d)."""
    of_heads = projection.weight.unflatten(1, (heads, -1)).transpose(0, 1)  # (H, C, d)
    return of_heads.transpose(1, 2) @ of_heads


def spectral_norms(values: Tensor, projection: Projection) -> Tensor:
    """The spectral norm of V_h W_h^T of each head: (B, H, n, d) -> (B, H)."""
    root = torch.linalg.qr(values, mode='r').R  # (B, H, min(n, d), d)
    square = root @ head_blocks(projection, values.shape[1]) @ root.transpose(2, 3)
    return torch.linalg.eigvalsh(square)[..., -1].clamp_min(0).sqrt()


def head_weights(z: Tensor, projection: Projection, by: str, spectral: Tensor | None = None) -> Tensor:
    """Weight of each head at each pixel, summing to 1 over heads: (B, H, N, d) -> (B, H, N).

    by: average; dot, Eq. 6 as it is, whose weights can be negative; dot-clamped, without its negative part; l2, |o_h|; cosine, of the angle
    between o_h and o. spectral: (B, H), a factor of each head. Where o is 0 heads weigh the same (the released clamped variant: 1 each).
    """
    if by == 'average':
        return z.new_full(z.shape[:3], 1 / z.shape[1])
    if by == 'l2':
        raw = head_norms(z, projection)
    else:
        raw = head_products(z, projection)
        if by == 'dot-clamped':
            raw = raw.clamp_min(0)
        if by == 'cosine':
            length = raw.sum(1, keepdim=True).clamp_min(0).sqrt()
            raw = quotient(raw, head_norms(z, projection) * length)
    if spectral is not None:
        raw = raw * spectral[..., None]
    total = raw.sum(1, keepdim=True)
    return torch.where(total == 0, 1 / z.shape[1], quotient(raw, total))


def aggregate_heads(attention: Tensor, weights: Tensor | None = None) -> Tensor:
    """Eq. 7: the weighted sum of the maps of all heads; without weights their mean: (B, H, N, n), (B, H, N) -> (B, N, n)."""
    return attention.mean(1) if weights is None else (attention * weights[..., None]).sum(1)


# Section 3.2: the map of all layers


def affinity(dense: Tensor, channels: str = 'all') -> Tensor:
    """Eq. 8: softmax over rows of D D^T / sqrt(C) of a dense feature: (B, C, h, w) -> (B, N, N).

    channels: 'first' reads the first channel alone, as the released code does.
    """
    pixels = (dense[:, :1] if channels == 'first' else dense).flatten(2).transpose(1, 2)  # (B, N, C)
    return (pixels * pixels.shape[2] ** -0.5 @ pixels.transpose(1, 2)).softmax(-1)


def resized(maps: Tensor, grid: Grid, to: Grid, renormalise: bool = False) -> Tensor:
    """Resize an affinity from one grid to another, queries by nearest neighbour and keys bilinearly: (B, N, N) -> (B, N', N').

    Rows then sum to N'/N of what they did, unless they are renormalised.
    """
    if grid != to:
        maps = resized_keys(maps[:, source_pixels(grid, to).to(maps.device)], grid, to)
    return quotient(maps, maps.sum(2, keepdim=True)) if renormalise else maps


def resized_keys(maps: Tensor, grid: Grid, to: Grid) -> Tensor:
    """(B, Q, N) -> (B, Q, N')."""
    if grid == to:
        return maps
    return enlarged(maps.unflatten(2, grid), to).flatten(2)


def source_pixels(grid: Grid, to: Grid) -> Tensor:
    """The pixel of a grid that is nearest to each pixel of another one, as torch's `nearest` has it: (N',)."""
    row, column = (torch.arange(wanted) * length // wanted for length, wanted in zip(grid, to, strict=True))
    return (row[:, None] * grid[1] + column).flatten()


def smaller_grid(grid: Grid, to: Grid) -> Grid:
    """The grid that an affinity is kept in if it is wanted in another: the wanted one if it has fewer rows and columns."""
    return to if to[0] <= grid[0] and to[1] <= grid[1] else grid


def similarity(dense: Tensor, own: Tensor, by: str) -> Tensor:
    """Eq. 9: the weight of a layer, from the affinity of the dense feature and its own, (B, N, N) each: (B,) float64.

    by: dot, the sum of products; cosine, that of the matrices' angle; l2, 1 / their distance; layer-mse, 1 / the summed distance of rows;
    layer-iou, the sum of minima by that of maxima; uniform, 1. layer-mse and layer-iou are the released variants, l2 and cosine ours.
    """

    def total(of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        pairs = zip(dense.split(ROWS, 1), own.split(ROWS, 1), strict=True)
        return torch.stack([of(one, other.to(one.dtype)).double() for one, other in pairs]).sum(0)  # (B,)

    if by == 'uniform':
        return torch.ones(len(dense), dtype=torch.float64, device=dense.device)
    if by in ('l2', 'layer-mse'):
        squares = total(lambda one, other: (one - other).square().sum((1, 2)))
        distance = squares.sqrt() if by == 'l2' else total(lambda one, other: (one - other).norm(dim=2).sum(1))
        return 1 / distance.clamp_min(torch.finfo(dense.dtype).tiny)
    if by == 'layer-iou':
        shared = total(lambda one, other: torch.minimum(one, other).sum((1, 2)))
        return shared / (total(lambda one, other: torch.maximum(one, other).sum((1, 2))) + ADDED_TO_UNION)
    products = total(lambda one, other: (one * other).sum((1, 2)))
    if by == 'dot':
        return products
    squares = total(lambda one, _: one.square().sum((1, 2))) * total(lambda _, other: other.square().sum((1, 2)))
    return quotient(products, squares.sqrt())


def enlarged(maps: Tensor, to: Grid) -> Tensor:
    """Resize maps bilinearly with half-pixel centres: (..., h, w) -> (..., h', w')."""
    if maps.shape[-2:] == to:
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return interpolate(flat, to, mode='bilinear', align_corners=False).reshape(*maps.shape[:-2], *to)


def aggregate_layers(maps: Sequence[Tensor], weights: Tensor, to: Grid) -> Tensor:
    """Eq. 10: the weighted mean of the maps of all layers, of any grids, then shares: L times (B, n, h, w), (L, B) -> (B, n, h', w')."""
    shares = layer_shares(weights)
    total = sum(share[:, None, None, None].to(own.dtype) * enlarged(own, to) for share, own in zip(shares, maps, strict=True))
    assert isinstance(total, Tensor)
    return token_shares(total)


def layer_shares(weights: Tensor) -> Tensor:
    """Layer weights above 0, summing to 1 over layers: (L, B) -> (L, B)."""
    above = weights.clamp_min(0)
    total = above.sum(0, keepdim=True)
    return torch.where(total == 0, 1 / len(weights), quotient(above, total))


def token_shares(maps: Tensor) -> Tensor:
    """What is above 0 of each pixel's values as shares over all tokens, as the released code does: (B, n, h, w) -> (B, n, h, w)."""
    above = maps.clamp_min(0)
    return quotient(above, above.sum(1, keepdim=True))


# Section 3.3: the maps of classes


def object_scores(maps: Tensor, objects: Sequence[Sequence[int]]) -> Tensor:
    """The mean over the tokens of each class or background object: (n, h, w) -> (C, h, w)."""
    return torch.stack([maps[list(tokens)].mean(0) for tokens in objects])


def rescaled(scores: Tensor, maps: Tensor, content: Sequence[int]) -> Tensor:
    """Eq. 11: scores by the sum over all content tokens, pixel by pixel: (C, h, w), (n, h, w) -> (C, h, w)."""
    return quotient(scores, maps[list(content)].sum(0))


def renormalised(maps: Tensor) -> Tensor:
    """Eq. 12: each map from 0 to 1, after the blur of the released code: (C, h, w) -> (C, h, w)."""
    return from_0_to_1(blurred(maps))


def blurred(maps: Tensor, taps: int = BLUR_TAPS, sigma: float = BLUR_SIGMA) -> Tensor:
    """Gaussian blur of taps x taps pixels, by default 5 x 5, maps mirrored at their borders: (C, h, w) -> (C, h, w)."""
    offsets = torch.arange(taps, dtype=maps.dtype, device=maps.device) - taps // 2
    kernel = (-0.5 * (offsets / sigma).square()).exp()
    kernel = kernel / kernel.sum()
    for axis in (1, 2):
        places = mirrored(maps.shape[axis], taps // 2).to(maps.device)
        beside = maps.index_select(axis, places).unfold(axis, taps, 1)  # (C, h, w, taps)
        maps = beside @ kernel
    return maps


def mirrored(length: int, reach: int) -> Tensor:
    """Places along an axis with as many before and behind as a blur reaches, mirrored without repeating the border."""
    period = max(1, 2 * (length - 1))
    places = torch.arange(-reach, length + reach) % period
    return torch.minimum(places, period - places).clamp_max(length - 1)


def from_0_to_1(maps: Tensor) -> Tensor:
    """Each map from 0 to 1 over its pixels; a flat one is 0: (C, h, w) -> (C, h, w)."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return quotient(maps - low, high - low)


def with_background(maps: Tensor, classes: int) -> Tensor:
    """The maps of classes, then the maximum of those of background objects, 0 if there are none: (C + O, h, w) -> (C + 1, h, w)."""
    objects = maps[classes:]
    background = objects.amax(0, keepdim=True) if len(objects) else torch.zeros_like(maps[:1])
    return torch.cat((maps[:classes], background))


def class_maps(maps: Tensor, roles: Sequence[Roles], rescale: bool = True) -> tuple[tuple[int, ...], Tensor]:
    """Numbers of the classes that have tokens, and Sec. 3.3 for a prompt: (n, h, w) -> (K + 1, h, w), background last.

    roles: of the columns of each tokenizer, over whose scores those of an object are averaged. An object that stands alone is not rescaled:
    its share would be the same everywhere.
    """
    numbers = tuple(dict.fromkeys(number for own in roles for number in own.classes))
    classes = [[own.classes[number] for own in roles if number in own.classes] for number in numbers]
    counts = {len(own.objects) for own in roles}
    objects = [list(same) for same in zip(*(own.objects for own in roles), strict=False)] if len(counts) == 1 else []
    if len(counts) > 1:  # one of the tokenizers does not know a word
        objects = [[columns] for own in roles for columns in own.objects]
    if not classes and not objects:
        return numbers, torch.zeros_like(maps[:1])
    scores = torch.stack([object_scores(maps, columns).mean(0) for columns in (*classes, *objects)])
    if rescale and len(scores) > 1:
        scores = rescaled(scores, maps, [column for own in roles for column in own.content])
    return numbers, with_background(renormalised(scores), len(classes))


# Section 3.4: refinement and decision


def propagated(maps: Tensor, self_map: Tensor) -> Tensor:
    """Eq. 13 once, not normalised: each pixel becomes the mean that its self-attention weighs, (C, h, w), (N, N) -> (C, h, w)."""
    return (maps.flatten(1) @ self_map.T).unflatten(1, maps.shape[1:])


def refined(maps: Tensor, self_map: Tensor, order: int) -> Tensor:
    """Eq. 13: maps propagated by the self-attention `order` times, then each from 0 to 1: (C, h, w), (N, N) -> (C, h, w)."""
    for _ in range(order):
        maps = propagated(maps, self_map)
    return from_0_to_1(maps)


def background_score(background: Tensor, tau: float, rule: str) -> Tensor:
    """The score of background from its map (h, w): offset, tau + B, as released; max of both, as in the paper; exact, B; avg, their mean;
    vanilla, tau."""
    if rule == 'exact':
        return background
    if rule == 'max':
        return background.clamp_min(tau)
    if rule == 'vanilla':
        return torch.full_like(background, tau)
    return (background + tau) / (2 if rule == 'avg' else 1)


def orders_of(maps: Tensor, self_map: Tensor, orders: int) -> Tensor:
    """Maps refined 0 .. orders - 1 times: (K, h, w), (N, N) -> (orders, K, h, w)."""
    steps = [maps]
    while len(steps) < orders:
        steps.append(propagated(steps[-1], self_map))
    return torch.stack([from_0_to_1(step) for step in steps])


def background_maps(background: Tensor, tau: float, rule: str) -> Tensor:
    """The maps of which the greatest is the score of background, once they are enlarged: (h, w) -> (1 or 2, h, w)."""
    if rule == 'max':
        return torch.stack((background, torch.full_like(background, tau)))
    return background_score(background, tau, rule)[None]


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """One by the other; 0 where the other is 0."""
    return torch.where(denominator == 0, 0, numerator / torch.where(denominator == 0, 1, denominator))
