"""What is the same for all families: where their files are, what is loaded of them, and what methods' stages do with them."""

from __future__ import annotations

import pathlib

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler
from safetensors.torch import load_file, save_file

from padseg.backbones import family_of, unet
from padseg.backbones.family import Family
from padseg.backbones.layout import FAMILIES, LAYOUTS, all_main, denoiser_in
from padseg.backbones.loading import check_loadable, load_family
from padseg.backbones.parts import tensors_needed
from padseg.backbones.recorder import Request, requests_of, watch
from padseg.backbones.source import Source, locate, no_layout
from padseg.backbones.spec import BACKBONES, CARDS, Spec
from padseg.errors import ModelUnavailable, UsageError
from padseg.methods.seg4diff import Options
from padseg.methods.stages.latents import content_noise, encode, encode_pixels
from padseg.methods.stages.token_maps import latent_token_maps

LAYERS = 16


@pytest.fixture(scope='module')
def family() -> Family:
    return unet


@pytest.fixture(scope='module')
def source(unet_folders) -> Source:
    return locate(str(unet_folders['sd15']))


def test_the_files_of_all_families_are_looked_for(source, sd3_folder, tmp_path):
    assert all_main() == ['transformer', 'vae', 'scheduler', 'unet']
    assert denoiser_in(source.folder) == 'unet' and denoiser_in(sd3_folder) == denoiser_in(tmp_path) == 'transformer'
    assert 'transformer/config.json or unet/config.json is missing' in str(no_layout('org/model'))


def test_classes_are_those_that_the_models_say():
    """The tables of names, which import nothing, against the libraries and what the families' modules work with."""
    import transformers

    for name, layout in LAYOUTS.items():
        module = family_of(Spec(repo='', family=name))
        assert module.LAYOUT is layout and FAMILIES[layout.network] == name
        assert layout.network in dir(module)
        for kind in (layout.network, layout.vae, *layout.schedulers):
            assert hasattr(diffusers, kind)
        for kind in (*layout.text_encoders.values(), *layout.second_encoders.values()):
            assert hasattr(transformers, kind)
    assert BACKBONES.keys() == CARDS.keys() and {spec.family for spec in BACKBONES.values()} == LAYOUTS.keys()


@pytest.mark.parametrize('whole', [False, True])
def test_it_is_loaded_whole_without_a_cut_of_its_own(family, source, whole):
    """Every tensor of the denoising network; of the VAE the encoder, unless all is wanted."""
    check_loadable(family, source, whole)
    backbone = load_family(family, source, 'cpu', whole=whole)
    names = {part: set(load_file(source.folder / part / 'diffusion_pytorch_model.safetensors')) for part in ('unet', 'vae')}
    encoder = {name for name in names['vae'] if not name.startswith(('decoder', 'post_quant'))}
    assert set(backbone.transformer.state_dict()) == names['unet']
    assert set(backbone.vae.state_dict()) == (names['vae'] if whole else encoder)
    assert set(tensors_needed(family, source, 'vae', None if whole else 0)) == (names['vae'] if whole else encoder)
    assert (backbone.layers, backbone.whole, backbone.multiple) == (LAYERS, True, 2)
    assert isinstance(backbone.scheduler, PNDMScheduler)
    backbone.attention_module(LAYERS - 1, ('values', 'output'))
    with pytest.raises(UsageError, match=r'layer is one of 0\.\.15; got 16'):
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
    DDPMScheduler().save_pretrained(folder / 'scheduler')
    for check in (check_loadable, load_family):
        with pytest.raises(ModelUnavailable, match='is a DDPMScheduler; known: PNDMScheduler, DDIMScheduler, Euler'):
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
    assert (latent.sigma, latent.timestep) == (level.sigma, 8.0)
    quiet = encode(picture, backbone, Options(geometry='stretch', side=32, step=1, layer=0).resolve(backbone.spec))
    noise, low = content_noise(picture, 0, shape), backbone.noise_level(1, 256)
    clean = (quiet.z - low.sigma * noise) / low.signal
    torch.testing.assert_close(latent.z, level.signal * clean + level.sigma * noise, atol=1e-5, rtol=0)

    (maps,) = latent_token_maps([latent], backbone, options)
    noted: dict[str, torch.Tensor] = {}
    attention = unet.blocks(backbone.transformer)[0].attn2
    handles = [
        getattr(attention, name).register_forward_hook(lambda _, __, out, name=name: noted.update({name: out})) for name in ('to_q', 'to_k')
    ]
    with torch.no_grad():
        backbone.denoise(latent.z, latent.timestep, backbone.null_prompt)
    for handle in handles:
        handle.remove()
    query, key = (noted[name][0].unflatten(-1, (attention.heads, -1)).transpose(0, 1) for name in ('to_q', 'to_k'))
    expected = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1).mean(0)  # (256, 77)
    assert expected.shape == (256, 77)
    torch.testing.assert_close(maps.maps, expected.T.unflatten(1, (16, 16)), atol=1e-6, rtol=1e-4)
    assert np.ptp(maps.maps.numpy(), axis=(1, 2)).max() > 1e-6 and maps.names == backbone.null_prompt.names


def test_layers_are_watched_in_any_order(family, source):
    """The forward stops after the last of them to run, which is not the last of the module's children."""
    backbone = load_family(family, source, 'cpu')
    z = torch.randn((2, 4, 16, 24), generator=torch.Generator().manual_seed(0))
    after = []
    handle = backbone.transformer.up_blocks[0].register_forward_hook(lambda *_: after.append(1))
    with torch.no_grad(), watch(requests_of(backbone, [6, 0, 2], lambda seen: seen.query.shape, ('output',))) as kept:
        backbone.denoise(z, 100.0, backbone.null_prompt)
    handle.remove()
    assert [kept[layer][2] for layer in (0, 2, 6)] == [16 * 24, 8 * 12, 2 * 3] and not after


MODELS = ['sd3', 'flux', 'flux2', 'sd15', 'sd21', 'sdxl', 'ssd', 'sigma', 'alpha']


@pytest.fixture(scope='module')
def backbones(backbone, flux, flux2, unets, pixarts):
    return {'sd3': backbone, 'flux': flux, 'flux2': flux2, **unets, **pixarts}


@pytest.mark.parametrize('name', MODELS)
def test_every_layer_has_a_name_a_grid_and_a_projection(backbones, name):
    """For pictures that are wider than high: tokens of a grid, queries of images by keys of text and of images, output by projection."""
    backbone = backbones[name]
    channels = backbone.family.size(backbone.transformer.config).channels
    z = torch.randn((1, channels, 10, 14), generator=torch.Generator().manual_seed(0))
    names = backbone.layer_names()
    assert len(names) == len(set(names)) == backbone.layers == backbone.spec.layers
    prompt = backbone.null_prompt
    text = prompt.embeds.shape[1]
    modules = [(backbone.attention_module(layer), backbone.self_attention_module(layer)) for layer in range(len(names))]
    projected: dict[int, torch.Tensor] = {}
    handles = []
    for layer, (attention, _) in enumerate(modules):
        if isinstance(getattr(attention, 'to_out', None), torch.nn.ModuleList):
            hook = attention.to_out[0].register_forward_hook(lambda _, __, out, layer=layer: projected.update({layer: out}))
            handles.append(hook)
    requests = requests_of(backbone, range(len(names)), lambda seen: seen, ('queries', 'keys', 'output'))
    with torch.no_grad(), watch(requests, stop=False) as kept:
        backbone.denoise(z, 100.0, prompt)
    for handle in handles:
        handle.remove()
    for layer, (attention, inner) in enumerate(modules):
        h, w = backbone.grid(layer, z.shape)
        seen, joint = kept[layer], attention is inner
        first = backbone.first_image_token(prompt)
        assert seen.query.shape[2] == h * w + (text if joint else 0) and seen.key.shape[2] == text + (h * w if joint else 0)
        assert backbone.text_columns(prompt, h * w)[0] == (h * w if name == 'sd3' else 0)
        weight, bias = backbone.output_projection(layer)
        mixed = seen.output.transpose(1, 2).flatten(2)[:, first : first + h * w]
        assert weight.shape == (mixed.shape[2], mixed.shape[2])
        if layer in projected:
            found = mixed @ weight.T + (0 if bias is None else bias)
            torch.testing.assert_close(found, projected[layer][:, -h * w :], atol=1e-5, rtol=1e-5)
        else:  # a single block of Flux, whose attention shares a projection with its MLP
            assert name in ('flux', 'flux2') and layer >= 2 and bias is None
            block = backbone.family.blocks(backbone.transformer)[layer]
            shared = block.proj_out if name == 'flux' else block.attn.to_out
            assert torch.equal(weight, shared.weight[:, : mixed.shape[2]])


@pytest.mark.parametrize('name', MODELS)
def test_recording_changes_no_bit(backbones, name):
    """Both attentions of every layer are recorded, once each; a picture of a batch gets what it gets alone."""
    backbone = backbones[name]
    channels = backbone.family.size(backbone.transformer.config).channels
    z = torch.randn((2, channels, 8, 12), generator=torch.Generator().manual_seed(1))
    modules = dict.fromkeys(
        module for layer in range(backbone.layers) for module in (backbone.attention_module(layer), backbone.self_attention_module(layer))
    )
    calls = []
    requests = {number: Request(module, lambda seen, number=number: calls.append(number)) for number, module in enumerate(modules)}
    with torch.no_grad():
        plain = backbone.denoise(z, 100.0, backbone.null_prompt)
        with watch(requests, stop=False):
            recorded = backbone.denoise(z, 100.0, backbone.null_prompt)
        alone = backbone.denoise(z[1:], 100.0, backbone.null_prompt)
    assert plain.shape == z.shape and torch.equal(plain, recorded) and plain.isfinite().all()
    assert sorted(calls) == list(range(len(modules)))
    torch.testing.assert_close(alone, plain[1:], atol=1e-4, rtol=1e-4)


def test_only_a_distilled_model_minds_guidance(backbones):
    for name, backbone in backbones.items():
        z = torch.randn((1, backbone.family.size(backbone.transformer.config).channels, 8, 8), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            plain, own, other = (backbone.denoise(z, 100.0, backbone.null_prompt, guidance) for guidance in (None, 3.5, 1.0))
        assert torch.equal(plain, own) and torch.equal(plain, other) == (name != 'flux')
