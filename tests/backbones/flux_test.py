"""Flux.1: its maps beside an explicit softmax, partial loading, its noise schedule, its empty prompt, damaged files, a whole run."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from support.processes import padseg
from torch import nn

from padseg.backbones import load
from padseg.backbones.availability import model_state, reckon_memory
from padseg.backbones.recorder import requests_of, watch
from padseg.backbones.spec import BACKBONES
from padseg.backbones.texts import texts_of
from padseg.commands import main
from padseg.errors import ModelUnavailable, UsageError
from padseg.methods import open_vocabulary
from padseg.methods.open_vocabulary import LabelOptions, label, score_maps
from padseg.methods.seg4diff import Options, segment, token_maps
from padseg.methods.stages.attention import token_attention
from padseg.methods.stages.latents import encode
from padseg.methods.stages.prompts import prompts_of
from padseg.methods.stages.saved_maps import read_maps
from padseg.methods.stages.token_maps import attention_maps

ROOT = pathlib.Path(__file__).parents[2]
AXES = (4, 6, 6)  # channels of a head that are rotated by 0, by the row, by the column
DOUBLE = 2  # double blocks; two single ones follow
TEXT = 77
PARTS = ('transformer', 'vae', 'scheduler', 'text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2')
WEIGHTS = {part: 'diffusion_pytorch_model.safetensors' if part in ('transformer', 'vae') else 'model.safetensors' for part in PARTS}
WITH_WEIGHTS = ['transformer', 'vae', 'text_encoder', 'text_encoder_2']


@pytest.fixture
def folder(flux_folder, tmp_path):
    """A copy of the model, to be changed."""
    return pathlib.Path(shutil.copytree(flux_folder, tmp_path / 'model'))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / 'prompts'


@pytest.fixture(scope='module')
def pipeline(flux_folder):
    """diffusers' own."""
    pipe = FluxPipeline.from_pretrained(flux_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def whole_call(seen):
    """Keep all that a layer computed."""
    return seen


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# maps


def rotated(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels as complex numbers, turned by the place times a frequency: tokens (B, L, d), places (L, 3)."""
    pairs = torch.view_as_complex(tokens.double().unflatten(-1, (-1, 2)))  # (B, L, d / 2)
    angles = [
        places[:, axis, None].double() * 10000.0 ** -(torch.arange(0, size, 2).double() / size) for axis, size in enumerate(AXES)
    ]  # (L, size / 2) each
    turned = pairs * torch.polar(torch.ones_like(pairs.real[0]), torch.cat(angles, 1))
    return torch.view_as_real(turned).flatten(-2)


def normed(tokens: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return norm.weight.double() * tokens.double() / (tokens.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()


def explicit_maps(backbone, pipeline, z, timestep, layer, prompt):
    """Another forward, as diffusers' pipeline does it, whose attention's inputs are noted, and from them on all by hand in float64."""
    transformer, count = backbone.transformer, len(z)
    h, w = z.shape[2] // 2, z.shape[3] // 2
    ids = pipeline._prepare_latent_image_ids(1, h, w, 'cpu', torch.float32)
    attention = [*transformer.transformer_blocks, *transformer.single_transformer_blocks][layer].attn
    noted = {}
    handle = attention.register_forward_pre_hook(lambda _, __, named: noted.update(named), with_kwargs=True)
    with torch.no_grad():
        velocity = transformer(
            hidden_states=pipeline._pack_latents(z, count, z.shape[1], *z.shape[2:]),
            encoder_hidden_states=prompt.embeds.repeat(count, 1, 1),
            pooled_projections=prompt.pooled.repeat(count, 1),
            timestep=torch.full((count,), timestep) / 1000,
            guidance=torch.full((count,), 3.5),
            img_ids=ids,
            txt_ids=torch.zeros(TEXT, 3),
        ).sample
    handle.remove()
    places = torch.cat((torch.zeros(TEXT, 3), ids))
    image, text = noted['hidden_states'], noted.get('encoder_hidden_states')  # single blocks have both in one, text first
    found = []
    for head in range(2):
        own = slice(16 * head, 16 * head + 16)
        query, key = (normed(project(image)[..., own], norm) for project, norm in heads_of(attention, 'to_q', 'to_k', 'norm'))
        if text is not None:
            added = (
                normed(project(text)[..., own], norm) for project, norm in heads_of(attention, 'add_q_proj', 'add_k_proj', 'norm_added')
            )
            query, key = (torch.cat(both, 1) for both in zip(added, (query, key), strict=True))
        scores = rotated(query, places) @ rotated(key, places).transpose(1, 2) / 16**0.5
        found.append(scores.softmax(-1)[:, TEXT:, :TEXT])
    maps = torch.stack(found).mean(0).transpose(1, 2).unflatten(2, (h, w))
    return maps.float(), pipeline._unpack_latents(velocity, 2 * z.shape[2], 2 * z.shape[3], 2)


def heads_of(attention, query, key, norm):
    """The projections to queries and keys, each with its norm."""
    return (getattr(attention, query), getattr(attention, f'{norm}_q')), (getattr(attention, key), getattr(attention, f'{norm}_k'))


@pytest.mark.parametrize('shape', [(1, 4, 16, 16), (3, 4, 12, 20)])
@pytest.mark.parametrize('layer', [0, 1, 2, 3])
def test_maps_equal_the_explicit_softmax(flux, pipeline, shape, layer):
    """Two double blocks, then two single ones; text before the image; all turned by their places."""
    z = latents(*shape)
    expected, velocity = explicit_maps(flux, pipeline, z, 400.0, layer, flux.null_prompt)
    torch.testing.assert_close(attention_maps(z, 400.0, flux, flux.null_prompt, layer), expected, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(flux.denoise(z, 400.0, flux.null_prompt), velocity, atol=1e-4, rtol=1e-4)
    assert expected.std((2, 3)).max() > 1e-4 < expected.std(1).max()  # maps that were all alike would prove nothing


@pytest.mark.parametrize('layer', [1, 2])
def test_stopping_early_changes_nothing(flux, layer):
    z = latents(2, 4, 12, 20)
    with torch.no_grad(), watch(requests_of(flux, [layer], whole_call), stop=False) as whole:
        flux.denoise(z, 100.0, flux.null_prompt)
    with torch.no_grad(), watch(requests_of(flux, [layer], whole_call)) as stopped:
        flux.denoise(z, 100.0, flux.null_prompt)
        raise AssertionError('the forward went on')
    assert torch.equal(whole[layer].query, stopped[layer].query) and torch.equal(whole[layer].key, stopped[layer].key)
    expected = token_attention(whole[layer], 60, range(TEXT), first=TEXT).transpose(1, 2).unflatten(2, (6, 10))
    assert torch.equal(attention_maps(z, 100.0, flux, flux.null_prompt, layer), expected)


def test_a_batch_is_its_pictures(flux):
    z = latents(3, 4, 8, 12)
    together = attention_maps(z, 300.0, flux, flux.null_prompt, 2)
    alone = torch.cat([attention_maps(each[None], 300.0, flux, flux.null_prompt, 2) for each in z])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_sixteen_bits_on_a_cpu_go_through_attention_by_rows(flux_folder):
    """It takes what diffusers' dispatch passes on, and gives what torch's own attention gives but for rounding."""
    backbone = load(str(flux_folder), device='cpu', dtype='bfloat16')
    assert backbone.dtype == backbone.null_prompt.embeds.dtype == backbone.null_prompt.pooled.dtype == torch.bfloat16
    z = latents(1, 4, 12, 20)
    with torch.no_grad(), watch(requests_of(backbone, [2], whole_call)) as seen:
        backbone.denoise(z, 256.0, backbone.null_prompt)
    usual = token_attention(seen[2], 60, range(TEXT), first=TEXT).transpose(1, 2).unflatten(2, (6, 10))
    spread = (usual - usual.mean((2, 3), keepdim=True)).abs().mean()
    assert 0 < (attention_maps(z, 256.0, backbone, backbone.null_prompt, 2) - usual).abs().mean() < 0.2 * spread


def test_a_model_without_guidance(make_flux, tmp_path, picture):
    """As Flux.1-schnell, whose noise does not depend on the picture's size either."""
    other = load(str(make_flux(tmp_path, guidance_embeds=False)), device='cpu')
    assert not any('guidance' in name for name in other.transformer.state_dict())
    maps = token_maps(picture, other).maps
    assert maps.shape == (TEXT, 6, 10) and torch.isfinite(maps).all()


# loading


def test_a_folder_is_loaded(flux, flux_folder):
    assert (flux.spec.family, flux.spec.layers, flux.spec.layer, flux.spec.steps) == ('flux', 4, 2, 50)
    assert (flux.patch, flux.multiple, flux.limit, flux.layers) == (2, 4, 768, 4)
    assert flux.identity.model == str(flux_folder)
    double = [hasattr(flux.attention_module(layer), 'add_q_proj') for layer in range(4)]
    assert double == [True, True, False, False]
    assert flux.text_columns(flux.null_prompt, 24) == list(range(TEXT)) and flux.first_image_token(flux.null_prompt) == TEXT


def test_without_padseg_json_the_named_row_stands_within_the_models_depth(folder):
    (folder / 'padseg.json').unlink()
    spec = load(str(folder), device='cpu').spec
    assert spec == BACKBONES['flux']._replace(repo=str(folder), layers=4, layer=3)


@pytest.mark.parametrize('layer', [None, 0, 1, 3])
def test_only_what_the_maps_need_is_read(layer, folder, picture, keep_only_needed):
    """Blocks up to the expert's, of that one queries and keys alone, and the encoder; the maps are those of the whole model."""
    last = 2 if layer is None else layer
    expected = token_maps(picture, load(str(folder), device='cpu', whole=True), Options(layer=last)).maps
    if last < DOUBLE:
        later = rf'single_|transformer_blocks\.([{last + 1}-9]\.|{last}\.(ff|attn\.(to_v|to_out|add_v_proj|to_add_out)))'
    else:
        own = last - DOUBLE
        later = rf'single_transformer_blocks\.([{own + 1}-9]\.|{own}\.(proj_|attn\.to_v))'
    names = keep_only_needed(folder, {'transformer': rf'{later}|norm_out|proj_out', 'vae': 'decoder|post_quant'})
    backbone = load(str(folder), device='cpu', layer=layer)
    assert {*backbone.transformer.state_dict(), *backbone.vae.state_dict()} == names
    assert torch.equal(token_maps(picture, backbone, Options(layer=last)).maps, expected)
    if last < 3:
        with pytest.raises(UsageError, match=rf'was loaded up to block {last}: load\(layer=3\) loads block 3 too'):
            token_maps(picture, backbone, Options(layer=3))
    with pytest.raises(UsageError, match=r'layer is one of 0\.\.3; got 4'):
        load(str(folder), device='cpu', layer=4)


def test_another_vae_for_the_same_latents(flux_folder, tmp_path, picture):
    small = {'encoder_block_out_channels': (8, 8), 'decoder_block_out_channels': (8, 8), 'num_encoder_blocks': (1, 1)}
    AutoencoderTiny(latent_channels=4, num_decoder_blocks=(1, 1), **small).save_pretrained(tmp_path)
    backbone = load(str(flux_folder), device='cpu', vae=str(tmp_path))
    assert token_maps(picture, backbone).maps.shape == (TEXT, 6, 10)
    AutoencoderTiny(latent_channels=16, num_decoder_blocks=(1, 1), **small).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r'have 16 channels, but the transformer takes 4$'):
        load(str(flux_folder), device='cpu', vae=str(tmp_path))


# noise


def test_noise_levels_follow_the_number_of_tokens(flux):
    """50 steps; 4096 tokens are a picture of 1024 x 1024."""
    for tokens, timestep in ((4096, 375.61), (16, 231.68)):
        _, sigma, found = flux.noise_level(8, tokens)
        assert found == pytest.approx(timestep, abs=0.005) and sigma == pytest.approx(timestep / 1000, abs=5e-6)
    shift = math.exp(0.5 + (1.15 - 0.5) * (1000 - 256) / (4096 - 256))
    assert flux.noise_level(5, 1000).sigma == pytest.approx(shift * 0.1 / (0.9 + shift * 0.1), abs=1e-6)
    assert flux.noise_level(50, 1000).sigma == 1


@pytest.mark.parametrize(('side', 'height', 'width'), [(32, 24, 40), (64, 48, 84)])
def test_a_picture_gets_the_noise_that_the_pipeline_has_at_its_size(flux, pipeline, picture, side, height, width):
    def leave(pipe, *_):
        pipe._interrupt = True
        return {}

    pipeline('', height=height, width=width, num_inference_steps=50, output_type='latent', callback_on_step_end=leave)
    latent = encode(picture, flux, Options(side=side).resolve(flux.spec))
    assert latent.z.shape == (1, 4, height // 2, width // 2)
    assert latent.timestep == float(pipeline.scheduler.timesteps[-8])


# the empty prompt


def test_the_null_prompt_is_that_of_the_pipeline(flux_folder, empty_cache):
    """Text encoders run in bfloat16, as they are published."""
    prompt = load(str(flux_folder), device='cpu').null_prompt
    pipe = FluxPipeline.from_pretrained(flux_folder, transformer=None, vae=None, dtype=torch.bfloat16)
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt('', max_sequence_length=TEXT)
    assert prompt.embeds.shape == (1, TEXT, 24) and prompt.pooled.shape == (1, 20)
    assert torch.equal(prompt.embeds, embeds.float()) and torch.equal(prompt.pooled, pooled.float())
    assert prompt.picked == tuple(range(TEXT)) and prompt.names[:2] == ('</s>', '<pad 1>') and len(set(prompt.names)) == TEXT
    assert len(list(empty_cache.glob('*.safetensors'))) == 1


def test_the_null_prompt_is_computed_once(folder, empty_cache):
    first = load(str(folder), device='cpu').null_prompt
    (cached,) = empty_cache.iterdir()
    written = cached.stat().st_mtime_ns
    again = load(str(folder), device='cpu').null_prompt
    assert torch.equal(again.embeds, first.embeds) and torch.equal(again.pooled, first.pooled)
    assert cached.stat().st_mtime_ns == written


# names of classes


@pytest.mark.parametrize('names', [['cat', 'grasses'], ['dog on grass', 'a', 'cats']])
def test_names_have_the_columns_of_their_tokens(flux, names):
    """From 0 on, as T5 counts them; CLIP has none. `grasses` is three tokens: the word and two letters."""
    texts = texts_of(flux)
    (prompt,) = prompts_of(names, texts, LabelOptions().resolve(flux.spec))
    pieces = texts.tokenizer.convert_ids_to_tokens(texts.tokenizer(' '.join(names)).input_ids)[:-1]
    assert ''.join(pieces) == '▁' + '▁'.join(' '.join(names).split())
    assert prompt.picked == tuple(range(len(pieces)))
    lengths = [prompt.names.count(name) for name in names]
    assert lengths == {2: [1, 3], 3: [3, 1, 2]}[len(names)]
    assert prompt.weights == tuple(1 / length for length in lengths for _ in range(length))
    assert flux.text_columns(flux.null_prompt, 60) == list(flux.null_prompt.picked)


def test_a_text_is_encoded_as_by_the_pipeline(flux, flux_folder, empty_cache):
    pipe = FluxPipeline.from_pretrained(flux_folder, transformer=None, vae=None, dtype=torch.bfloat16)
    texts = texts_of(flux)
    for text in ('', 'cat grasses', 'cat grasses'):
        with torch.no_grad():
            embeds, pooled, _ = pipe.encode_prompt(text, max_sequence_length=TEXT)
        found = texts.encode(text, 't5', 'zeros')
        assert torch.equal(found[0], embeds.float()) and torch.equal(found[1], pooled.float())
    assert not torch.equal(found[0], flux.null_prompt.embeds) and not torch.equal(found[1], flux.null_prompt.pooled)
    assert len(list(empty_cache.iterdir())) == 2
    with pytest.raises(UsageError, match=r'only t5 has columns: encoders is t5; got l\+g'):
        texts.tokens('cat', 'l+g')


@pytest.mark.parametrize('names', [['cat', 'bird'], ['bird', 'dog bee', 'cats'], ['xx yy zz']])
def test_the_released_read_out_counts_spaces_alone(flux, names):
    """As many columns a name as T5 has tokens for it by itself, end left out, one name after the other from 0 on."""
    texts = texts_of(flux)
    expected, first = [], 0
    for name in names:
        count = len(texts.tokenizer(name).input_ids) - 1
        expected += [(column, name, 1 / count) for column in range(first, first + count)]
        first += count
    for options in (LabelOptions(blanks=True), LabelOptions(geometry='seg4diff-ovss')):
        (prompt,) = prompts_of(names, texts, options.resolve(flux.spec))
        assert list(zip(prompt.picked, prompt.names, prompt.weights, strict=True)) == expected
    words = texts.tokenizer.convert_ids_to_tokens(texts.tokenizer(' '.join(names)).input_ids)
    (prompt,) = prompts_of(names, texts, LabelOptions().resolve(flux.spec))
    assert prompt.picked == tuple(column for column, _, _ in expected if words[column] != '▁')
    assert len(prompt.picked) < len(expected)  # else these names show nothing


def test_only_a_read_out_with_spaces_is_recorded_as_one(flux):
    """What version 0.1 made without them is continued."""
    assert 'blanks' not in open_vocabulary.recorded(LabelOptions(), flux.spec)
    assert open_vocabulary.recorded(LabelOptions(blanks=True), flux.spec)['blanks'] is True
    assert 'blanks' not in open_vocabulary.recorded(LabelOptions(geometry='seg4diff-ovss', blanks=False), flux.spec)


@pytest.mark.parametrize('layers', [(1,), (0, 3)])
def test_scores_of_names_are_means_of_columns(flux, pipeline, picture, layers):
    """Beside the explicit softmax with the same prompt, over double and single blocks."""
    names = ['cat', 'grasses']
    scores = score_maps(picture, flux, names, LabelOptions(layers=layers))
    options = LabelOptions(layers=layers).resolve(flux.spec)
    (prompt,) = prompts_of(names, texts_of(flux), options)
    latent = encode(picture, flux, Options().resolve(flux.spec))
    maps = torch.stack([explicit_maps(flux, pipeline, latent.z, latent.timestep, layer, prompt)[0][0] for layer in layers]).mean(0)
    expected = torch.stack((maps[0], maps[1:4].mean(0)))
    assert scores.names == tuple(names)
    torch.testing.assert_close(scores.maps.float(), expected, atol=1e-6, rtol=1e-4)


# damage


def refusal(folder: pathlib.Path) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        load(str(folder), device='cpu')
    assert '\n' not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('part', PARTS)
def test_a_missing_part_is_named(folder, empty_cache, part):
    shutil.rmtree(folder / part)
    assert part in refusal(folder)


@pytest.mark.parametrize('part', WITH_WEIGHTS)
def test_truncated_weights(folder, empty_cache, part):
    path = folder / part / WEIGHTS[part]
    os.truncate(path, path.stat().st_size // 2)
    assert str(folder / part) in refusal(folder)


@pytest.mark.parametrize('part', WITH_WEIGHTS)
def test_weights_that_lack_a_tensor(folder, empty_cache, part):
    path = folder / part / WEIGHTS[part]
    tensors = load_file(path)
    lost = sorted(name for name in tensors if name.endswith('.weight') and not name.startswith(('decoder', 'norm_out', 'shared')))[2]
    del tensors[lost]
    save_file(tensors, path, {'format': 'pt'})
    message = refusal(folder)
    assert f'{part} of {folder} is incomplete' in message and f'lack 1 tensors, {lost} first' in message


@pytest.mark.parametrize('name', ['transformer_blocks.0.attn.norm_q.bias', 'time_text_embed.more.weight'])
def test_weights_that_hold_more_than_the_configuration_knows(folder, name):
    path = folder / 'transformer' / WEIGHTS['transformer']
    save_file({**load_file(path), name: torch.zeros(3)}, path, {'format': 'pt'})
    message = refusal(folder)
    assert f'transformer of {folder} does not fit its configuration' in message and f'hold 1 more tensors, {name} first' in message


@pytest.mark.parametrize('text', [None, '', '[]', '{}'])
def test_a_t5_tokenizer_without_a_vocabulary(folder, empty_cache, text):
    path = folder / 'tokenizer_2' / 'tokenizer.json'
    path.unlink() if text is None else path.write_text(text)
    assert 'tokenizer_2' in refusal(folder)


def test_a_t5_tokenizer_beside_a_vocabulary_of_clip(folder, empty_cache):
    """transformers would make an empty vocabulary of it."""
    (folder / 'tokenizer_2' / 'tokenizer.json').unlink()
    for name in ('vocab.json', 'merges.txt'):
        (folder / 'tokenizer_2' / name).write_text('{}')
    assert f'tokenizer_2 of {folder} has no vocabulary' in refusal(folder)


def test_a_t5_tokenizer_of_too_few_places(folder, empty_cache):
    path = folder / 'tokenizer_2' / 'tokenizer_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'model_max_length': 76}))
    assert f'tokenizer_2 of {folder} has 76 slots; expected 77' in refusal(folder)


@pytest.mark.parametrize(
    ('key', 'value', 'words'),
    [
        ('num_single_layers', None, 'must say num_single_layers, a number >= 1; got None'),
        ('num_single_layers', 0, 'must say num_single_layers, a number >= 1; got 0'),
        ('num_layers', '2', 'must say num_layers, a number >= 1; got 2'),
        ('_class_name', 'HunyuanDiT2DModel', 'describes a HunyuanDiT2DModel; known: SD3Transformer2DModel, Flux'),
        ('_class_name', ['Flux'], r"describes a \['Flux'\]; known"),
        ('_class_name', 'SD3Transformer2DModel', 'transformer of .* cannot be read|does not fit its configuration|is incomplete'),
    ],
)
def test_a_configuration_of_another_kind(folder, key, value, words):
    path = folder / 'transformer' / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    (folder / 'padseg.json').unlink()
    assert re.search(words, refusal(folder))


# the command line


def test_a_run_over_a_folder(flux_folder, tmp_path, picture):
    """Two pictures, wide and tall; the label maps are those of the library."""
    pictures = {'wide.png': picture, 'more/tall.png': np.ascontiguousarray(picture.transpose(1, 0, 2)[:, :20])}
    for name, image in pictures.items():
        path = tmp_path / 'in' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image[..., ::-1])
    ran = padseg('run', '--model', flux_folder, '--dir', tmp_path / 'in', '--out', tmp_path / 'out', '--device', 'cpu')
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in (tmp_path / 'out' / 'manifest.jsonl').read_text().splitlines()]
    assert {line['input']: line['status'] for line in lines} == dict.fromkeys(pictures, 'done')
    backbone = load(str(flux_folder), device='cpu')
    assert json.loads((tmp_path / 'out' / 'run.json').read_text())['model']['weights'] == backbone.identity.weights
    for name, image in pictures.items():
        labels = segment(image, backbone).labels
        assert np.array_equal(np.asarray(Image.open(tmp_path / 'out' / 'labels' / f'{name}.png')), labels) and labels.max() > 0


def test_names_for_the_pictures_of_a_folder(flux_folder, flux, tmp_path, picture):
    """With the read-out in single blocks, and scores kept; the results are those of the library."""
    (tmp_path / 'in').mkdir()
    cv2.imwrite(str(tmp_path / 'in' / 'wide.png'), picture[..., ::-1])
    folders = ['--dir', str(tmp_path / 'in'), '--out', str(tmp_path / 'out')]
    flags = ['--classes', 'cat, grasses', '--layers', '2,3', '--save-maps']
    assert main(['label', '--model', str(flux_folder), '--device', 'cpu', '-q', *folders, *flags]) == 0
    names, options = ('cat', 'grasses'), LabelOptions(layers=(2, 3))
    expected = label(picture, flux, names, options).labels
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'out' / 'labels' / 'wide.png.png')), expected)
    assert np.unique(expected).tolist() == [1, 2]
    kept = read_maps(tmp_path / 'out' / 'maps' / 'wide.png.npz')
    assert kept.names == names and torch.equal(kept.maps, score_maps(picture, flux, names, options).maps)
    assert [row['name'] for row in json.loads((tmp_path / 'out' / 'classes.json').read_text())] == list(names)
    settings = json.loads((tmp_path / 'out' / 'run.json').read_text())['settings']
    assert (settings['encoders'], settings['columns'], settings['layers']) == ('t5', 't5', '2, 3')


def test_doctor_says_whether_it_loads(folder, empty_cache):
    state, source = model_state(str(folder))
    assert state.usable and source is not None
    bare = reckon_memory(source, torch.device('cpu'), 'float32')
    load(str(folder), device='cpu')  # which caches the empty prompt
    cached = reckon_memory(source, torch.device('cpu'), 'float32')
    text = [load_file(folder / part / WEIGHTS[part]) for part in ('text_encoder', 'text_encoder_2')]
    assert bare.host - cached.host == 2 * sum(tensor.numel() for tensors in text for tensor in tensors.values())
    path = folder / 'transformer' / WEIGHTS['transformer']
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if 'time_text_embed' not in name}, path, {'format': 'pt'})
    state, source = model_state(str(folder))
    assert not state.usable and source is None and 'transformer' in state.message and 'time_text_embed' in state.message
