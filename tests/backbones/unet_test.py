"""Stable Diffusion 1.5 and 2.1, SDXL and SSD-1B: beside diffusers' own pipelines, with explicit softmax, and with damaged files."""

from __future__ import annotations

import json
import math
import pathlib
import shutil

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from support.crossing import DPM, EULER, PNDM, UNETS, changed_by_files

from padseg.backbones import family_of, load, unet
from padseg.backbones.availability import files_to_fetch, model_state, reckon_memory
from padseg.backbones.layout import LAYOUTS
from padseg.backbones.parts import tensors_needed
from padseg.backbones.recorder import Request, watch
from padseg.backbones.source import locate, small_vae
from padseg.backbones.spec import BACKBONES, CARDS
from padseg.backbones.texts import texts_of
from padseg.commands import main
from padseg.errors import ModelUnavailable, UsageError
from padseg.methods import METHODS, open_backbone
from padseg.methods.open_vocabulary import label
from padseg.methods.seg4diff import segment

TEXTS = ['', 'a cat on grass', 'A Cat-dog, Grass']
FORMER = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}


@pytest.fixture(scope='module')
def pipelines(unet_folders):
    """diffusers' own."""
    kinds = {'sd15': StableDiffusionPipeline, 'sd21': StableDiffusionPipeline}
    return {kind: kinds.get(kind, StableDiffusionXLPipeline).from_pretrained(folder) for kind, folder in unet_folders.items()}


@pytest.fixture
def copied(unet_folders, tmp_path):
    """A copy of SDXL in small, to be changed."""
    return pathlib.Path(shutil.copytree(unet_folders['sdxl'], tmp_path / 'model'))


def own_prompt(pipeline, text: str):
    """The embeddings that diffusers' pipeline makes of a text, the pooled one for SDXL."""
    with torch.no_grad():
        made = pipeline.encode_prompt(text, device='cpu', num_images_per_prompt=1, do_classifier_free_guidance=False)
    return made[0], made[2] if len(made) > 2 else None


@pytest.mark.parametrize('kind', UNETS)
def test_noise_is_predicted_as_by_the_pipeline(unets, pipelines, kind):
    """Of pictures with sides that no level halves evenly too; SDXL is told their size in pixels, as its own original, not cropped."""
    backbone, pipeline = unets[kind], pipelines[kind]
    embeds, pooled = own_prompt(pipeline, '')
    for shape in ((2, 4, 8, 12), (1, 4, 9, 13)):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        added = None
        if pooled is not None:
            sides = (8 * shape[2], 8 * shape[3])
            ids = pipeline._get_add_time_ids(sides, (0, 0), sides, torch.float32, text_encoder_projection_dim=12)
            added = {'text_embeds': pooled.repeat(len(z), 1), 'time_ids': ids.repeat(len(z), 1)}
        with torch.no_grad():
            expected = pipeline.unet(z, torch.tensor(101), embeds.repeat(len(z), 1, 1), added_cond_kwargs=added).sample
            found = backbone.denoise(z, 101.0, backbone.null_prompt)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('kind', UNETS)
def test_texts_are_those_of_the_pipeline(unets, pipelines, kind):
    backbone = unets[kind]
    texts = texts_of(backbone, keep=False)
    encoders = backbone.spec.encoders
    for text in TEXTS:
        embeds, pooled = own_prompt(pipelines[kind], text)
        found = texts.encode(text, encoders, 'zeros')
        assert torch.equal(found[0], embeds) and texts.mask(text) is None
        assert torch.equal(found[1], pooled) if pooled is not None else found[1].shape == (1, 0)
    null = backbone.null_prompt
    assert torch.equal(null.embeds, own_prompt(pipelines[kind], '')[0]) and null.mask is None
    assert null.names[:3] == ('<|startoftext|>', '<|endoftext|>', '<pad 2>') and len(null.names) == 77

    (tokens,) = texts.tokens('a Cat, grass!', encoders).values()
    assert [('a Cat, grass!')[start:end] for start, end in tokens.spans] == ['', 'a', 'Cat', ',', 'grass', '!', '']
    assert (tokens.first, tokens.slots, tokens.strange) == (0, 77, (True, False, False, False, False, False, True))
    with pytest.raises(UsageError, match=f'encoders is .*{encoders[-1]}; got t5$'):
        texts.tokens('a cat', 't5')


def test_a_text_that_the_second_tokenizer_cuts_otherwise(unets):
    """It pads with '!' and never joins two of them to one token; the columns behind would be of other words."""
    texts = texts_of(unets['sdxl'], keep=False)
    first, second = texts.clip_tokenizers.values()
    first.add_tokens(['!!'])
    assert len(first('a !!').input_ids) != len(second('a !!').input_ids)
    with pytest.raises(UsageError, match="cut 'a !!' differently; one of them pads with !"):
        texts.tokens('a !!', 'l+g')


@pytest.mark.parametrize('kind', UNETS)
def test_maps_equal_the_explicit_softmax(unets, kind):
    """Of every layer, from image to text and from image to image, beside queries and keys that hooks note, in float64."""
    backbone = unets[kind]
    z = torch.randn((2, 4, 7, 12), generator=torch.Generator().manual_seed(0))
    layers = range(backbone.layers)
    modules = {('text', layer): backbone.attention_module(layer) for layer in layers} | {
        ('image', layer): backbone.self_attention_module(layer) for layer in layers
    }
    noted = {}
    handles = [
        getattr(module, name).register_forward_hook(lambda _, __, out, key=(key, name): noted.update({key: out.double()}))
        for key, module in modules.items()
        for name in ('to_q', 'to_k')
    ]
    requests = {key: Request(module, softmax_of) for key, module in modules.items()}
    with torch.no_grad(), watch(requests, stop=False) as kept:
        backbone.denoise(z, 101.0, backbone.null_prompt)
    for handle in handles:
        handle.remove()
    for key, module in modules.items():
        query, key_states = (noted[key, name].unflatten(-1, (module.heads, -1)).transpose(1, 2) for name in ('to_q', 'to_k'))
        expected = (query @ key_states.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        tokens = 77 if key[0] == 'text' else query.shape[2]
        assert kept[key].shape == expected.shape == (2, module.heads, query.shape[2], tokens)
        torch.testing.assert_close(kept[key].double(), expected, atol=1e-6, rtol=1e-4)
        assert expected.std(3).mean() > 1e-4 or query.shape[2] == 1  # not even everywhere


def softmax_of(seen):
    return (seen.query @ seen.key.transpose(2, 3) * seen.query.shape[-1] ** -0.5).softmax(-1)


# as on the hub, what decides the number of blocks
PUBLISHED = {
    'sd1.5': {**UNETS['sd15'], 'block_out_channels': (320, 640, 1280, 1280), 'attention_head_dim': 8, 'cross_attention_dim': 768},
    'sd2.1': {
        **UNETS['sd21'],
        'block_out_channels': (320, 640, 1280, 1280),
        'attention_head_dim': (5, 10, 20, 20),
        'cross_attention_dim': 1024,
    },
    'sdxl': {
        **UNETS['sdxl'],
        'block_out_channels': (320, 640, 1280),
        'transformer_layers_per_block': (1, 2, 10),
        'attention_head_dim': (5, 10, 20),
        'cross_attention_dim': 2048,
        'addition_time_embed_dim': 256,
        'projection_class_embeddings_input_dim': 2816,
    },
    'ssd-1b': {
        **UNETS['ssd'],
        'block_out_channels': (320, 640, 1280),
        'transformer_layers_per_block': [[1], [2, 2], [4, 4]],
        'reverse_transformer_layers_per_block': [[4, 4, 10], [2, 1, 1], 1],
        'attention_head_dim': (5, 10, 20),
        'cross_attention_dim': 2048,
        'addition_time_embed_dim': 256,
        'projection_class_embeddings_input_dim': 2816,
    },
}
DENSE = {'sd1.5': 'up-level2-repeat1-vit-block0', 'sdxl': 'up-level1-repeat0-vit-block0'}


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_published_networks_have_the_layers_of_their_rows(name):
    spec = BACKBONES[name]
    with torch.device('meta'):
        network = UNet2DConditionModel(**{**PUBLISHED[name], 'norm_num_groups': 32})
    names = unet.layer_names(network)
    assert len(names) == spec.layers == len(unet.blocks(network))
    assert names[spec.layer] == DENSE.get(name, names[spec.layer])
    cells = spec.side // 8
    height, width = unet.grid(network, spec.layer, (1, 4, cells, cells))
    assert height == width == {'sd1.5': 32, 'sd2.1': 48}.get(name, 64)
    if name == 'sd1.5':  # as in the paper: 64² x2, 32² x2, 16² x2, 8², 16² x3, 32² x3, 64² x3
        sides = [unet.grid(network, layer, (1, 4, 64, 64))[0] for layer in range(16)]
        assert sides == [64, 64, 32, 32, 16, 16, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        assert names[:3] == [f'down-level{level}-repeat{repeat}-vit-block0' for level, repeat in ((0, 0), (0, 1), (1, 0))]
        assert (names[6], names[7], names[15]) == ('mid-vit-block0', 'up-level1-repeat0-vit-block0', 'up-level3-repeat2-vit-block0')
    pooled = {'sdxl': 1280, 'ssd-1b': 1280}.get(name, 0)
    shapes = {'embeds': (1, 77, PUBLISHED[name]['cross_attention_dim']), 'pooled': (1, pooled)}
    assert unet.prompt_shapes(77, network.config) == shapes


@pytest.mark.parametrize(
    ('family', 'scheduler', 'steps', 'step', 'tokens', 'timestep'),
    [
        ('sd1.5', PNDMScheduler(**PNDM), 1000, 101, 4096, 101),
        ('sdxl', EulerDiscreteScheduler(**EULER), 1000, 100, 16384, 100),
        ('pixart-sigma', DPMSolverMultistepScheduler(**DPM), 1000, 100, 4096, 100),
        ('flux', FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), 28, 5, 4096, 407.08),
        ('sd3', FlowMatchEulerDiscreteScheduler(shift=3.0), 28, 8, 4096, 515.07),
    ],
)
def test_times_of_the_published_schedules(family, scheduler, steps, step, tokens, timestep):
    """Those of real pictures in the released code of GoCA and Seg4Diff."""
    spec = BACKBONES[family]
    assert steps == spec.steps or family == 'flux'
    level = family_of(spec).noise_level(scheduler, steps, step, tokens)
    assert level.timestep == pytest.approx(timestep, abs=5e-3)
    if steps == 28:
        assert level.sigma == pytest.approx(timestep / 1000, abs=1e-5)


def test_a_schedule_of_another_length(unets):
    backbone = unets['sd15']
    assert backbone.noise_level(101, 1).timestep == 101 and backbone.noise_level(8, 1, steps=50).timestep == 141


# loading


def test_rows_of_folders(unet_folders, tmp_path):
    """What a folder has no padseg.json for is that of the published models of its kind, with the side that its network states."""
    for kind, folder in unet_folders.items():
        other = pathlib.Path(shutil.copytree(folder, tmp_path / kind))
        (other / 'padseg.json').unlink()
        spec = locate(str(other)).spec
        large = kind in ('sdxl', 'ssd')
        assert (spec.family, spec.side, spec.sequence, spec.steps) == ('unet', 128 if large else 64, 77, 1000)
        assert spec.encoders == ('l+g' if large else 'clip') and spec.layer < spec.layers


@pytest.mark.slow
def test_half_precision_and_shards(unet_folders, unets, tmp_path):
    """Weights of fp16 alone are read; where both are there, the whole precision."""
    folder = tmp_path / 'model'
    read = StableDiffusionPipeline.from_pretrained(unet_folders['sd15'], torch_dtype=torch.float16)
    read.save_pretrained(folder, safe_serialization=True, variant='fp16', max_shard_size='100KB')
    shutil.copy(unet_folders['sd15'] / 'padseg.json', folder)
    weights = [path.name for path in folder.rglob('*.safetensors')]
    assert len(weights) > 3 and all('fp16' in name for name in weights)
    half = load(str(folder), device='cpu', dtype='float16')
    assert half.dtype == half.vae.dtype == half.null_prompt.embeds.dtype == torch.float16
    whole = unets['sd15']
    for name, weight in whole.transformer.state_dict().items():
        assert torch.equal(half.transformer.state_dict()[name], weight.half())
    shutil.copytree(unet_folders['sd15'], folder, dirs_exist_ok=True)
    both = load(str(folder), device='cpu')
    assert torch.equal(both.transformer.conv_in.weight, whole.transformer.conv_in.weight)
    assert both.identity.weights != whole.identity.weights


@pytest.mark.slow
def test_the_vae_that_overflows_runs_in_float32(unet_folders, copied):
    """SDXL's, also in the estimate of memory; not one that was trained not to overflow, whose configuration says so."""
    for kind, folder in unet_folders.items():
        large = kind in ('sdxl', 'ssd')
        source, cpu = locate(str(folder)), torch.device('cpu')
        memory = [reckon_memory(source, cpu, dtype).device for dtype in ('float32', 'float16')]
        vae = sum(map(math.prod, tensors_needed(unet, source, 'vae', 0).values()))
        assert 2 * memory[1] - memory[0] == (4 * vae if large else 0)
    half = load(str(copied), device='cpu', dtype='float16')
    assert (half.dtype, half.vae.dtype) == (torch.float16, torch.float32)
    config = copied / 'vae' / 'config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), 'force_upcast': False}))
    assert load(str(copied), device='cpu', dtype='bfloat16').vae.dtype == torch.bfloat16


def test_only_what_is_read_is_downloaded():
    """Stable Diffusion 1.5's repository holds its weights in eight forms, SDXL's in six; one with half precision alone has that read."""
    read = ['model_index.json', 'scheduler/scheduler_config.json', 'unet/config.json', 'unet/diffusion_pytorch_model.safetensors']
    read += ['vae/config.json', 'vae/diffusion_pytorch_model.fp16.safetensors', 'tokenizer/merges.txt', 'tokenizer/vocab.json']
    read += ['text_encoder/config.json', 'text_encoder/model-00001-of-00002.safetensors', 'text_encoder/model.safetensors.index.json']
    others = ['v1-5-pruned.ckpt', 'unet/diffusion_pytorch_model.bin', 'unet/diffusion_pytorch_model.fp16.safetensors']
    others += [
        'unet/diffusion_pytorch_model.non_ema.safetensors',
        'unet/model.onnx_data',
        'unet/openvino_model.bin',
        'vae_encoder/model.onnx',
    ]
    others += ['text_encoder/model-00001-of-00002.fp16.safetensors', 'text_encoder/pytorch_model.bin', 'text_encoder/flax_model.msgpack']
    assert sorted(files_to_fetch([*others, *read])) == sorted(read)


def test_names_of_tensors_from_before_they_were_renamed(unet_folders, unets, tmp_path, picture):
    """Stable Diffusion's published VAEs."""
    folder = pathlib.Path(shutil.copytree(unet_folders['sd15'], tmp_path / 'model'))
    path = folder / 'vae' / 'diffusion_pytorch_model.safetensors'
    tensors = {}
    for name, tensor in load_file(path).items():
        former = next((name.replace(new, old) for new, old in FORMER.items() if f'attentions.0.{new}.' in name), name)
        tensors[former] = tensor
    assert sum('proj_attn' in name or '.query.' in name for name in tensors) == 8
    save_file(tensors, path, {'format': 'pt'})
    renamed = load(str(folder), device='cpu', whole=True)
    for name, weight in unets['sd15'].vae.state_dict().items():
        assert torch.equal(renamed.vae.state_dict()[name], weight)


def test_the_small_vae_is_that_of_the_latents(unet_folders, pixart_folders):
    """Models of a family have one of two VAEs, whose latents are scaled differently."""
    found = {kind: small_vae(locate(str(folder))) for kind, folder in {**unet_folders, **pixart_folders}.items()}
    small, large = (getattr(LAYOUTS['unet'], name) for name in ('small_vae', 'large_vae'))
    assert found == {'sd15': small, 'sd21': small, 'sdxl': large, 'ssd': large, 'sigma': large, 'alpha': small}


def test_methods_for_other_models_refuse_it_by_name(unets, unet_folders, picture, tmp_path, capsys):
    with pytest.raises(UsageError, match='^seg4diff does not support .* of the family unet; supported: .*flux, flux2, sd3'):
        segment(picture, unets['sd15'])
    with pytest.raises(UsageError, match='^open-vocabulary does not support .* of the family unet; supported: .*flux, flux2, sd3'):
        label(picture, unets['sdxl'], ['cat'])
    for model in ('sd1.4', 'pixart-sigma'):  # before anything is downloaded
        with pytest.raises(UsageError, match=f'^seg4diff does not support {model} of the family'):
            open_backbone(METHODS['seg4diff'], METHODS['seg4diff'].Options(), model)
    with pytest.raises(
        UsageError, match='diffseg does not support tiny of the family sd3; supported: unet, such as --model sd1.4, as in its'
    ):
        open_backbone(METHODS['diffseg'], METHODS['diffseg'].Options(), 'tiny')
    for folder, pixels in (('pictures', picture), ('labels', picture[..., 0] // 100)):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / 'a.png')
    paths = ['--dir', str(tmp_path / 'pictures'), '--labels', str(tmp_path / 'labels'), '--out', str(tmp_path / 'out')]
    assert main(['analyze', *paths, '--model', str(unet_folders['sd15'])]) == 2
    assert 'analyze does not support' in capsys.readouterr().err and not (tmp_path / 'out').exists()


def test_named_rows():
    for name in ('sd1.4', 'sd1.5', 'sd2.1', 'sdxl', 'ssd-1b', 'pixart-sigma'):
        spec = BACKBONES[name]
        assert spec.layer < spec.layers and not CARDS[name].gated and spec.family in ('unet', 'pixart')


PARTS = ['unet', 'vae', 'scheduler', 'text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2']


def refusals(folder: pathlib.Path) -> str:
    """What loading says, and doctor beforehand."""
    with pytest.raises(ModelUnavailable) as caught:
        load(str(folder), device='cpu')
    state, source = model_state(str(folder))
    assert source is None and not state.usable and state.message == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('part', PARTS)
def test_a_missing_part_is_named(copied, part, tmp_path, monkeypatch):
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path / 'cache'))
    shutil.rmtree(copied / part)
    message = refusals(copied)
    assert part in message
    if part != 'unet':
        assert f'{copied} is incomplete: no file named ' in message and f' in {part}' in message


def test_what_is_damaged_is_named(copied, tmp_path, monkeypatch):
    monkeypatch.setenv('PADSEG_CACHE', str(tmp_path / 'cache'))
    assert model_state(str(copied))[0].usable
    path = copied / 'unet' / 'diffusion_pytorch_model.safetensors'
    whole = load_file(path)
    last = 'up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_k.weight'
    save_file({name: tensor for name, tensor in whole.items() if name != last}, path, {'format': 'pt'})
    assert f'unet of {copied} is incomplete' in (message := refusals(copied)) and f'lack 1 tensors, {last} first' in message
    save_file({name: tensor for name, tensor in whole.items() if 'attn2' not in name}, path, {'format': 'pt'})
    assert 'attends to no text' in refusals(copied)
    path.write_bytes(b'nothing')
    assert f'{path} is damaged' in refusals(copied)
    save_file(whole, path, {'format': 'pt'})
    config = copied / 'unet' / 'config.json'
    values = json.loads(config.read_text())
    for name, value in {'class_embed_type': 'timestep', 'addition_embed_type': 'image_hint', 'time_cond_proj_dim': 8}.items():
        config.write_text(json.dumps({**values, name: value}))
        assert f'{config}: {name} is {value}, an input that padseg does not give' in refusals(copied)
    config.write_text(json.dumps({**values, 'layers_per_block': 100, 'transformer_layers_per_block': [100, 100, 100]}))
    assert 'describes more transformer blocks than the 28 that the weights' in refusals(copied)  # and builds none of them
    config.write_text(json.dumps({**values, '_class_name': 'UNet2DModel'}))
    assert 'describes a UNet2DModel; known: SD3Transformer2DModel, FluxTransformer2DModel, Flux2Tra' in refusals(copied)


def test_a_schedule_without_a_limit(copied):
    """diffusers writes -Infinity for it, which is no JSON; it is read in schedules alone."""
    path = copied / 'scheduler' / 'scheduler_config.json'
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, 'lambda_min_clipped': float('-inf')}))
    assert load(str(copied), device='cpu').noise_level(100, 1).timestep == 100
    path.write_text(json.dumps({**values, 'beta_start': float('-inf')}))
    assert 'scheduler' in refusals(copied)
    path.write_text(json.dumps({**values, 'beta_start': float('inf')}))
    assert 'Infinity is not a JSON number' in refusals(copied)


def test_identity_covers_all_files(copied):
    fields = {'unet': 'weights', 'vae': 'weights', 'scheduler': 'scheduler'}
    for path, changed in changed_by_files(copied):
        assert changed == {fields.get(path.parent.name, 'text_encoders')}, path
