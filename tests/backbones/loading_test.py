"""Loading: folders, a hub on this machine, the cached null prompt, and words for everything that can be wrong with a model's files."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from support.hub import COMMIT, serve
from support.models import load_and_empty_the_cache, load_each, load_on_a_full_disk, load_to_the_second_block
from support.processes import start

from padseg.backbones import load
from padseg.backbones.source import locate
from padseg.backbones.spec import BACKBONES
from padseg.errors import ModelUnavailable, UsageError
from padseg.methods import check_settings
from padseg.methods.seg4diff import Options, settings_of, token_maps
from padseg.methods.stages.latents import encode_pixels

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def folder(sd3_folder, tmp_path):
    """A copy of a model, to be changed."""
    return pathlib.Path(shutil.copytree(sd3_folder, tmp_path / 'model'))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / 'prompts'


def printed_by(target: Callable[..., None], *arguments: object, **environment: str) -> str:
    """What a function prints in a process of its own."""
    ran = start(target, *arguments, **environment).wait()
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def same_prompt(first, second) -> bool:
    return torch.equal(first.null_prompt.embeds, second.null_prompt.embeds) and torch.equal(
        first.null_prompt.pooled, second.null_prompt.pooled
    )


# names and values


@pytest.mark.parametrize('family', ['backbone', 'backbone35'])
def test_a_folder_is_loaded(family, request):
    backbone = request.getfixturevalue(family)
    folder = request.getfixturevalue({'backbone': 'sd3_folder', 'backbone35': 'sd35_folder'}[family])
    assert (backbone.spec.layers, backbone.spec.layer, backbone.spec.side) == (4, 2, 32)
    assert (backbone.patch, backbone.multiple, backbone.limit) == (2, 4, 96)
    assert (backbone.device.type, backbone.dtype) == ('cpu', torch.float32)
    assert backbone.identity.model == backbone.identity.folder == str(folder) and backbone.identity.revision is None
    for module in (backbone.transformer, backbone.vae):
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    dual = [block.use_dual_attention for block in backbone.transformer.transformer_blocks]
    assert dual == ([False] * 4 if family == 'backbone' else [True, True, True, False])
    assert (backbone.attention_module(0).norm_q is None) == (family == 'backbone')
    z = torch.randn((2, 4, 8, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert backbone.denoise(z, 300.0, backbone.null_prompt).shape == z.shape
    assert backbone.text_columns(backbone.null_prompt, 24) == list(range(24, 101))


@pytest.mark.parametrize('name', ['nothing', 'sd4', 'a/b/c', '/nowhere/at/all', '../nothing', './nothing', 'org/-', 'tiny@main', ''])
def test_an_unknown_name_lists_the_known_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match='^unknown model') as caught:
        load(name)
    assert caught.value.exit_code == 2
    for known in (*BACKBONES, 'org/name', 'folder'):
        assert known in str(caught.value)


@pytest.mark.parametrize('dtype', ['float64', 'half', '', 'torch.float32'])
def test_an_unknown_dtype_lists_the_known_ones(sd3_folder, dtype):
    with pytest.raises(UsageError, match=f'^dtype is one of float32, bfloat16, float16; got {dtype}$'):
        load(str(sd3_folder), dtype=dtype)


@pytest.mark.parametrize('device', ['cuda:99', 'nonsense', ''])
def test_a_device_that_is_not_there(sd3_folder, device):
    with pytest.raises(UsageError, match=f'^device {device} is not available here: .'):
        load(str(sd3_folder), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu_here(sd3_folder):
    with pytest.raises(UsageError, match='^device cuda is not available here: .'):
        load(str(sd3_folder), device='cuda')


def test_a_folder_has_no_revisions(sd3_folder):
    with pytest.raises(UsageError, match='is a folder, which has no revisions; got revision main'):
        load(str(sd3_folder), revision='main')


# the row


def test_padseg_json_overrides_the_row(folder):
    row = {
        'layer': 1,
        'step': 4,
        'side': 64,
        'threshold': 0.5,
        'normalisation': 'share',
        'refine': 'guided',
        'superpixels': 30,
        'join': 0.1,
        'components': True,
        'min_area': 0.25,
    }
    (folder / 'padseg.json').write_text(json.dumps(row))
    spec = load(str(folder), device='cpu').spec
    own = {name: value for name, value in row.items() if name not in ('layer', 'side')}  # as version 0.1 wrote them
    facts = {
        'repo': str(folder),
        'family': 'sd3',
        'layers': 4,
        'layer': 1,
        'steps': 28,
        'side': 64,
        'sequence': 77,
        'encoders': 'l+g',
        'words': (),
    }
    assert spec._asdict() == {**facts, 'own': {'seg4diff': own}}
    settings = settings_of(spec)
    assert settings == {**row, 'tokens': 'all'} and isinstance(settings['superpixels'], float)


def test_without_padseg_json_the_defaults_stand_within_the_models_depth(folder):
    (folder / 'padseg.json').unlink()
    spec = load(str(folder), device='cpu').spec
    assert (spec.layers, spec.layer, spec.side, spec.own) == (4, 3, 1024, {})


@pytest.mark.parametrize(
    ('row', 'key'),
    [
        ({'layer': '2'}, 'layer'),
        ({'layer': 1.5}, 'layer'),
        ({'layer': True}, 'layer'),
        ({'layer': None}, 'layer'),
        ({'side': [32]}, 'side'),
        ({'threshold': '0.1'}, 'threshold'),
        ({'components': 1}, 'components'),
        ({'normalisation': 3}, 'normalisation'),
        ({'layer': 4}, 'layer'),
        ({'layer': -1}, 'layer'),
        ({'step': 29}, 'step'),
        ({'threshold': -1}, 'threshold'),
        ({'normalisation': 'none'}, 'normalisation'),
        ({'layers': 9}, 'layers'),
        ({'colour': 'red'}, 'colour'),
        ({'side': 32, 'repo': 'elsewhere'}, 'repo'),
        ({'family': 'flux'}, 'family'),
    ],
)
def test_a_bad_padseg_json_is_refused_with_the_key(folder, row, key):
    (folder / 'padseg.json').write_text(json.dumps(row))
    with pytest.raises(ModelUnavailable, match=rf'padseg\.json.*\b{key}\b') as caught:
        check_settings(locate(str(folder)).spec)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize('text', ['', '{"layer": 2', '[2]', 'null', '\ufeff', '{"side": NaN}', '{"side": 1e999}', '[' * 100_000])
def test_a_padseg_json_that_holds_no_object(folder, text):
    (folder / 'padseg.json').write_text(text)
    with pytest.raises(ModelUnavailable, match=r'padseg\.json (is not valid JSON|must hold a JSON object)'):
        load(str(folder))


# damage

PARTS = ['transformer', 'vae', 'scheduler', 'text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2']
CONFIGS = {'scheduler': 'scheduler_config.json', 'tokenizer': 'tokenizer_config.json', 'tokenizer_2': 'tokenizer_config.json'}
WEIGHTS = {part: 'diffusion_pytorch_model.safetensors' if part in ('transformer', 'vae') else 'model.safetensors' for part in PARTS}
WITH_WEIGHTS = ['transformer', 'vae', 'text_encoder', 'text_encoder_2']


def refusal(folder: pathlib.Path) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        load(str(folder), device='cpu')
    assert caught.value.exit_code == 4
    assert '\n' not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('part', PARTS)
def test_a_missing_part_is_named(folder, empty_cache, part):
    shutil.rmtree(folder / part)
    assert part in refusal(folder)
    assert not empty_cache.exists()


@pytest.mark.parametrize('text', ['', '{"_class_name": ', '[1]'])
@pytest.mark.parametrize('part', PARTS)
def test_a_damaged_configuration_is_named(folder, empty_cache, part, text):
    path = folder / part / CONFIGS.get(part, 'config.json')
    path.write_text(text)
    assert str(path) in refusal(folder)


@pytest.mark.parametrize('part', ['transformer', 'tokenizer', 'tokenizer_2'])
def test_a_configuration_that_says_nothing(folder, empty_cache, part):
    (folder / part / CONFIGS.get(part, 'config.json')).write_text('{}')
    assert part in refusal(folder)


@pytest.mark.parametrize('part', WITH_WEIGHTS)
def test_truncated_weights(folder, empty_cache, part):
    path = folder / part / WEIGHTS[part]
    os.truncate(path, path.stat().st_size // 2)
    assert str(folder / part) in refusal(folder)


@pytest.mark.parametrize('part', WITH_WEIGHTS)
def test_only_safetensors_are_read(folder, empty_cache, part):
    path = folder / part / WEIGHTS[part]
    torch.save(load_file(path), path.with_suffix('.bin').with_name(path.stem.replace('model.', 'pytorch_model.') + '.bin'))
    path.unlink()
    assert f'no file named {path.name}' in refusal(folder)


@pytest.mark.parametrize('part', WITH_WEIGHTS)
def test_weights_that_lack_a_tensor(folder, empty_cache, part):
    path = folder / part / WEIGHTS[part]
    tensors = load_file(path)
    lost = sorted(name for name in tensors if name.endswith('.weight') and not name.startswith('decoder'))[2]
    del tensors[lost]
    save_file(tensors, path, {'format': 'pt'})
    message = refusal(folder)
    assert f'{part} of {folder} is incomplete' in message and f'lack 1 tensors, {lost} first' in message


@pytest.mark.parametrize('part', WITH_WEIGHTS)
def test_weights_of_another_size(folder, empty_cache, part):
    path = folder / part / WEIGHTS[part]
    tensors = load_file(path)
    tensors[sorted(name for name in tensors if not name.startswith(('decoder', 'norm_out', 'proj_out')))[2]] = torch.zeros(3, 3, 3)
    save_file(tensors, path, {'format': 'pt'})
    assert f'{part} of {folder} cannot be read' in refusal(folder)


@pytest.mark.parametrize(('part', 'name'), [('transformer', 'transformer_blocks.0.attn.norm_q.weight'), ('vae', 'encoder.more.bias')])
def test_weights_that_hold_more_than_the_configuration_knows(folder, part, name):
    """Such as norms of queries and keys: without them the maps would be others, and nobody would notice."""
    path = folder / part / WEIGHTS[part]
    save_file({**load_file(path), name: torch.zeros(3)}, path, {'format': 'pt'})
    message = refusal(folder)
    assert f'{part} of {folder} does not fit its configuration' in message and f'hold 1 more tensors, {name} first' in message


@pytest.mark.parametrize('family', ['sd3', 'sd35'])
@pytest.mark.parametrize('layer', [None, 0, 1, 3])
def test_only_what_the_maps_need_is_read(family, layer, tmp_path, picture, request, keep_only_needed):
    """Blocks up to the expert's, of that one queries and keys alone, and the encoder; the maps are those of the whole model."""
    folder = shutil.copytree(request.getfixturevalue(f'{family}_folder'), tmp_path / 'model')
    last = 2 if layer is None else layer
    expected = token_maps(picture, load(str(folder), device='cpu', whole=True), Options(layer=last)).maps
    of_the_last = r'ff|attn2|attn\.(to_v|to_out|add_v_proj|to_add_out)'
    unneeded = {
        'transformer': rf'transformer_blocks\.([{last + 1}-9]\d*\.|{last}\.({of_the_last}))|norm_out|proj_out',
        'vae': 'decoder|post_quant',
    }
    names = keep_only_needed(folder, unneeded)
    backbone = load(str(folder), device='cpu', layer=layer)
    assert {*backbone.transformer.state_dict(), *backbone.vae.state_dict()} == names
    assert torch.equal(token_maps(picture, backbone, Options(layer=last)).maps, expected)
    if last < 3:
        with pytest.raises(UsageError, match=rf'was loaded up to block {last}: load\(layer=3\) loads block 3 too'):
            token_maps(picture, backbone, Options(layer=3))
    with pytest.raises(UsageError, match=r'layer is one of 0\.\.3; got 4'):
        load(str(folder), device='cpu', layer=4)


@pytest.mark.parametrize('part', ['tokenizer', 'tokenizer_2'])
@pytest.mark.parametrize('text', [None, '', '[]', '{}'])
def test_a_tokenizer_without_a_vocabulary(folder, empty_cache, part, text):
    path = folder / part / 'tokenizer.json'
    path.unlink() if text is None else path.write_text(text)
    assert f'{part} of {folder}' in refusal(folder)


def test_text_encoders_that_do_not_fit_the_transformer(folder, empty_cache):
    for name in ('text_encoder', 'tokenizer'):
        shutil.rmtree(folder / f'{name}_2')
        shutil.copytree(folder / name, folder / f'{name}_2')
    assert "'pooled': (1, 128)" in refusal(folder)
    assert not empty_cache.exists()


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / 'notes.txt').write_text('no model')
    assert refusal(tmp_path) == f'{tmp_path} is not a model in diffusers layout: transformer/config.json or unet/config.json is missing'


def test_what_is_not_read_takes_no_memory(sd3_folder, make_model, tmp_path):
    """Peak memory of fresh processes: a model of 226 MB whole, and up to its second of six blocks."""
    make_model(tmp_path, qk_norm=None, num_layers=6, num_attention_heads=8, attention_head_dim=64)

    def peak(folder: pathlib.Path, whole: bool) -> int:
        return round(2**20 * float(printed_by(load_to_the_second_block, str(folder), whole)))

    for folder in (sd3_folder, tmp_path):
        load(str(folder), device='cpu')  # the prompt is computed once
    size = sum(path.stat().st_size for path in tmp_path.rglob('*.safetensors') if 'text_encoder' not in str(path))
    nothing, part, whole = peak(sd3_folder, False), peak(tmp_path, False), peak(tmp_path, True)
    assert size > 200e6 and whole - nothing > 0.9 * size
    assert part - nothing < 0.45 * (whole - nothing), (nothing, part, whole)


# a VAE that comes by itself


@pytest.fixture(scope='module')
def small_vae(tmp_path_factory):
    torch.manual_seed(1)
    widths = {
        'encoder_block_out_channels': (8, 8),
        'decoder_block_out_channels': (8, 8),
        'num_encoder_blocks': (1, 1),
        'num_decoder_blocks': (1, 1),
    }
    vae = AutoencoderTiny(latent_channels=4, scaling_factor=1.7, shift_factor=0.3, **widths).eval()
    folder = tmp_path_factory.mktemp('vae')
    vae.save_pretrained(folder)
    return vae, folder


def test_a_small_vae_takes_the_place_of_the_encoder(sd3_folder, backbone, small_vae, picture):
    vae, folder = small_vae
    quick = load(str(sd3_folder), device='cpu', vae=str(folder))
    pixels = torch.from_numpy(picture / np.float32(127.5) - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = (vae.encode(pixels).latents - 0.3) * 1.7
    torch.testing.assert_close(encode_pixels(pixels, quick), expected, atol=1e-5, rtol=0)
    assert quick.vae.decoder is None and quick.multiple == backbone.multiple
    assert len({quick.identity.weights, backbone.identity.weights}) == 2
    maps = token_maps(picture, quick).maps
    assert maps.shape == token_maps(picture, backbone).maps.shape and not torch.equal(maps, token_maps(picture, backbone).maps)


def test_vaes_that_cannot_be_used(sd3_folder, small_vae, tmp_path, monkeypatch):
    _, folder = small_vae
    with pytest.raises(UsageError, match='unknown VAE nonsense: use tiny, a hub id'):
        load(str(sd3_folder), device='cpu', vae='nonsense')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / 'other')
    with pytest.raises(UsageError, match=r'the latents of .*other have 16 channels, but the transformer takes 4'):
        load(str(sd3_folder), device='cpu', vae=str(tmp_path / 'other'))
    broken = shutil.copytree(folder, tmp_path / 'broken')
    (broken / 'diffusion_pytorch_model.safetensors').unlink()
    with pytest.raises(ModelUnavailable, match=r'broken is incomplete: no file named diffusion_pytorch_model.safetensors'):
        load(str(sd3_folder), device='cpu', vae=str(broken))


# the null prompt


@pytest.mark.parametrize('family', ['sd3_folder', 'sd35_folder'])
def test_the_null_prompt_is_that_of_the_pipeline(family, empty_cache, request):
    folder = request.getfixturevalue(family)
    prompt = load(str(folder), device='cpu').null_prompt
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt='', prompt_2='', prompt_3='', do_classifier_free_guidance=False, max_sequence_length=77
        )
    assert prompt.embeds.shape == (1, 154, 160) and prompt.pooled.shape == (1, 160)
    assert torch.equal(prompt.embeds, embeds) and torch.equal(prompt.pooled, pooled)
    assert not prompt.embeds[:, 77:].any() and prompt.embeds[:, :77].std(1).min() > 0
    assert prompt.picked == tuple(range(77)) and len(prompt.names) == 77
    assert prompt.names[:3] == ('<|startoftext|>', '<|endoftext|>', '<pad 2>') and prompt.names[-1] == '<pad 76>'


def test_tokenizers_in_the_layout_of_the_published_models(folder, empty_cache, backbone):
    for part in ('tokenizer', 'tokenizer_2'):
        path = folder / part / 'tokenizer.json'
        model = json.loads(path.read_text())['model']
        (folder / part / 'vocab.json').write_text(json.dumps(model['vocab']))
        (folder / part / 'merges.txt').write_text('\n'.join(['#version: 0.2', *(' '.join(pair) for pair in model['merges'])]) + '\n')
        path.unlink()
    assert same_prompt(load(str(folder), device='cpu'), backbone)
    (folder / 'tokenizer_2' / 'merges.txt').unlink()
    assert 'tokenizer_2' in refusal(folder)


def test_the_cached_prompt_is_the_computed_one(sd3_folder, empty_cache):
    first = load(str(sd3_folder), device='cpu')
    (cached,) = empty_cache.iterdir()
    written = cached.stat().st_mtime_ns
    assert same_prompt(first, load(str(sd3_folder), device='cpu'))
    assert cached.stat().st_mtime_ns == written and list(empty_cache.iterdir()) == [cached]


def test_the_cache_does_not_depend_on_who_filled_it(sd3_folder, empty_cache, backbone):
    assert load(str(sd3_folder), device='cpu', dtype='bfloat16').null_prompt.embeds.dtype == torch.bfloat16
    (cached,) = empty_cache.iterdir()
    assert same_prompt(load(str(sd3_folder), device='cpu'), backbone)


def test_other_text_encoders_have_another_entry(folder, empty_cache):
    first = load(str(folder), device='cpu')
    path = folder / 'text_encoder' / WEIGHTS['text_encoder']
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, {'format': 'pt'})
    assert not same_prompt(first, load(str(folder), device='cpu'))
    assert len(list(empty_cache.iterdir())) == 2


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'of another model', 'a folder'])
def test_a_damaged_cache_is_computed_again(sd3_folder, empty_cache, backbone, damage):
    load(str(sd3_folder), device='cpu')
    (cached,) = empty_cache.iterdir()
    whole = cached.read_bytes()
    if damage == 'a folder':
        cached.unlink()
        cached.mkdir()
    elif damage == 'of another model':
        save_file({'embeds': torch.zeros(1, 154, 8), 'pooled': torch.zeros(1, 160)}, cached)
    else:
        cached.write_bytes(whole[: len(whole) // 2] if damage == 'truncated' else b'')
    assert same_prompt(load(str(sd3_folder), device='cpu'), backbone)
    if damage != 'a folder':
        assert cached.read_bytes() == whole


def test_a_cache_that_cannot_be_written_only_warns(sd3_folder, tmp_path, monkeypatch, backbone, caplog):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path / 'file'))
    assert same_prompt(load(str(sd3_folder), device='cpu'), backbone)
    assert [record.levelname for record in caplog.records if record.name.startswith('padseg')] == ['WARNING']
    assert 'the null prompt cannot be cached' in caplog.text and str(tmp_path / 'file') in caplog.text


def test_a_full_disk_only_warns(sd3_folder, tmp_path):
    assert printed_by(load_on_a_full_disk, str(sd3_folder), PADSEG_CACHE=str(tmp_path)) == '154\n'
    assert not list((tmp_path / 'prompts').iterdir())


def test_text_encoders_are_not_loaded_again(sd3_folder, tmp_path):
    load(str(sd3_folder), device='cpu')
    assert printed_by(load_and_empty_the_cache, str(sd3_folder), str(tmp_path)) == 'False\nTrue\n'


def test_two_processes_at_once(sd3_folder, tmp_path):
    running = [start(load_each, str(sd3_folder), PADSEG_CACHE=str(tmp_path)) for _ in range(2)]
    ended = [process.wait() for process in running]
    assert [ran.returncode for ran in ended] == [0, 0]
    assert ended[0].stdout == ended[1].stdout != ''
    assert len(list((tmp_path / 'prompts').iterdir())) == 1


# weights


def test_the_weights_hash_is_that_of_the_content(sd3_folder, folder, backbone):
    assert len(backbone.identity.weights) == 64
    assert load(str(folder), device='cpu').identity.weights == backbone.identity.weights
    path = folder / 'vae' / WEIGHTS['vae']
    save_file({name: tensor + 1e-3 for name, tensor in load_file(path).items()}, path, {'format': 'pt'})
    assert load(str(folder), device='cpu').identity.weights != backbone.identity.weights


@pytest.mark.parametrize('family', ['sd3', 'sd35'])
def test_sharded_weights_give_the_same_maps(family, tmp_path, picture, request):
    folder = shutil.copytree(request.getfixturevalue(f'{family}_folder'), tmp_path / 'model')
    whole = load(str(folder), device='cpu', whole=True)
    shutil.rmtree(folder / 'transformer')
    whole.transformer.save_pretrained(folder / 'transformer', max_shard_size='200KB')
    shards = list((folder / 'transformer').glob('*-of-*.safetensors'))
    assert len(shards) > 2
    sharded = load(str(folder), device='cpu', whole=True)
    for name, tensor in whole.transformer.state_dict().items():
        assert torch.equal(sharded.transformer.state_dict()[name], tensor)
    assert torch.equal(token_maps(picture, sharded).maps, token_maps(picture, whole).maps)
    shards[1].unlink()
    assert 'transformer' in refusal(folder)


@pytest.mark.parametrize('family', ['backbone', 'backbone35'])
@pytest.mark.parametrize(('dtype', 'bound'), [('bfloat16', 0.1), ('float16', 0.02)])
def test_half_precision(family, dtype, bound, picture, request):
    exact = request.getfixturevalue(family)
    rough = load(exact.identity.folder, device='cpu', dtype=dtype)
    for module in (rough.transformer, rough.vae):
        assert {parameter.dtype for parameter in module.parameters()} == {getattr(torch, dtype)}
    assert rough.dtype == rough.null_prompt.embeds.dtype == rough.null_prompt.pooled.dtype == getattr(torch, dtype)
    expected, maps = (token_maps(picture, backbone).maps for backbone in (exact, rough))
    assert maps.dtype == torch.float32 and not torch.equal(maps, expected)
    # relative to the spread of the maps, which is what merging sees
    assert (maps - expected).abs().max() < bound * (expected.max() - expected.min())


# the hub


@pytest.fixture
def hub(folder):
    """A hub on this machine, whose model also has weights in other forms, which nobody should ask for."""
    for part, name in (('vae', 'diffusion_pytorch_model.fp16.safetensors'), ('text_encoder', 'pytorch_model.bin'), ('vae', 'model.onnx')):
        (folder / part / name).write_bytes(bytes(1000))
    with serve(folder) as running:
        yield running


def test_a_hub_model_is_downloaded_and_loads_offline_afterwards(hub, tmp_path, backbone):
    home = {
        'HF_HOME': str(tmp_path / 'hub'),
        'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1',
        'PADSEG_CACHE': str(tmp_path / 'cache'),
    }
    absent = ('org/gated', 'org/none', 'org/model@no-such', 'org/cut')
    online = json.loads(printed_by(load_each, 'org/model', *absent, **home, HF_ENDPOINT=hub.url))
    model, _, revision, *hashes, embeds = online[0]
    assert (model, revision, hashes) == ('org/model', COMMIT, list(backbone.identity[3:]))
    assert embeds == float(backbone.null_prompt.embeds.double().sum())
    assert online[1:] == [
        [4, 'org/gated is gated: accept its licence on https://huggingface.co/org/gated, then `hf auth login`'],
        [4, 'org/none is not on the hub, or is private: check the name, or `hf auth login`'],
        [4, 'org/model has no revision no-such: https://huggingface.co/org/model/tree/main lists branches and tags'],
        [4, online[4][1]],
    ]
    assert 'org/cut is not in the cache and the hub cannot be reached' in online[4][1] and '--model tiny' in online[4][1]
    fetched = {path.split(COMMIT + '/')[1] for path in hub.asked if f'/org/model/resolve/{COMMIT}/' in path}
    assert {name.split('/')[0] for name in fetched} == {'model_index.json', 'padseg.json', *PARTS}
    assert not any(form in name for name in fetched for form in ('fp16', '.bin', '.onnx'))

    snapshot = tmp_path / 'hub' / 'hub' / 'models--org--model' / 'snapshots' / COMMIT
    link = snapshot / 'transformer' / WEIGHTS['transformer']
    assert online[0][1] == str(snapshot) and link.is_symlink() and len(link.resolve().name) == 64
    shutil.rmtree(tmp_path / 'cache')
    names = ('org/model', f'org/model@{COMMIT}', 'org/model@main')
    offline = json.loads(printed_by(load_each, *names, 'org/none', **home, HF_HUB_OFFLINE='1'))
    assert offline[:3] == [[name, *online[0][1:]] for name in names]
    code, message = offline[3]
    assert code == 4 and 'org/none is not in the cache and the hub cannot be reached' in message
