"""FLUX.2: its maps beside an explicit softmax, partial loading, its latents and noise, the tokens of Qwen3's template, a whole run."""

from __future__ import annotations

import json
import pathlib
import shutil

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, Flux2KleinPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from support.flux2 import SLOTS, random_flux2
from torch import nn

from padseg.analysis.blocks import token_groups
from padseg.analysis.recording import Text
from padseg.analysis.tokens import slot_names
from padseg.backbones import load
from padseg.backbones.availability import model_state, reckon_memory
from padseg.backbones.cpu_attention import by_rows
from padseg.backbones.cpu_norm import exact_norms
from padseg.backbones.flux import packed, unpacked
from padseg.backbones.latent_scale import scaled, unscaled
from padseg.backbones.qwen_text import NOT_THINKING, THINKING, qwen_tokens
from padseg.backbones.recorder import requests_of, watch
from padseg.backbones.spec import BACKBONES
from padseg.backbones.texts import texts_of
from padseg.commands import main
from padseg.errors import ModelUnavailable, UsageError
from padseg.generation.guidance import guide_of
from padseg.generation.sample import sample, sampler_of
from padseg.generation.settings import SamplingSettings
from padseg.methods.diffcut import DiffCutOptions
from padseg.methods.open_vocabulary import LabelOptions, label, score_maps
from padseg.methods.seg4diff import Options, segment, token_maps
from padseg.methods.stages.latents import encode, encode_pixels
from padseg.methods.stages.prompts import prompts_of
from padseg.methods.stages.token_maps import attention_maps

AXES = (4, 4, 4, 4)  # channels of a head that are rotated by time, row, column and slot of the text
DOUBLE = 2  # double blocks; two single ones follow
TEMPLATE = 12  # tokens
VOC = (
    'aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse, motorbike, person, plant, sheep, sofa, train, '
    'monitor'
).split(', ')


@pytest.fixture
def folder(flux2_folder, tmp_path):
    """A copy of the model, to be changed."""
    return pathlib.Path(shutil.copytree(flux2_folder, tmp_path / 'model'))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / 'prompts'


@pytest.fixture(scope='module')
def pipeline(flux2_folder):
    """diffusers' own; its text encoder is in bfloat16, as it is published."""
    pipe = Flux2KleinPipeline.from_pretrained(flux2_folder, dtype={'text_encoder': torch.bfloat16, 'default': torch.float32})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def changed(path: pathlib.Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# maps


def rotated(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels as complex numbers, turned by the place times a frequency: tokens (B, L, d), places (L, 4)."""
    pairs = torch.view_as_complex(tokens.double().unflatten(-1, (-1, 2)))  # (B, L, d / 2)
    angles = [places[:, axis, None].double() * 2000.0 ** -(torch.arange(0, size, 2).double() / size) for axis, size in enumerate(AXES)]
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(pairs.real[0]), torch.cat(angles, 1))).flatten(-2)


def normed(tokens: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return norm.weight.double() * tokens.double() / (tokens.double().square().mean(-1, keepdim=True) + norm.eps).sqrt()


def explicit_maps(backbone, pipeline, z, timestep, layer, prompt, guidance=None):
    """Another forward, as diffusers' pipeline does it, whose attention's inputs are noted, and from them on all by hand in float64."""
    transformer, count = backbone.transformer, len(z)
    patches = pipeline._patchify_latents(z)
    ids, slots = pipeline._prepare_latent_ids(patches), pipeline._prepare_text_ids(prompt.embeds)
    attention = [*transformer.transformer_blocks, *transformer.single_transformer_blocks][layer].attn
    noted = {}
    handle = attention.register_forward_pre_hook(lambda _, __, named: noted.update(named), with_kwargs=True)
    with torch.no_grad():
        velocity = transformer(
            hidden_states=pipeline._pack_latents(patches),
            encoder_hidden_states=prompt.embeds.repeat(count, 1, 1),
            timestep=torch.full((count,), timestep) / 1000,
            guidance=guidance,
            img_ids=ids,
            txt_ids=slots,
        ).sample
    handle.remove()
    places, text = torch.cat((slots[0], ids[0])), noted.get('encoder_hidden_states')
    found = []
    for head in range(2):
        own = slice(16 * head, 16 * head + 16)
        if layer < DOUBLE:
            parts = [[attention.add_q_proj(text), attention.to_q(noted['hidden_states'])]]
            parts += [[attention.add_k_proj(text), attention.to_k(noted['hidden_states'])]]
            norms = [[attention.norm_added_q, attention.norm_q], [attention.norm_added_k, attention.norm_k]]
        else:  # text and image are in one, and so are queries and keys
            joint = noted['hidden_states'] @ attention.to_qkv_mlp_proj.weight.T
            parts, norms = [[joint[..., :32]], [joint[..., 32:64]]], [[attention.norm_q], [attention.norm_k]]
        query, key = (
            torch.cat([normed(tokens[..., own], norm) for tokens, norm in zip(some, by, strict=True)], 1)
            for some, by in zip(parts, norms, strict=True)
        )
        scores = rotated(query, places) @ rotated(key, places).transpose(1, 2) / 16**0.5
        found.append(scores.softmax(-1)[:, SLOTS:, :SLOTS])
    h, w = patches.shape[2:]
    flow = pipeline._unpatchify_latents(pipeline._unpack_latents_with_ids(velocity, ids))
    return torch.stack(found).mean(0).transpose(1, 2).unflatten(2, (h, w)).float(), flow


@pytest.mark.parametrize('shape', [(1, 4, 16, 16), (3, 4, 12, 20)])
@pytest.mark.parametrize('layer', [0, 1, 2, 3])
def test_maps_equal_the_explicit_softmax(flux2, pipeline, shape, layer):
    """Two double blocks, then two single ones; text before the image; all turned by their places."""
    z = latents(*shape)
    expected, velocity = explicit_maps(flux2, pipeline, z, 400.0, layer, flux2.null_prompt)
    torch.testing.assert_close(attention_maps(z, 400.0, flux2, flux2.null_prompt, layer), expected, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(flux2.denoise(z, 400.0, flux2.null_prompt), velocity, atol=1e-4, rtol=1e-4)
    assert expected.std((2, 3)).max() > 1e-4 < expected.std(1).max()  # maps that were all alike would prove nothing


@pytest.mark.parametrize('layer', [1, 2])
def test_stopping_early_changes_nothing(flux2, layer):
    z = latents(2, 4, 12, 20)
    with torch.no_grad(), watch(requests_of(flux2, [layer], lambda seen: seen), stop=False) as whole:
        flux2.denoise(z, 100.0, flux2.null_prompt)
    with torch.no_grad(), watch(requests_of(flux2, [layer], lambda seen: seen)) as stopped:
        flux2.denoise(z, 100.0, flux2.null_prompt)
        raise AssertionError('the forward went on')
    assert torch.equal(whole[layer].query, stopped[layer].query) and torch.equal(whole[layer].key, stopped[layer].key)


def test_a_batch_is_its_pictures(flux2):
    z = latents(3, 4, 8, 12)
    for layer in (1, 3):
        together = attention_maps(z, 300.0, flux2, flux2.null_prompt, layer)
        alone = torch.cat([attention_maps(each[None], 300.0, flux2, flux2.null_prompt, layer) for each in z])
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_sixteen_bits_on_a_cpu(flux2_folder, flux2, picture):
    backbone = load(str(flux2_folder), device='cpu', dtype='bfloat16')
    assert backbone.dtype == backbone.vae.bn.running_mean.dtype == backbone.null_prompt.embeds.dtype == torch.bfloat16
    assert backbone.vae.bn.num_batches_tracked.dtype == torch.int64
    maps, exact = token_maps(picture, backbone).maps, token_maps(picture, flux2).maps
    assert 0 < (maps - exact).abs().mean() < 0.3 * (exact - exact.mean((1, 2), keepdim=True)).abs().mean()


def test_a_model_that_is_told_its_guidance(tmp_path, pipeline):
    """As FLUX.2-dev's transformer."""
    backbone = load(str(random_flux2(tmp_path, guidance_embeds=True)), device='cpu', whole=True)
    z, null = latents(1, 4, 8, 12), backbone.null_prompt
    for strength in (None, 4.0, 1.0):
        _, velocity = explicit_maps(backbone, pipeline, z, 400.0, 0, null, torch.full((1,), 4.0 if strength is None else strength))
        with torch.no_grad():
            torch.testing.assert_close(backbone.denoise(z, 400.0, null, strength), velocity, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not torch.equal(backbone.denoise(z, 400.0, null, 1.0), backbone.denoise(z, 400.0, null))


# loading


def test_a_folder_is_loaded(flux2, folder):
    assert (flux2.spec.family, flux2.spec.layers, flux2.spec.layer, flux2.spec.steps) == ('flux2', 4, 2, 50)
    assert (flux2.patch, flux2.multiple, flux2.limit, flux2.layers) == (2, 4, 768, 4)
    (folder / 'padseg.json').unlink()
    named = BACKBONES['flux2-klein-base']
    assert load(str(folder), device='cpu').spec == named._replace(repo=str(folder), layers=4, layer=3)


@pytest.mark.parametrize('layer', [0, 1, 2, 3])
def test_only_what_the_maps_need_is_read(layer, folder, picture, keep_only_needed):
    """Blocks up to the expert's, of that one queries and keys alone, and the encoder; the maps are those of the whole model."""
    expected = token_maps(picture, load(str(folder), device='cpu', whole=True), Options(layer=layer)).maps
    if layer < DOUBLE:
        later = rf'single_|transformer_blocks\.([{layer + 1}-9]\.|{layer}\.(ff|attn\.(to_v|to_out|add_v_proj|to_add_out)))'
    else:
        own = layer - DOUBLE
        later = rf'single_transformer_blocks\.([{own + 1}-9]\.|{own}\.attn\.to_out)'
    names = keep_only_needed(folder, {'transformer': rf'{later}|norm_out|proj_out', 'vae': 'decoder|post_quant'})
    backbone = load(str(folder), device='cpu', layer=layer)
    assert {*backbone.transformer.state_dict(), *backbone.vae.state_dict()} == names
    assert torch.equal(token_maps(picture, backbone, Options(layer=layer)).maps, expected)


def test_no_small_vae_is_known(flux2, flux2_folder, tmp_path, picture):
    """Any in AutoencoderTiny's layout for these latents is taken."""
    with pytest.raises(UsageError, match="no small VAE in AutoencoderTiny's layout for"):
        load(str(flux2_folder), device='cpu', vae='tiny')
    small = {'encoder_block_out_channels': (8, 8), 'decoder_block_out_channels': (8, 8), 'num_encoder_blocks': (1, 1)}
    AutoencoderTiny(latent_channels=4, num_decoder_blocks=(1, 1), **small).save_pretrained(tmp_path)
    assert token_maps(picture, load(str(flux2_folder), device='cpu', vae=str(tmp_path))).maps.shape == (SLOTS, 6, 10)


def test_whole_numbers_are_counters_and_no_weights(folder, empty_cache):
    path = folder / 'vae' / 'diffusion_pytorch_model.safetensors'
    tensors = load_file(path)
    assert tensors['bn.num_batches_tracked'].dtype == torch.int64
    save_file({**tensors, 'bn.running_mean': torch.zeros(16, dtype=torch.int8)}, path, {'format': 'pt'})
    with pytest.raises(ModelUnavailable, match=r'vae of .* cannot be used: bn\.running_mean in .* holds integers'):
        load(str(folder), device='cpu')


def test_other_patches_are_refused(folder):
    path = folder / 'vae' / 'diffusion_pytorch_model.safetensors'
    tensors = load_file(path)
    save_file(
        {name: tensor[:4].clone() if name.startswith('bn.run') else tensor for name, tensor in tensors.items()}, path, {'format': 'pt'}
    )
    changed(folder / 'vae' / 'config.json', patch_size=[1, 1])
    with pytest.raises(ModelUnavailable, match=r'vae/config.json: patch_size is \[2, 2\]; got'):
        load(str(folder), device='cpu')


def test_doctor_says_whether_it_loads(folder, empty_cache):
    state, source = model_state(str(folder))
    assert state.usable and source is not None
    cpu = torch.device('cpu')
    bare = reckon_memory(source, cpu, 'float32')
    backbone = load(str(folder), device='cpu')  # which caches the empty prompt
    held = (*backbone.transformer.state_dict().values(), *backbone.vae.state_dict().values())
    cached = reckon_memory(source, cpu, 'float32')
    assert cached.device == sum(4 * tensor.numel() for tensor in held)
    assert bare.host - cached.host == sum(2 * tensor.numel() for tensor in load_file(folder / 'text_encoder/model.safetensors').values())
    shutil.rmtree(folder / 'tokenizer')
    assert not model_state(str(folder))[0].usable


@pytest.mark.parametrize('part', ['transformer', 'vae', 'scheduler', 'text_encoder', 'tokenizer'])
def test_a_missing_part_is_named(folder, empty_cache, part):
    shutil.rmtree(folder / part)
    with pytest.raises(ModelUnavailable, match=part):
        load(str(folder), device='cpu')


def test_a_class_that_is_not_known_is_refused_with_the_list(folder):
    changed(folder / 'transformer' / 'config.json', _class_name='Flux3Transformer2DModel')
    with pytest.raises(
        ModelUnavailable, match=r'describes a Flux3Transformer2DModel; known: SD3Transformer2DModel, .*Flux2Transformer2DMo'
    ):
        load(str(folder), device='cpu')


# latents and noise


def test_latents_are_those_of_the_pipeline(flux2, pipeline):
    """Bit for bit, patches packed as it packs them, for pictures that are no squares."""
    pixels = torch.rand((2, 3, 24, 40), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad(), by_rows(), exact_norms():
        pipeline.vae.to(memory_format=torch.channels_last)
        expected = pipeline._encode_vae_image(pixels.contiguous(memory_format=torch.channels_last), None)
    found = encode_pixels(pixels, flux2)
    assert found.shape == (2, 4, 12, 20) and torch.equal(pipeline._patchify_latents(found), expected)
    assert torch.equal(packed(found), pipeline._pack_latents(expected)) and torch.equal(unpacked(packed(found), 6, 10), found)


def test_the_decoder_gets_what_the_encoder_gave(flux2, pipeline):
    z = latents(2, 4, 12, 20)
    torch.testing.assert_close(scaled(flux2.vae, unscaled(flux2.vae, z)), z, atol=1e-6, rtol=1e-5)
    mean, variance = pipeline.vae.bn.running_mean, pipeline.vae.bn.running_var
    by_channel = pipeline._patchify_latents(z) * torch.sqrt(variance + 1e-4).view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    assert torch.equal(unscaled(flux2.vae, z), pipeline._unpatchify_latents(by_channel))


@pytest.mark.parametrize(('side', 'height', 'width'), [(32, 24, 40), (64, 48, 84)])
def test_a_picture_gets_the_noise_that_the_pipeline_has_at_its_size(flux2, pipeline, picture, side, height, width):
    def leave(pipe, *_):
        pipe._interrupt = True
        return {}

    shown = {'height': height, 'width': width, 'num_inference_steps': 50, 'guidance_scale': 1.0}
    pipeline(prompt_embeds=flux2.null_prompt.embeds, output_type='latent', callback_on_step_end=leave, **shown)
    latent = encode(picture, flux2, Options(side=side).resolve(flux2.spec))
    assert latent.z.shape == (1, 4, height // 2, width // 2)
    assert latent.timestep == float(pipeline.scheduler.timesteps[-8])


# texts


def test_texts_are_encoded_as_by_the_pipeline(flux2, flux2_folder, pipeline, empty_cache):
    """Bit for bit; what does not fit is cut off."""
    texts = texts_of(flux2)
    for text in ('', 'cat dog', 'cat dog', 'a photo of a café', 'grass ' * SLOTS):
        with torch.no_grad():
            embeds, _ = pipeline.encode_prompt(text, max_sequence_length=SLOTS)
        found, pooled = texts.encode(text, 'qwen3', 'zeros')
        assert torch.equal(found, embeds.float()) and pooled.shape == (1, 0)
    assert len(list(empty_cache.iterdir())) == 4 and texts.mask('cat') is None
    with pytest.raises(UsageError, match=r'only qwen3 has columns: encoders is qwen3; got t5'):
        texts.tokens('cat', 't5')


def test_the_null_prompt_is_known_without_its_encoder(folder, empty_cache, pipeline):
    """Which tokens are of the template and which are pads too."""
    first = load(str(folder), device='cpu').null_prompt
    with torch.no_grad():
        assert torch.equal(first.embeds, pipeline.encode_prompt('', max_sequence_length=SLOTS)[0].float())
    for part in ('text_encoder', 'tokenizer'):
        for path in (folder / part).iterdir():
            if path.suffix == '.safetensors':
                path.write_bytes(b'')
    with pytest.raises(ModelUnavailable, match='damaged'):
        model_state(str(folder))[1] or load(str(folder), device='cpu')
    assert first.picked == tuple(range(SLOTS)) and len(first.kinds) == SLOTS
    assert first.names[:6] == ('<|im_start|>', 'user', '\\n', '<|im_end|>', '\\n', '<|im_start|>')
    assert first.names[TEMPLATE - 1 : TEMPLATE + 1] == ('\\n\\n', f'<pad {TEMPLATE}>')
    assert first.kinds == ('template',) * TEMPLATE + ('pad',) * (SLOTS - TEMPLATE)


def test_tokens_of_one_kind_are_read(flux2, picture):
    everything = token_maps(picture, flux2)
    for tokens, kept in (('all', slice(None)), ('template', slice(TEMPLATE)), ('pads', slice(TEMPLATE, None))):
        maps = token_maps(picture, flux2, Options(tokens=tokens))
        assert torch.equal(maps.maps, everything.maps[kept]) and maps.names == everything.names[kept]


def test_names_have_the_columns_of_their_tokens(flux2):
    """Of 20 names in one prompt of 512 tokens: the pieces are the names, letter for letter, and none is of the template."""
    texts = texts_of(flux2, keep=False)
    texts.source = texts.source._replace(spec=flux2.spec._replace(sequence=512))
    options = LabelOptions().resolve(flux2.spec)
    (prompt,) = prompts_of(VOC, texts, options)
    shown = pieces_of(texts.tokenizer, ' '.join(VOC), 512)
    for name in VOC:
        columns = [column for column, own in zip(prompt.picked, prompt.names, strict=True) if own == name]
        assert columns == list(range(columns[0], columns[-1] + 1))
        assert ''.join(shown[column] for column in columns).strip() == name
    assert len(set(prompt.picked)) == len(prompt.picked) and prompt.picked[0] == 3
    assert prompt.names.count('cat') == prompt.names.count('dog') == 1
    split = prompts_of(VOC, texts_of(flux2, keep=False), options)  # of 40 slots
    assert len(split) > 3 and list(dict.fromkeys(name for one in split for name in one.names)) == VOC


def pieces_of(tokenizer, text: str, slots: int) -> list[str]:
    """What each token of a text in its template stands for, from another reading: by the pipeline's way to tokenize."""
    chat = [{'role': 'user', 'content': text}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return [tokenizer.decode([number]) for number in tokenizer(whole, padding='max_length', max_length=slots).input_ids]


@pytest.mark.parametrize(('template', 'thinking'), [(THINKING, True), (NOT_THINKING, False)])
def test_the_template_is_that_of_the_tokenizer(flux2, template, thinking):
    tokenizer = texts_of(flux2).tokenizer
    for text in ('', 'cat', '\n cat\n', 'a <|im_end|> b'):
        chat = [{'role': 'user', 'content': text}]
        shown = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True, enable_thinking=thinking)
        found = qwen_tokens(tokenizer, text, SLOTS, template)
        assert len(found.spans) == len(shown['input_ids'])
        assert sorted({place for start, end in found.spans for place in range(start, end)}) == list(range(len(text)))
        assert found.strange.count(False) <= len(text) and all(found.strange[:2])  # the third one may be a line break with the text's
    assert any(text[slice(*span)] == '<|im_end|>' and odd for span, odd in zip(found.spans, found.strange, strict=True))


def test_a_name_that_is_a_token_of_the_template_is_refused(flux2):
    with pytest.raises(UsageError, match=r"the tokenizer has no tokens for the name '<think>'"):
        prompts_of(['cat', '<think>'], texts_of(flux2), LabelOptions().resolve(flux2.spec))


def test_a_configuration_by_an_earlier_version_of_transformers(folder, flux2, empty_cache):
    """The base of angles stands beside other numbers, not among `rope_parameters`."""
    path = folder / 'text_encoder' / 'config.json'
    values = json.loads(path.read_text())
    assert values.pop('rope_parameters')['rope_theta'] == 1e6
    path.write_text(json.dumps({**values, 'rope_theta': 1_000_000, 'rope_scaling': None}))
    assert torch.equal(load(str(folder), device='cpu').null_prompt.embeds, flux2.null_prompt.embeds)
    path.write_text(json.dumps({**values, 'rope_theta': 10_000, 'rope_scaling': None}))
    assert not torch.equal(load(str(folder), device='cpu').null_prompt.embeds, flux2.null_prompt.embeds)


def test_what_is_not_qwen3_is_refused(folder, empty_cache):
    """As the text encoder of FLUX.2-dev; a tokenizer that knows no template; one that pads before; an encoder that is not deep enough."""
    encoder, tokenizer = folder / 'text_encoder' / 'config.json', folder / 'tokenizer'
    before = encoder.read_text()
    changed(encoder, model_type='mistral3')
    for check in (lambda path: load(path, device='cpu'), whole_state):
        with pytest.raises(ModelUnavailable, match=r'text_encoder of .* is a mistral3; this family reads texts with qwen3 alone'):
            check(str(folder))
    encoder.write_text(before)
    changed(tokenizer / 'tokenizer_config.json', padding_side='left')
    with pytest.raises(ModelUnavailable, match="tokenizer of .* cuts Qwen3's template"):
        load(str(folder), device='cpu')
    changed(tokenizer / 'tokenizer_config.json', padding_side='right')
    vocabulary = json.loads((tokenizer / 'tokenizer.json').read_text())
    vocabulary['added_tokens'] = [token for token in vocabulary['added_tokens'] if token['content'] != '<think>']
    (tokenizer / 'tokenizer.json').write_text(json.dumps(vocabulary))
    changed(tokenizer / 'tokenizer_config.json', added_tokens_decoder={})
    with pytest.raises(ModelUnavailable, match=r"cuts Qwen3's template into <\|im_start\|> user .*; expected <\|im_start\|> user"):
        load(str(folder), device='cpu')


def whole_state(model: str) -> None:
    state, _ = model_state(model)
    raise ModelUnavailable(state.message)


# the command line


def test_a_run_over_a_folder(flux2_folder, flux2, tmp_path, picture):
    """The label map is that of the library, and which tokens were read is recorded."""
    (tmp_path / 'in').mkdir()
    cv2.imwrite(str(tmp_path / 'in' / 'wide.png'), picture[..., ::-1])
    folders = ['--dir', str(tmp_path / 'in'), '--out', str(tmp_path / 'out')]
    model = ['--model', str(flux2_folder), '--device', 'cpu', '-q']
    assert main(['run', *model, *folders, '--tokens', 'pads', '--threshold', '0.01']) == 0
    options = Options(tokens='pads', threshold=0.01)
    labels = segment(picture, flux2, options).labels
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'out' / 'labels' / 'wide.png.png')), labels) and labels.max() > 0
    assert json.loads((tmp_path / 'out' / 'run.json').read_text())['settings']['tokens'] == 'pads'
    assert main(['run', *model, *folders, '--tokens', 'all', '--threshold', '0.01']) == 6  # other settings
    assert main(['run', *model, *folders, '--tokens', 'registers', '--overwrite']) == 2


def test_names_for_the_pictures_of_a_folder(flux2_folder, flux2, tmp_path, picture):
    (tmp_path / 'in').mkdir()
    cv2.imwrite(str(tmp_path / 'in' / 'wide.png'), picture[..., ::-1])
    folders = ['--dir', str(tmp_path / 'in'), '--out', str(tmp_path / 'out')]
    assert main(['label', '--model', str(flux2_folder), '--device', 'cpu', '-q', *folders, '--classes', 'cat, grasses']) == 0
    expected = label(picture, flux2, ('cat', 'grasses')).labels
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'out' / 'labels' / 'wide.png.png')), expected)
    settings = json.loads((tmp_path / 'out' / 'run.json').read_text())['settings']
    assert (settings['encoders'], settings['columns'], settings['layers']) == ('qwen3', 'qwen3', '2')


def test_pictures_are_those_of_the_pipeline(flux2, pipeline):
    """With classifier-free guidance, from the same noise."""
    settings = SamplingSettings(steps=3, size=32, scale=3.0).resolve(flux2.spec)
    (found,) = sample(sampler_of(flux2), ['a cat on grass'], [3], settings, guide_of(flux2, settings), with_tokens=False)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        text, empty = (pipeline.encode_prompt(one, max_sequence_length=SLOTS)[0].float() for one in ('a cat on grass', ''))
    given = {'latents': pipeline._patchify_latents(noise), 'num_inference_steps': 3, 'guidance_scale': 3.0, 'height': 32, 'width': 32}
    (expected,) = pipeline(prompt_embeds=text, negative_prompt_embeds=empty, output_type='np', **given).images
    assert found.shape == (32, 32, 3) and np.abs(found - 255 * expected).max() < 1.01 and found.std() > 2


def test_measures_tell_the_template_from_pads(flux2, picture):
    """Groups of tokens, and names of single ones."""
    groups = token_groups(flux2, flux2.null_prompt, 60)
    assert groups['first'] == [0] and groups['template'] == list(range(1, TEMPLATE)) and groups['pads'] == list(range(TEMPLATE, SLOTS))
    tokens = texts_of(flux2).tokens('cat dog', 'qwen3')
    names = slot_names(Text('cat dog', flux2.null_prompt, tokens))
    assert [names[column] for column in range(3, 6)] == ['cat', ' dog', '(template)']
    assert names[0] == '(template)' and names[SLOTS - 1] == '(pad)'


@pytest.mark.parametrize('layer', [1, 3])
def test_scores_of_names_are_means_of_columns(flux2, pipeline, picture, layer):
    names, options = ['cat', 'dog', 'grasses'], LabelOptions(layers=(layer,))
    scores = score_maps(picture, flux2, names, options)
    (prompt,) = prompts_of(names, texts_of(flux2), options.resolve(flux2.spec))
    latent = encode(picture, flux2, Options().resolve(flux2.spec))
    maps, _ = explicit_maps(flux2, pipeline, latent.z, latent.timestep, layer, prompt)
    expected = torch.stack([maps[0, 3], maps[0, 4], maps[0, 5:8].mean(0)])  # <|im_start|>user\n stands before; `grasses` is three tokens
    torch.testing.assert_close(scores.maps.float(), expected, atol=1e-6, rtol=1e-4)


def test_cuts_of_its_features(flux2, picture):
    labels = segment(picture, flux2, DiffCutOptions(tau=0.5), method='diffcut').labels
    assert labels.shape == picture.shape[:2] and labels.max() >= 1
