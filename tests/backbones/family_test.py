"""A family of another kind, written here: a UNet with one text encoder, DDPM noise and no way to read it in part."""

from __future__ import annotations

import pathlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from padseg.backbones import flux, sd3
from padseg.backbones.family import Dimensions, Family
from padseg.backbones.layout import LAYOUTS, FamilyLayout, all_main, denoiser_in
from padseg.backbones.loading import check_loadable, load_family
from padseg.backbones.noise import ddpm_level, scheduled
from padseg.backbones.parts import clip_tokenizer, read_text_encoders, tensors_needed
from padseg.backbones.recorder import requests_of, watch
from padseg.backbones.source import Source, check_files, no_layout, text_files, text_parts
from padseg.backbones.spec import Spec
from padseg.errors import ModelUnavailable, UsageError
from padseg.methods.seg4diff import Options
from padseg.methods.stages.latents import content_noise, encode, encode_pixels
from padseg.methods.stages.token_maps import latent_token_maps
from padseg.train import tiny_model as tiny

WORDS = ['a', 'cat', 'dog']
SLOTS, WIDTH, LAYERS = 77, 16, 5  # blocks of transformers: two going down, one in the middle, two going up at full size
LAYOUT = FamilyLayout(
    denoiser='unet',
    network='UNet2DConditionModel',
    vae='AutoencoderKL',
    schedulers=('PNDMScheduler', 'EulerDiscreteScheduler'),
    text_encoders={'text_encoder': 'CLIPTextModel'},
    tokenizers=('tokenizer',),
    small_vae='madebyollin/taesd',
)


def blocks(unet: Any) -> list[Any]:
    """In the order in which they run, unlike that of the module's children."""
    levels = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    attentions = [attention for level in levels for attention in getattr(level, 'attentions', ())]
    return [block for attention in attentions for block in attention.transformer_blocks]


def compute_null_prompt(source: Source, unet: Any, slots: int) -> dict[str, torch.Tensor]:
    text_files(source)
    check_files(source, text_parts(source))
    parts = tokenizers(source) | read_text_encoders(source, torch.float32)
    tokens = parts['tokenizer']('', padding='max_length', max_length=slots, return_tensors='pt').input_ids
    with torch.no_grad():
        return {'embeds': parts['text_encoder'](tokens)[0].contiguous(), 'pooled': torch.zeros(1, 1)}


def tokenizers(source: Source) -> dict[str, Any]:
    return {'tokenizer': clip_tokenizer(source, 'tokenizer', source.spec.sequence)}


def denoise(unet: Any, z: torch.Tensor, timestep: float, prompt: Any) -> torch.Tensor:
    return unet(z.to(unet.dtype), timestep, prompt.embeds.expand(len(z), -1, -1), return_dict=False)[0]


@pytest.fixture(scope='module')
def family() -> Family:
    module: Any = ModuleType('unet')
    module.LAYOUT, module.TEXT_DTYPE, module.cut = LAYOUT, torch.float32, None
    module.size = lambda config: Dimensions(config.in_channels, 1, 64)
    module.blocks, module.tokenizers, module.denoise = blocks, tokenizers, denoise
    module.noise_level = lambda scheduler, steps, step, _: ddpm_level(scheduled(scheduler, num_inference_steps=steps), step)
    module.prompt_shapes = lambda slots, config: {'embeds': (1, slots, config.cross_attention_dim), 'pooled': (1, 1)}
    module.compute_null_prompt = compute_null_prompt
    module.null_names = lambda slots: [f'<pad {number}>' for number in range(slots)]
    module.attention_module = lambda unet, layer: blocks(unet)[layer].attn2
    module.text_columns = lambda picked, _: list(picked)
    module.first_image_token = lambda _: 0
    return module


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Source:
    """A model of this family as diffusers' own pipeline writes it."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizers(WORDS)[0]
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp('unet') / 'model'
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return Source(Spec(repo=str(folder), family='unet', layers=LAYERS, layer=0, steps=50, side=32), str(folder), folder, None)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(LAYOUTS, 'unet', LAYOUT)


def test_the_files_of_all_families_are_looked_for(source, sd3_folder, tmp_path):
    assert all_main() == ['transformer', 'vae', 'scheduler', 'unet']
    assert denoiser_in(source.folder) == 'unet' and denoiser_in(sd3_folder) == denoiser_in(tmp_path) == 'transformer'
    assert 'transformer/config.json or unet/config.json is missing' in str(no_layout('org/model'))


def test_classes_are_those_that_the_models_say():
    """The table of names, which imports nothing, against what the families' modules work with."""
    for module in (sd3, flux):
        assert module.LAYOUT.network in dir(module)


@pytest.mark.parametrize('whole', [False, True])
def test_it_is_loaded_whole_without_a_cut_of_its_own(family, source, whole):
    """Every tensor of the denoising network; of the VAE the encoder, unless all is wanted."""
    check_loadable(family, source, whole)
    backbone = load_family(family, source, 'cpu', whole=whole)
    names = {part: set(load_file(source.folder / part / 'diffusion_pytorch_model.safetensors')) for part in LAYOUT.networks}
    encoder = {name for name in names['vae'] if not name.startswith(('decoder', 'post_quant'))}
    assert set(backbone.transformer.state_dict()) == names['unet']
    assert set(backbone.vae.state_dict()) == (names['vae'] if whole else encoder)
    assert set(tensors_needed(family, source, 'vae', None if whole else 0)) == (names['vae'] if whole else encoder)
    assert (backbone.layers, backbone.whole, backbone.multiple) == (LAYERS, True, 2)
    assert isinstance(backbone.scheduler, PNDMScheduler)
    backbone.attention_module(LAYERS - 1, ('values', 'output'))
    with pytest.raises(UsageError, match=r'layer is one of 0\.\.4; got 5'):
        load_family(family, source, 'cpu', layer=LAYERS, whole=whole)


def test_what_is_wrong_is_told_for_parts_and_wholes_alike(family, source, sd3_folder, tmp_path):
    folder = pathlib.Path(tmp_path / 'model')
    for part in source.folder.rglob('*'):
        if part.is_file():
            (folder / part.relative_to(source.folder)).parent.mkdir(parents=True, exist_ok=True)
            (folder / part.relative_to(source.folder)).write_bytes(part.read_bytes())
    other = source._replace(folder=folder, model=str(folder))
    path = folder / 'unet' / 'diffusion_pytorch_model.safetensors'
    save_file({name: tensor for name, tensor in load_file(path).items() if name != 'conv_out.bias'}, path, {'format': 'pt'})
    for whole in (False, True):
        for check in (check_loadable, lambda *given: load_family(*given[:2], 'cpu', whole=given[2])):
            with pytest.raises(ModelUnavailable, match=r'unet of .* is incomplete: .* lack 1 tensors, conv_out\.bias first'):
                check(family, other, whole)
    save_file(load_file(source.folder / path.relative_to(folder)), path, {'format': 'pt'})
    DDIMScheduler().save_pretrained(folder / 'scheduler')
    for check in (check_loadable, load_family):
        with pytest.raises(ModelUnavailable, match='is a DDIMScheduler; known: PNDMScheduler, EulerDiscreteScheduler'):
            check(family, other)


def test_a_model_that_is_wanted_whole_is_checked_whole(sd3_folder, tmp_path):
    """A block after the expert's may be missing for its maps, not for all that `whole` reads."""
    from shutil import copytree

    from padseg.backbones.availability import model_state, reckon_memory

    folder = copytree(sd3_folder, tmp_path / 'model')
    _, whole = model_state(str(folder), whole=True)
    assert whole is not None
    networks = [load_file(folder / part / 'diffusion_pytorch_model.safetensors') for part in ('transformer', 'vae')]
    size = sum(4 * tensor.numel() for network in networks for tensor in network.values())
    cpu = torch.device('cpu')
    assert reckon_memory(whole, cpu, 'float32', whole=True).device == size > reckon_memory(whole, cpu, 'float32').device
    path = folder / 'transformer' / 'diffusion_pytorch_model.safetensors'
    save_file({name: tensor for name, tensor in networks[0].items() if not name.startswith('proj_out')}, path, {'format': 'pt'})
    assert model_state(str(folder))[0].usable
    state, here = model_state(str(folder), whole=True)
    assert not state.usable and here is None and 'lack 2 tensors, proj_out.bias first' in state.message


def test_stages_of_methods_work_with_it(family, source, picture):
    """Noise by DDPM and maps of its cross-attention, whose keys are the text alone, beside the softmax by hand."""
    backbone = load_family(family, source, 'cpu')
    options = Options(geometry='stretch', side=32, step=8, layer=0).resolve(backbone.spec)
    latent = encode(picture, backbone, options)
    pixels = torch.nn.functional.interpolate(torch.zeros(1, 3, 4, 4), (32, 32))
    shape = encode_pixels(pixels, backbone).shape
    level = backbone.noise_level(8, 256)
    assert (latent.sigma, latent.timestep) == (level.sigma, 141.0)  # 1, 21, 41, ... of 50 steps
    quiet = encode(picture, backbone, Options(geometry='stretch', side=32, step=1, layer=0).resolve(backbone.spec))
    noise, low = content_noise(picture, 0, shape), backbone.noise_level(1, 256)
    clean = (quiet.z - low.sigma * noise) / low.signal
    torch.testing.assert_close(latent.z, level.signal * clean + level.sigma * noise, atol=1e-5, rtol=0)

    (maps,) = latent_token_maps([latent], backbone, options)
    noted: dict[str, torch.Tensor] = {}
    attention = blocks(backbone.transformer)[0].attn2
    handles = [
        getattr(attention, name).register_forward_hook(lambda _, __, out, name=name: noted.update({name: out})) for name in ('to_q', 'to_k')
    ]
    with torch.no_grad():
        backbone.denoise(latent.z, latent.timestep, backbone.null_prompt)
    for handle in handles:
        handle.remove()
    query, key = (noted[name][0].unflatten(-1, (attention.heads, -1)).transpose(0, 1) for name in ('to_q', 'to_k'))
    expected = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1).mean(0)  # (256, 77)
    assert expected.shape == (256, SLOTS)
    torch.testing.assert_close(maps.maps, expected.T.unflatten(1, (16, 16)), atol=1e-6, rtol=1e-4)
    assert np.ptp(maps.maps.numpy(), axis=(1, 2)).max() > 1e-6 and maps.names == backbone.null_prompt.names


def test_layers_are_watched_in_any_order(family, source):
    """The forward stops after the last of them to run, which is not the last of the module's children."""
    backbone = load_family(family, source, 'cpu')
    z = torch.randn((2, 4, 16, 24), generator=torch.Generator().manual_seed(0))
    after = []
    handle = backbone.transformer.up_blocks[0].register_forward_hook(lambda *_: after.append(1))
    with torch.no_grad(), watch(requests_of(backbone, [2, 0, 1], lambda seen: seen.query.shape, ('output',))) as kept:
        backbone.denoise(z, 100.0, backbone.null_prompt)
    handle.remove()
    assert [kept[layer][2] for layer in range(3)] == [16 * 24, 8 * 12, 8 * 12] and not after
