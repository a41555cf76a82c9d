"""Cases of S-CFG: guidance by masks, those of its own and GoCA's, in 64 bits."""

from __future__ import annotations

import re

import torch
from support.golden.goca import Pieces

from padseg.generation import goca_masks, scfg
from padseg.methods.stages import aggregation
from padseg.methods.stages.cross_maps import Aggregated
from padseg.types import Tokens

INSERTED = '\u2581'  # T5's mark of a space, which is no content where it stands alone


def tokens_in(text, words):
    """Where the tokens of a vocabulary's spelling lie in a text."""
    spans, place = [], 0
    for word in words:
        letters = word.removesuffix('</w>').removeprefix(INSERTED)
        found = text.find(letters, place) if letters and not re.fullmatch(r'<.*>', word) else -1
        spans.append((found, found + len(letters)) if found >= 0 else (0, 0))
        place = spans[-1][1] or place
    return Tokens(0, len(words), tuple(spans), tuple(span == (0, 0) for span in spans))


def scfg_gamma(case, arrays):
    empty, text, tokens, foreground = (arrays[f'in.{name}'].double() for name in ('eps_u', 'eps_c', 'token_masks', 'fore_mask'))
    eta, whole = scfg.moved(empty, text), foreground[:, 0]
    enlarged = [torch.nn.functional.interpolate(masks, scale_factor=case['hyper']['R']) for masks in (tokens, foreground)]
    yield 'out.eta', eta[:, None]
    yield 'out.token_means', scfg.mean_in(eta, enlarged[0])
    yield 'out.fore_mean', scfg.mean_in(eta, enlarged[1])
    yield 'out.gamma_raw', scfg.regional(eta, tokens, whole)[:, None]
    for scale in case['hyper']['w']:
        yield f'out.w{scale:g}.gamma', scfg.gamma(eta, tokens, whole, scale)[:, None]
        yield f'out.w{scale:g}.eps', scfg.guided(empty, text, scfg.Masks(tokens, whole), scale)
    yield 'out.no_foreground.gamma', scfg.gamma(eta, tokens, torch.zeros_like(whole), scale)[:, None]
    yield 'out.one_token.gamma', scfg.gamma(eta, torch.ones_like(tokens[:, :1]), torch.ones_like(whole), scale)[:, None]
    point = torch.zeros(5, 5, dtype=torch.float64)
    point[2, 2] = 1
    yield 'out.kernel', scfg.smoothed(point[None])[0, 1:4, 1:4]
    yield 'out.smooth', scfg.smoothed(arrays['in.smooth'].double())


def scfg_segmentation(case, arrays):
    side = case['hyper']['latent_side']
    found = scfg.Segmentation((side // case['hyper']['r'],) * 2, scfg.Ground(0, (0,)))
    names = sorted({name.removeprefix('in.').rpartition('.')[0] for name in arrays if name.startswith('in.')})
    for number, name in enumerate(names):
        parts = (arrays[f'in.{name}.{part}'].double() for part in ('q_self', 'k_self', 'q_cross', 'k_cross'))
        q_self, k_self, q_cross, k_cross = parts
        own, cross = ((q @ k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(2) for q, k in ((q_self, k_self), (q_cross, k_cross)))
        part = int(name.partition('.')[0].removeprefix('r'))
        found.add(number, (side // part,) * 2, own, cross)
    yield 'out.token_maps', found.maps()[0]
    yield 'out.fore_maps', found.maps()[1]
    yield 'out.token_masks', found.masks().tokens
    yield 'out.fore_mask', found.masks().foreground[:, None]


def goca_scfg(case, arrays):
    hyper = case['hyper']
    content, order, words = hyper['K'], hyper['order'], hyper['tokens']
    spelled = ''.join(word for word in words if not re.fullmatch(r'<.*>', word)).replace('</w>', ' ').replace(INSERTED, ' ')
    assert list(goca_masks.content_of(tokens_in(spelled, words))) == content
    halves = []
    for half in range(2):
        pieces = Pieces(case, {name: array[half] if array.ndim == 4 else array for name, array in arrays.items() if name.startswith('in.')})
        maps = aggregation.aggregate_layers(pieces.cross('dot'), pieces.weights(hyper['dense_channels'], 'dot'), pieces.grid)
        halves.append(Aggregated(maps, pieces.self_map()[None], torch.ones(1)))
    empty, text = halves
    own = text.self_map[0]
    ground = scfg.Ground(1, (words.index('</s>'),)) if '</s>' in words else scfg.Ground(0, (0,))
    background = halves[ground.half].maps[0, ground.columns[0]]
    normal = aggregation.renormalised(aggregation.rescaled(text.maps[0], text.maps[0], content))
    masks = goca_masks.masks_of(text, None if ground.half else empty, ground, [content], order)
    yield 'out.A_G_pos', text.maps[0].permute(1, 2, 0)
    yield 'out.renormalised_pos', normal.permute(1, 2, 0)
    yield 'out.refined_pos', aggregation.refined(normal, own, order)
    yield 'out.refined_neg0', aggregation.refined(background[None], own, order)[0]
    yield 'out.new_ca', goca_masks.competing(text.maps[0], own, content, order)[None]
    yield 'out.fore0', goca_masks.background_map(background, own, order)
    yield 'out.token_masks', masks.tokens
    yield 'out.fore_mask', masks.foreground[:, None]


CASES = {
    'scfg_gamma': scfg_gamma,
    'scfg_segmentation': scfg_segmentation,
    'goca_scfg_sd15': goca_scfg,
    'goca_scfg_sigma': goca_scfg,
}
