"""Models that strangers made: what would take for ever, reach elsewhere or mean nothing is refused in a line, by loading and doctor."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from padseg.backbones import load
from padseg.backbones.availability import model_state
from padseg.backbones.null_prompt import encoders_key
from padseg.backbones.source import locate
from padseg.errors import ModelUnavailable
from padseg.methods import check_settings
from padseg.methods.seg4diff import token_maps

WEIGHTS = {'transformer': 'diffusion_pytorch_model', 'vae': 'diffusion_pytorch_model', 'text_encoder': 'model', 'text_encoder_2': 'model'}
SECONDS = 20  # that a refusal may take on a busy machine; what is refused here would take minutes, or more memory than there is


@pytest.fixture
def folder(sd3_folder, tmp_path, monkeypatch):
    """A copy of a model, to be changed, whose prompt is not cached."""
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path / 'cache'))
    return pathlib.Path(shutil.copytree(sd3_folder, tmp_path / 'model'))


def edit(path: pathlib.Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(path: pathlib.Path, change: Any) -> None:
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, {'format': 'pt'})


def refusals(folder: pathlib.Path) -> str:
    """What loading says, in one line and at once."""
    began = time.perf_counter()
    with pytest.raises(ModelUnavailable) as caught:
        load(str(folder), device='cpu')
    assert time.perf_counter() - began < SECONDS
    assert caught.value.exit_code == 4 and '\n' not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def both_refuse(folder: pathlib.Path) -> str:
    message = refusals(folder)
    state, source = model_state(str(folder))
    assert source is None and (state.state, state.message) in {('damaged', message), ('incomplete', message)}
    return message


@pytest.mark.parametrize(
    ('part', 'changes', 'words'),
    [
        ('transformer', {'num_layers': 100_000}, 'num_layers is 100000, but the weights beside it have blocks up to number 3'),
        ('transformer', {'num_attention_heads': 10**9}, 'num_attention_heads is 1000000000, but the weights'),
        ('transformer', {'joint_attention_dim': 10**30}, 'joint_attention_dim is a number of 31 digits'),
        ('transformer', {'pos_embed_max_size': 10**7}, 'pos_embed_max_size is 10000000'),
        ('transformer', {'caption_projection_dim': 48}, 'is .*, expected '),
        ('transformer', {'dual_attention_layers': [0] * 5000}, r'dual_attention_layers \(length\) is 5000'),
        ('transformer', {'num_attention_heads': 0}, 'transformer of .* cannot be read'),
        ('transformer', {'patch_size': '2'}, 'transformer of .* cannot be read'),
        ('transformer', {'attention_head_dim': None}, 'transformer of .* cannot be read'),
        ('transformer', {'quantization_config': {'quant_method': 'bitsandbytes'}}, 'quantised weights, which padseg does not read'),
        ('vae', {'layers_per_block': 10**6}, 'layers_per_block is 1000000'),
        ('vae', {'block_out_channels': [8] * 10_000}, r'block_out_channels \(length\) is 10000'),
        ('vae', {'latent_channels': 10**12}, 'latent_channels is 1000000000000'),
        ('vae', {'norm_num_groups': 0}, 'vae of .* cannot be read'),
        ('vae', {'_class_name': 'AutoencoderTiny'}, 'describes a AutoencoderTiny; expected AutoencoderKL'),
        ('vae', {'scaling_factor': 'large'}, "scaling_factor is a number; got 'large'"),
        ('vae', {'scaling_factor': None}, 'scaling_factor is a number; got None'),
        ('vae', {'shift_factor': [1]}, r'shift_factor is a number; got \[1\]'),
        ('text_encoder', {'num_hidden_layers': 100_000}, 'num_hidden_layers is 100000'),
        ('text_encoder_2', {'vocab_size': 10**10}, 'vocab_size is 10000000000'),
        ('text_encoder', {'max_position_embeddings': 10**9}, 'max_position_embeddings is 1000000000'),
        ('text_encoder', {'quantization_config': {}}, 'quantised weights'),
        ('scheduler', {'num_train_timesteps': 10**9}, 'num_train_timesteps is 1000000000'),
        ('scheduler', {'shift': -5.0}, 'noise levels are not in 0..1'),
        ('scheduler', {'use_dynamic_shifting': True}, 'scheduler of .* cannot be read'),
        ('scheduler', {'_class_name': ['FlowMatchEulerDiscreteScheduler']}, r"is a \['FlowMatchEuler"),
    ],
)
def test_configurations_that_are_not_those_of_the_weights(folder, part, changes, words):
    edit(folder / part / ('scheduler_config.json' if part == 'scheduler' else 'config.json'), **changes)
    assert re.search(words, both_refuse(folder))


@pytest.mark.parametrize('size', [60_000, 65_536])
def test_a_text_encoder_is_not_made_of_what_the_weights_lack(folder, size):
    """Each number for itself is one that a model may have; what is missing would be filled with random values, tens of gigabytes."""
    edit(folder / 'text_encoder' / 'config.json', hidden_size=size, intermediate_size=size, num_attention_heads=4)
    tensors = load_file(folder / 'text_encoder' / 'model.safetensors')
    few = {name: tensor for name, tensor in tensors.items() if 'layers.0.layer_norm' in name}
    save_file(few, folder / 'text_encoder' / 'model.safetensors', {'format': 'pt'})
    assert 'text_encoder of' in refusals(folder)


@pytest.mark.parametrize(
    'changes',
    [
        {'_attn_implementation': 'org/repo'},
        {'attn_implementation': 'org/repo:kernel'},
        {'_attn_implementation_internal': 'org/repo'},
        {'auto_map': {'AutoModel': 'org/repo--modeling.Encoder'}},
        {'_experts_implementation': 'org/repo', 'dtype': 'float16', 'return_dict': False, 'architectures': ['Other'], 'model_type': 'x'},
    ],
)
def test_what_a_text_encoder_asks_transformers_for_is_not_looked_for(folder, backbone, changes):
    """Its configuration describes a network; it does not choose code."""
    (folder / 'text_encoder' / 'modeling.py').write_text('raise SystemExit(3)')
    edit(folder / 'text_encoder' / 'config.json', **changes)
    assert torch.equal(load(str(folder), device='cpu').null_prompt.embeds, backbone.null_prompt.embeds)


def test_adapters_are_not_looked_for(folder):
    (folder / 'text_encoder_2' / 'adapter_config.json').write_text('{"base_model_name_or_path": "org/repo"}')
    assert 'has an adapter, which padseg does not read' in both_refuse(folder)


@pytest.mark.parametrize(
    ('row', 'words'),
    [
        ({'steps': 10**9}, r'steps is one of 1\.\.10000; got 1000000000'),
        ({'side': 10**30}, 'side is one of .*; got a number of 31 digits'),
        ({'sequence': 10**9}, 'sequence is one of'),
        ({'layer': 10**9}, r'layer is one of 0\.\.3'),
        ({'words': 'cat'}, 'words: '),
        ({'words': ['cat', 3]}, 'words: '),
        ({'seg4diff': {'superpixels': 1e300}}, 'superpixels is a scale from 0 to below 1e9; got 1e.300'),
        ({'seg4diff': {'superpixels': 10**400}}, 'superpixels is a scale'),
        ({'seg4diff': {'threshold': 10**400, 'side': 10**9}}, 'side is a number of pixels'),
        ({'seg4diff': {'normalisation': ['share']}}, 'normalisation is one of'),
        ({'seg4diff': {'threshold': [[0.1]]}}, 'threshold is a number'),
        ({'open-vocabulary': {'layers': 3}}, 'layers is a list or a tuple; got 3'),
        ({'open-vocabulary': {'layers': [[1]]}}, 'layers are distinct numbers'),
        ({'open-vocabulary': {'background_words': 'sky'}}, "background_words is a list or a tuple; got 'sky'"),
    ],
)
def test_rows_out_of_range(folder, row, words):
    (folder / 'padseg.json').write_text(json.dumps(row))
    with pytest.raises(ModelUnavailable, match=rf'padseg\.json.*{words}'):
        check_settings(locate(str(folder)).spec)


def test_a_row_with_a_byte_order_mark(folder):
    (folder / 'padseg.json').write_text('\ufeff{"side": 48}', encoding='utf-8')
    assert locate(str(folder)).spec.side == 48


@pytest.mark.parametrize('name', ['padseg.json', 'transformer/config.json', 'scheduler/scheduler_config.json', 'text_encoder/config.json'])
@pytest.mark.parametrize('text', ['[' * 200_000, '{"a":' * 200_000, '{"layer": 1' + '0' * 5000 + '}'])
def test_deep_and_long_json(folder, name, text):
    (folder / name).write_text(text)
    assert str(folder / name) in refusals(folder)


# weights


@pytest.mark.parametrize('part', WEIGHTS)
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers(folder, part, value):
    lost = []

    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith('.weight') and not name.startswith(('decoder', 'norm_out', 'proj_out')) and not lost:
            lost.append(name)
            tensor.view(-1)[-1] = value
        return tensor

    rewrite(folder / part / f'{WEIGHTS[part]}.safetensors', spoil)
    assert 'not finite' in refusals(folder)


def test_whole_numbers_are_no_weights(folder):
    rewrite(
        folder / 'transformer' / 'diffusion_pytorch_model.safetensors',
        lambda name, tensor: (tensor * 10).to(torch.int8) if name == 'context_embedder.weight' else tensor,
    )
    assert 'context_embedder.weight in' in both_refuse(folder)


@pytest.mark.parametrize('part', WEIGHTS)
@pytest.mark.parametrize(
    'shard', ['../../elsewhere.safetensors', '/etc/weights.safetensors', 'sub/a.safetensors', '.a.safetensors', 'a.bin', '']
)
def test_an_index_names_files_beside_it(folder, part, shard):
    own = folder / part / f'{WEIGHTS[part]}.safetensors'
    own.rename(folder.parent / 'elsewhere.safetensors')
    own.with_name(f'{own.name}.index.json').write_text(json.dumps({'weight_map': {'a': shard}}))
    assert f'names a file that is not a safetensors file beside it: {shard!r}' in both_refuse(folder)


@pytest.mark.parametrize('part', WEIGHTS)
def test_pointers_of_git_lfs_are_told_apart(folder, part):
    path = folder / part / f'{WEIGHTS[part]}.safetensors'
    path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:' + '0' * 64 + '\nsize 12345\n')
    assert f'{path} is a pointer of git-lfs, not the file: run `git lfs pull`' in both_refuse(folder)


@pytest.mark.parametrize('name', ['tokenizer/tokenizer.json', 'vae/config.json'])
def test_pointers_of_git_lfs_in_place_of_json(folder, name):
    (folder / name).write_text('version https://git-lfs.github.com/spec/v1\n')
    assert 'git lfs pull' in both_refuse(folder)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.ckpt', 'diffusion_pytorch_model.bin'])
def test_other_forms_of_weights_are_named(folder, name):
    (folder / 'transformer' / 'diffusion_pytorch_model.safetensors').rename(folder / 'transformer' / name)
    message = both_refuse(folder)
    assert 'no file named diffusion_pytorch_model.safetensors in transformer' in message and f'not {name}' in message


@pytest.mark.parametrize('sharded', [False, True])
def test_a_folder_of_half_precision_alone_is_loaded(folder, backbone, picture, sharded):
    """As `save_pretrained(variant='fp16')` writes it, and as many repositories are copied."""
    for part, name in WEIGHTS.items():
        path = folder / part / f'{name}.safetensors'
        rewrite(path, lambda _, tensor: tensor.half() if tensor.is_floating_point() else tensor)
        path.rename(path.with_name(f'{name}.fp16.safetensors'))
    if sharded:
        path = folder / 'transformer' / 'diffusion_pytorch_model.fp16.safetensors'
        tensors = load_file(path)
        for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
            save_file(
                {name: tensors[name] for name in names}, path.with_name(f'diffusion_pytorch_model.fp16-0000{number}-of-00002.safetensors')
            )
        places = {
            name: f'diffusion_pytorch_model.fp16-0000{1 + number % 2}-of-00002.safetensors' for number, name in enumerate(sorted(tensors))
        }
        path.with_name('diffusion_pytorch_model.safetensors.index.fp16.json').write_text(json.dumps({'weight_map': places}))
        path.unlink()
    rough = load(str(folder), device='cpu')
    expected = token_maps(picture, backbone).maps
    assert (token_maps(picture, rough).maps - expected).abs().max() < 0.05 * (expected.max() - expected.min())
    assert model_state(str(folder))[0].state == 'ready'


def test_whole_precision_goes_before_half(folder, backbone, picture):
    for part, name in WEIGHTS.items():
        (folder / part / f'{name}.fp16.safetensors').write_bytes(b'not read')
    assert torch.equal(token_maps(picture, load(str(folder), device='cpu')).maps, token_maps(picture, backbone).maps)


# the cache and the names of links


def cached_file(folder: pathlib.Path) -> pathlib.Path:
    load(str(folder), device='cpu')
    (cached,) = (folder.parent / 'cache' / 'prompts').iterdir()
    return cached


@pytest.mark.parametrize('how', ['planted', 'with its words', 'not finite', 'of another text', 'of another type'])
def test_a_planted_embedding_is_made_again(folder, backbone, how):
    cached = cached_file(folder)
    whole = cached.read_bytes()
    tensors = {name: tensor + 1 for name, tensor in load_file(cached).items()}
    if how == 'planted':
        save_file(tensors, cached)
    elif how == 'of another text':
        from padseg.backbones.texts import texts_of

        texts_of(load(str(folder), device='cpu')).encode('cat', 'l+g', 'zeros')
        (other,) = (path for path in cached.parent.iterdir() if path != cached)
        cached.write_bytes(other.read_bytes())
    else:
        from safetensors import safe_open

        with safe_open(cached, 'pt') as file:
            words = file.metadata()
        changed = {
            'with its words': tensors,
            'not finite': {name: tensor * float('nan') for name, tensor in tensors.items()},
            'of another type': {name: (tensor - 1).double() for name, tensor in tensors.items()},
        }[how]
        save_file(changed, cached, words)
    assert torch.equal(load(str(folder), device='cpu').null_prompt.embeds, backbone.null_prompt.embeds)
    assert cached.read_bytes() == whole


def test_text_encoders_that_give_nothing_finite_are_not_cached(folder):
    rewrite(
        folder / 'text_encoder' / 'model.safetensors', lambda name, tensor: tensor * float('nan') if name.endswith('norm.bias') else tensor
    )
    assert 'the text encoders of' in refusals(folder) and not (folder.parent / 'cache').exists()


def test_a_link_is_believed_only_in_the_cache_of_the_hub(folder, tmp_path, monkeypatch):
    """A file named after a hash that is not its own: outside of the hub's cache it is read, whatever lies beside it."""
    honest = load(str(folder), device='cpu').identity
    for place in ('links', 'models--org--name/blobs'):
        blob = tmp_path / place / ('0' * 64)
        blob.parent.mkdir(parents=True)
        shutil.copy(folder / 'transformer' / 'diffusion_pytorch_model.safetensors', blob)
        copy = tmp_path / 'models--org--name' / 'snapshots' / place.replace('/', '-')
        shutil.copytree(folder, copy)
        (copy / 'transformer' / 'diffusion_pytorch_model.safetensors').unlink()
        (copy / 'transformer' / 'diffusion_pytorch_model.safetensors').symlink_to(blob)
        assert load(str(copy), device='cpu').identity.weights == honest.weights
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
        believed = load(str(copy), device='cpu').identity.weights != honest.weights
        assert believed == (place != 'links')
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'other'))
    assert encoders_key(locate(str(folder))) == encoders_key(locate(str(copy)))


TOKENIZERS: dict[str, dict[str, Any]] = {  # what is put in the place of a part of tokenizer.json; the first three are panics of Rust code
    'a damaged table of characters': {'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}},
    'no table of characters': {'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': ''}},
    'a table of one number': {'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': '/////w=='}},
    'an empty merge': {'model': {'type': 'BPE', 'vocab': {'a': 2, 'b': 1}, 'merges': [['', '']]}},
    'too large a stride': {'truncation': {'direction': 'Right', 'max_length': 2, 'strategy': 'LongestFirst', 'stride': 5}},
    'a word that is not there': {'model': {'type': 'WordLevel', 'unk_token': 'zz', 'vocab': {'a': 0}}},
    'pieces without the unknown': {'model': {'type': 'Unigram', 'unk_id': None, 'vocab': [['a', -1.0]]}},
    'an unknown outside the pieces': {'model': {'type': 'Unigram', 'unk_id': 5, 'vocab': [['a', -1.0]]}},
    'no pieces': {'model': {'type': 'Unigram', 'unk_id': 0, 'vocab': []}},
    'an unknown model': {'model': {'type': 'Magic'}},
    'a merge of what is not there': {'model': {'type': 'BPE', 'vocab': {'a': 0}, 'merges': [['x', 'y']]}},
    'dropout': {'model': {'type': 'BPE', 'vocab': {'a': 0}, 'merges': [], 'dropout': 1.5}},
    'an open pattern': {'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': '(?<='}, 'behavior': 'Isolated', 'invert': False}},
    'no model': {'model': None},
    'tokens are text': {'added_tokens': 'x'},
}


@pytest.mark.parametrize('changes', TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_that_cannot_be_used(folder, changes, capfd):
    edit(folder / 'tokenizer' / 'tokenizer.json', **changes)
    assert refusals(folder).startswith(f'tokenizer of {folder} cannot be read from ')
    assert capfd.readouterr().err == ''  # of a panic, Rust writes a trace


@pytest.mark.parametrize('part', ['tokenizer', 'tokenizer_2'])
def test_tokens_without_an_embedding(folder, part):
    path = folder / part / 'tokenizer.json'
    content = json.loads(path.read_text())
    model = content['model'] | {'vocab': {token: number + 5000 for token, number in content['model']['vocab'].items()}}
    edit(path, model=model, added_tokens=[token | {'id': token['id'] + 5000} for token in content['added_tokens']])
    size = json.loads((folder / part.replace('tokenizer', 'text_encoder') / 'config.json').read_text())['vocab_size']
    assert refusals(folder) == f'{part} of {folder} has a token {size + 4999}; its text encoder has embeddings for {size} tokens'
