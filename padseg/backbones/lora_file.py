"""Find the files of a LoRA, read their headers and identify their content, without torch. Strangers may have written them."""

from __future__ import annotations

import hashlib
import os
import pathlib
from typing import NamedTuple

from padseg.backbones.configuration import refuse_pointer
from padseg.backbones.source import file_hash
from padseg.errors import ModelUnavailable, UsageError

WEIGHTS = 'pytorch_lora_weights.safetensors'  # as diffusers names it
PEFT_WEIGHTS, PEFT_CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
MOST_HEADER = 1 << 24  # bytes; the header of a LoRA for all layers of Flux.1 has less than 200,000
PICKLED = (b'PK\x03\x04', b'\x80')  # first bytes of what torch.save writes


class LoraFile(NamedTuple):
    """Where a LoRA is. config: of peft, beside weights that peft wrote; else None."""

    weights: pathlib.Path
    config: pathlib.Path | None


class Stored(NamedTuple):
    """What a header says of a tensor. dtype: in the words of safetensors."""

    dtype: str
    shape: tuple[int, ...]


def locate_lora(path: os.PathLike[str] | str) -> LoraFile:
    """Find a LoRA by the path of its safetensors file or of a folder with it. Raises UsageError if there is none."""
    place = pathlib.Path(path)
    if os.path.isdir(place):  # of os.path, because a name can be too long to ask for
        known = [place / name for name in (WEIGHTS, PEFT_WEIGHTS)]
        held = [file for file in known if os.path.isfile(file)]
        if not held:
            raise UsageError(f'there is no LoRA in {place}: it has neither {WEIGHTS} nor {PEFT_WEIGHTS}; name the file itself')
        place = held[0]
    if not os.path.isfile(place):  # reading anything but a file could block
        raise UsageError(f'{place} is not the file of a LoRA or a folder with one')
    config = place.parent / PEFT_CONFIG
    return LoraFile(place, config if place.name == PEFT_WEIGHTS and os.path.isfile(config) else None)


def lora_hash(file: LoraFile) -> str:
    """SHA-256 of a LoRA's content, whatever its name. Raises ModelUnavailable if it cannot be read."""
    try:
        hashes = [file_hash(path) for path in file if path is not None]
    except OSError as error:
        raise ModelUnavailable(f'{file.weights} cannot be read: {error.strerror}') from error
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(' '.join(hashes).encode()).hexdigest()


def lora_header(path: pathlib.Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata, from the header alone. Raises ModelUnavailable if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open('rb') as file:
            start = file.read(8)
        refuse_pointer(path)
        if int.from_bytes(start, 'little') > MOST_HEADER:
            if start.startswith(PICKLED):
                raise ModelUnavailable(f'{path} is a pickle of torch, which is not read: `padseg convert-lora` converts released LoRAs')
            raise ModelUnavailable(f'{path} is not a LoRA: it is no safetensors file, or its header is too large')
        with safe_open(path, 'np') as file:  # compares the sizes in the header with that of the file
            slices = {name: file.get_slice(name) for name in file.keys()}
            stored = {name: Stored(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            return stored, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelUnavailable(f'{path} is damaged ({" ".join(str(error).split())[:300]}): copy or download it again') from error
