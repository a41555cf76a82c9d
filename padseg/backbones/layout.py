"""How a model of each family lies in its folder: its parts, and the classes that read them. Names alone: nothing heavy is imported."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import NamedTuple


class FamilyLayout(NamedTuple):
    """Folders in diffusers' layout with the names of their classes, as `model_index.json` has them.

    denoiser: the folder of the network that denoises; network: its class; schedulers: those that it may come with, the first one where
    the configuration names none; text_encoders, tokenizers: what every text goes through; small_vae: another VAE for its latents, on the
    hub, in the layout of AutoencoderTiny.
    """

    denoiser: str
    network: str
    vae: str
    schedulers: tuple[str, ...]
    text_encoders: Mapping[str, str]
    tokenizers: tuple[str, ...]
    small_vae: str

    @property
    def networks(self) -> tuple[str, ...]:
        """The parts with weights that work on every picture."""
        return (self.denoiser, 'vae')

    @property
    def main(self) -> tuple[str, ...]:
        return (*self.networks, 'scheduler')

    @property
    def text(self) -> tuple[str, ...]:
        return (*self.text_encoders, *self.tokenizers)


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
}


def all_main() -> list[str]:
    """The main parts of models of any family: which family it is shows only when they are here."""
    return list(dict.fromkeys(part for layout in LAYOUTS.values() for part in layout.main))


def all_text() -> list[str]:
    return list(dict.fromkeys(part for layout in LAYOUTS.values() for part in layout.text))


def denoisers() -> list[str]:
    return list(dict.fromkeys(layout.denoiser for layout in LAYOUTS.values()))


def denoiser_in(folder: pathlib.Path) -> str:
    """The part of a model of any family that denoises: the one whose configuration is in the folder, by default the first."""
    return next((name for name in denoisers() if (folder / name / 'config.json').is_file()), denoisers()[0])


def config_name(part: str) -> str:
    """The configuration of a part."""
    if part.startswith('tokenizer'):
        return 'tokenizer_config.json'
    return 'scheduler_config.json' if part == 'scheduler' else 'config.json'


def weights_name(part: str) -> str | None:
    """The weights of a part without their suffix, since a large model's are several files; '.' is a VAE that comes by itself."""
    if part.startswith('tokenizer') or part == 'scheduler':
        return None
    return 'model' if part.startswith('text_encoder') else 'diffusion_pytorch_model'
