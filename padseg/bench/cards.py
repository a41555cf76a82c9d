"""Which graphics cards have room for the maps of each model, reckoned from published shapes without weights: bin/bench cards."""

from __future__ import annotations

import json
from typing import Any

import click
import torch

from padseg.backbones import family_of
from padseg.backbones.fits import FORMS, MEMORY, Need, needs
from padseg.backbones.parts import cut_model
from padseg.backbones.spec import BACKBONES
from padseg.bench.sizes import SHAPES


@click.command('cards')
@click.option('--side', type=click.IntRange(min=64), default=1024, show_default=True, help='of the picture, in pixels')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object')
def command(side: int, as_json: bool) -> None:
    """Reckon the memory that maps up to the expert block need for one picture, with each form of weights, and the smallest card for it."""
    found = {name: needs_of(name, side) for name in SHAPES}
    if as_json:
        print(
            json.dumps(
                {name: {form: {**need._asdict(), 'card': need.card} for form, need in forms.items()} for name, forms in found.items()}
            )
        )
        return
    print(f'{"":16}' + ''.join(f'{form:>20}' for form in FORMS))
    for name, forms in found.items():
        print(f'{name:16}' + ''.join(f'{in_words(need):>20}' for need in forms.values()))


def needs_of(name: str, side: int) -> dict[str, Need]:
    """What a named model needs, built without memory, by form of the weights."""
    import diffusers

    shape, spec = SHAPES[name], BACKBONES[name]
    family = family_of(spec)
    with torch.device('meta'):
        network: Any = getattr(diffusers, family.LAYOUT.network)(**shape.transformer)
        vae: Any = getattr(diffusers, family.LAYOUT.vae)(**shape.vae)
    cut_model(family, network, family.LAYOUT.denoiser, spec.layer)
    cut_model(family, vae, 'vae', spec.layer)
    exact = family.needs_exact_vae(shape.transformer)
    return needs(family, network, vae, side, spec.sequence, lambda dtype: torch.float32 if exact else dtype)


def in_words(need: Need) -> str:
    """GiB, and the smallest card."""
    return f'{need.total / 2**30:.1f} GiB, {need.card or f"> {MEMORY[-1]}"}'
