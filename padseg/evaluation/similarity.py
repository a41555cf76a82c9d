"""Compare pictures with texts and with each other by the features of CLIP and DINO: CLIPScore, CLIP-I and DINO similarity.

CLIPScore is 100 times the cosine, as T2I-Metrics computes it and published tables of text-to-image models mostly have it. Hessel et al.
(2021) multiply by 2.5, cut at 0, and put 'A photo depicts' before the text; none of that is done here. CLIP-I and DINO similarity are
cosines, as in DreamBooth (Ruiz et al. 2023).
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional

from padseg.backbones.configuration import check_network, read_json
from padseg.backbones.parts import choose_device, told_errors
from padseg.backbones.source import HUB_ID, content_hash, snapshot, tensor_shapes
from padseg.errors import ModelUnavailable, UsageError
from padseg.types import Array, Image

CLIP = 'openai/clip-vit-base-patch32'  # ViT-B/32, the usual one for CLIPScore
DINO = 'facebook/dino-vits16'  # ViT-S/16, the one of DreamBooth
CLIPS = ('clip',)  # model_type of their configurations
DINOS = ('vit', 'dinov2', 'dinov2_with_registers', 'dinov3_vit')
SCALE = 100  # of CLIPScore
BATCH = 32  # pictures a forward pass
PERMITTED = ('pooler.', 'embeddings.mask_token')  # of DINO: not used here, so weights may lack them
PROBE = 'a photo'

One = TypeVar('One')


class PictureModel(NamedTuple):
    """CLIP or DINO, loaded. tokens: CLIP's tokenizer; name: as given; commit: of a hub snapshot; weights: SHA-256 of the files."""

    network: Any
    pictures: Any
    tokens: Any
    name: str
    commit: str | None
    weights: str

    @property
    def device(self) -> torch.device:
        place: torch.device = self.network.device
        return place


def load_clip(name: str = CLIP, device: str | None = None, revision: str | None = None, remedy: str = '') -> PictureModel:
    """Load a CLIP by hub id or from a folder in transformers' layout, in float32. remedy: what an error should advise, besides the reason.

    Raises ModelUnavailable, UsageError.
    """
    from transformers import AutoTokenizer, CLIPModel

    folder, commit = located(name, revision, CLIPS, 'CLIP', remedy)
    network = filled(CLIPModel, folder, choose_device(device), ())
    with told_errors(f'{folder} cannot be loaded'):
        tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokens(PROBE)
    return PictureModel(network, processor(folder), tokens, name, commit, content_hash(folder, files_of(folder)))


def load_dino(name: str = DINO, device: str | None = None, revision: str | None = None, remedy: str = '') -> PictureModel:
    """Load a DINO, DINOv2 or DINOv3 of ViT's kind by hub id or from a folder, in float32; the arguments are those of `load_clip`."""
    from transformers import AutoModel

    folder, commit = located(name, revision, DINOS, 'DINO', remedy)
    network = filled(AutoModel, folder, choose_device(device), PERMITTED)
    return PictureModel(network, processor(folder), None, name, commit, content_hash(folder, files_of(folder)))


def clip_score(model: PictureModel, pictures: Sequence[Image], texts: Sequence[str]) -> Array:
    """CLIPScore of each picture (H, W, 3) with the text of the same place: (N,) in -100..100. Long texts are cut, see `texts_cut`."""
    return scores_of(clip_image_features(model, pictures), clip_text_features(model, texts))


def clip_image_similarity(model: PictureModel, a: Sequence[Image], b: Sequence[Image]) -> Array:
    """CLIP-I of each picture (H, W, 3) of `a` with that of `b` in the same place: (N,) in -1..1."""
    return cosines(clip_image_features(model, a), clip_image_features(model, b))


def dino_similarity(model: PictureModel, a: Sequence[Image], b: Sequence[Image]) -> Array:
    """DINO similarity of each picture (H, W, 3) of `a` with that of `b` in the same place: (N,) in -1..1."""
    return cosines(dino_features(model, a), dino_features(model, b))


def scores_of(pictures: Tensor, texts: Tensor) -> Array:
    """CLIPScore from unit features (N, D) of pictures and texts: (N,)."""
    return SCALE * cosines(pictures, texts)


def cosines(a: Tensor, b: Tensor) -> Array:
    """Cosines of unit vectors (N, D), row by row: (N,)."""
    if a.shape != b.shape:
        raise ValueError(f'as many pictures as partners are expected; got {len(a)} and {len(b)}')
    return (a * b).sum(1).numpy()


@torch.no_grad()
def clip_image_features(model: PictureModel, pictures: Sequence[Image]) -> Tensor:
    """CLIP's unit vectors of pictures (H, W, 3) uint8: (N, D) float32 on the CPU."""
    return unit([model.network.get_image_features(**prepared(model, batch)).pooler_output for batch in batches(pictures)])


@torch.no_grad()
def clip_text_features(model: PictureModel, texts: Sequence[str]) -> Tensor:
    """CLIP's unit vectors of texts: (N, D) float32 on the CPU."""
    return unit([model.network.get_text_features(**tokenized(model, batch)).pooler_output for batch in batches(texts)])


@torch.no_grad()
def dino_features(model: PictureModel, pictures: Sequence[Image]) -> Tensor:
    """DINO's unit vectors of pictures (H, W, 3) uint8, those of the class token: (N, D) float32 on the CPU."""
    return unit([model.network(**prepared(model, batch)).last_hidden_state[:, 0] for batch in batches(pictures)])


def texts_cut(model: PictureModel, texts: Sequence[str]) -> list[bool]:
    """Whether each text has more tokens than CLIP reads, so that its end does not count."""
    return [len(model.tokens(text).input_ids) > slots(model) for text in texts]


def slots(model: PictureModel) -> int:
    count: int = model.network.config.text_config.max_position_embeddings
    return count


def prepared(model: PictureModel, pictures: Sequence[Image]) -> dict[str, Tensor]:
    """The pictures as the network takes them: resized, cut and scaled as the model's own settings say, by Pillow as in CLIP's own code."""
    values = model.pictures([PIL.Image.fromarray(picture) for picture in pictures], return_tensors='pt')
    return {'pixel_values': values['pixel_values'].to(model.device)}


def tokenized(model: PictureModel, texts: Sequence[str]) -> dict[str, Tensor]:
    values = model.tokens(list(texts), padding=True, truncation=True, max_length=slots(model), return_tensors='pt')
    return {name: values[name].to(model.device) for name in ('input_ids', 'attention_mask')}


def unit(parts: Sequence[Tensor]) -> Tensor:
    return functional.normalize(torch.cat([part.float() for part in parts]), dim=1).cpu() if parts else torch.zeros(0, 0)


def batches(items: Sequence[One]) -> Iterator[Sequence[One]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def located(name: str, revision: str | None, kinds: Sequence[str], what: str, remedy: str) -> tuple[pathlib.Path, str | None]:
    """The folder of a model in transformers' layout, downloaded if need be, and its commit. Raises ModelUnavailable, UsageError."""
    folder, commit = pathlib.Path(name), None
    if not folder.is_dir():
        if not HUB_ID.fullmatch(name):
            raise UsageError(f'unknown {what} {name}: use a hub id such as {CLIP if kinds == CLIPS else DINO}, or a folder')
        try:
            folder = downloaded(name, revision)
        except ModelUnavailable as error:
            raise ModelUnavailable(f'{what}: {str(error).partition("; `--model")[0]}{remedy and f"; {remedy}"}', error.state) from error
        commit = folder.name
    elif revision:
        raise UsageError(f'{name} is a folder, which has no revisions; got revision {revision}')
    if not (folder / 'config.json').is_file():
        raise ModelUnavailable(f"{name} is no {what} in transformers' layout: it has no config.json", 'incomplete')
    kind = read_json(folder / 'config.json').get('model_type')
    if kind not in kinds:
        raise ModelUnavailable(f'{folder / "config.json"} describes a {str(kind)[:100]}; expected {" or ".join(kinds)}')
    return folder, commit


def downloaded(repo: str, revision: str | None) -> pathlib.Path:
    """A snapshot with safetensors, or with pickled weights if it has no others; of these, transformers reads tensors only."""
    folder = snapshot(repo, revision, ('*.json', '*.txt', 'model*.safetensors'))
    return folder if any(folder.glob('model*.safetensors')) else snapshot(repo, revision, ('*.json', '*.txt', 'pytorch_model.bin'))


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that decide a model's features, sorted."""
    return sorted(path for glob in ('*.json', '*.txt', 'model*.safetensors', 'pytorch_model*.bin') for path in folder.glob(glob))


def filled(kind: Any, folder: pathlib.Path, place: torch.device, permitted: tuple[str, ...]) -> Any:
    """A network with the weights of a folder. ModelUnavailable if any are missing, which transformers would draw at random."""
    with told_errors(f'{folder} is damaged'):
        shapes = {name: shape for path in folder.glob('model*.safetensors') for name, shape in tensor_shapes(path).items()}
    if shapes:
        check_network(read_json(folder / 'config.json'), folder / 'config.json', shapes)
    with without_bar(), told_errors(f'{folder} cannot be loaded'):
        network, seen = kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
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


def processor(folder: pathlib.Path) -> Any:
    """What resizes and scales pictures, as the folder says. By Pillow: torchvision, if it is installed, would give other values."""
    from transformers import AutoImageProcessor

    with told_errors(f'{folder} cannot be loaded'):
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False, backend='pil')
