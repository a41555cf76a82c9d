"""LoRAs: merged they give what an adapter gives, here and in diffusers; what does not fit, or comes from strangers, is refused."""

from __future__ import annotations

import copy
import json
import pathlib
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import partial

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.crossing import random_pixart, random_unet

from padseg.backbones import family_of, identity, load
from padseg.backbones.lora import STATED, Lora, Pair, merge_lora, read_lora, save_lora
from padseg.backbones.lora_file import locate_lora, lora_hash
from padseg.backbones.lora_released import convert_lora
from padseg.backbones.parts import linear_layers
from padseg.backbones.source import locate
from padseg.backbones.weights import shapes_of_model
from padseg.commands import main
from padseg.errors import ModelUnavailable, OutputConflict, UsageError
from padseg.run.cluster import Actor
from padseg.run.job import Job
from padseg.run.prepare import from_model

RANK, ALPHA = 4, 6.0
TARGETS = ['attn.to_q', 'attn.to_k', 'attn.to_v', 'attn.to_out.0']
LAYER = 'transformer_blocks.0.attn.to_q'
Tensors = dict[str, torch.Tensor]


def inputs(transformer) -> dict[str, torch.Tensor]:
    config, random = transformer.config, torch.Generator().manual_seed(5)
    return {
        'hidden_states': torch.randn(2, config.in_channels, 8, 12, generator=random),
        'encoder_hidden_states': torch.randn(2, 7, config.joint_attention_dim, generator=random),
        'pooled_projections': torch.randn(2, config.pooled_projection_dim, generator=random),
        'timestep': torch.tensor([700.0, 40.0]),
    }


@torch.no_grad()
def answer(transformer) -> torch.Tensor:
    return transformer(**{name: value.to(transformer.dtype) for name, value in inputs(transformer).items()}, return_dict=False)[0].float()


def random_lora(folder: pathlib.Path, seed: int = 0, blocks: int = 4, rank: int = RANK) -> Tensors:
    """Matrices for the image stream of a model's first blocks, named as peft names them."""
    random, source = torch.Generator().manual_seed(seed), locate(str(folder))
    shapes = linear_layers(family_of(source.spec), source)
    matrices: Tensors = {}
    for layer in (f'transformer_blocks.{block}.{target}' for block in range(blocks) for target in TARGETS):
        out, into = shapes[layer]
        matrices[f'{layer}.lora_A.weight'] = torch.randn(rank, into, generator=random) / 4
        matrices[f'{layer}.lora_B.weight'] = torch.randn(out, rank, generator=random) / 4
    return matrices


@pytest.fixture(scope='module')
def lora(sd3_folder, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp('lora') / 'pytorch_lora_weights.safetensors'
    save_lora(path, random_lora(sd3_folder), RANK, ALPHA, TARGETS)
    return path


@pytest.fixture(scope='module')
def merged(sd3_folder, lora):
    return load(str(sd3_folder), device='cpu', whole=True, lora=lora)


# what it gives


def adapted(folder: pathlib.Path):
    """The transformer of a model with peft's adapter, whose matrices are random."""
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig

    torch.manual_seed(3)
    transformer = SD3Transformer2DModel.from_pretrained(folder / 'transformer').eval()
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights='gaussian', target_modules=TARGETS))
    for name, weight in transformer.named_parameters():
        if '.lora_B.' in name:
            torch.nn.init.normal_(weight, std=0.3)
    return transformer


@pytest.mark.parametrize('model', ['sd3_folder', 'sd35_folder'])
def test_merged_weights_give_what_the_adapter_and_the_pipeline_give(model, tmp_path, request):
    from diffusers import StableDiffusion3Pipeline
    from peft import get_peft_model_state_dict

    folder = request.getfixturevalue(model)
    adapter = adapted(folder)
    path = tmp_path / 'lora' / 'pytorch_lora_weights.safetensors'
    save_lora(path, get_peft_model_state_dict(adapter), RANK, ALPHA, TARGETS)
    expected = answer(adapter)
    adapter.disable_adapters()
    assert (answer(adapter) - expected).abs().max() > 0.01
    ours = load(str(folder), device='cpu', whole=True, lora=path.parent).transformer
    torch.testing.assert_close(answer(ours), expected, rtol=1e-5, atol=1e-5)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.load_lora_weights(path.parent)
    (config,) = pipeline.transformer.peft_config.values()
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (RANK, ALPHA, set(TARGETS))
    torch.testing.assert_close(answer(pipeline.transformer), expected, rtol=1e-5, atol=1e-5)


def test_what_diffusers_and_peft_write_is_read(sd3_folder, tmp_path):
    """By a pipeline, by a transformer and by peft: the same matrices and factors."""
    from diffusers import StableDiffusion3Pipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    adapter = adapted(sd3_folder)
    matrices = get_peft_model_state_dict(adapter)
    metadata = {'transformer_lora_adapter_metadata': adapter.peft_config['default'].to_dict()}
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / 'pipeline', matrices, **metadata)
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / 'script', convert_state_dict_to_diffusers(matrices), **metadata)
    adapter.save_lora_adapter(tmp_path / 'transformer')
    from diffusers import SD3Transformer2DModel

    plain = SD3Transformer2DModel.from_pretrained(sd3_folder / 'transformer')
    wrapped = get_peft_model(plain, LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=TARGETS))
    wrapped.load_state_dict(
        {f'base_model.model.{name.replace(".weight", ".default.weight")}': one for name, one in matrices.items()}, strict=False
    )
    wrapped.save_pretrained(tmp_path / 'peft')
    for written, factor in (
        ('pipeline', ALPHA / RANK),
        ('script', ALPHA / RANK),
        ('transformer', ALPHA / RANK),
        ('peft', ALPHA / RANK**0.5),
    ):
        found = read_lora(tmp_path / written)
        assert found.pairs.keys() == {name.rpartition('.lora_')[0] for name in matrices}
        for layer, pair in found.pairs.items():
            assert pair.factor == factor
            assert torch.equal(pair.down, matrices[f'{layer}.lora_A.weight']) and torch.equal(pair.up, matrices[f'{layer}.lora_B.weight'])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_weights_are_added_in_float32_and_rounded_once(sd3_folder, backbone, lora, dtype):
    kind = getattr(torch, dtype)
    plain = {name: tensor.to(kind) for name, tensor in backbone.transformer.state_dict().items()}
    changed = load(str(sd3_folder), device='cpu', dtype=dtype, whole=True, lora=lora, lora_scale=0.5).transformer.state_dict()
    matrices = random_lora(sd3_folder)
    layers = {name.rpartition('.lora_')[0] for name in matrices}
    assert {name for name in plain if not torch.equal(plain[name], changed[name])} == {f'{layer}.weight' for layer in layers}
    for layer in layers:
        up, down = matrices[f'{layer}.lora_B.weight'].double(), matrices[f'{layer}.lora_A.weight'].double()
        exact = plain[f'{layer}.weight'].double() + 0.5 * ALPHA / RANK * up @ down
        assert changed[f'{layer}.weight'].dtype == kind
        assert (changed[f'{layer}.weight'].double() - exact).abs().max() <= exact.abs().max() * torch.finfo(kind).eps


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
def test_half_precision_matrices(backbone, sd3_folder, tmp_path, kind):
    """A file of half the size is read as its values are, and their product is that of float32."""
    rounded = {name: tensor.to(kind) for name, tensor in random_lora(sd3_folder).items()}
    save_lora(tmp_path / 'half', rounded, RANK, ALPHA, TARGETS)
    transformer = copy.deepcopy(backbone.transformer)
    merge_lora(transformer, read_lora(tmp_path / 'half'), transformer.state_dict().keys())
    up, down = rounded[f'{LAYER}.lora_B.weight'].double(), rounded[f'{LAYER}.lora_A.weight'].double()
    exact = backbone.transformer.state_dict()[f'{LAYER}.weight'].double() + ALPHA / RANK * up @ down
    torch.testing.assert_close(transformer.state_dict()[f'{LAYER}.weight'].double(), exact, rtol=1e-6, atol=1e-6)


def test_first_blocks_alone_are_changed_alike(sd3_folder, lora, merged):
    """A model that was cut to the blocks which are needed has the weights of the whole one; of the rest of the LoRA nothing is missed."""
    cut = load(str(sd3_folder), device='cpu', layer=1, lora=lora)
    whole, kept = merged.transformer.state_dict(), cut.transformer.state_dict()
    assert f'{LAYER}.weight' in kept and 'transformer_blocks.3.attn.to_q.weight' not in kept
    assert all(torch.equal(whole[name], kept[name]) for name in kept)


def test_a_lora_of_later_blocks_alone_changes_nothing_before_them(sd3_folder, backbone, tmp_path):
    matrices = {name: tensor for name, tensor in random_lora(sd3_folder).items() if '.3.' in name}
    save_lora(tmp_path / 'late', matrices, RANK, ALPHA, TARGETS)
    plain, late = (
        backbone.transformer.state_dict(),
        load(str(sd3_folder), device='cpu', layer=2, lora=tmp_path / 'late').transformer.state_dict(),
    )
    assert all(torch.equal(plain[name], late[name]) for name in late)


def test_scale_zero_is_no_lora_but_another_identity(sd3_folder, backbone, merged, lora):
    none = load(str(sd3_folder), device='cpu', whole=True, lora=lora, lora_scale=0.0)
    plain, same = backbone.transformer.state_dict(), none.transformer.state_dict()
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert len({one.identity for one in (backbone, none, merged)}) == 3
    for one, how in ((backbone, {}), (none, {'lora': lora, 'lora_scale': 0.0}), (merged, {'lora': str(lora)})):
        assert identity(str(sd3_folder), **how) == one.identity
    assert backbone.identity.lora is None and backbone.identity.lora_scale is None
    assert merged.identity == backbone.identity._replace(lora=lora_hash(locate_lora(lora)), lora_scale=1.0)
    assert 'lora' not in backbone.identity.recorded() and merged.identity.recorded()['lora_scale'] == 1.0


@pytest.mark.parametrize('kind', ['flux', 'unet', 'pixart'])
def test_every_family(kind, tmp_path, make_flux):
    """Any linear layers, whichever they are called: here the first and the last that make queries."""
    make = {'flux': make_flux, 'unet': partial(random_unet, kind='sd15'), 'pixart': partial(random_pixart, alpha=False)}[kind]
    folder = make(tmp_path / 'model')
    source = locate(str(folder))
    shapes = linear_layers(family_of(source.spec), source)
    layers = [layer for layer in shapes if layer.endswith('to_q')]
    chosen, prefix = [layers[0], layers[-1]], 'unet' if kind == 'unet' else 'transformer'
    tensors = {}
    for layer in chosen:
        tensors[f'{prefix}.{layer}.lora_A.weight'] = torch.ones(2, shapes[layer][1])
        tensors[f'{prefix}.{layer}.lora_B.weight'] = torch.ones(shapes[layer][0], 2)
    save_file(tensors, tmp_path / 'any.safetensors')
    changed = load(str(folder), device='cpu', whole=True, lora=tmp_path / 'any.safetensors').transformer.state_dict()
    before = load_file(next((folder / prefix).glob('*.safetensors')))
    assert {name for name in before if not torch.equal(before[name], changed[name])} == {f'{layer}.weight' for layer in chosen}
    assert all(torch.equal(changed[f'{layer}.weight'], before[f'{layer}.weight'] + 2) for layer in chosen)


def test_it_is_written_the_same_every_time(sd3_folder, tmp_path):
    matrices = random_lora(sd3_folder)
    save_lora(tmp_path / 'one', matrices, RANK, ALPHA, TARGETS)
    save_lora(tmp_path / 'two', dict(reversed(matrices.items())), RANK, ALPHA, reversed(TARGETS))
    assert (tmp_path / 'one').read_bytes() == (tmp_path / 'two').read_bytes()


# alpha


def factors(tensors: Tensors, path: pathlib.Path, stated: object = None) -> dict[str, float]:
    text = stated if isinstance(stated, str) else json.dumps(stated)
    save_file(tensors, path, None if stated is None else {STATED: text})
    return {layer: pair.factor for layer, pair in read_lora(path).pairs.items()}


def two_layers() -> Tensors:
    layers = (LAYER, LAYER.replace('to_q', 'to_out.0'))
    return {f'transformer.{layer}.lora_{kind}.weight': torch.ones(RANK, RANK) for layer in layers for kind in 'AB'}


def test_alpha(tmp_path, caplog):
    path = tmp_path / 'a'
    first, second = LAYER, LAYER.replace('to_q', 'to_out.0')
    assert factors(two_layers(), path) == {first: 1, second: 1}
    assert 'does not say its alpha' in caplog.text
    caplog.clear()
    assert factors(two_layers(), path, {'transformer.r': 4, 'transformer.lora_alpha': 2}) == {first: 0.5, second: 0.5}
    assert factors(two_layers(), path, {'r': 4, 'lora_alpha': 2.0, 'use_rslora': True}) == {first: 1, second: 1}
    pattern = {'transformer.lora_alpha': 2, 'transformer.alpha_pattern': {f'^{first}': 8, 'to_out': 3}}
    assert factors(two_layers(), path, pattern) == {first: 2, second: 0.5}
    alphas = {f'transformer.{first}.alpha': torch.tensor(1.0), f'transformer.{second}.alpha': torch.tensor([6.0], dtype=torch.bfloat16)}
    assert factors(two_layers() | alphas, path) == {first: 0.25, second: 1.5}
    assert caplog.text == ''


# what is refused


def craft(path: pathlib.Path, header: object, data: bytes = b'') -> pathlib.Path:
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = 'F32') -> dict[str, object]:
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, end]}


NAME = f'transformer.{LAYER}'
HUGE = {f'{NAME}.lora_A.weight': entry([2**40, 32], 0, 2**47), f'{NAME}.lora_B.weight': entry([32, 2**40], 2**47, 2**48)}
WRAPPED = {f'{NAME}.lora_A.weight': entry([2**33, 2**33], 0, 16), f'{NAME}.lora_B.weight': entry([4, 4], 16, 80)}
NESTED = b'{"a":' * 100_000
BAD_FILES: dict[str, tuple[Callable[[pathlib.Path], object], str]] = {
    'nothing': (lambda path: path.write_bytes(b''), 'damaged|no safetensors file'),
    'text': (lambda path: path.write_text('a LoRA, believe me'), 'no safetensors file'),
    'a pointer': (lambda path: path.write_text('version https://git-lfs.github.com/spec/v1\n'), 'pointer of git-lfs'),
    'a header of exabytes': (lambda path: path.write_bytes(struct.pack('<Q', 2**62) + b'{}'), 'no safetensors file'),
    'no JSON': (lambda path: craft(path, b'{"a": '), 'damaged'),
    'deep JSON': (lambda path: craft(path, NESTED), 'damaged'),
    'no tensors': (lambda path: craft(path, {}), 'holds no tensors'),
    'huge sizes': (lambda path: craft(path, HUGE, bytes(64)), 'damaged'),
    'sizes that overflow': (lambda path: craft(path, WRAPPED, bytes(80)), 'damaged'),
    'pickle': (lambda path: torch.save(two_layers(), path), 'pickle of torch.*convert-lora'),
    'pickle of old': (lambda path: path.write_bytes(pickle.dumps(print, protocol=2)), 'pickle of torch'),
}


@pytest.mark.parametrize('what', BAD_FILES)
def test_files_that_are_no_lora(what, tmp_path):
    write, words = BAD_FILES[what]
    write(tmp_path / 'bad.safetensors')
    with pytest.raises(ModelUnavailable, match=words):
        read_lora(tmp_path / 'bad.safetensors')


def test_more_than_a_lora_can_have_is_not_read(tmp_path):
    """The header fits the file, which has holes: 8 GiB that take no space."""
    side = 2**15
    path = craft(
        tmp_path / 'sparse',
        {f'{NAME}.lora_A.weight': entry([side, side], 0, 2**32), f'{NAME}.lora_B.weight': entry([side, side], 2**32, 2**33)},
    )
    with path.open('r+b') as file:
        file.truncate(path.stat().st_size + 2**33)
    with pytest.raises(ModelUnavailable, match='too large for a LoRA'):
        read_lora(path)


def changed(**parts: torch.Tensor | None) -> Tensors:
    """Two layers, of the first of which these tensors are others; None takes one away."""
    ends = {'down': '.lora_A.weight', 'up': '.lora_B.weight', 'alpha': '.alpha'}
    tensors = {**two_layers(), **{NAME + ends[name]: one for name, one in parts.items()}}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


ONE = torch.ones(1)
BAD_TENSORS: dict[str, tuple[Tensors, object, str]] = {
    'two ranks': (changed(down=torch.ones(3, 4)), None, 'lora_A has rank 3 and lora_B rank 4'),
    'no B': (changed(up=None), None, 'incomplete: .*to_q has no lora_B.weight'),
    'no A': (changed(down=None), None, 'incomplete: .*to_q has no lora_A.weight'),
    'alpha alone': (changed(up=None, down=None, alpha=ONE), None, 'incomplete'),
    'vectors': (changed(up=torch.ones(4), down=torch.ones(4)), None, 'reads matrices'),
    'convolutions': (changed(up=torch.ones(4, 4, 1, 1), down=torch.ones(4, 4, 1, 1)), None, 'reads matrices'),
    'nothing in it': (changed(up=torch.ones(4, 0), down=torch.ones(0, 4)), None, 'reads matrices'),
    'rank above sizes': (changed(up=torch.ones(4, 9), down=torch.ones(9, 8)), None, 'rank 9 of .* above'),
    'whole numbers': (changed(up=torch.ones(4, 4, dtype=torch.int8)), None, 'type I8'),
    'doubles': (changed(up=torch.ones(4, 4, dtype=torch.float64)), None, 'type F64'),
    'NaN in A': (changed(down=torch.full((4, 4), torch.nan)), None, 'lora_A.weight has values that are not finite'),
    'infinite in B': (changed(up=torch.tensor([[1.0, torch.inf, 0, 0]] * 4)), None, 'lora_B.weight has values that are not finite'),
    'zero B': ({name: tensor * ('lora_A' in name) for name, tensor in two_layers().items()}, None, 'changes nothing: lora_B is zero'),
    'zero A': ({name: tensor * ('lora_B' in name) for name, tensor in two_layers().items()}, None, 'changes nothing'),
    'alpha NaN': (changed(alpha=ONE * torch.nan), None, 'alpha is a number above 0'),
    'alpha zero': (changed(alpha=ONE * 0), None, 'alpha is a number above 0'),
    'several alphas': (changed(alpha=torch.ones(2)), None, 'not one number'),
    'encoders': ({**two_layers(), 'text_encoder_2.a.lora_A.weight': ONE}, None, 'a LoRA of text encoders .* save it without'),
    'kohya': ({'lora_te1_text_model.lora_up.weight': ONE}, None, 'text encoders'),
    'kohya of a unet': ({'lora_unet_down.lora_up.weight': ONE}, None, "not a LoRA in diffusers' layout"),
    'DoRA': ({**two_layers(), f'{NAME}.lora_magnitude_vector': ONE}, None, "not a LoRA in diffusers' layout"),
    'bias': ({**two_layers(), f'{NAME}.lora_B.bias': ONE}, None, "not a LoRA in diffusers' layout"),
    'two layouts': ({**two_layers(), f'{NAME}.lora.down.weight': torch.ones(4, 4)}, None, 'two tensors for one layer'),
    'twice': ({**two_layers(), f'{LAYER}.lora_A.weight': torch.ones(4, 4)}, None, 'two tensors for one layer'),
    'settings no JSON': (two_layers(), '{', 'not JSON of settings'),
    'settings deep': (two_layers(), '[' * 100_000, 'not JSON of settings'),
    'settings long': (two_layers(), json.dumps('a' * 2_000_000), 'not JSON of settings'),
    'settings a list': (two_layers(), '[]', 'not JSON of settings'),
    'settings NaN': (two_layers(), '{"transformer.lora_alpha": NaN}', 'not JSON of settings'),
    'settings rank': (two_layers(), {'transformer.r': 8}, 'settings say rank 8, but .* has rank 4'),
    'settings no rank': (two_layers(), {'transformer.r': '4'}, 'the rank is a number >= 1'),
    'settings alpha': (two_layers(), {'transformer.lora_alpha': 1e300}, 'alpha is a number'),
    'settings alpha true': (two_layers(), {'transformer.lora_alpha': True}, 'alpha is a number'),
    'settings of other weights': (two_layers(), {'transformer.init_lora_weights': 'pissa_niter_4'}, 'for changed weights'),
    'settings pattern': (two_layers(), {'alpha_pattern': {'(a+)+$': 4}}, 'not regular expressions'),
    'settings no pattern': (two_layers(), {'alpha_pattern': [4]}, 'alpha_pattern is not an object'),
}  # fmt: skip


@pytest.mark.parametrize('what', BAD_TENSORS)
def test_tensors_that_are_no_lora(what, tmp_path):
    tensors, stated, words = BAD_TENSORS[what]
    with pytest.raises(ModelUnavailable, match=words):
        factors(tensors, tmp_path / 'bad', stated)


def test_ranks_may_differ_where_the_settings_say_so(tmp_path):
    tensors = changed(up=torch.ones(4, 2), down=torch.ones(2, 4))
    stated = {'transformer.r': 4, 'transformer.lora_alpha': 4, 'transformer.rank_pattern': {'to_q': 2}}
    assert sorted(factors(tensors, tmp_path / 'a', stated).values()) == [1, 2]


def renamed(path: pathlib.Path, out: pathlib.Path, old: str, new: str) -> pathlib.Path:
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, out)
    return out


MISFITS = {
    'another block': ('blocks.3.', 'blocks.4.', r'no linear layer transformer_blocks\.4\.attn\.\S+ \(4 of 16'),
    'another model': ('transformer.transformer_blocks', 'unet.blocks', r'no linear layer blocks\.0\.attn\.\S+ \(16 of 16'),
    'no layer': ('attn.to_q', 'attn', r'no linear layer transformer_blocks\.0\.attn \(4 of 16'),
    'a norm': ('attn.to_out.0', 'norm1.norm', 'no linear layer'),
    'another size': ('attn.to_q', 'ff.net.2', r'ff\.net\.2 is 32 x 32 in the LoRA and 32 x 128 in the model'),
}


@pytest.mark.parametrize('what', MISFITS)
def test_loras_that_do_not_fit_the_model(what, sd3_folder, lora, tmp_path):
    """Blocks that are not loaded count, too."""
    old, new, words = MISFITS[what]
    with pytest.raises(ModelUnavailable, match=words):
        load(str(sd3_folder), device='cpu', layer=1, lora=renamed(lora, tmp_path / 'odd', old, new))


def test_no_tensor_is_read_before_the_header_fits(sd3_folder, tmp_path):
    """Matrices of 2 GiB that the model does not have, in a file with holes, take no time."""
    path = craft(
        tmp_path / 'wide',
        {f'{NAME}.lora_A.weight': entry([2**14, 2**14], 0, 2**30), f'{NAME}.lora_B.weight': entry([2**14, 2**14], 2**30, 2**31)},
    )
    with path.open('r+b') as file:
        file.truncate(path.stat().st_size + 2**31)
    with pytest.raises(ModelUnavailable, match='16384 x 16384 in the LoRA and 32 x 32 in the model'):
        load(str(sd3_folder), device='cpu', lora=path)


def test_merging_by_hand_refuses_the_same_and_changes_nothing(backbone):
    transformer = copy.deepcopy(backbone.transformer)
    known, before = set(shapes_of_model(transformer)), {name: one.clone() for name, one in transformer.state_dict().items()}
    good = Pair(torch.ones(RANK, 32), torch.ones(32, RANK), 1.0)
    for layer, pair, words in (
        ('transformer_blocks.9.attn.to_q', good, 'no linear layer'),
        ('pos_embed.proj', good, 'is no linear layer'),
        (LAYER.replace('to_q', 'to_k'), good._replace(up=torch.ones(31, RANK)), '31 x 32 in the LoRA'),
    ):
        with pytest.raises(ModelUnavailable, match=words):
            merge_lora(transformer, Lora(pathlib.Path('a'), '', 1.0, {LAYER: good, layer: pair}), known)
    assert all(torch.equal(before[name], one) for name, one in transformer.state_dict().items())
    merge_lora(transformer, Lora(pathlib.Path('a'), '', 0.5, {LAYER: good}), known)
    assert torch.equal(transformer.state_dict()[f'{LAYER}.weight'], before[f'{LAYER}.weight'] + 0.5 * RANK)


def test_values_that_the_type_cannot_hold(sd3_folder, tmp_path):
    large = {name: tensor * 1000 for name, tensor in random_lora(sd3_folder).items()}
    save_lora(tmp_path / 'large', large, RANK, ALPHA, TARGETS)
    with pytest.raises(ModelUnavailable, match=r'not finite in torch\.float16'):
        load(str(sd3_folder), device='cpu', dtype='float16', lora=tmp_path / 'large')


@pytest.mark.parametrize('scale', [float('nan'), float('inf')])
def test_scales_that_are_no_numbers(sd3_folder, lora, scale):
    with pytest.raises(UsageError, match='finite number'):
        load(str(sd3_folder), device='cpu', lora=lora, lora_scale=scale)


def test_paths_without_a_lora(sd3_folder, tmp_path):
    for path in (tmp_path, tmp_path / 'none.safetensors', tmp_path / ('a' * 300), ''):
        with pytest.raises(UsageError, match='no LoRA in|not the file of a LoRA'):
            load(str(sd3_folder), device='cpu', lora=path)
    with pytest.raises(UsageError, match='there is none'):
        load(str(sd3_folder), device='cpu', lora_scale=0.5)


# in an output folder


@pytest.fixture
def pictures(tmp_path, picture) -> pathlib.Path:
    (tmp_path / 'pictures').mkdir()
    PIL.Image.fromarray(picture).save(tmp_path / 'pictures' / 'a.png')
    return tmp_path / 'pictures'


@pytest.fixture
def run(sd3_folder, pictures, tmp_path) -> Callable[..., int]:
    out = str(tmp_path / 'out')
    return lambda *flags: main(['run', '--dir', str(pictures), '--out', out, '--model', str(sd3_folder), '--device', 'cpu', '-q', *flags])


def test_a_run_records_its_lora_and_is_continued_with_it_alone(run, sd3_folder, lora, tmp_path, pictures, picture, capsys):
    assert run('--lora', str(lora), '--lora-scale', '0.5') == 0
    record = json.loads((tmp_path / 'out' / 'run.json').read_text())
    plain = tmp_path / 'plain'
    assert main(['run', '--dir', str(pictures), '--out', str(plain), '--model', str(sd3_folder), '--device', 'cpu', '-q']) == 0
    without = json.loads((plain / 'run.json').read_text())
    assert record['requested'].keys() - without['requested'].keys() == {'lora', 'lora_scale'}
    assert record['settings'].keys() - without['settings'].keys() == {'lora', 'lora_scale'}
    assert record['settings']['lora'] == lora_hash(locate_lora(lora)) and record['settings']['lora_scale'] == 0.5
    assert record['model'] == without['model'] and record['key'] != without['key']
    assert run('--lora', str(lora), '--lora-scale', '0.5') == 0  # nothing left to do, and nothing to load
    PIL.Image.fromarray(picture[::-1]).save(pictures / 'b.png')
    moved = shutil.copytree(lora.parent, tmp_path / 'moved')
    assert run('--lora', str(moved), '--lora-scale', '0.5') == 0  # the same content by another path
    assert json.loads((tmp_path / 'out' / 'run.json').read_text())['counts']['skipped'] == 1
    for flags, words in (((), 'lora .* there, None now'), (('--lora', str(lora)), 'lora_scale 0.5 there, 1.0 now')):
        assert run(*flags) == 6
        assert re.search(words, capsys.readouterr().err)


def test_another_lora_by_the_same_name_is_noticed(run, sd3_folder, lora, tmp_path, capsys):
    own = shutil.copytree(lora.parent, tmp_path / 'own') / lora.name
    assert run('--lora', str(own)) == 0
    save_lora(own, random_lora(sd3_folder, seed=1), RANK, ALPHA, TARGETS)
    assert run('--lora', str(own)) == 6
    assert 'made with other settings (lora ' in capsys.readouterr().err
    own.write_bytes(b'damaged')
    assert run('--lora', str(own)) == 4
    own.unlink()
    assert run('--lora', str(own)) == 0  # all is done, and a model that is gone is not asked for, either


def test_runs_refuse_what_does_not_go_with_a_lora(run, lora, tmp_path, capsys):
    for flags, words in (
        (('--lora-scale', '0.5'), '--lora-scale is the strength of a LoRA'),
        (('--lora', str(tmp_path)), 'there is no LoRA in'),
        (('--lora', str(lora), '--method', 'grid'), 'leave out --lora'),
        (('--lora', str(lora), '--lora-scale', 'nan'), 'finite number'),
    ):
        assert run(*flags) == 2
        assert words in capsys.readouterr().err


def test_label_and_shards(lora, sd3_folder, pictures, tmp_path, picture, texts_folder):
    PIL.Image.fromarray(picture[::-1]).save(pictures / 'c.png')
    common = ['--dir', str(pictures), '--device', 'cpu', '-q', '--lora', str(lora)]
    for part in ('1/2', '2/2'):
        assert main(['run', '--out', str(tmp_path / 'out'), '--model', str(sd3_folder), '--shard', part, *common]) == 0
    assert main(['run', '--collect', str(tmp_path / 'out'), '-q']) == 0
    hashed = lora_hash(locate_lora(lora))
    assert json.loads((tmp_path / 'out' / 'run.json').read_text())['settings']['lora'] == hashed
    own = tmp_path / 'lora.safetensors'
    save_lora(own, random_lora(texts_folder), RANK, ALPHA, TARGETS)
    names = ['--model', str(texts_folder), '--classes', 'cat, light']
    assert main(['label', '--out', str(tmp_path / 'names'), *names, *common[:-1], str(own)]) == 0
    assert json.loads((tmp_path / 'names' / 'run.json').read_text())['settings']['lora'] == lora_hash(locate_lora(own))


def test_machines_of_a_cluster_must_have_the_same_lora(sd3_folder, lora, pictures, tmp_path):
    own = shutil.copytree(lora.parent, tmp_path / 'own') / lora.name
    job = Job(pictures, tmp_path / 'out', model=str(sd3_folder), device='cpu', lora=str(own))
    _, record = from_model(job)
    assert Actor(job, record, 'cpu').stages
    save_lora(own, random_lora(sd3_folder, seed=1), RANK, ALPHA, TARGETS)
    with pytest.raises(OutputConflict, match=r'another \S+ \(lora \w+ there, \w+ now\)'):
        assert Actor(job, record, 'cpu').stages


def test_merging_kept_maps_again_keeps_the_lora(run, lora, tmp_path):
    assert run('--lora', str(lora), '--save-maps') == 0
    assert main(['merge', str(tmp_path / 'out'), '--out', str(tmp_path / 'again'), '--threshold', '0.2', '-q']) == 0
    assert json.loads((tmp_path / 'again' / 'run.json').read_text())['settings']['lora'] == lora_hash(locate_lora(lora))


@pytest.fixture
def truth(tmp_path, pictures) -> pathlib.Path:
    root = tmp_path / 'truth'
    for part in ('images', 'labels'):
        (root / part).mkdir(parents=True)
    shutil.copy(pictures / 'a.png', root / 'images' / 'a.png')
    values = PIL.Image.new('L', (80, 48))
    values.paste(1, (30, 0, 80, 48))
    values.save(root / 'labels' / 'a.png')
    return root


@pytest.mark.slow
def test_eval_and_analyze(sd3_folder, lora, truth, tmp_path, capsys):
    def score(*flags: str) -> int:
        common = [
            '--regions',
            '--sweep',
            '0.01,0.1',
            '--model',
            str(sd3_folder),
            '--device',
            'cpu',
            '--out',
            str(tmp_path / 'scores'),
            '-q',
        ]
        return main(['eval', 'folder', '--root', str(truth), *common, *flags])

    assert score() == 0
    plain = json.loads((tmp_path / 'scores' / 'scores.json').read_text())
    assert 'lora' not in plain['settings']['predictions']
    assert score('--lora', str(lora)) == 6
    assert 'predictions.lora None there' in capsys.readouterr().err
    assert score('--lora', str(lora), '--overwrite') == 0  # and not by the maps that the first one kept
    scored = json.loads((tmp_path / 'scores' / 'scores.json').read_text())
    assert scored['settings']['predictions']['lora'] == lora_hash(locate_lora(lora))
    assert scored['settings']['predictions']['lora_scale'] == 1.0
    assert scored['sweep'] != plain['sweep']
    assert score('--lora', str(lora)) == 0
    assert score('--lora', str(lora), '--lora-scale', '2') == 6
    assert score('--lora', str(lora), '--pred', str(truth / 'labels')) == 2
    capsys.readouterr()
    folders = ['--dir', str(truth / 'images'), '--labels', str(truth / 'labels'), '--out', str(tmp_path / 'analysis')]
    assert main(['analyze', *folders, '--model', str(sd3_folder), '--device', 'cpu', '--json', '-q', '--lora', str(lora)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found['lora'], found['lora_scale']) == (scored['settings']['predictions']['lora'], 1.0)


# released checkpoints


def released(folder: pathlib.Path, **more: object) -> dict[str, object]:
    """What the authors' trainer saves, in small: all of the model, the score layer and the optimizer."""
    state = {f'backbone.transformer.{name.replace(".weight", ".default.weight")}': one for name, one in random_lora(folder).items()}
    others = {
        'backbone.transformer.transformer_blocks.0.attn.to_q.base_layer.weight': torch.ones(32, 32),
        'backbone.vae.encoder.conv_in.weight': torch.ones(8, 3, 3, 3),
        'attn_score_layer.0.weight': torch.ones(64, 1, 3, 3),
        'attn_score_layer.0.bias': torch.ones(64),
    }
    return {'model': {**state, **others, **more}, 'optimizer': {'state': {}}, 'iteration': 2999}


def test_a_released_checkpoint_converts_and_loads(sd3_folder, lora, merged, tmp_path, capsys):
    from diffusers import SD3Transformer2DModel

    torch.save(released(sd3_folder), tmp_path / 'released.pth')
    out = tmp_path / 'made.safetensors'
    assert main(['convert-lora', str(tmp_path / 'released.pth'), str(out), '--alpha', str(ALPHA)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith('a LoRA of rank 4 and alpha 6 for 16 layers')
    assert printed[1] == 'left out: attn_score_layer (2), backbone.transformer (1), backbone.vae (1), iteration (1), optimizer (1)'
    ours = load(str(sd3_folder), device='cpu', whole=True, lora=out)
    expected = merged.transformer.state_dict()
    assert all(torch.equal(expected[name], one) for name, one in ours.transformer.state_dict().items())
    pipeline = SD3Transformer2DModel.from_pretrained(sd3_folder / 'transformer').eval()
    pipeline.load_lora_adapter(str(tmp_path), weight_name=out.name)
    torch.testing.assert_close(answer(pipeline), answer(ours.transformer), rtol=1e-5, atol=1e-5)


def test_alpha_of_a_released_checkpoint_is_its_rank(sd3_folder, tmp_path, capsys):
    torch.save(released(sd3_folder), tmp_path / 'released.pth')
    out = tmp_path / 'made.safetensors'
    assert main(['convert-lora', str(tmp_path / 'released.pth'), str(out), '--json']) == 0
    assert json.loads(capsys.readouterr().out)['alpha'] == RANK
    assert {pair.factor for pair in read_lora(out).pairs.values()} == {1.0}
    assert main(['convert-lora', str(tmp_path / 'released.pth'), str(out)]) == 6
    assert 'exists' in capsys.readouterr().err


class Code:
    """Unpickled, it would write a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


FULL = f'backbone.transformer.{LAYER}.lora_A.default.weight'


def changed_state(state: dict[str, object], **changes: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, object]:
    model = dict(state['model'])
    for name, tensor in model.items():
        for part, change in changes.items():
            if f'.lora_{part}.' in name:
                model[name] = change(tensor)
    return {**state, 'model': model}


BAD_STATES: dict[str, tuple[Callable[[dict[str, object]], object], str]] = {
    'a list': (lambda state: [1], 'it holds no names'),
    'no model': (lambda state: {'iteration': 1}, "no tensors under 'model'"),
    'a number': (lambda state: {'model': 3}, "no tensors under 'model'"),
    'no LoRA': (lambda state: {'model': {'attn_score_layer.0.bias': ONE}}, r'has no LoRA: .* it has attn_score_layer \(1\)'),
    'zero B': (lambda state: changed_state(state, B=torch.zeros_like), 'changes nothing: lora_B is zero'),
    'NaN': (lambda state: changed_state(state, A=lambda one: one * torch.nan), 'not finite'),
    'half a pair': (lambda state: {'model': {FULL: torch.ones(4, 32)}}, 'incomplete: .* has no lora_B'),
    'two ranks in a pair': (lambda state: changed_state(state, A=lambda one: one[:3].clone()), 'lora_A has rank 3 and lora_B rank 4'),
    'several ranks': (
        lambda state: {
            'model': {
                **state['model'],
                FULL: torch.ones(2, 32),
                FULL.replace('_A', '_B'): torch.ones(32, 2),
            }
        },
        'several ranks: 2, 4',
    ),
    'whole numbers': (lambda state: {'model': {FULL: torch.ones(4, 4, dtype=torch.int64)}}, 'no matrix of floating-point numbers'),
    'no tensor': (lambda state: {'model': {FULL: [1.0]}}, 'no matrix of floating-point numbers'),
    'sparse': (lambda state: {'model': {FULL: torch.ones(4, 4).to_sparse()}}, 'no matrix of floating-point numbers'),
    'no memory': (lambda state: {'model': {FULL: torch.ones(4, 4, device='meta')}}, 'no matrix of floating-point numbers'),
    'one value for all': (lambda state: {'model': {FULL: ONE.expand(2**20, 2**20)}}, 'more numbers than the file'),
}


@pytest.mark.parametrize('what', BAD_STATES)
def test_checkpoints_that_are_refused(what, sd3_folder, tmp_path):
    change, words = BAD_STATES[what]
    torch.save(change(released(sd3_folder)), tmp_path / 'bad.pth')
    with pytest.raises(ModelUnavailable, match=words):
        convert_lora(tmp_path / 'bad.pth', tmp_path / 'out.safetensors')
    assert not (tmp_path / 'out.safetensors').exists()


def test_code_in_a_checkpoint_does_not_run(sd3_folder, tmp_path, capsys):
    path = tmp_path / 'code.pth'
    torch.save({**released(sd3_folder), 'trainer': Code(tmp_path / 'ran')}, path)
    assert main(['convert-lora', str(path), str(tmp_path / 'out.safetensors')]) == 4
    assert 'holds code or objects' in capsys.readouterr().err
    path.write_bytes(pickle.dumps(Code(tmp_path / 'ran')))
    assert main(['convert-lora', str(path), str(tmp_path / 'out.safetensors')]) == 4
    assert 'not a checkpoint as torch writes it' in capsys.readouterr().err
    assert not (tmp_path / 'ran').exists()


def test_packed_and_damaged_archives(sd3_folder, tmp_path):
    good, path = tmp_path / 'good.pth', tmp_path / 'bad.pth'
    torch.save(released(sd3_folder), good)
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as packed:
        for record in archive.infolist():
            packed.writestr(record.filename, archive.read(record))
    with pytest.raises(ModelUnavailable, match='packed, as torch never does'):
        convert_lora(path, tmp_path / 'out.safetensors')
    path.write_bytes(good.read_bytes()[:-300])
    with pytest.raises(ModelUnavailable, match='not a checkpoint as torch writes it'):
        convert_lora(path, tmp_path / 'out.safetensors')
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a.txt', 'a')
    with pytest.raises(ModelUnavailable, match='cannot be read as a checkpoint'):
        convert_lora(path, tmp_path / 'out.safetensors')


def test_a_place_that_cannot_be_written_to(sd3_folder, tmp_path, capsys):
    path = tmp_path / 'released.pth'
    torch.save(released(sd3_folder), path)
    for out in ('/dev/full/a.safetensors', str(path / 'a.safetensors')):
        assert main(['convert-lora', str(path), out]) == 6
        assert 'cannot write to' in capsys.readouterr().err


def test_conversions_that_cannot_be(tmp_path):
    (tmp_path / 'a.pth').write_bytes(b'')
    for released_path, out, alpha, words in (
        (tmp_path / 'none.pth', tmp_path / 'a.safetensors', None, 'is not a file'),
        (tmp_path / 'a.pth', tmp_path / 'a.bin', None, 'ends in .safetensors'),
        (tmp_path / 'a.pth', tmp_path / 'a.safetensors', float('nan'), 'alpha is a number'),
        (tmp_path / 'a.pth', tmp_path / 'a.safetensors', 0.0, 'alpha is a number'),
    ):
        with pytest.raises(UsageError, match=words):
            convert_lora(released_path, out, alpha)
    (tmp_path / 'b.safetensors').symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(OutputConflict, match='exists'):
        convert_lora(tmp_path / 'a.pth', tmp_path / 'b.safetensors')
