"""GoCA's aggregation in the slow, obvious way: all maps of all heads and layers in 64 bits, explicit products and torch's resizing."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import interpolate

from padseg.backbones.recorder import Request, watch
from padseg.types import Attention

EVERY = ('queries', 'keys', 'values', 'output')


def everything_of(backbone, run):
    """What both attentions of every layer are given while `run` runs the model once, in 64 bits: by layer, then `cross` or `self`."""
    seen = {}

    def keep(key):
        return lambda found: seen.__setitem__(key, Attention(*(None if part is None else part.double().clone() for part in found)))

    requests = {}
    for layer in range(backbone.layers):
        requests[layer, 'cross'] = Request(backbone.attention_module(layer, EVERY), keep((layer, 'cross')), EVERY)
        requests[layer, 'self'] = Request(backbone.self_attention_module(layer), keep((layer, 'self')))
    with torch.no_grad(), watch(requests, stop=False):
        run()
    return seen


def row_of(seen, row):
    """What is there of one row of the batch."""
    return {key: Attention(*(None if part is None else part[row : row + 1] for part in found)) for key, found in seen.items()}


def softmax_of(seen):
    scores = seen.query @ seen.key.transpose(2, 3) / math.sqrt(seen.query.shape[3])
    return (scores if seen.mask is None else scores + seen.mask).softmax(3)


def resized(maps, grid, to):
    keys = interpolate(maps.unflatten(2, grid), to, mode='bilinear', align_corners=False).flatten(2)
    return interpolate(keys.transpose(1, 2).unflatten(2, grid), to, mode='nearest').flatten(2).transpose(1, 2)


def naive(backbone, seen, shape, plan):
    """Maps, mean self-attention and layer weights, for latents of this shape."""
    grids = [backbone.grid(layer, shape) for layer in range(backbone.layers)]
    to = max(grids, key=math.prod)
    own = [softmax_of(seen[layer, 'self']).mean(1) for layer in range(backbone.layers)]
    pixels = seen[plan.dense, 'cross'].query.transpose(1, 2).flatten(2)
    dense = (pixels @ pixels.transpose(1, 2) / math.sqrt(pixels.shape[2])).softmax(2)
    total, weights = 0, []
    for layer in plan.cross:
        found = seen[layer, 'cross']
        text = softmax_of(found)
        z = text @ found.value
        assert torch.allclose(z, found.output, atol=1e-5)
        weight, bias = backbone.output_projection(layer)
        vectors = torch.einsum('chd,bhnd->bnhc', weight.detach().double().unflatten(1, (z.shape[1], -1)), z)
        assert bias is not None
        products = (vectors * vectors.sum(2, keepdim=True)).sum(3)
        cross = torch.einsum('bnh,bhnt->bnt', products / products.sum(2, keepdim=True), text)
        weights.append(float((dense * resized(own[layer], grids[layer], grids[plan.dense])).sum()))
        large = interpolate(cross.transpose(1, 2).unflatten(2, grids[layer]), to, mode='bilinear', align_corners=False)
        total = total + weights[-1] * large
    maps = (total / sum(weights)).clamp_min(0)
    self_map = torch.stack([resized(own[layer], grids[layer], to) for layer in plan.refine]).mean(0)
    return maps / maps.sum(1, keepdim=True), self_map, torch.tensor(weights)
