"""Cases of ConceptAttention: concepts beside the prompt in Flux, and their maps."""

from __future__ import annotations

import re

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from padseg.backbones import Backbone, Identity, flux
from padseg.backbones.recorder import requests_of, watch
from padseg.backbones.spec import Spec
from padseg.backbones.third_stream import places_of, third_stream, with_concepts
from padseg.evaluation import binary_maps
from padseg.evaluation.protocols import OBJECT, protocol
from padseg.evaluation.scores import ScoreTotals, score_object
from padseg.methods.stages.concept_maps import concept_scores, head_joined, linear_normalised
from padseg.types import Prompt

BLOCK = {  # of the reference implementation, in diffusers' names
    'img_mod.lin': 'norm1.linear',
    'txt_mod.lin': 'norm1_context.linear',
    'img_attn.norm.query_norm': 'attn.norm_q',
    'img_attn.norm.key_norm': 'attn.norm_k',
    'txt_attn.norm.query_norm': 'attn.norm_added_q',
    'txt_attn.norm.key_norm': 'attn.norm_added_k',
    'img_attn.proj': 'attn.to_out.0',
    'txt_attn.proj': 'attn.to_add_out',
    'img_mlp.0': 'ff.net.0.proj',
    'img_mlp.2': 'ff.net.2',
    'txt_mlp.0': 'ff_context.net.0.proj',
    'txt_mlp.2': 'ff_context.net.2',
    'modulation.lin': 'norm.linear',
    'norm.query_norm': 'attn.norm_q',
    'norm.key_norm': 'attn.norm_k',
    'linear2': 'proj_out',
}
AROUND = {
    'img_in': 'x_embedder',
    'txt_in': 'context_embedder',
    'time_in.in_layer': 'time_text_embed.timestep_embedder.linear_1',
    'time_in.out_layer': 'time_text_embed.timestep_embedder.linear_2',
    'vector_in.in_layer': 'time_text_embed.text_embedder.linear_1',
    'vector_in.out_layer': 'time_text_embed.text_embedder.linear_2',
    'guidance_in.in_layer': 'time_text_embed.guidance_embedder.linear_1',
    'guidance_in.out_layer': 'time_text_embed.guidance_embedder.linear_2',
    'final_layer.linear': 'proj_out',
}
FUSED = {
    'img_attn.qkv': ('attn.to_q', 'attn.to_k', 'attn.to_v'),
    'txt_attn.qkv': ('attn.add_q_proj', 'attn.add_k_proj', 'attn.add_v_proj'),
}


def flux_weights(arrays, hidden):
    """The weights of a Flux of the reference implementation for diffusers' class, in 64 bits."""
    weights = {}
    for key, tensor in arrays.items():
        if not key.startswith('in.w.'):
            continue
        name, _, kind = key.removeprefix('in.w.').rpartition('.')
        kind, tensor = kind.replace('scale', 'weight'), tensor.double()
        block = re.match(r'(double|single)_blocks\.(\d+)\.(.*)', name)
        if not block and name in AROUND:
            weights[f'{AROUND[name]}.{kind}'] = tensor
        elif not block:  # final_layer.adaLN_modulation.1, whose halves are swapped
            weights[f'norm_out.linear.{kind}'] = torch.cat(tensor.chunk(2)[::-1])
        else:
            stem = f'{"single_" if block[1] == "single" else ""}transformer_blocks.{block[2]}'
            names, parts = [BLOCK.get(block[3], '')], [tensor]
            if block[3] in FUSED:
                names, parts = FUSED[block[3]], tensor.chunk(3)
            if block[3] == 'linear1':
                names = ('attn.to_q', 'attn.to_k', 'attn.to_v', 'proj_mlp')
                parts = tensor.split([hidden] * 3 + [len(tensor) - 3 * hidden])
            weights |= {f'{stem}.{own}.{kind}': part for own, part in zip(names, parts, strict=True)}
    return weights


def golden_flux(hyper, arrays):
    """A backbone that holds the model of a case."""
    hidden, heads = hyper['hidden'], hyper['heads']
    with torch.device('meta'):
        model = FluxTransformer2DModel(
            in_channels=arrays['in.img'].shape[2],
            num_layers=hyper['double_blocks'],
            num_single_layers=hyper['single_blocks'],
            attention_head_dim=hidden // heads,
            num_attention_heads=heads,
            joint_attention_dim=arrays['in.txt'].shape[2],
            pooled_projection_dim=arrays['in.pooled'].shape[1],
            guidance_embeds=True,
            axes_dims_rope=tuple(hyper['axes_dim']),
        )
    model.load_state_dict(flux_weights(arrays, hidden), assign=True)
    model.pos_embed = FluxPosEmbed(theta=hyper['theta'], axes_dim=hyper['axes_dim'])
    layers = hyper['double_blocks'] + hyper['single_blocks']
    parts = dict.fromkeys(('vae', 'scheduler', 'null_prompt'))
    spec, identity = Spec('golden', 'flux', layers=layers), Identity('golden', '', None, '', '', '')
    return Backbone(spec, identity, flux, model, **parts, layers=layers, whole=True, patch=2, multiple=16, limit=192)


def streams_of(backbone, hyper, arrays, pooled, concept_pooled=None, sees='both'):
    """The velocity, and outputs of image and concepts in all double blocks, of one forward pass with concepts beside the prompt."""
    image, concepts = arrays['in.img'].double(), arrays['in.concepts'].double()
    together = with_concepts(Prompt(arrays['in.txt'].double(), pooled, (), ()), concepts)
    places = places_of(backbone, together, image.shape[1])
    wanted = requests_of(
        backbone,
        range(hyper['double_blocks']),
        lambda seen: [head_joined(seen.output, place) for place in (places.image, places.concepts)],
        ('queries', 'keys', 'output'),
    )
    z = flux.unpacked(image, *hyper['grid'])
    with torch.no_grad(), third_stream(backbone, places, sees, concept_pooled), watch(wanted, stop=False) as kept:
        velocity = backbone.denoise(z, 1000 * hyper['timestep'], together, hyper['guidance'])
    return flux.packed(velocity), kept


def conceptattention_dit(case, arrays):
    hyper = case['hyper']
    backbone, pooled = golden_flux(hyper, arrays), arrays['in.pooled'].double()
    zeros = torch.zeros_like(pooled)
    for mode, own in (('generate', pooled), ('encode', zeros)):
        velocity, kept = streams_of(backbone, hyper, arrays, own, zeros)
        yield f'out.{mode}.pred', velocity
        for layer, (image, concepts) in kept.items():
            yield f'out.{mode}.L{layer}.image', image
            yield f'out.{mode}.L{layer}.concept', concepts
            yield f'out.{mode}.L{layer}.scores', concept_scores(image, concepts, softmax=False)
    for name, sees in (('cross_only', 'image'), ('self_only', 'concepts'), ('neither', 'itself')):
        kept = streams_of(backbone, hyper, arrays, pooled, zeros, sees)[1]
        yield f'out.{name}.concept', torch.stack([concepts for _, concepts in kept.values()])


def mean_maps(arrays, layers, times, **how):
    """The mean over layers and times of the maps of concepts, (1, K, h, w)."""
    image, concepts = arrays['in.image'].double(), arrays['in.concept'].double()
    maps = [concept_scores(image[time][layer], concepts[time][layer], **how) for time in times for layer in layers]
    return torch.stack(maps).mean(0).unflatten(2, (round(image.shape[-2] ** 0.5), -1))


def conceptattention_heatmaps(case, arrays):
    chosen, everything = ([0, 2], [1]), (range(case['hyper']['layers']), range(case['hyper']['times']))
    yield 'out.softmax', mean_maps(arrays, *chosen)
    yield 'out.raw', mean_maps(arrays, *chosen, softmax=False)
    yield 'out.normalised_softmax', mean_maps(arrays, *chosen, normalise='linear')
    yield 'out.normalised_raw', mean_maps(arrays, *chosen, normalise='linear', softmax=False)
    yield 'out.all_softmax', mean_maps(arrays, *everything)
    yield 'out.first_commit_softmax', mean_maps(arrays, [0, 2], [0], normalise='linear')[0]
    yield 'out.first_commit_raw', mean_maps(arrays, [0, 2], [0], normalise='linear', softmax=False)[0]
    yield 'out.first_commit_plain', mean_maps(arrays, [0, 2], [0], softmax=False)[0]
    yield 'out.linear_normalised', linear_normalised(arrays['in.concept'][0][0].double())


def conceptattention_schedule(case, arrays):
    for name, scheduler in (('schnell', {'shift': 1.0}), ('dev', {'shift': 3.0, 'use_dynamic_shifting': True})):
        for steps in (4, 28, 50):
            levels = [flux.noise_level(FlowMatchEulerDiscreteScheduler(**scheduler), steps, steps - step, 4096) for step in range(steps)]
            yield f'out.{name}_{steps}', torch.tensor([*(level.sigma for level in levels), 0.0])
    levels = [flux.noise_level(FlowMatchEulerDiscreteScheduler(shift=1.0), 4, 4 - index, 4096).sigma for index in range(4)]
    yield 'out.levels', torch.tensor(levels)


def conceptattention_protocol(case, arrays):
    maps, truths = arrays['in.coefficients'][:, 0].float().numpy(), arrays['in.truth'].numpy() > 0
    size = (case['hyper']['size'],) * 2
    masks = binary_maps.above_mean(maps)
    yield 'out.masks', torch.from_numpy(masks).byte()
    rules = protocol('conceptattention-imagenet')
    totals, precisions = ScoreTotals(OBJECT, rules), []
    for number, (values, mask, truth) in enumerate(zip(maps, masks, truths, strict=True)):
        large = binary_maps.nearest(values, size)
        picture = score_object(str(number), 1 - binary_maps.nearest(mask, size), 1 - truth, large, rules)
        precisions.append(picture.precision)
        totals.add(picture)
    scores = totals.result()
    yield 'out.pixel_accuracy', torch.tensor(scores.accuracy)
    yield 'out.iou', torch.tensor([scores.acc_by_2_minus_acc] * 2)
    yield 'out.miou', torch.tensor(scores.acc_by_2_minus_acc)
    yield 'out.ap', torch.tensor(precisions)
    yield 'out.map', torch.tensor(scores.mean_average_precision)


def conceptattention_sd3(case, arrays):
    image, concepts = arrays['in.image'].double()[None], arrays['in.concept'].double()[None, :, :, 1:]
    pair = {'in.image': image, 'in.concept': concepts}
    yield 'out.softmax', mean_maps(pair, [0, 2], [0], normalise='length')[0]
    yield 'out.raw', mean_maps(pair, range(image.shape[1]), [0], normalise='length', softmax=False)[0]


CASES = {
    'conceptattention_dit': conceptattention_dit,
    'conceptattention_heatmaps': conceptattention_heatmaps,
    'conceptattention_protocol': conceptattention_protocol,
    'conceptattention_schedule': conceptattention_schedule,
    'conceptattention_sd3': conceptattention_sd3,
}
