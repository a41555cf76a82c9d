"""The parts in each family's model folder and the classes that read them. Names only, so that nothing heavy is imported."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple


class FamilyLayout(NamedTuple):
    """Folders in diffusers' layout and their class names, as in `model_index.json`.

    denoiser: folder of the denoising network; network: its class; schedulers: the ones a model may come with, the first being the default
    if the configuration names none; text_encoders, tokenizers: the ones that every text goes through; small_vae: hub id of another VAE for
    the same latents, in AutoencoderTiny's layout, or '' without one. The second ones are of models whose network takes added text
    embeddings; large_vae: the small VAE for latents scaled as SDXL's.
    """

    denoiser: str
    network: str
    vae: str
    schedulers: tuple[str, ...]
    text_encoders: Mapping[str, str]
    tokenizers: tuple[str, ...]
    small_vae: str
    second_encoders: Mapping[str, str] = {}
    second_tokenizers: tuple[str, ...] = ()
    large_vae: str = ''

    @property
    def networks(self) -> tuple[str, ...]:
        """The parts with weights that process every picture."""
        return (self.denoiser, 'vae')

    @property
    def main(self) -> tuple[str, ...]:
        return (*self.networks, 'scheduler')

    @property
    def text(self) -> tuple[str, ...]:
        return (*self.text_encoders, *self.second_encoders, *self.tokenizers, *self.second_tokenizers)


LAYOUTS: dict[str, FamilyLayout] = {
    'sd3': FamilyLayout(
        denoiser='transformer',
        network='SD3Transformer2DModel',
        vae='AutoencoderKL',
        schedulers=('FlowMatchEulerDiscreteScheduler',),
        text_encoders={'text_encoder': 'CLIPTextModelWithProjection', 'text_encoder_2': 'CLIPTextModelWithProjection'},
        tokenizers=('tokenizer', 'tokenizer_2'),
        small_vae='madebyollin/taesd3',
    ),
    'flux': FamilyLayout(
        denoiser='transformer',
        network='FluxTransformer2DModel',
        vae='AutoencoderKL',
        schedulers=('FlowMatchEulerDiscreteScheduler',),
        text_encoders={'text_encoder': 'CLIPTextModel', 'text_encoder_2': 'T5EncoderModel'},
        tokenizers=('tokenizer', 'tokenizer_2'),
        small_vae='madebyollin/taef1',
    ),
    'flux2': FamilyLayout(
        denoiser='transformer',
        network='Flux2Transformer2DModel',
        vae='AutoencoderKLFlux2',
        schedulers=('FlowMatchEulerDiscreteScheduler',),
        text_encoders={'text_encoder': 'Qwen3ForCausalLM'},
        tokenizers=('tokenizer',),
        small_vae='',
    ),
    'unet': FamilyLayout(
        denoiser='unet',
        network='UNet2DConditionModel',
        vae='AutoencoderKL',
        schedulers=(
            'PNDMScheduler',
            'DDIMScheduler',
            'EulerDiscreteScheduler',
            'EulerAncestralDiscreteScheduler',
            'DPMSolverMultistepScheduler',
        ),
        text_encoders={'text_encoder': 'CLIPTextModel'},
        tokenizers=('tokenizer',),
        small_vae='madebyollin/taesd',
        second_encoders={'text_encoder_2': 'CLIPTextModelWithProjection'},
        second_tokenizers=('tokenizer_2',),
        large_vae='madebyollin/taesdxl',
    ),
    'pixart': FamilyLayout(
        denoiser='transformer',
        network='PixArtTransformer2DModel',
        vae='AutoencoderKL',
        schedulers=('DPMSolverMultistepScheduler',),
        text_encoders={'text_encoder': 'T5EncoderModel'},
        tokenizers=('tokenizer',),
        small_vae='madebyollin/taesd',
        large_vae='madebyollin/taesdxl',
    ),
}
FAMILIES = {layout.network: family for family, layout in LAYOUTS.items()}  # by diffusers' class of the denoising network


def all_main() -> list[str]:
    """The main parts of models of any family, for when the family is not known before the download."""
    return list(dict.fromkeys(part for layout in LAYOUTS.values() for part in layout.main))


def all_text() -> list[str]:
    return list(dict.fromkeys(part for layout in LAYOUTS.values() for part in layout.text))


def denoisers() -> list[str]:
    return list(dict.fromkeys(layout.denoiser for layout in LAYOUTS.values()))


def denoiser_in(folder: pathlib.Path) -> str:
    """Name of the denoiser's folder in a model of any family: the one that holds a configuration, by default the first."""
    return next((name for name in denoisers() if (folder / name / 'config.json').is_file()), denoisers()[0])


def network_class(config: Mapping[str, Any], default: str) -> str:
    """The class that a configuration names, by today's name: PixArt's published ones have that of a class which is now several."""
    name = str(config.get('_class_name', default))
    return 'PixArtTransformer2DModel' if name == 'Transformer2DModel' and config.get('norm_type') == 'ada_norm_single' else name


def config_name(part: str) -> str:
    """File name of a part's configuration."""
    if part.startswith('tokenizer'):
        return 'tokenizer_config.json'
    return 'scheduler_config.json' if part == 'scheduler' else 'config.json'


def weights_name(part: str) -> str | None:
    """File name of a part's weights without suffix, because large models split them into several files; '.' is a standalone VAE."""
    if part.startswith('tokenizer') or part == 'scheduler':
        return None
    return 'model' if part.startswith('text_encoder') else 'diffusion_pytorch_model'
