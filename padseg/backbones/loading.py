"""Load a model of any family, and check beforehand whether it would load."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch

from padseg.backbones import Backbone, Identity
from padseg.backbones.compiled import compile_blocks
from padseg.backbones.cpu_encoder import speed_up
from padseg.backbones.family import Family
from padseg.backbones.lora import Lora, checked_scale, merge_lora, read_lora
from padseg.backbones.lora_file import locate_lora, lora_hash
from padseg.backbones.null_prompt import encoders_hash, null_prompt, prompt_is_cached
from padseg.backbones.parts import (
    choose_device,
    choose_dtype,
    encoder_values,
    filled_part,
    linear_layers,
    outlined,
    read_scheduler,
    vae_dtype,
    weights_hash,
)
from padseg.backbones.source import Source, check_files, content_hash, part_files, text_encoders, text_parts, weight_files
from padseg.errors import UsageError


def load_family(
    family: Family,
    source: Source,
    device: str | None = None,
    dtype: str | None = None,
    layer: int | None = None,
    whole: bool = False,
    vae: Source | None = None,
    compile: bool = False,
    lora: str | None = None,
    lora_scale: float = 1.0,
    quantize: str | None = None,
) -> Backbone:
    """Load the parts of transformer and VAE that token maps up to `layer` need (by default the expert block), or all of both if `whole`.

    Also loads the null prompt; text encoders are read only if it is not cached. vae: a standalone VAE to use instead. compile: compile the
    blocks before `layer`. lora, lora_scale: path and strength of a LoRA that is added to the transformer's weights.
    quantize: as for `padseg.load`.
    """
    layer = source.spec.layer if layer is None else layer
    if not 0 <= layer < source.spec.layers:
        raise UsageError(f'layer is one of 0..{source.spec.layers - 1}; got {layer}')
    last = None if whole else layer
    place = choose_device(device)
    added = lora_for(family, source, lora, lora_scale) if lora else None
    size = sum(path.stat().st_size for path in weight_files(source.folder, family.LAYOUT.networks))
    kind = getattr(torch, dtype) if dtype else choose_dtype(place, size)
    owner, part = (vae, '.') if vae else (source, 'vae')
    with ThreadPoolExecutor(1) as beside:  # hashing four gigabytes takes as long as loading the tensors needed from them
        hashed = beside.submit(weights_hash, family, source, vae)
        transformer = filled_part(family, source, family.LAYOUT.denoiser, last, place, kind, quantize)
        if added:
            merge_lora(transformer, *added)
        exact = vae_dtype(family, source, owner, part, kind)
        encoder = filled_part(family, owner, part, last, place, exact).to(memory_format=torch.channels_last)  # faster for convolutions
        if place.type == 'cpu':
            speed_up(encoder)
    taken = family.size(transformer.config)
    if encoder.config.latent_channels != taken.channels:
        raise UsageError(
            f'the latents of {owner.model} have {encoder.config.latent_channels} channels, but the transformer takes {taken.channels}'
        )
    if compile:
        compile_blocks(family.blocks(transformer)[:layer])
    scheduler = read_scheduler(family, source)
    prompt, encoders = null_prompt(family, source, transformer, place, kind)
    multiple = taken.patch * 2 ** (len(encoder.config.block_out_channels) - 1)
    return Backbone(
        spec=source.spec,
        identity=identity_of(source, hashed.result(), encoders, (added[0].hash, added[0].scale) if added else None),
        family=family,
        transformer=transformer,
        vae=encoder,
        scheduler=scheduler,
        null_prompt=prompt,
        layers=source.spec.layers if whole or not family.cut else layer + 1,
        whole=whole or not family.cut,
        patch=taken.patch,
        multiple=multiple,
        limit=taken.limit * multiple,
        compiled=layer if compile else 0,
        quantize=quantize,
    )


def lora_for(family: Family, source: Source, path: str, scale: float) -> tuple[Lora, set[str]]:
    """A LoRA that fits a model, and the names of the weights that one can change."""
    layers = linear_layers(family, source)
    return read_lora(path, scale, layers), {f'{name}.weight' for name in layers}


def identify(family: Family, source: Source, vae: Source | None = None, lora: str | None = None, lora_scale: float = 1.0) -> Identity:
    """Which model `load` would load, without loading it. ModelUnavailable if text encoders are missing that it would need."""
    encoders = encoders_hash(source)
    if encoders is None:
        check_files(source, text_parts(source))
    added = (lora_hash(locate_lora(lora)), checked_scale(lora_scale)) if lora else None
    return identity_of(source, weights_hash(family, source, vae), encoders or '', added)


def identity_of(source: Source, weights: str, encoders: str, lora: tuple[str, float] | None = None) -> Identity:
    schedule = content_hash(source.folder, part_files(source.folder, ('scheduler',)))
    return Identity(
        source.model,
        str(source.folder),
        source.commit,
        weights,
        scheduler=joint_hash(schedule, source.spec.steps),
        text_encoders=joint_hash(encoders, source.spec.sequence),
        lora=lora[0] if lora else None,
        lora_scale=lora[1] if lora else None,
    )


def joint_hash(*parts: object) -> str:
    """SHA-256 over several facts."""
    return hashlib.sha256(' '.join(map(str, parts)).encode()).hexdigest()


def check_loadable(family: Family, source: Source, whole: bool = False) -> None:
    """Raise ModelUnavailable for what `load` would reject, as far as this can be seen without reading weights or using a network.

    whole: as in `load(whole=True)`.
    """
    for part in family.LAYOUT.networks:
        outlined(family, source, part, None if whole else source.spec.layer)
    read_scheduler(family, source)
    if not prompt_is_cached(source):
        check_files(source, text_parts(source))
        family.tokenizers(source)
        for part in text_encoders(source):
            encoder_values(source, part)
