"""Cases of GoCA: the aggregation of cross-attention maps, in 64 bits."""

from __future__ import annotations

import json
import re

import torch

from padseg.methods.stages import aggregation

HEADS = {
    'average': ('average', False),
    'l2': ('l2', False),
    'cosine': ('cosine', False),
    'dot_clamped': ('dot-clamped', False),
    'dot': ('dot', False),
    'cosine_vw': ('cosine', True),
    'dot_clamped_vw': ('dot-clamped', True),
}
LAYERS = {'dot': 'dot', 'mse': 'layer-mse', 'iou': 'layer-iou', 'vanilla': 'uniform'}
RULES = ('vanilla', 'max', 'exact', 'avg', 'offset')


class Pieces:
    """The inputs of a case of GoCA, and what follows from its index."""

    def __init__(self, case, arrays):
        self.hyper = hyper = case['hyper']
        self.grid = (self.hyper['grid'],) * 2
        self.dense = arrays['in.dense'].double()[None]
        self.dense_grid = tuple(self.dense.shape[2:])
        self.layers = []
        self.sizes = {}
        for number, side in enumerate(self.hyper['sides']):
            q, k, v, w, q_self, k_self = (
                arrays[f'in.L{number}.{name}'].double() for name in ('q_cross', 'k_cross', 'v_cross', 'w_out', 'q_self', 'k_self')
            )
            attention = (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(2)[None]  # (1, H, N, n)
            own = (q_self @ k_self.transpose(1, 2) / q_self.shape[2] ** 0.5).softmax(2).mean(0)[None]
            self.layers.append(((side, side), attention, v[None], aggregation.projection_of(w, side * side), own))
        names = hyper.get('layers', range(len(self.layers)))
        self.refining = [list(names).index(name) for name in hyper.get('refinement_layers', [])]
        if 'roles' not in hyper:
            return
        roles = hyper['roles']
        self.content = roles['K (all content tokens)']
        self.classes = {int(number): tokens for number, tokens in roles['T_c (class id -> tokens)'].items()}
        self.objects = roles['T_b (background objects)']

    def heads(self, number, method):
        by, vw = HEADS[method]
        _, attention, values, projection, _ = self.layers[number]
        return aggregation.head_weights(attention @ values, projection, by, aggregation.spectral_norms(values, projection) if vw else None)

    def cross(self, method):
        """The maps of all layers after aggregation over heads, (1, n, h, w) each."""
        found = [aggregation.aggregate_heads(layer[1], self.heads(number, method)) for number, layer in enumerate(self.layers)]
        return [maps.transpose(1, 2).unflatten(2, layer[0]) for maps, layer in zip(found, self.layers, strict=True)]

    def own(self, number, to):
        if (number, to) not in self.sizes:
            self.sizes[number, to] = aggregation.resized(self.layers[number][4], self.layers[number][0], to)
        return self.sizes[number, to]

    def weights(self, channels, by):
        dense = aggregation.affinity(self.dense, channels)
        own = [self.own(number, self.dense_grid) for number in range(len(self.layers))]
        return torch.stack([aggregation.similarity(dense, maps, by) for maps in own])

    def self_map(self):
        return torch.stack([self.own(number, self.grid)[0] for number in self.refining]).mean(0)

    def classes_of(self, maps, classes, objects, rescale=True):
        """Maps of classes and background, and what they are made of."""
        groups = [*classes.values(), *objects]
        scores = aggregation.object_scores(maps, groups)
        shares = aggregation.rescaled(scores, maps, self.content) if rescale else scores
        normal = aggregation.renormalised(shares)
        return scores, shares, normal, aggregation.with_background(normal, len(classes))


def goca_heads(case, arrays):
    pieces = Pieces(case, arrays)
    for number in range(len(pieces.layers)):
        for method in HEADS:
            yield f'out.L{number}.w_{method}', pieces.heads(number, method)[0].T
            yield f'out.L{number}.map_{method}', pieces.cross(method)[number][0].flatten(1).T


def goca_layers(case, arrays):
    pieces = Pieces(case, arrays)
    rows = arrays['in.rows'].long()
    for number in range(len(pieces.layers)):
        yield f'out.R_rows_L{number}', pieces.own(number, pieces.dense_grid)[0, rows]
    for channels in ('first', 'all'):
        yield f'out.{channels}.P_rows', aggregation.affinity(pieces.dense, channels)[0, rows]
        for name, by in LAYERS.items():
            weights = pieces.weights(channels, by)
            yield f'out.{channels}.lambda_{name}', weights[:, 0]
            yield f'out.{channels}.alpha_{name}', aggregation.layer_shares(weights)[:, 0]
        maps = aggregation.aggregate_layers(pieces.cross('dot'), pieces.weights(channels, 'dot'), pieces.grid)
        yield f'out.{channels}.A_G', maps[0].permute(1, 2, 0)


COMBINATIONS = {
    'released': ('dot', 'first', 'dot', True),
    'paper': ('dot', 'all', 'dot', True),
    'baseline': ('average', 'all', 'uniform', False),
    'average_heads': ('average', 'all', 'dot', True),
}


def goca_grid(case, arrays):
    pieces = Pieces(case, arrays)
    self_map = pieces.self_map()
    truth = arrays['in.label']
    size, count = tuple(truth.shape), case['hyper']['class_count']
    yield 'out.Sbar_rows', self_map[arrays['in.refine_rows'].long()]
    yield 'out.Sbar_rowsum', self_map.sum(1)
    for name, (heads, channels, by, rescale) in COMBINATIONS.items():
        weights = pieces.weights(channels, by)
        maps = aggregation.aggregate_layers(pieces.cross(heads), weights, pieces.grid)[0]
        scores, shares, normal, stacked = pieces.classes_of(maps, pieces.classes, pieces.objects, rescale)
        yield f'out.{name}.alpha', aggregation.layer_shares(weights)[:, 0]
        yield f'out.{name}.A_G', maps.permute(1, 2, 0)
        yield f'out.{name}.raw_scores', torch.cat((scores, maps[pieces.content].sum(0, keepdim=True))).permute(1, 2, 0)
        yield f'out.{name}.rescaled', shares.permute(1, 2, 0)
        yield f'out.{name}.renormalised', normal.permute(1, 2, 0)
        yield f'out.{name}.X', stacked
        for order in case['hyper']['orders']:
            refined = aggregation.refined(stacked, self_map, order)
            yield f'out.{name}.refined{order}', refined
            large = aggregation.enlarged(refined, size)
            labels = [labels_of(large, pieces.classes, count, tau, 'offset')[1] for tau in case['hyper']['taus']]
            yield f'out.{name}.labels{order}', torch.stack(labels).byte()
            if order == case['hyper']['orders'][0]:
                yield f'out.{name}.upsampled', large
                tables = [counts(found, truth, count) for found in labels]
                yield f'out.{name}.intersections', torch.stack([shared for shared, _ in tables])
                yield f'out.{name}.unions', torch.stack([joined for _, joined in tables])
                yield f'out.{name}.miou', torch.stack([(shared / (joined + 1e-8)).mean() for shared, joined in tables])


def labels_of(maps, classes, count, tau, rule):
    """The score of background, and the best of it and of all classes of a data set, of which absent ones are 0."""
    scores = torch.zeros(count, *maps.shape[1:], dtype=maps.dtype)
    scores[list(classes)] = maps[: len(classes)]
    scores[0] = background = aggregation.background_score(maps[-1], tau, rule)
    return background, scores.argmax(0)


def counts(found, truth, count):
    pairs = [(found == number, truth == number) for number in range(count)]
    return tuple(torch.tensor([int(of(*pair).sum()) for pair in pairs]) for of in (torch.logical_and, torch.logical_or))


def goca_rules(case, arrays):
    pieces, hyper = Pieces(case, arrays), case['hyper']
    self_map = pieces.self_map()
    maps = aggregation.aggregate_layers(pieces.cross('dot'), pieces.weights(hyper['dense_channels'], 'dot'), pieces.grid)[0]
    *_, normal, stacked = pieces.classes_of(maps, pieces.classes, pieces.objects)
    yield 'out.X', stacked
    yield 'out.keep_all.X', normal
    refined = aggregation.refined(stacked, self_map, hyper['order'])
    yield f'out.refined{hyper["order"]}', refined
    large = aggregation.enlarged(refined, tuple(hyper['label_size']))
    for rule in RULES:
        taus = json.loads(re.search(r'\[.*?\]', case['arrays'][f'out.rule_{rule}.background']['meaning'])[0])
        if rule == 'max':  # where the released code keeps the map from one threshold to the next, so that it is only ever raised
            taus = [max(taus[: number + 1]) for number in range(len(taus))]
        made = [labels_of(large, pieces.classes, hyper['class_count'], tau, rule) for tau in taus]
        yield f'out.rule_{rule}.background', torch.stack([background for background, _ in made])
        yield f'out.rule_{rule}.labels', torch.stack([labels for _, labels in made]).byte()
    alone = {int(number): tokens for number, tokens in hyper['no_background_roles'].items()}
    *_, stacked = pieces.classes_of(maps, alone, [])
    yield 'out.no_background.X', stacked
    yield f'out.no_background.refined{hyper["order"]}', aggregation.refined(stacked, self_map, hyper['order'])


CASES = {
    'goca_heads': goca_heads,
    'goca_layers': goca_layers,
    'goca_grid32': goca_grid,
    'goca_grid64': goca_grid,
    'goca_rules': goca_rules,
}
