"""Z-Image: its maps beside an explicit softmax, what fills up image and text, partial loading, its texts beside diffusers' pipeline."""

from __future__ import annotations

import json
import pathlib
import shutil

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from support.crossing import changed_by_files
from support.zimage import SLOTS, WIDTH, ZIMAGE, random_zimage
from transformers import Qwen3Model

from padseg.analysis.blocks import token_groups
from padseg.analysis.recording import text_of, token_sets
from padseg.backbones import load, zimage
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
from padseg.types import Prompt

TEMPLATE = ('<|im_start|>', 'user', '\\n', '<|im_end|>', '\\n', '<|im_start|>', 'assistant', '\\n')
TEXT = 32  # tokens of the empty prompt when it is filled up
TWENTY = 'a cat, dog, grass, on, cow, sky, tree, road, car, bus, boat, bird, horse, sheep, chair, table, bed, sofa, lamp, cup'.split(', ')


@pytest.fixture(scope='module')
def folder(made_once):
    return made_once('zimage', random_zimage)


@pytest.fixture(scope='module')
def backbone(folder):
    return load(str(folder), device='cpu', whole=True)


@pytest.fixture(scope='module')
def pipeline(folder):
    """diffusers' own, with the text encoder in the precision in which it is loaded here."""
    found = ZImagePipeline.from_pretrained(folder)
    found.text_encoder = Qwen3Model.from_pretrained(folder / 'text_encoder', dtype=torch.bfloat16)  # whose frequencies stay in 32 bits
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def copied(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path / 'cache'))
    return pathlib.Path(shutil.copytree(folder, tmp_path / 'model'))


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def prompt_for(backbone, text: str) -> Prompt:
    texts = texts_of(backbone, keep=False)
    return Prompt(*texts.encode(text, 'qwen3', 'zeros'), tuple(range(64)), tuple(map(str, range(64))), mask=texts.mask(text))


# maps


def rotated(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels as complex numbers, turned by the place times a frequency: tokens (B, L, d), places (L, 3)."""
    pairs = torch.view_as_complex(tokens.double().unflatten(-1, (-1, 2)))  # (B, L, d / 2)
    angles = [
        places[:, axis, None].double() * 256.0 ** -(torch.arange(0, channels, 2).double() / channels)
        for axis, channels in enumerate(ZIMAGE['axes_dims'])
    ]
    turned = pairs * torch.polar(torch.ones_like(pairs.real[0]), torch.cat(angles, 1))
    return torch.view_as_real(turned).flatten(-2)


def places_of(h: int, w: int, text: int) -> torch.Tensor:
    """Of image tokens, behind the text in time; of what fills them up, all the same; of the text: (L, 3)."""
    image = torch.cartesian_prod(torch.tensor([text + 1]), torch.arange(h), torch.arange(w))
    return torch.cat((image, torch.zeros(-h * w % 32, 3), torch.nn.functional.pad(torch.arange(1, text + 1)[:, None], (0, 2))))


def normed(tokens: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    return norm.weight.double() * tokens.double() / (tokens.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()


def explicit_maps(backbone, z, timestep, layer, prompt, text=TEXT):
    """Another forward, as diffusers' pipeline does it, whose attention's input is noted, and from it on all by hand in float64."""
    transformer, count = backbone.transformer, len(z)
    h, w = z.shape[2] // 2, z.shape[3] // 2
    attention, noted = transformer.layers[layer].attention, []
    handle = attention.register_forward_pre_hook(lambda _, args: noted.append(args[0]))
    tokens = prompt.embeds[0, : int(prompt.mask.sum())]
    with torch.no_grad():
        pictures = transformer(list(z.unsqueeze(2).unbind()), (1000 - torch.full((count,), timestep)) / 1000, [tokens] * count).sample
    handle.remove()
    ((joint,), places) = noted, places_of(h, w, text)
    assert joint.shape[1] == len(places)
    found = []
    for head in range(2):
        own = slice(16 * head, 16 * head + 16)
        query = rotated(normed(attention.to_q(joint)[..., own], attention.norm_q), places)
        key = rotated(normed(attention.to_k(joint)[..., own], attention.norm_k), places)
        found.append((query @ key.transpose(1, 2) / 16**0.5).softmax(-1)[:, : h * w, -text:])
    return torch.stack(found).mean(0).transpose(1, 2).unflatten(2, (h, w)).float(), -torch.stack(pictures).squeeze(2)


@pytest.mark.parametrize('shape', [(1, 4, 16, 16), (3, 4, 12, 20)])
@pytest.mark.parametrize('layer', [0, 1, 2])
def test_maps_equal_the_explicit_softmax(backbone, shape, layer):
    """Image first, then the text; 60 image tokens are filled up to 64; pictures that are not square, and several at once."""
    z = latents(*shape)
    expected, velocity = explicit_maps(backbone, z, 400.0, layer, backbone.null_prompt)
    torch.testing.assert_close(attention_maps(z, 400.0, backbone, backbone.null_prompt, layer), expected, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(backbone.denoise(z, 400.0, backbone.null_prompt), velocity, atol=1e-4, rtol=1e-4)
    for kind in (slice(8), slice(8, None)):  # maps that were all alike would prove nothing: also of learned pads, which differ by place
        assert expected[:, kind].std((2, 3)).max() > 1e-4 < expected[:, kind].std(1).max()


def test_a_longer_text_is_filled_up_further(backbone):
    """33 tokens and more are filled up to 64."""
    text, z = 'cat dog grass cat dog grass abcdefghijklmnopqrst', latents(2, 4, 12, 20)
    prompt = prompt_for(backbone, text)
    assert 32 < prompt.mask.sum() < SLOTS
    expected, _ = explicit_maps(backbone, z, 100.0, 1, prompt, text=64)
    torch.testing.assert_close(attention_maps(z, 100.0, backbone, prompt, 1), expected, atol=1e-6, rtol=1e-4)


def test_stopping_early_changes_nothing(backbone):
    z, after = latents(2, 4, 12, 20), []
    handle = backbone.transformer.layers[1].feed_forward.register_forward_hook(lambda *_: after.append(1))
    with torch.no_grad(), watch(requests_of(backbone, [1], lambda seen: seen), stop=False) as whole:
        backbone.denoise(z, 100.0, backbone.null_prompt)
    assert after.pop()
    with torch.no_grad(), watch(requests_of(backbone, [1], lambda seen: seen)) as stopped:
        backbone.denoise(z, 100.0, backbone.null_prompt)
    handle.remove()
    assert not after and torch.equal(whole[1].query, stopped[1].query) and torch.equal(whole[1].key, stopped[1].key)


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
        torch.testing.assert_close(mixed @ weight.T, projected[layer][:, :60], atol=1e-5, rtol=1e-5)


def test_template_and_learned_pads_are_told_apart(backbone, picture):
    """The empty prompt is a template, which is filled up by the learned token; each option reads the maps of its kind."""
    prompt = backbone.null_prompt
    assert prompt.names == (*TEMPLATE, *(f'<learned pad {number}>' for number in range(8, 32)))
    assert prompt.kinds == ('template',) * 8 + ('pad',) * 24 and prompt.mask.sum() == 8 and prompt.embeds.shape == (1, TEXT, WIDTH)
    assert backbone.text_columns(prompt, 60) == list(range(64, 96)) and backbone.text_columns(prompt, 64) == list(range(64, 96))
    assert backbone.first_image_token(prompt) == 0
    everything = token_maps(picture, backbone)
    for tokens, kept in (('template', slice(8)), ('pads', slice(8, None))):
        some = token_maps(picture, backbone, Options(tokens=tokens))
        assert some.names == everything.names[kept] and torch.equal(some.maps, everything.maps[kept])
    with pytest.raises(UsageError, match='tokens is one of all, pads, template; got registers'):
        token_maps(picture, backbone, Options(tokens='registers'))


def test_pads_are_the_learned_token(copied, picture):
    """Not zeros, and not what Qwen makes of its own pads: with another learned token, the maps are others."""
    path = copied / 'transformer' / 'diffusion_pytorch_model.safetensors'
    tensors = load_file(path)
    maps = [token_maps(picture, load(str(copied), device='cpu')).maps]
    save_file({**tensors, 'cap_pad_token': -tensors['cap_pad_token']}, path, {'format': 'pt'})
    maps.append(token_maps(picture, load(str(copied), device='cpu')).maps)
    assert (maps[0] - maps[1])[8:].abs().max() > 1e-3
    save_file({name: tensor for name, tensor in tensors.items() if name != 'cap_pad_token'}, path, {'format': 'pt'})
    assert 'lack 1 tensors, cap_pad_token first' in refusal(copied)


def test_analyses_know_all_tokens(backbone):
    """Each is in one group; what fills up an image is neither of the image nor of the text."""
    groups = token_groups(backbone, backbone.null_prompt, 60)
    assert sorted(token for group in groups.values() for token in group) == list(range(96))
    assert groups['rest'] == list(range(60, 64)) and groups['first'] == [64] and groups['pads'] == list(range(72, 96))
    sets = token_sets(backbone, text_of(texts_of(backbone), 'cat', 'qwen3'), 60)
    assert sets['text'] == list(range(64, 96)) and sets['others'] == list(range(60, 64)) and sets['prompt'] == [67]


# loading


@pytest.mark.parametrize('layer', [None, 0, 2])
def test_a_part_gives_what_the_whole_gives(backbone, copied, keep_only_needed, picture, layer):
    """From files that hold nothing else; the refiner blocks come before all others."""
    last = 1 if layer is None else layer
    expected = token_maps(picture, backbone, Options(layer=last)).maps
    later = rf'layers\.([{last + 1}-9]\.|{last}\.(feed|attention_norm2|ffn|attention\.(to_v|to_out)))|all_final'
    names = keep_only_needed(copied, {'transformer': later, 'vae': 'decoder|post_quant'})
    part = load(str(copied), device='cpu', layer=layer)
    assert {*part.transformer.state_dict(), *part.vae.state_dict()} == names
    assert torch.equal(token_maps(picture, part, Options(layer=last)).maps, expected)


def test_sixteen_bits_on_a_cpu_go_through_attention_by_rows(folder):
    """It takes what diffusers' dispatch passes on."""
    half = load(str(folder), device='cpu', dtype='bfloat16')
    assert half.vae.dtype == half.dtype == half.null_prompt.embeds.dtype == torch.bfloat16
    z = latents(1, 4, 12, 20)
    with torch.no_grad(), watch(requests_of(half, [1], lambda seen: seen)) as seen:
        half.denoise(z, 256.0, half.null_prompt)
    usual = token_attention(seen[1], 60, range(64, 96)).transpose(1, 2).unflatten(2, (6, 10))
    spread = (usual - usual.mean((2, 3), keepdim=True)).abs().mean()
    assert 0 < (attention_maps(z, 256.0, half, half.null_prompt, 1) - usual).abs().mean() < 0.2 * spread


def test_rows(copied):
    (copied / 'padseg.json').unlink()
    spec = locate(str(copied)).spec
    assert spec == BACKBONES['z-image']._replace(repo=str(copied), layers=3, layer=2)
    with torch.device('meta'):
        network = ZImageTransformer2DModel()  # as published
    for name in ('z-image', 'z-image-turbo'):
        row = BACKBONES[name]
        assert len(zimage.layer_names(network)) == row.layers and CARDS[name] == ('Apache-2.0', False)
        assert zimage.prompt_shapes(row.sequence, network.config)['embeds'] == (1, 32, 2560)
    assert zimage.size(network.config) == (16, 2, 192) and sum(weight.numel() for weight in network.parameters()) // 10**7 == 615
    assert small_vae(locate(str(copied))) == 'madebyollin/taef1'


def test_another_vae_for_the_same_latents(folder, tmp_path, picture):
    small = {'encoder_block_out_channels': (8, 8), 'decoder_block_out_channels': (8, 8), 'num_encoder_blocks': (1, 1)}
    AutoencoderTiny(latent_channels=4, num_decoder_blocks=(1, 1), **small).save_pretrained(tmp_path)
    assert token_maps(picture, load(str(folder), device='cpu', vae=str(tmp_path))).maps.shape == (TEXT, 6, 10)


@pytest.mark.parametrize('dynamic', [False, True])
def test_latents_and_noise_are_those_of_the_pipeline(folder, pipeline, picture, dynamic, tmp_path):
    """A picture gets the noise that the pipeline has at its size; latents are shifted, then scaled."""
    other = pathlib.Path(shutil.copytree(folder, tmp_path / 'model'))
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic).save_pretrained(other / 'scheduler')
    backbone = load(str(other), device='cpu')
    pixels = torch.rand((2, 3, 24, 40), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(encode_pixels(pixels, backbone), (mean - 0.1159) * 0.3611, atol=1e-5, rtol=1e-5)

    def leave(pipe, *_):
        pipe._interrupt = True
        return {}

    parts = {name: part for name, part in pipeline.components.items() if name not in ('scheduler', 'text_encoder')}
    own = ZImagePipeline(**parts, text_encoder=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic))
    own.set_progress_bar_config(disable=True)
    own(
        prompt_embeds=[torch.zeros(8, WIDTH)],
        height=48,
        width=84,
        num_inference_steps=50,
        guidance_scale=0.0,
        output_type='latent',
        callback_on_step_end=leave,
    )
    latent = encode(picture, backbone, Options(side=64).resolve(backbone.spec))
    assert latent.z.shape == (1, 4, 24, 42)
    assert latent.timestep == float(own.scheduler.timesteps[-8]) and latent.sigma == float(own.scheduler.sigmas[-9])


def test_pictures_are_those_of_diffusers(backbone, pipeline):
    """With classifier-free guidance, whose strength the pipeline counts from 0; texts of two lengths are filled up to 32 and to 64."""
    settings = SamplingSettings(steps=3, size=36, scale=3.0).resolve(backbone.spec)
    prompts = ['a cat on grass cat dog abcdefghijklmnopqrst', 'a dog']
    lengths = [len(tokens) for tokens in pipeline.encode_prompt(prompts.copy(), max_sequence_length=SLOTS)[0]]
    assert lengths[0] > 32 > lengths[1]
    found = sample(sampler_of(backbone), prompts, (3, 4), settings, guide_of(backbone, settings), with_tokens=False)
    expected = pipeline(
        prompt=prompts.copy(),
        height=36,
        width=36,
        num_inference_steps=3,
        guidance_scale=2.0,
        max_sequence_length=SLOTS,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type='np',
    ).images
    for one, other in zip(found, expected, strict=True):
        assert one.shape == (36, 36, 3) and np.abs(one - 255 * other).max() < 1.01 and one.std() > 2


def test_turbo_is_made_in_few_steps_without_guidance():
    base, turbo = (SamplingSettings().resolve(BACKBONES[name]) for name in ('z-image', 'z-image-turbo'))
    assert (base.steps, base.scale, turbo.steps, turbo.scale) == (50, 6.0, 9, 1.0)


# texts


def test_texts_are_those_of_the_pipeline(backbone, pipeline, monkeypatch, tmp_path):
    """Its tokens in the first slots, nothing behind; a text that is too long is cut off."""
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path))
    texts = texts_of(backbone)
    for text in ('', 'a cat on grass', 'A Cat, 12 <think>', 'é 猫', 'z' * 60, 'a cat on grass'):
        with torch.no_grad():
            ((embeds,), _) = pipeline.encode_prompt(text, device='cpu', do_classifier_free_guidance=False, max_sequence_length=SLOTS)
        found, pooled = texts.encode(text, 'qwen3', 'zeros')
        mask = texts.mask(text)
        assert torch.equal(found[0, : len(embeds)], embeds.float()) and not found[0, len(embeds) :].any() and pooled.shape == (1, 0)
        assert mask.shape == (1, 32 if len(embeds) <= 32 else 64) == found.shape[:2]
        assert mask.sum() == mask[0, : len(embeds)].sum() == len(embeds)
    assert len(list((tmp_path / 'prompts').iterdir())) == 5
    assert torch.equal(backbone.null_prompt.embeds, texts.encode('', 'qwen3', 'zeros')[0])
    assert torch.equal(backbone.null_prompt.mask, texts.mask(''))
    with pytest.raises(UsageError, match='encoders is qwen3; got t5'):
        texts.tokens('cat', 't5')


def test_the_null_prompt_is_computed_once(copied, tmp_path):
    first = load(str(copied), device='cpu').null_prompt
    (cached,) = (tmp_path / 'cache' / 'prompts').iterdir()
    written = cached.stat().st_mtime_ns
    again = load(str(copied), device='cpu').null_prompt
    assert torch.equal(first.embeds, again.embeds) and torch.equal(first.mask, again.mask) and first.names == again.names
    assert cached.stat().st_mtime_ns == written


def test_names_have_the_columns_of_their_tokens(backbone):
    """20 names over several prompts, each behind the first three tokens of the template."""
    texts = texts_of(backbone, keep=False)
    prompts = prompts_of(TWENTY, texts, LabelOptions().resolve(backbone.spec))
    assert len(prompts) > 1 and tuple(dict.fromkeys(name for prompt in prompts for name in prompt.names)) == tuple(TWENTY)
    tokenizer = texts.tokenizer
    for prompt in prompts:
        own = list(dict.fromkeys(prompt.names))
        chat = tokenizer.apply_chat_template(
            [{'role': 'user', 'content': ' '.join(own)}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        numbers = tokenizer(chat).input_ids
        assert len(numbers) == prompt.mask.sum() <= SLOTS
        assert prompt.picked[0] == 3 and prompt.picked[-1] == len(numbers) - 6  # five tokens of the template stand behind
        for name in own:
            columns = [column for column, other in zip(prompt.picked, prompt.names, strict=True) if other == name]
            assert tokenizer.decode([numbers[column] for column in columns]).strip() == name
        assert backbone.text_columns(prompt, 60) == [64 + column for column in prompt.picked]


def test_scores_of_names_are_means_of_columns(backbone, picture):
    """Beside the explicit softmax with the same prompt."""
    names = ['cat', 'grass', 'sky']
    options = LabelOptions(layers=(0, 2)).resolve(backbone.spec)
    scores = score_maps(picture, backbone, names, LabelOptions(layers=(0, 2)))
    (prompt,) = prompts_of(names, texts_of(backbone), options)
    latent = encode(picture, backbone, Options().resolve(backbone.spec))
    maps = torch.stack([explicit_maps(backbone, latent.z, latent.timestep, layer, prompt)[0][0] for layer in (0, 2)]).mean(0)
    columns = {name: [column for column, other in zip(prompt.picked, prompt.names, strict=True) if other == name] for name in names}
    expected = torch.stack([maps[columns[name]].mean(0) for name in names])
    torch.testing.assert_close(scores.maps.float(), expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(UsageError, match=r'head is one of 0\.\.1 '):
        score_maps(picture, backbone, names, LabelOptions(head=2))


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
    config = copied / 'transformer' / 'config.json'
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, 'n_layers': 0}))
    assert 'must say n_layers, a number >= 1; got 0' in refusal(copied)
    config.write_text(json.dumps({**values, '_class_name': 'Lumina2Transformer2DModel'}))
    assert 'describes a Lumina2Transformer2DModel; known: SD3Transformer2DModel' in refusal(copied)


@pytest.mark.parametrize('lens', [[1536], [1536, 0, 512], [1536, 'a', 512]])
def test_axes_that_are_none_are_refused(copied, lens):
    config = copied / 'transformer' / 'config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), 'axes_lens': lens}))
    with pytest.raises(ModelUnavailable):
        load(str(copied), device='cpu')


def test_the_first_axis_has_a_place_for_the_image_behind_the_longest_text(copied):
    """40 slots are filled up to 64; the text has places 1 to 64, the image 65."""
    config = copied / 'transformer' / 'config.json'
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, 'axes_lens': [65, 48, 48]}))
    with pytest.raises(ModelUnavailable, match='with 40 slots of text has 66 places along its first axis or more; got 65'):
        load(str(copied), device='cpu')
    config.write_text(json.dumps({**values, 'axes_lens': [66, 48, 48]}))
    backbone = load(str(copied), device='cpu', whole=True)
    texts, long = texts_of(backbone), 'cat ' * 100
    prompt = Prompt(*texts.encode(long, 'qwen3', 'zeros'), (), (), mask=texts.mask(long))
    assert prompt.mask.shape == (1, 64)
    with torch.no_grad():
        assert backbone.denoise(torch.randn(1, 4, 4, 4), 500.0, prompt).isfinite().all()


def test_a_base_of_angles_has_a_limit(copied):
    config = copied / 'transformer' / 'config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), 'rope_theta': 10**40}))
    with pytest.raises(ModelUnavailable, match='rope_theta'):
        load(str(copied), device='cpu')


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
    """`run` with the learned pads alone, and `label`; the results are those of the library."""
    (tmp_path / 'in').mkdir()
    cv2.imwrite(str(tmp_path / 'in' / 'wide.png'), picture[..., ::-1])
    shared = ['--model', str(folder), '--device', 'cpu', '-q', '--dir', str(tmp_path / 'in')]
    assert main(['run', *shared, '--out', str(tmp_path / 'regions'), '--tokens', 'pads']) == 0
    assert main(['label', *shared, '--out', str(tmp_path / 'classes'), '--classes', 'cat, grass']) == 0
    for out, expected in (
        ('regions', segment(picture, backbone, Options(tokens='pads')).labels),
        ('classes', label(picture, backbone, ('cat', 'grass')).labels),
    ):
        assert np.array_equal(np.asarray(Image.open(tmp_path / out / 'labels' / 'wide.png.png')), expected) and expected.max() > 0
