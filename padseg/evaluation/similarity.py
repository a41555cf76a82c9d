"""Compare pictures with texts and with each other by the features of CLIP and DINO: CLIPScore, CLIP-I and DINO similarity.

CLIPScore is 100 times the cosine, as T2I-Metrics computes it and published tables of text-to-image models mostly have it. Hessel et al.
(2021) multiply by 2.5, cut at 0, and put 'A photo depicts' before the text; none of that is done here. CLIP-I and DINO similarity are
cosines, as in DreamBooth (Ruiz et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional

from padseg.backbones.parts import choose_device, told_errors
from padseg.backbones.source import content_hash
from padseg.errors import ModelUnavailable
from padseg.evaluation.model_folder import files_of, filled, located, processor_in, tokenizer_in
from padseg.types import Array, Image

CLIP = 'openai/clip-vit-base-patch32'  # ViT-B/32, the usual one for CLIPScore
DINO = 'facebook/dino-vits16'  # ViT-S/16, the one of DreamBooth
CLIPS = ('clip',)  # model_type of their configurations
DINOS = ('vit', 'dinov2', 'dinov2_with_registers', 'dinov3_vit')
SCALE = 100  # of CLIPScore
BATCH = 32  # pictures a forward pass
PERMITTED = ('pooler.', 'embeddings.mask_token')  # of DINO: not used here, so weights may lack them
GREY = np.full((32, 32, 3), 128, np.uint8)  # a picture to try a model on

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
    from transformers import CLIPModel

    folder, commit = located(name, revision, CLIPS, 'CLIP', CLIP, remedy)
    network = filled(CLIPModel, folder, choose_device(device), ())
    text, picture = network.config.text_config, network.config.vision_config
    tokens = tokenizer_in(folder, text.max_position_embeddings, text.vocab_size)
    pictures = processor_in(folder, picture.patch_size)
    model = PictureModel(network, pictures, tokens, name, commit, content_hash(folder, files_of(folder)))
    with told_errors(f'{folder} cannot be used'):
        clip_image_features(model, [GREY])
        clip_text_features(model, ['a photo'])
    return model


def load_dino(name: str = DINO, device: str | None = None, revision: str | None = None, remedy: str = '') -> PictureModel:
    """Load a DINO, DINOv2 or DINOv3 of ViT's kind by hub id or from a folder, in float32; the arguments are those of `load_clip`."""
    from transformers import AutoModel

    folder, commit = located(name, revision, DINOS, 'DINO', DINO, remedy)
    network = filled(AutoModel, folder, choose_device(device), PERMITTED)
    pictures = processor_in(folder, network.config.patch_size)
    model = PictureModel(network, pictures, None, name, commit, content_hash(folder, files_of(folder)))
    with told_errors(f'{folder} cannot be used'):
        dino_features(model, [GREY])
    return model


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
    return unit(model, [model.network.get_image_features(**prepared(model, batch)).pooler_output for batch in batches(pictures)])


@torch.no_grad()
def clip_text_features(model: PictureModel, texts: Sequence[str]) -> Tensor:
    """CLIP's unit vectors of texts: (N, D) float32 on the CPU."""
    return unit(model, [model.network.get_text_features(**tokenized(model, batch)).pooler_output for batch in batches(texts)])


@torch.no_grad()
def dino_features(model: PictureModel, pictures: Sequence[Image]) -> Tensor:
    """DINO's unit vectors of pictures (H, W, 3) uint8, those of the class token: (N, D) float32 on the CPU."""
    return unit(model, [model.network(**prepared(model, batch)).last_hidden_state[:, 0] for batch in batches(pictures)])


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


def unit(model: PictureModel, parts: Sequence[Tensor]) -> Tensor:
    """Vectors (n, D) of all parts, scaled to unit length: (N, D) float32. ModelUnavailable if any is not finite."""
    if not parts:
        return torch.zeros(0, 0)
    features = torch.cat([part.float() for part in parts])
    if not features.isfinite().all():
        raise ModelUnavailable(f'{model.name} gives features that are not finite')
    return functional.normalize(features, dim=1).cpu()


def batches(items: Sequence[One]) -> Iterator[Sequence[One]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
