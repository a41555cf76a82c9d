"""The recorder against attention formed the obvious way: what it gives, that it changes nothing, where it stops, what it lets go."""

from __future__ import annotations

import weakref

import pytest
import torch
from support.explicit_attention import ExplicitAttention
from torch import nn
from torch.nn import functional

from padseg.backbones import load
from padseg.backbones.recorder import Request, requests_of, watch
from padseg.errors import PadsegError, UsageError
from padseg.methods.stages.attention import token_attention
from padseg.methods.stages.token_maps import attention_maps
from padseg.types import Attention

ALL = ('queries', 'keys', 'values', 'output')
FAMILIES = ['backbone', 'backbone35', 'flux']


@pytest.fixture(params=FAMILIES)
def model(request):
    return request.getfixturevalue(request.param)


def whole_call(seen: Attention) -> Attention:
    """Keep all of a call."""
    return seen


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def forward(model, z: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.denoise(z, 100.0, model.null_prompt)


@pytest.mark.parametrize('name', ['backbone', 'backbone35'])
def test_a_call_is_that_of_explicit_attention(name, request):
    model = request.getfixturevalue(name)
    z = latents(2, 4, 12, 20)
    processors = {name: ExplicitAttention() for name in model.transformer.attn_processors}
    before = dict(model.transformer.attn_processors)
    model.transformer.set_attn_processor(dict(processors))
    try:
        forward(model, z)
    finally:
        model.transformer.set_attn_processor(before)
    with watch(requests_of(model, range(4), whole_call, ALL)) as kept:
        forward(model, z)
    for layer, seen in kept.items():
        explicit = processors[f'transformer_blocks.{layer}.attn.processor']
        for found, expected in zip((seen.query, seen.key, seen.value, seen.output), explicit.tensors, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert seen.mask is None


def test_values_and_output_are_those_that_are_projected(model):
    """The values are what the projections gave, the output is what the softmax makes of them and what the next projection takes."""
    z = latents(1, 4, 12, 20)
    projected: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(4)}
    handles = []
    for layer, parts in projected.items():
        attention = model.attention_module(layer)
        for name in ('to_v', 'add_v_proj'):
            if getattr(attention, name, None) is not None:
                handles.append(getattr(attention, name).register_forward_hook(lambda _, __, out, parts=parts: parts.append(out)))
    with watch(requests_of(model, range(4), whole_call, ALL), stop=False) as kept:
        forward(model, z)
    for handle in handles:
        handle.remove()
    text_first = model.first_image_token(model.null_prompt) > 0
    for layer, seen in kept.items():
        joint = torch.cat(projected[layer][::-1] if text_first else projected[layer], 1)  # (B, L, D)
        assert torch.equal(seen.value, joint.unflatten(-1, (2, 16)).transpose(1, 2))
        weights = (seen.query @ seen.key.transpose(2, 3) / 16**0.5).softmax(-1)
        torch.testing.assert_close(seen.output, weights @ seen.value, atol=1e-4, rtol=1e-4)


def test_only_what_is_asked_for_is_given(model):
    z = latents(1, 4, 8, 8)
    requests = {
        what: Request(model.attention_module(1, what), whole_call, what) for what in [('queries', 'keys'), ('values',), ('output',), ALL]
    }
    with watch(requests) as kept:
        forward(model, z)
    assert kept.keys() == requests.keys()
    for what, seen in kept.items():
        assert (seen.value is not None, seen.output is not None) == ('values' in what, 'output' in what)
        assert torch.equal(seen.query, kept[ALL].query)


def test_watching_leaves_the_output_and_no_hook(model):
    z = latents(1, 4, 16, 16)
    alone = forward(model, z)
    requests = requests_of(model, [3, 1], whole_call, ALL)
    with watch(requests, stop=False) as kept:
        watched = forward(model, z)
    assert torch.equal(alone, watched)
    assert sorted(kept) == [1, 3]
    with pytest.raises(ZeroDivisionError), watch(requests):
        raise ZeroDivisionError
    for request in requests.values():
        assert not request.module._forward_pre_hooks and not request.module._forward_hooks


@pytest.mark.parametrize('layers', [(1,), (2,), (2, 0)])
def test_stopping_early_changes_nothing(model, layers):
    z = latents(2, 4, 12, 20)
    with watch(requests_of(model, layers, whole_call), stop=False) as whole:
        forward(model, z)
    with watch(requests_of(model, layers, whole_call)) as stopped:
        forward(model, z)
        raise AssertionError('the forward went on')
    for layer in layers:
        assert torch.equal(whole[layer].query, stopped[layer].query) and torch.equal(whole[layer].key, stopped[layer].key)
    h, w = z.shape[2] // 2, z.shape[3] // 2
    columns, first = model.text_columns(model.null_prompt, h * w), model.first_image_token(model.null_prompt)
    maps = torch.stack([token_attention(whole[layer], h * w, columns, first=first) for layer in layers]).mean(0)
    found = attention_maps(z, 100.0, model, model.null_prompt, *layers)
    assert torch.equal(found, maps.transpose(1, 2).unflatten(2, (h, w)))


@pytest.mark.parametrize(('what', 'computed'), [(('queries', 'keys'), 0), (('values',), 0), (('output',), 1)])
def test_the_last_attention_is_computed_for_its_output_only(backbone, what, computed):
    calls = []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is functional.scaled_dot_product_attention:
                calls.append(func)
            return func(*args, **(kwargs or {}))

    with Count(), watch(requests_of(backbone, [2], whole_call, what)):
        forward(backbone, latents(1, 4, 8, 8))
    assert len(calls) == 2 + computed  # those of blocks 0 and 1 first


def test_only_reductions_are_held(model):
    """Queries, keys, values and outputs of a layer are gone when the next one runs, and those of the last after the forward."""
    tensors: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def reduce(seen: Attention) -> torch.Tensor:
        alive.append(sum(tensor() is not None for tensor in tensors))
        tensors.extend(weakref.ref(tensor) for tensor in (seen.query, seen.key, seen.value, seen.output) if tensor is not None)
        return seen.query.mean()

    with watch(requests_of(model, range(4), reduce, ALL)) as kept:
        forward(model, latents(1, 4, 12, 20))
    assert alive == [0, 0, 0, 0] and len(tensors) == 16 and len(kept) == 4
    assert not any(tensor() is not None for tensor in tensors)


def test_token_maps_hold_no_queries_and_keys(model):
    """Those of a layer are gone before the next layer attends."""
    tensors: list[weakref.ref[torch.Tensor]] = []

    class Look(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is functional.scaled_dot_product_attention:
                assert not any(tensor() is not None for tensor in tensors)
                given = [*args, *(kwargs or {}).values()]
                tensors.extend(weakref.ref(tensor) for tensor in given if isinstance(tensor, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with Look():
        maps = attention_maps(latents(1, 4, 12, 20), 100.0, model, model.null_prompt, 0, 1, 3)
    assert len(tensors) >= 9 and torch.isfinite(maps).all()  # of the last layer the attention is not computed
    assert not any(tensor() is not None for tensor in tensors)


def test_gradients_flow_through_what_is_kept(backbone):
    z = latents(1, 4, 8, 8).requires_grad_()
    with watch(requests_of(backbone, [1, 2], lambda seen: token_attention(seen, 16, [17, 20]))) as kept:
        backbone.denoise(z, 100.0, backbone.null_prompt)
    sum(kept.values()).square().sum().backward()
    found, z.grad = z.grad, None
    with watch(requests_of(backbone, [1, 2], whole_call), stop=False) as whole:
        backbone.denoise(z, 100.0, backbone.null_prompt)
    scores = [(seen.query @ seen.key.transpose(2, 3) / 16**0.5).softmax(-1)[:, :, :16, [17, 20]].mean(1) for seen in whole.values()]
    sum(scores).square().sum().backward()
    assert found.abs().max() > 0
    torch.testing.assert_close(found, z.grad, atol=1e-6 * float(z.grad.abs().max()), rtol=1e-3)


def test_a_layer_that_never_ran_is_an_error(backbone):
    with pytest.raises(PadsegError, match=r'layer \[1\]'), watch(requests_of(backbone, [1], whole_call)):
        pass


@pytest.mark.parametrize('name', ['sd3_folder', 'flux_folder'])
def test_of_the_last_block_of_a_part_only_queries_and_keys_can_be_read(name, request):
    """The rest of it was left out: what stands in the place of values is none."""
    part, last = load(str(request.getfixturevalue(name)), device='cpu', layer=3), r'of block 3 .*: load\(whole=True\)'
    for what in ('values', 'output'):
        with pytest.raises(UsageError, match=last):
            requests_of(part, range(4), whole_call, (what,))
    with watch(requests_of(part, range(3), whole_call, ALL)) as kept:
        forward(part, latents(1, 4, 8, 8))
    assert len(kept) == 3
    with pytest.raises(UsageError, match='was loaded up to block 1'):
        requests_of(load(part.identity.model, device='cpu', layer=1), [2], whole_call)


class Plain(nn.Module):
    """Attention of its input to itself, with whatever the fused call takes."""

    def forward(self, tokens: torch.Tensor, **options: object) -> torch.Tensor:
        return functional.scaled_dot_product_attention(tokens, tokens, tokens, **options)


def test_masks_of_truth_values_become_additive():
    module, tokens = Plain(), torch.randn((1, 2, 6, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, True, False, True, False, True])
    with watch({'only': Request(module, whole_call, ALL)}, stop=False) as kept:
        expected = module(tokens, attn_mask=mask[None, None, None])
    weights = token_attention(kept['only'], 6, range(6))[0]
    assert torch.equal(weights[:, [2, 4]], torch.zeros(6, 2)) and torch.equal(kept['only'].output, expected)
    torch.testing.assert_close((tokens @ tokens.transpose(2, 3) / 8**0.5)[..., mask].softmax(-1).mean(1)[0], weights[:, mask])


def test_a_scale_that_is_the_usual_one_changes_nothing():
    """AuraFlow names it."""
    module, tokens = Plain(), torch.randn((1, 2, 6, 8), generator=torch.Generator().manual_seed(0))
    with watch({0: Request(module, whole_call, ALL)}, stop=False) as kept:
        module(tokens, scale=8**-0.5)
    assert torch.equal(kept[0].query, tokens) and torch.equal(kept[0].output, module(tokens))


@pytest.mark.parametrize('options', [{'is_causal': True}, {'scale': 0.1}, {'enable_gqa': True}])
def test_attention_of_another_kind_is_refused(options):
    module = Plain()
    with (
        pytest.raises(PadsegError, match='cannot read attention that is causal, has its own scale or groups heads'),
        watch({0: Request(module, whole_call)}),
    ):
        module(torch.zeros(1, 2, 6, 8), **options)
