"""Token maps against the whole attention matrix, formed the obvious way."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.explicit_attention import ExplicitAttention

from padseg.errors import PadsegError, UsageError
from padseg.methods import concepts, open_vocabulary
from padseg.methods.concepts import ConceptOptions
from padseg.methods.open_vocabulary import LabelOptions
from padseg.methods.seg4diff import Options, token_maps
from padseg.methods.stages.attention import token_attention
from padseg.methods.stages.latents import encode
from padseg.methods.stages.token_maps import attention_maps, latent_token_maps, read_prompt
from padseg.types import Attention


def explicit_maps(backbone, z, timestep, layer):
    """All blocks run, with every attention matrix whole; also the velocity."""
    transformer = backbone.transformer
    before = dict(transformer.attn_processors)
    processors = {name: ExplicitAttention() for name in before}
    transformer.set_attn_processor(dict(processors))
    try:
        with torch.no_grad():
            velocity = backbone.denoise(z, timestep, backbone.null_prompt)
    finally:
        transformer.set_attn_processor(before)
    h, w = (length // backbone.patch for length in z.shape[2:])
    whole = processors[f'transformer_blocks.{layer}.attn.processor'].probabilities.mean(1)  # (B, N + L, N + L)
    text = whole[:, : h * w, h * w : h * w + 77]
    return text.transpose(1, 2).reshape(len(z), 77, h, w), velocity


@pytest.mark.parametrize('family', ['backbone', 'backbone35'])
@pytest.mark.parametrize('shape', [(1, 4, 16, 16), (3, 4, 12, 20)])
@pytest.mark.parametrize('layer', [0, 2, 3])
def test_maps_equal_the_explicit_softmax(family, shape, layer, request):
    backbone = request.getfixturevalue(family)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected, velocity = explicit_maps(backbone, z, 400.0, layer)
    torch.testing.assert_close(attention_maps(z, 400.0, backbone, backbone.null_prompt, layer), expected, atol=1e-5, rtol=0)
    with torch.no_grad():  # the reference is the model: the same velocity comes out
        torch.testing.assert_close(velocity, backbone.denoise(z, 400.0, backbone.null_prompt), atol=1e-4, rtol=1e-4)
    assert expected.std(1).max() > 1e-4  # maps that were all alike would prove nothing


@pytest.mark.parametrize('chunk', [1, 7, 64, 1000])
def test_chunks_and_masks(chunk):
    generator = torch.Generator().manual_seed(4)
    query, key = torch.randn((2, 3, 50, 8), generator=generator), torch.randn((2, 3, 60, 8), generator=generator)
    for mask in (None, torch.randn((2, 1, 1, 60), generator=generator), torch.randn((1, 3, 50, 60), generator=generator)):
        scores = query @ key.transpose(2, 3) / 8**0.5 + (0 if mask is None else mask)
        expected = scores.softmax(-1)[:, :, :40, [50, 59, 3]].mean(1)
        torch.testing.assert_close(
            token_attention(Attention(query, key, mask=mask), 40, [50, 59, 3], chunk), expected, atol=1e-6, rtol=1e-5
        )


def test_half_precision_is_summed_in_float32():
    query, key = torch.full((1, 1, 4, 64), 12.0, dtype=torch.float16), torch.full((1, 1, 4096, 64), 12.0, dtype=torch.float16)
    share = token_attention(Attention(query, key), 4, range(8))  # 64 * 144 / 8 = 1152 a score, 9216 before scaling
    assert share.dtype == torch.float32
    torch.testing.assert_close(share, torch.full((1, 4, 8), 1 / 4096), rtol=1e-4, atol=0)


def test_queries_out_of_range():
    with pytest.raises(ValueError, match='1..4'):
        token_attention(Attention(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)), 5, [0])


def test_batch_and_single_give_the_same_maps(backbone, picture):
    options = Options().resolve(backbone.spec)
    other = picture[:, ::-1].copy()
    latents = [encode(image, backbone, options) for image in (picture, other)]
    together = latent_token_maps(latents, backbone, options)
    for maps, image in zip(together, (picture, other), strict=True):
        torch.testing.assert_close(maps.maps, token_maps(image, backbone).maps, atol=1e-6, rtol=1e-5)


def test_whole_picture_keeps_its_aspect_ratio(backbone, picture):
    maps = token_maps(picture, backbone)
    assert maps.maps.shape == (77, 6, 10)  # side 32, 4 pixels a token: 64 tokens' area at 48:80
    assert maps.frame.size == (48, 80) and maps.frame.box == (0, 0, 48, 80)
    assert len(maps.names) == 77 and maps.names[:2] == ('<|startoftext|>', '<|endoftext|>')
    assert maps.maps.min() > 0 and maps.maps.sum(0).max() < 1


@pytest.mark.parametrize(('family', 'template'), [('backbone', 2), ('flux', 1)])
def test_tokens_of_one_kind(family, template, picture, request):
    """Maps of a kind are those of all tokens, without the others; the softmax goes over all of them all the same."""
    backbone = request.getfixturevalue(family)
    everything = token_maps(picture, backbone)
    assert torch.equal(token_maps(picture, backbone, Options(tokens='all')).maps, everything.maps)
    for tokens, kept in (('template', slice(template)), ('pads', slice(template, None))):
        maps = token_maps(picture, backbone, Options(tokens=tokens))
        assert torch.equal(maps.maps, everything.maps[kept]) and maps.names == everything.names[kept]
        assert all(name.startswith('<pad ') == (tokens == 'pads') for name in maps.names)
    with pytest.raises(UsageError, match=r'has no tokens of this kind: tokens is one of all, pads, template; got registers'):
        token_maps(picture, backbone, Options(tokens='registers'))


def test_a_model_without_pads_has_none_to_read(pixarts, backbone):
    """PixArt's pads are masked."""
    assert read_prompt(pixarts['sigma'], 'template').names == ('</s>',)
    with pytest.raises(UsageError, match=r'tokens is one of all, template; got pads'):
        read_prompt(pixarts['sigma'], 'pads')


def test_proposals_of_named_classes_read_the_tokens_of_the_models_own_settings(speller, picture):
    """Those that `padseg run` would read."""
    own = dataclasses.replace(speller, spec=speller.spec._replace(own={'seg4diff': {'tokens': 'template'}}))
    everything = token_maps(picture, speller)
    for method, options in ((open_vocabulary, LabelOptions(on='proposals')), (concepts, ConceptOptions(on='proposals'))):
        (found,) = method.maps([picture], method.prepare(own, options, ('cat', 'grass')))
        assert found.names == ('cat', 'grass', *everything.names[:2])
        torch.testing.assert_close(found.maps[2:], everything.maps[:2], atol=1e-6, rtol=1e-5)


def test_attention_that_is_not_finite_is_an_error(sd3_folder, picture):
    from padseg.backbones import load

    broken = load(str(sd3_folder), device='cpu')
    broken.transformer.transformer_blocks[0].attn.to_q.bias.fill_(float('nan'))
    with pytest.raises(PadsegError, match='not finite'):
        token_maps(picture, broken)
