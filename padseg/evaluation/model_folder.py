"""Models in transformers' layout whose folders others may have written: files, sizes and shapes are checked before memory is taken."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import PIL.Image
import torch

from padseg.backbones.configuration import Shape, check_network, numbers_in, read_json, refuse_specials, some_digits
from padseg.backbones.lora_released import read_checkpoint
from padseg.backbones.parts import told_errors
from padseg.backbones.source import HUB_ID, chosen_weights, snapshot, tensor_shapes
from padseg.errors import ModelUnavailable, UsageError

MOST_SIDE = 1024  # pixels of what a model sees of a picture; CLIP and DINO see 224 to 518
MOST_PATCHES = 1 << 13  # of a picture; DINO with patches of 8 pixels has 784
PICKLED = 'pytorch_model.bin'
SETTINGS = ('preprocessor_config.json', 'processor_config.json')  # of what resizes pictures


def located(name: str, revision: str | None, kinds: Sequence[str], what: str, usual: str, remedy: str) -> tuple[pathlib.Path, str | None]:
    """The folder of a model, downloaded if need be, and its commit. kinds: of its configuration; usual: a hub id, for messages.

    Raises ModelUnavailable, also for a folder that holds anything but files under the names of files, and UsageError.
    """
    folder, commit = pathlib.Path(name), None
    if not folder.is_dir():
        if not HUB_ID.fullmatch(name):
            raise UsageError(f'unknown {what} {name}: use a hub id such as {usual}, or a folder')
        try:
            folder = downloaded(name, revision)
        except ModelUnavailable as error:
            raise ModelUnavailable(f'{what}: {error}{remedy and f"; {remedy}"}', error.state) from error
        commit = folder.name
    elif revision:
        raise UsageError(f'{name} is a folder, which has no revisions; got revision {revision}')
    refuse_specials(folder)
    if not (folder / 'config.json').is_file():
        raise ModelUnavailable(f"{name} is no {what} in transformers' layout: it has no config.json", 'incomplete')
    kind = read_json(folder / 'config.json').get('model_type')
    if kind not in kinds:
        raise ModelUnavailable(f'{folder / "config.json"} describes a {str(kind)[:100]}; expected {" or ".join(kinds)}')
    return folder, commit


def downloaded(repo: str, revision: str | None) -> pathlib.Path:
    """A snapshot with safetensors, or with pickled weights if it has no others; of these, only tensors are read."""
    folder = snapshot(repo, revision, ('*.json', '*.txt', 'model*.safetensors'))
    return folder if any(folder.glob('model*.safetensors')) else snapshot(repo, revision, ('*.json', '*.txt', PICKLED))


def weights_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that weights are read from. Raises ModelUnavailable if any is missing."""
    files = chosen_weights(folder, 'model')[1]
    if not any(path.is_file() for path in files) and (folder / PICKLED).is_file():
        return [folder / PICKLED]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelUnavailable(f'{folder} is incomplete: it has no {missing[0]}', 'incomplete')
    return files


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that decide a model's features, sorted."""
    return sorted([path for path in folder.iterdir() if path.suffix in ('.json', '.txt') and path.is_file()] + weights_in(folder))


def shapes_in(path: pathlib.Path) -> dict[str, Shape]:
    """The shapes of the tensors in a file of weights; of a pickled one no memory is taken for them, and nothing but tensors is read."""
    if path.name != PICKLED:
        with told_errors(f'{path} is damaged'):
            return tensor_shapes(path)
    tensors = {str(name): tensor for name, tensor in read_checkpoint(path).items() if isinstance(tensor, torch.Tensor)}
    if not all(tensor.layout == torch.strided and tensor.device.type == 'cpu' for tensor in tensors.values()):
        raise ModelUnavailable(f'{path} is damaged: it holds other tensors than weights')
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * path.stat().st_size:  # tied weights are there once
        raise ModelUnavailable(f'{path} is damaged: it describes more weights than it holds')
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def filled(kind: Any, folder: pathlib.Path, place: torch.device, permitted: tuple[str, ...]) -> Any:
    """A network with the weights of a folder. kind: its class, or transformers' AutoModel; permitted: what weights may lack.

    Raises ModelUnavailable if any other weights are missing, which transformers would draw at random, or if the configuration describes
    more than the weights beside it are.
    """
    from transformers import AutoConfig, AutoModel

    files, path = weights_in(folder), folder / 'config.json'
    if (folder / 'adapter_config.json').exists():
        raise ModelUnavailable(f'{folder} has an adapter, which padseg does not read')
    shapes = {name: shape for file in files for name, shape in shapes_in(file).items()}
    check_network(read_json(path), path, shapes)
    held = sum(torch.Size(shape).numel() for shape in shapes.values())
    with told_errors(f'{folder} cannot be loaded'):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device('meta'):
            empty = kind.from_config(config) if kind is AutoModel else kind(config)
        described = sum(weight.numel() for weight in empty.parameters())
    if described > 2 * held:
        raise ModelUnavailable(f'{folder} is incomplete: it holds {held} weights, and {path.name} describes {described}', 'incomplete')
    with without_bar(), told_errors(f'{folder} cannot be loaded'):
        network, seen = kind.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            attn_implementation='sdpa',  # else a repository that the configuration names would be looked up on the hub
            use_safetensors=files[0].name != PICKLED,
            output_loading_info=True,
        )
    missing = sorted(name for name in seen['missing_keys'] if not name.startswith(permitted))
    if missing:
        raise ModelUnavailable(f'{folder} is incomplete: its weights lack {", ".join(missing[:3])}', 'incomplete')
    if not all(weight.isfinite().all() for weight in network.parameters()):
        raise ModelUnavailable(f'{folder} has weights that are not finite')
    return network.eval().requires_grad_(False).to(place)


@contextmanager
def without_bar() -> Iterator[None]:
    """Hide the progress of transformers, which draws it even for small models."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def tokenizer_in(folder: pathlib.Path, slots: int, known: int) -> Any:
    """The tokenizer in a folder, tried on some texts. slots: the tokens that the model reads; known: those that it has embeddings for."""
    from transformers import AutoTokenizer

    with told_errors(f'{folder} cannot be loaded'):
        tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        highest = max(tokens.get_vocab().values(), default=0)
        tokens(['a photo', 'é 猫'], padding=True, truncation=True, max_length=slots)
    if highest >= known:
        raise ModelUnavailable(f'{folder} has a token {highest}; its text encoder has embeddings for {known} tokens')
    return tokens


def processor_in(folder: pathlib.Path, patch: int) -> Any:
    """What resizes and scales pictures, as the folder says, tried on some. patch: side in pixels of what the model makes a token of.

    Pillow resizes: torchvision, if it is installed, would give other values. Raises ModelUnavailable for sizes that no such model has.
    """
    from transformers import AutoImageProcessor

    for path in [folder / name for name in SETTINGS if (folder / name).exists()]:
        for name, value in numbers_in(read_json(path)):
            if abs(value) > MOST_SIDE:
                raise ModelUnavailable(f'{path}: {name} is {some_digits(value)}; a model sees at most {MOST_SIDE} pixels along a side')
    with told_errors(f'{folder} cannot be loaded'):
        pictures = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False, backend='pil')
        tried = [PIL.Image.new('RGB', size) for size in ((48, 16), (24, 40))]
        height, width = pictures(tried, return_tensors='pt')['pixel_values'].shape[2:]
    if (height // patch) * (width // patch) > MOST_PATCHES:
        size = f'{width}x{height} pixels in patches of {patch}'
        raise ModelUnavailable(f'{folder} sees pictures of {size}: at most {MOST_PATCHES} patches are read')
    return pictures
