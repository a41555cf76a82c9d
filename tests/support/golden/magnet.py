"""Cases of MAGNET: mask alignment, in 32 bits."""

from __future__ import annotations

import torch

from padseg.train import alignment
from padseg.train.lora import flow_loss


def layer_of(arrays, prefix):
    layer = alignment.ScoreLayer()
    names = {name: name.replace(f'{prefix}attn_score_layer', 'layers') for name in arrays if 'attn_score_layer' in name}
    layer.load_state_dict({new: arrays[name] for name, new in names.items()})
    return layer


def magnet_losses(case, arrays):
    masks = arrays['in.masks']
    for focal in ('released', 'correct'):
        logits = arrays['in.logits'].clone().requires_grad_()
        loss, dice = alignment.focal_loss(logits, masks, focal), alignment.dice_loss(logits, masks)
        for count in (5, 3):
            yield f'out.focal_{focal}_N{count}', (loss / count).detach()
            yield f'out.dice_N{count}', (dice / count).detach()
        yield 'out.grad_dice', torch.autograd.grad(dice / 5, logits)[0]
        yield f'out.grad_focal_{focal}', torch.autograd.grad(loss / 5, logits)[0]
    inside, outside = alignment.focal_parts(arrays['in.points'], 'released')
    yield 'out.points_released_t1', inside
    yield 'out.points_released_t0', outside


def magnet_matching(case, arrays):
    logits, masks = arrays['in.logits'], arrays['in.masks'].bool()
    small = alignment.smaller(masks, logits.shape[1:])
    yield 'out.small_masks', small.byte()
    yield 'out.cost_focal', (focal := alignment.focal_cost(logits, small, 'released'))
    yield 'out.cost_dice', (dice := alignment.dice_cost(logits, small))
    yield 'out.cost', alignment.FOCAL_COST * focal + alignment.DICE_COST * dice
    yield 'out.candidate', (found := alignment.match(logits, masks, 'released'))[0].int()
    yield 'out.mask', found[1].int()
    losses = alignment.mask_losses(alignment.Pairs(logits[found[0]], masks[found[1]]), 'released')
    yield 'out.loss_mask', losses[0] / len(masks)
    yield 'out.loss_dice', losses[1] / len(masks)


def magnet_score_layer(case, arrays):
    layer, maps = layer_of(arrays, 'in.'), arrays['in.maps']
    assert sum(weight.numel() for weight in layer.parameters()) == case['hyper']['parameters']
    yield 'out.residual', layer.layers(maps).detach()
    yield 'out.logits', layer(maps[:, 0])[:, None].detach()


def magnet_coco(case, arrays):
    hyper, layer = case['hyper'], layer_of(arrays, 'in.mlp.')
    slots, ids = hyper['tokenizer_max_length'], hyper['class_ids']
    maps = alignment.scores(arrays['in.q'], arrays['in.k'], heads=False).unflatten(2, (64, 64))
    prompts, pairs = [], []
    for number, classes in enumerate(hyper['ground_truth']):
        prompt = [0, *(token for each in classes for token in ids[each]), 1]
        prompts.append((prompt + [-1] * slots)[:slots])
        columns = alignment.columns_by_ids(prompt, [ids[each] for each in classes], slots)
        assert columns == hyper['columns_per_class_by_isin'][number]
        masks = arrays['in.sem_seg'][number][None] == torch.tensor(classes)[:, None, None]
        pairs.append(alignment.named_pairs(maps[number], columns, masks, layer))
    yield 'out.prompt_ids', torch.tensor(prompts, dtype=torch.int32)
    yield 'out.pairs', torch.cat([pair.logits for pair in pairs]).detach()
    yield 'out.targets', torch.cat([pair.masks for pair in pairs]).byte()
    count = sum(len(pair.logits) for pair in pairs)
    assert count == hyper['N']
    yield from magnet_totals(case, arrays, pairs, count)


def magnet_sa1b(case, arrays):
    hyper, layer = case['hyper'], layer_of(arrays, 'in.mlp.')
    maps = alignment.scores(arrays['in.q'], arrays['in.k'], heads=True).unflatten(2, (64, 64))
    least = float(hyper['min_area'].removeprefix('> '))
    kept = [alignment.largest(arrays[f'in.masks{number}'].bool(), least, hyper['max_mask']) for number in range(2)]
    pairs = []
    for number, masks in enumerate(kept):
        yield f'out.kept_area{number}', masks.flatten(1).sum(1).float()
        found = alignment.match(alignment.every_logit(maps[number], layer), masks, 'released')
        yield f'out.candidate{number}', found[0].int()
        yield f'out.mask{number}', found[1].int()
        pairs.append(alignment.matched_pairs(maps[number], masks, layer, 'released'))
    yield from magnet_totals(case, arrays, pairs, sum(map(len, kept)))


def magnet_totals(case, arrays, pairs, count):
    weights = case['hyper']['weights']
    losses = [alignment.mask_losses(pair, 'released') for pair in pairs]
    focal, dice = (weights[name] * sum(part) / count for name, part in zip(('focal', 'dice'), zip(*losses, strict=True), strict=True))
    flow = weights['fm'] * flow_loss(arrays['in.model_pred'], arrays['in.model_input'], arrays['in.noise']).mean()
    for name, value in (('loss_mask', focal), ('loss_dice', dice), ('loss_fm', flow), ('total', focal + dice + flow)):
        yield f'out.{name}', value.detach()


CASES = {
    'magnet_losses': magnet_losses,
    'magnet_matching': magnet_matching,
    'magnet_score_layer': magnet_score_layer,
    'magnet_coco': magnet_coco,
    'magnet_sa1b': magnet_sa1b,
}
