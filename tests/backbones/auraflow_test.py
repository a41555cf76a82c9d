"""AuraFlow: its maps beside an explicit softmax, its registers and pads, partial loading, its texts beside diffusers' pipeline, a run."""

from __future__ import annotations

import json
import pathlib
import shutil

import cv2
import numpy as np
import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file
from support.auraflow import AURAFLOW, SLOTS, random_auraflow
from support.crossing import changed_by_files

from padseg.analysis.blocks import token_groups
from padseg.analysis.recording import text_of, token_sets
from padseg.backbones import auraflow, load
from padseg.backbones.availability import model_state, reckon_memory
from padseg.backbones.recorder import requests_of, watch
from padseg.backbones.source import locate, small_vae
from padseg.backbones.spec import BACKBONES, CARDS
from padseg.backbones.texts import texts_of
from padseg.commands import main
from padseg.errors import ModelUnavailable, UsageError
from padseg.generation.guidance import guide_of
from padseg.generation.sample import sample, sampler_of
from padseg.generation.settings import SamplingSettings
from padseg.methods.open_vocabulary import LabelOptions, label, score_maps
from padseg.methods.seg4diff import Options, segment, token_maps
from padseg.methods.stages.attention import token_attention
from padseg.methods.stages.latents import encode, encode_pixels
from padseg.methods.stages.prompts import prompts_of
from padseg.methods.stages.token_maps import attention_maps

JOINT = 2  # joint blocks; two single ones follow
TEXT = 8 + SLOTS  # registers, then the text's slots
TWENTY = 'a cat, dog, grass, on, cow, sky, tree, road, car, bus, boat, bird, horse, sheep, chair, table, bed, sofa, lamp, cup'


@pytest.fixture(scope='module')
def folders(made_once):
    return {side: made_once(f'auraflow-{side}', random_auraflow, padding=side) for side in ('right', 'left')}


@pytest.fixture(scope='module')
def folder(folders):
    return folders['right']


@pytest.fixture(scope='module')
def backbones(folders):
    return {side: load(str(folder), device='cpu', whole=True) for side, folder in folders.items()}


@pytest.fixture(scope='module')
def backbone(backbones):
    return backbones['right']


@pytest.fixture(scope='module')
def pipelines(folders):
    """diffusers' own, with the text encoder in the precision in which it is loaded here."""
    found = {}
    for side, folder in folders.items():
        found[side] = pipeline = AuraFlowPipeline.from_pretrained(folder)
        pipeline.text_encoder.to(torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def copied(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path / 'cache'))
    return pathlib.Path(shutil.copytree(folder, tmp_path / 'model'))


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# maps


def normed(tokens: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over a head's channels."""
    centred = tokens.double() - tokens.double().mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def explicit_maps(backbone, z, timestep, layer, prompt):
    """Another forward, as diffusers' pipeline does it, whose attention's inputs are noted, and from them on all by hand in float64."""
    transformer, count = backbone.transformer, len(z)
    h, w = z.shape[2] // 2, z.shape[3] // 2
    attention = [*transformer.joint_transformer_blocks, *transformer.single_transformer_blocks][layer].attn
    noted = {}
    handle = attention.register_forward_pre_hook(lambda _, __, named: noted.update(named), with_kwargs=True)
    with torch.no_grad():
        velocity = transformer(
            z, encoder_hidden_states=prompt.embeds.repeat(count, 1, 1), timestep=torch.full((count,), timestep) / 1000
        ).sample
    handle.remove()
    image, text = noted['hidden_states'], noted.get('encoder_hidden_states')  # single blocks have both in one, text first
    found = []
    for head in range(2):
        own = slice(16 * head, 16 * head + 16)
        query, key = (normed(project(image)[..., own]) for project in (attention.to_q, attention.to_k))
        if text is not None:
            added = (normed(project(text)[..., own]) for project in (attention.add_q_proj, attention.add_k_proj))
            query, key = (torch.cat(both, 1) for both in zip(added, (query, key), strict=True))
        scores = query @ key.transpose(1, 2) / 16**0.5
        assert scores.shape[1] == TEXT + h * w
        found.append(scores.softmax(-1)[:, TEXT:, :TEXT])
    return torch.stack(found).mean(0).transpose(1, 2).unflatten(2, (h, w)).float(), velocity


@pytest.mark.parametrize('shape', [(1, 4, 16, 16), (3, 4, 12, 20)])
@pytest.mark.parametrize('layer', [0, 1, 2, 3])
def test_maps_equal_the_explicit_softmax(backbone, shape, layer):
    """Two joint blocks, then two single ones; registers, text, image; pictures that are not square, and several at once."""
    z = latents(*shape)
    expected, velocity = explicit_maps(backbone, z, 400.0, layer, backbone.null_prompt)
    torch.testing.assert_close(attention_maps(z, 400.0, backbone, backbone.null_prompt, layer), expected, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(backbone.denoise(z, 400.0, backbone.null_prompt), velocity, atol=1e-4, rtol=1e-4)
    assert expected[:, :9].std((2, 3)).max() > 1e-4 < expected[:, :9].std(1).max()  # maps that were all alike would prove nothing
    torch.testing.assert_close(expected[:, 9:], expected[:, 9:10].expand(-1, SLOTS - 1, -1, -1))  # but pads are all one token


def test_stopping_early_changes_nothing(backbone):
    z, after = latents(2, 4, 12, 20), []
    handle = auraflow.blocks(backbone.transformer)[2].ff.register_forward_hook(lambda *_: after.append(1))
    with torch.no_grad(), watch(requests_of(backbone, [2], lambda seen: seen), stop=False) as whole:
        backbone.denoise(z, 100.0, backbone.null_prompt)
    assert after.pop()
    with torch.no_grad(), watch(requests_of(backbone, [2], lambda seen: seen)) as stopped:
        backbone.denoise(z, 100.0, backbone.null_prompt)
    handle.remove()
    assert not after and torch.equal(whole[2].query, stopped[2].query) and torch.equal(whole[2].key, stopped[2].key)


def test_recording_changes_no_bit_and_outputs_are_projected(backbone):
    """Every block's attention is recorded once; what it gives is what its projection takes, and behind that the block's own."""
    z, projected, handles = latents(2, 4, 12, 20), {}, []
    for layer in range(backbone.layers):
        module = backbone.attention_module(layer)
        assert module is backbone.self_attention_module(layer) and backbone.grid(layer, z.shape) == (6, 10)
        handles.append(module.to_out[0].register_forward_hook(lambda _, __, out, layer=layer: projected.update({layer: out})))
    requests = requests_of(backbone, range(backbone.layers), lambda seen: seen, ('queries', 'keys', 'output'))
    with torch.no_grad():
        plain = backbone.denoise(z, 100.0, backbone.null_prompt)
        with watch(requests, stop=False) as kept:
            recorded = backbone.denoise(z, 100.0, backbone.null_prompt)
    for handle in handles:
        handle.remove()
    assert torch.equal(plain, recorded) and plain.shape == z.shape
    first = backbone.first_image_token(backbone.null_prompt)
    for layer in range(backbone.layers):
        weight, bias = backbone.output_projection(layer)
        mixed = kept[layer].output.transpose(1, 2).flatten(2)[:, first : first + 60]
        assert bias is None
        torch.testing.assert_close(mixed @ weight.T, projected[layer][:, -60:], atol=1e-5, rtol=1e-5)


def test_registers_pads_and_template_are_told_apart(backbones, picture):
    """The end token comes before the pads or behind them, as the tokenizer says; each option reads the maps of its kind."""
    names = [f'<register {number}>' for number in range(8)]
    for side, backbone in backbones.items():
        prompt, place = backbone.null_prompt, 0 if side == 'right' else SLOTS - 1
        assert prompt.names[:8] == tuple(names) and prompt.kinds[:8] == ('register',) * 8
        assert prompt.names[8 + place] == '</s>' and prompt.kinds.count('template') == 1 and prompt.kinds.count('pad') == SLOTS - 1
        assert len(set(prompt.names)) == TEXT == len(prompt.names)
        assert backbone.text_columns(prompt, 24) == list(range(TEXT)) and backbone.first_image_token(prompt) == TEXT
        everything = token_maps(picture, backbone)
        for tokens, kind in (('registers', 'register'), ('pads', 'pad'), ('template', 'template')):
            some = token_maps(picture, backbone, Options(tokens=tokens))
            kept = [number for number, other in enumerate(prompt.kinds) if other == kind]
            assert some.names == tuple(prompt.names[number] for number in kept)
            assert torch.equal(some.maps, everything.maps[kept])


def test_analyses_know_all_tokens(backbones):
    """Each is in one group; registers are neither of the image nor of the text."""
    for side, backbone in backbones.items():
        groups = token_groups(backbone, backbone.null_prompt, 6)
        assert sorted(token for group in groups.values() for token in group) == list(range(TEXT + 6))
        assert groups['registers'] == list(range(8)) and groups['image'] == list(range(TEXT, TEXT + 6)) and 'rest' not in groups
        sets = token_sets(backbone, text_of(texts_of(backbone), 'cat', 't5'), 6)
        assert sets['text'] == list(range(8, TEXT)) and sets['others'] == list(range(8)) and set(sets['t5']) <= set(sets['text'])
        assert sets['prompt'] == [8 if side == 'right' else TEXT - 2]


# loading


@pytest.mark.parametrize('layer', [None, 0, 1, 3])
def test_a_part_gives_what_the_whole_gives(backbone, copied, keep_only_needed, picture, layer):
    """From files that hold nothing else: the expert block, a single one; the joint ones; the last."""
    last = 2 if layer is None else layer
    expected = token_maps(picture, backbone, Options(layer=last)).maps
    if last < JOINT:
        later = rf'joint_transformer_blocks\.([{last + 1}-9]\.|{last}\.(ff|attn\.(to_v|add_v|to_out|to_add_out)))|single_'
    else:
        later = rf'single_transformer_blocks\.([{last - JOINT + 1}-9]\.|{last - JOINT}\.(ff|attn\.(to_v|to_out)))'
    names = keep_only_needed(copied, {'transformer': rf'{later}|norm_out|proj_out', 'vae': 'decoder|post_quant'})
    part = load(str(copied), device='cpu', layer=layer)
    assert {*part.transformer.state_dict(), *part.vae.state_dict()} == names
    assert torch.equal(token_maps(picture, part, Options(layer=last)).maps, expected)


def test_sixteen_bits_on_a_cpu_go_through_attention_by_rows(folder):
    """It takes AuraFlow's calls, which name their scale. The VAE, which is SDXL's, runs in float32."""
    half = load(str(folder), device='cpu', dtype='bfloat16')
    assert half.vae.dtype == torch.float32 and half.dtype == half.null_prompt.embeds.dtype == torch.bfloat16
    z = latents(1, 4, 12, 20)
    with torch.no_grad(), watch(requests_of(half, [2], lambda seen: seen)) as seen:
        half.denoise(z, 256.0, half.null_prompt)
    usual = token_attention(seen[2], 60, range(9), first=TEXT).transpose(1, 2).unflatten(2, (6, 10))
    spread = (usual - usual.mean((2, 3), keepdim=True)).abs().mean()
    assert 0 < (attention_maps(z, 256.0, half, half.null_prompt, 2)[:, :9] - usual).abs().mean() < 0.2 * spread


def test_rows(copied):
    (copied / 'padseg.json').unlink()
    spec = locate(str(copied)).spec
    assert spec == BACKBONES['auraflow']._replace(repo=str(copied), layers=4, layer=3)
    with torch.device('meta'):
        network = AuraFlowTransformer2DModel(pos_embed_max_size=9216)  # otherwise as published
    row = BACKBONES['auraflow']
    assert len(auraflow.layer_names(network)) == row.layers and auraflow.size(network.config) == (4, 2, 96)
    assert auraflow.prompt_shapes(row.sequence, network.config)['embeds'] == (1, 256, 2048)
    assert sum(weight.numel() for weight in network.parameters()) // 10**7 == 685 and network.register_tokens.shape[1] == auraflow.REGISTERS
    assert CARDS['auraflow'] == ('Apache-2.0', False) and small_vae(locate(str(copied))) == 'madebyollin/taesdxl'


def test_another_vae_for_the_same_latents(folder, tmp_path, picture):
    small = {'encoder_block_out_channels': (8, 8), 'decoder_block_out_channels': (8, 8), 'num_encoder_blocks': (1, 1)}
    AutoencoderTiny(latent_channels=4, num_decoder_blocks=(1, 1), **small).save_pretrained(tmp_path)
    assert token_maps(picture, load(str(folder), device='cpu', vae=str(tmp_path))).maps.shape == (TEXT, 6, 10)


def test_latents_and_noise_are_those_of_the_pipeline(backbone, pipelines, picture):
    """The schedule is the same for all sizes; nothing is shifted before it is scaled."""
    pipeline = pipelines['right']
    pixels = torch.rand((2, 3, 24, 40), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(encode_pixels(pixels, backbone), expected, atol=1e-5, rtol=1e-5)
    pipeline.scheduler.set_timesteps(50)
    latent = encode(picture, backbone, Options(side=64).resolve(backbone.spec))
    assert latent.timestep == float(pipeline.scheduler.timesteps[-8]) and latent.sigma == float(pipeline.scheduler.sigmas[-9])


def test_pictures_are_those_of_diffusers(backbone, pipelines):
    """With classifier-free guidance."""
    settings = SamplingSettings(steps=3, size=32, scale=3.0).resolve(backbone.spec)
    prompts = ['a cat on grass', 'a dog']
    found = sample(sampler_of(backbone), prompts, (3, 4), settings, guide_of(backbone, settings), with_tokens=False)
    pipeline = pipelines['right']
    with torch.no_grad():
        texts = pipeline.encode_prompt(prompts, device='cpu', max_sequence_length=SLOTS)
    pipeline.text_encoder.float()  # or the pipeline would round the latents too
    names = ('prompt_embeds', 'prompt_attention_mask', 'negative_prompt_embeds', 'negative_prompt_attention_mask')
    expected = pipeline(
        **{name: part.float() for name, part in zip(names, texts, strict=True)},
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type='np',
    ).images
    pipeline.text_encoder.to(torch.bfloat16)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == (32, 32, 3) and np.abs(one - 255 * other).max() < 1.01 and one.std() > 2


# texts


@pytest.mark.parametrize('side', ['right', 'left'])
def test_texts_are_those_of_the_pipeline(backbones, pipelines, side, monkeypatch, tmp_path):
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path))
    backbone, pipeline = backbones[side], pipelines[side]
    texts = texts_of(backbone)
    for text in ('', 'a cat on grass', 'A Cat, 12', 'a cat on grass'):
        with torch.no_grad():
            embeds = pipeline.encode_prompt(text, do_classifier_free_guidance=False, device='cpu', max_sequence_length=SLOTS)[0]
        found, pooled = texts.encode(text, 't5', 'zeros')
        assert torch.equal(found, embeds.float()) and pooled.shape == (1, 0)
        (tokens,) = texts.tokens(text, 't5').values()
        filled = embeds[0].any(1).nonzero().flatten().tolist()  # pads are zeros
        assert filled == list(range(tokens.first, tokens.first + len(tokens.spans)))
    assert len(list((tmp_path / 'prompts').iterdir())) == 3
    assert torch.equal(backbone.null_prompt.embeds, texts.encode('', 't5', 'zeros')[0])
    with pytest.raises(UsageError, match=r'encoders is t5; got l\+g'):
        texts.tokens('cat', 'l+g')


def test_the_null_prompt_is_computed_once_and_its_encoder_not_kept(copied, tmp_path):
    first = load(str(copied), device='cpu').null_prompt
    (cached,) = (tmp_path / 'cache' / 'prompts').iterdir()
    written = cached.stat().st_mtime_ns
    shutil.move(copied / 'text_encoder' / 'model.safetensors', tmp_path / 'weights')
    assert model_state(str(copied))[1] is None  # of a folder, the weights of text encoders are part of what it is
    shutil.move(tmp_path / 'weights', copied / 'text_encoder' / 'model.safetensors')
    again = load(str(copied), device='cpu').null_prompt
    assert torch.equal(first.embeds, again.embeds) and (first.names, first.kinds) == (again.names, again.kinds)
    assert cached.stat().st_mtime_ns == written


@pytest.mark.parametrize('side', ['right', 'left'])
def test_names_have_the_columns_of_their_tokens(backbones, side):
    """20 names over several prompts; Llama's tokens of letters and bytes make what is no word of its vocabulary."""
    backbone, names = backbones[side], TWENTY.split(', ')
    texts = texts_of(backbone, keep=False)
    prompts = prompts_of(names, texts, LabelOptions().resolve(backbone.spec))
    assert len(prompts) > 1 and tuple(dict.fromkeys(name for prompt in prompts for name in prompt.names)) == tuple(names)
    tokenizer = texts.tokenizer
    for prompt in prompts:
        own = list(dict.fromkeys(prompt.names))
        padded = tokenizer(' '.join(own), padding='max_length', max_length=SLOTS).input_ids
        words = tokenizer.convert_ids_to_tokens(padded)
        for name in own:
            pieces = [words[column] for column, other in zip(prompt.picked, prompt.names, strict=True) if other == name]
            assert ''.join(pieces).replace('▁', ' ').strip() == name
        assert backbone.text_columns(prompt, 60) == [8 + column for column in prompt.picked]


@pytest.mark.parametrize('side', ['right', 'left'])
def test_scores_of_names_are_means_of_columns(backbones, picture, side):
    """Beside the explicit softmax with the same prompt, over joint and single blocks."""
    backbone, names = backbones[side], ['cat', 'grass', 'sky']
    options = LabelOptions(layers=(0, 3)).resolve(backbone.spec)
    scores = score_maps(picture, backbone, names, LabelOptions(layers=(0, 3)))
    (prompt,) = prompts_of(names, texts_of(backbone), options)
    latent = encode(picture, backbone, Options().resolve(backbone.spec))
    maps = torch.stack([explicit_maps(backbone, latent.z, latent.timestep, layer, prompt)[0][0] for layer in (0, 3)]).mean(0)
    columns = {name: [8 + column for column, other in zip(prompt.picked, prompt.names, strict=True) if other == name] for name in names}
    expected = torch.stack([maps[columns[name]].mean(0) for name in names])
    torch.testing.assert_close(scores.maps.float(), expected, atol=1e-6, rtol=1e-4)


# damage, and the command line


def refusal(folder: pathlib.Path) -> str:
    """What loading says, and doctor beforehand."""
    with pytest.raises(ModelUnavailable) as caught:
        load(str(folder), device='cpu')
    state, source = model_state(str(folder))
    assert source is None and not state.usable and state.message == str(caught.value)
    return str(caught.value)


def test_what_is_damaged_is_named(copied):
    for part in ('vae', 'scheduler', 'text_encoder', 'tokenizer'):
        shutil.move(copied / part, copied.parent / part)
        assert f'{copied} is incomplete: no file named ' in (message := refusal(copied)) and f' in {part}' in message
        shutil.move(copied.parent / part, copied / part)
    path = copied / 'transformer' / 'diffusion_pytorch_model.safetensors'
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != 'register_tokens'}, path, {'format': 'pt'})
    assert 'lack 1 tensors, register_tokens first' in refusal(copied)
    save_file(tensors, path, {'format': 'pt'})
    config = copied / 'transformer' / 'config.json'
    config.write_text(json.dumps({**AURAFLOW, '_class_name': 'AuraFlowTransformer3DModel'}))
    assert 'describes a AuraFlowTransformer3DModel; known: SD3Transformer2DModel' in refusal(copied)


def test_doctor_reckons_memory(copied):
    state, source = model_state(str(copied))
    assert state.usable and source is not None
    bare = reckon_memory(source, torch.device('cpu'), 'float32')
    load(str(copied), device='cpu')  # which caches the empty prompt
    cached = reckon_memory(source, torch.device('cpu'), 'float32')
    text = load_file(copied / 'text_encoder' / 'model.safetensors')
    assert bare.host - cached.host == 2 * sum(tensor.numel() for tensor in text.values())


def test_identity_covers_all_files(copied):
    fields = {'transformer': 'weights', 'vae': 'weights', 'scheduler': 'scheduler'}
    for path, changed in changed_by_files(copied):
        assert changed == {fields.get(path.parent.name, 'text_encoders')}, path


def test_folders_of_pictures(folder, backbone, tmp_path, picture):
    """`run` with the registers alone, and `label`; the results are those of the library."""
    (tmp_path / 'in').mkdir()
    cv2.imwrite(str(tmp_path / 'in' / 'wide.png'), picture[..., ::-1])
    shared = ['--model', str(folder), '--device', 'cpu', '-q', '--dir', str(tmp_path / 'in')]
    assert main(['run', *shared, '--out', str(tmp_path / 'regions'), '--tokens', 'registers']) == 0
    assert main(['label', *shared, '--out', str(tmp_path / 'classes'), '--classes', 'cat, grass']) == 0
    for out, expected in (
        ('regions', segment(picture, backbone, Options(tokens='registers')).labels),
        ('classes', label(picture, backbone, ('cat', 'grass')).labels),
    ):
        assert np.array_equal(np.asarray(Image.open(tmp_path / out / 'labels' / 'wide.png.png')), expected) and expected.max() > 0
