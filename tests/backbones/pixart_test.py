"""PixArt-Sigma and PixArt-alpha: beside diffusers' own pipelines, with masked pads, and with damaged files."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from support.crossing import PIXART, changed_by_files

from padseg.backbones import load, pixart
from padseg.backbones.availability import model_state
from padseg.backbones.recorder import Request, watch
from padseg.backbones.source import locate
from padseg.backbones.spec import BACKBONES
from padseg.backbones.texts import texts_of
from padseg.errors import ModelUnavailable, UsageError
from padseg.methods.seg4diff import segment
from padseg.methods.stages.attention import token_attention
from padseg.types import Prompt

SLOTS = {'sigma': 300, 'alpha': 120}
TEXT = 'A Cat on grass'


@pytest.fixture(scope='module')
def pipelines(pixart_folders):
    """diffusers' own, with the text encoder in the precision in which it is loaded here."""
    found = {}
    for kind, folder in pixart_folders.items():
        pipeline = (PixArtSigmaPipeline if kind == 'sigma' else PixArtAlphaPipeline).from_pretrained(folder)
        pipeline.text_encoder.to(torch.bfloat16)
        found[kind] = pipeline
    return found


@pytest.fixture
def copied(pixart_folders, tmp_path, monkeypatch):
    """A copy of Sigma in small, to be changed."""
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path / 'cache'))
    return pathlib.Path(shutil.copytree(pixart_folders['sigma'], tmp_path / 'model'))


def own_prompt(pipeline, text: str):
    """Embeddings and mask that diffusers' pipeline makes of a text."""
    with torch.no_grad():
        return pipeline.encode_prompt(text, do_classifier_free_guidance=False, device='cpu')[:2]


def prompt_for(backbone, text: str) -> Prompt:
    texts = texts_of(backbone, keep=False)
    return Prompt(*texts.encode(text, 't5', 'zeros'), (), (), mask=texts.mask(text))


@pytest.mark.parametrize('kind', SLOTS)
@pytest.mark.parametrize('text', ['', TEXT])
def test_noise_is_predicted_as_by_the_pipeline(pixarts, pipelines, kind, text):
    """Of pictures of other sizes than in training too; the variance that the network predicts is left out. Only alpha is told sizes."""
    backbone, pipeline = pixarts[kind], pipelines[kind]
    embeds, mask = own_prompt(pipeline, text)
    for shape in ((2, 4, 8, 12), (1, 4, 16, 16)):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        added = {'resolution': None, 'aspect_ratio': None}
        if kind == 'alpha':
            added = {
                'resolution': torch.tensor([[8.0 * shape[2], 8.0 * shape[3]]] * len(z)),
                'aspect_ratio': torch.tensor([[shape[2] / shape[3]]] * len(z)),
            }
        with torch.no_grad():
            expected = pipeline.transformer(
                z,
                encoder_hidden_states=embeds.float().repeat(len(z), 1, 1),
                encoder_attention_mask=mask.repeat(len(z), 1),
                timestep=torch.tensor([100]).expand(len(z)),
                added_cond_kwargs=added,
            ).sample
            found = backbone.denoise(z, 100.0, prompt_for(backbone, text))
        assert expected.shape[1] == 8
        torch.testing.assert_close(found, expected[:, :4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('kind', SLOTS)
def test_texts_are_those_of_the_pipeline(pixarts, pipelines, kind):
    """In lower case, from a vocabulary in either form; Sigma's tokenizer says 120 slots, which its pipeline does not mind."""
    backbone, slots = pixarts[kind], SLOTS[kind]
    texts = texts_of(backbone, keep=False)
    for text in ('', TEXT, '  a dog-cat. '):
        embeds, mask = own_prompt(pipelines[kind], text)
        assert embeds.shape == (1, slots, 32)
        found, pooled = texts.encode(text, 't5', 'zeros')
        assert torch.equal(found, embeds.float()) and pooled.shape == (1, 0)
        assert torch.equal(texts.mask(text), mask.float()) and 0 < mask.sum() < 20
    null = backbone.null_prompt
    assert torch.equal(null.mask, own_prompt(pipelines[kind], '')[1].float()) and null.mask.sum() == 1
    assert (null.picked, null.names) == ((0,), ('</s>',)) and null.embeds.shape == (1, slots, 32)
    with pytest.raises(UsageError, match='encoders is t5; got l$'):
        texts.tokens('a cat', 'l')


@pytest.mark.parametrize(
    ('text', 'pieces'),
    [
        (TEXT, ['A', 'Cat', 'on', 'grass', '']),
        ('  Grass', ['Grass', '']),
        ('İ cat', ['', 'İ', 'İ', 'cat', '']),  # one letter that is two in lower case: i, and a dot that has no token
    ],
)
def test_tokens_have_their_places_in_the_text_as_given(pixarts, text, pieces):
    for backbone in pixarts.values():
        (tokens,) = texts_of(backbone, keep=False).tokens(text, 't5').values()
        assert [text[start:end] for start, end in tokens.spans] == pieces
        assert tokens.first == 0 and tokens.slots == backbone.spec.sequence


@pytest.mark.parametrize('kind', SLOTS)
def test_pads_get_no_attention(pixarts, kind):
    """Every layer's maps beside the softmax by hand over the tokens alone; those of pads are 0, of 300 or 120 slots."""
    backbone = pixarts[kind]
    prompt = prompt_for(backbone, TEXT)
    kept = int(prompt.mask.sum())
    z = torch.randn((2, 4, 8, 12), generator=torch.Generator().manual_seed(0))
    noted = {}
    modules = {layer: backbone.attention_module(layer) for layer in range(backbone.layers)}
    handles = [
        getattr(module, name).register_forward_hook(lambda _, __, out, key=(layer, name): noted.update({key: out.double()}))
        for layer, module in modules.items()
        for name in ('to_q', 'to_k')
    ]
    everything = tuple(range(backbone.spec.sequence))
    requests = {layer: Request(module, lambda seen: token_attention(seen, 24, everything, head=1)) for layer, module in modules.items()}
    with torch.no_grad(), watch(requests) as maps:
        backbone.denoise(z, 100.0, prompt)
    for handle in handles:
        handle.remove()
    for layer, module in modules.items():
        query, key = (noted[layer, name].unflatten(-1, (module.heads, -1))[:, :, 1] for name in ('to_q', 'to_k'))
        expected = (query @ key[:, :kept].transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
        assert maps[layer].shape == (2, 24, SLOTS[kind]) and not maps[layer][..., kept:].any()
        torch.testing.assert_close(maps[layer][..., :kept].double(), expected, atol=1e-6, rtol=1e-4)


def test_16_bits(pixart_folders):
    """Pads get nothing in 16 bits either; the VAE, which is SDXL's, runs in float32."""
    for dtype in ('float16', 'bfloat16'):
        half = load(str(pixart_folders['sigma']), device='cpu', dtype=dtype)
        assert half.vae.dtype == torch.float32 and half.dtype == half.null_prompt.mask.dtype == getattr(torch, dtype)
        request = Request(half.attention_module(1), lambda seen: token_attention(seen, 24, range(300)))
        with torch.no_grad(), watch({0: request}) as kept:
            half.denoise(torch.zeros(1, 4, 8, 12), 100.0, half.null_prompt)
        assert not kept[0][..., 1:].any() and (kept[0][..., 0] == 1).all()


def test_places_of_tokens_are_computed_once(pixarts, pipelines):
    """They are no weights; the network in small memory must still have them."""
    for kind, backbone in pixarts.items():
        places = backbone.transformer.pos_embed.pos_embed
        assert torch.equal(places, pipelines[kind].transformer.pos_embed.pos_embed) and places.shape == (1, 64, 24)


def test_rows(pixart_folders, tmp_path):
    """Sigma and alpha are told apart by their pipelines; without one, it is Sigma. The side is the network's."""
    for kind, folder in pixart_folders.items():
        other = pathlib.Path(shutil.copytree(folder, tmp_path / kind))
        (other / 'padseg.json').unlink()
        spec = locate(str(other)).spec
        assert (spec.family, spec.layers, spec.side, spec.sequence, spec.encoders) == ('pixart', 3, 128, SLOTS[kind], 't5')
        (other / 'model_index.json').unlink()
        assert locate(str(other)).spec.sequence == 300
    with torch.device('meta'):
        network = PixArtTransformer2DModel(**{**PIXART, 'num_layers': 28, 'caption_channels': 4096})
    spec = BACKBONES['pixart-sigma']
    names = pixart.layer_names(network)
    assert len(names) == spec.layers and names[spec.layer] == 'vit-block13'
    assert pixart.grid(network, 13, (1, 4, 128, 96)) == (64, 48)
    assert pixart.prompt_shapes(300, network.config)['embeds'] == (1, 300, 4096)


def test_methods_for_other_models_refuse_it_by_name(pixarts, picture):
    with pytest.raises(UsageError, match='^seg4diff does not support .* of the family pixart; supported: .*flux, flux2, sd3'):
        segment(picture, pixarts['sigma'])


def refusals(folder: pathlib.Path) -> str:
    """What loading says, and doctor beforehand."""
    with pytest.raises(ModelUnavailable) as caught:
        load(str(folder), device='cpu')
    state, source = model_state(str(folder))
    assert source is None and not state.usable and state.message == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('part', ['transformer', 'vae', 'scheduler', 'text_encoder', 'tokenizer'])
def test_a_missing_part_is_named(copied, part):
    assert model_state(str(copied))[0].usable
    shutil.rmtree(copied / part)
    message = refusals(copied)
    assert part in message
    if part != 'transformer':
        assert f'{copied} is incomplete: no file named ' in message and f' in {part}' in message


def test_what_is_damaged_is_named(copied):
    shard = copied / 'text_encoder' / 'model-00002-of-00004.safetensors'
    kept = shard.read_bytes()
    shard.unlink()
    assert f'no file named {shard.name} in text_encoder' in refusals(copied)
    shard.write_bytes(kept[:-5])
    assert f'{shard} is damaged' in refusals(copied)
    shard.write_bytes(kept)
    (copied / 'tokenizer' / 'spiece.model').write_bytes(b'nothing')
    assert f'tokenizer of {copied}' in refusals(copied)
    (copied / 'tokenizer' / 'spiece.model').unlink()
    assert 'no file named tokenizer.json in tokenizer' in refusals(copied)


def test_a_transformer_that_lacks_a_tensor(copied):
    path = copied / 'transformer' / 'diffusion_pytorch_model.safetensors'
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != 'proj_out.bias'}, path, {'format': 'pt'})
    assert f'transformer of {copied} is incomplete' in (message := refusals(copied)) and 'lack 1 tensors, proj_out.bias first' in message
    save_file(tensors, path, {'format': 'pt'})
    config = copied / 'transformer' / 'config.json'
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, 'norm_type': 'ada_norm'}))  # another network of the class that PixArt's had
    assert 'describes a Transformer2DModel; known: SD3Transformer2DModel' in refusals(copied)
    config.write_text(json.dumps({**values, 'num_layers': 2}))
    assert 'does not fit its configuration' in refusals(copied)


def test_identity_covers_all_files(copied):
    fields = {'transformer': 'weights', 'vae': 'weights', 'scheduler': 'scheduler'}
    for path, changed in changed_by_files(copied):
        assert changed == {fields.get(path.parent.name, 'text_encoders')}, path
