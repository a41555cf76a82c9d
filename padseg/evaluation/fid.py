"""The distance of two sets of pictures in the features of Inception (FID, Heusel et al. 2017), computed by torchmetrics."""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from padseg.backbones.parts import DAMAGE, choose_device
from padseg.backbones.source import file_hash
from padseg.errors import ModelUnavailable, NotFinite, PadsegError
from padseg.evaluation.similarity import batches
from padseg.types import Array, Image

SIDE = 299  # of what Inception sees, in pixels
FILE = 'inception-2015-12-05.pt'  # Inception as a TorchScript file, as NVIDIA publishes it with StyleGAN
FEWEST = 2  # pictures with which a covariance is defined


class Inception(NamedTuple):
    """What gives features. network: (N, 3, H, W) float32 in 0..255 to (N, D); name, weights: of its file and its SHA-256.

    resize: 'clean' or 'network', as for `load_inception`.
    """

    network: Callable[[Tensor], Tensor]
    name: str = ''
    weights: str = ''
    resize: str = 'clean'
    device: torch.device = torch.device('cpu')


def load_inception(path: Path, device: str | None = None, resize: str = 'clean') -> Inception:
    """Load Inception, or another network with its interface, from a TorchScript file. Such a file is a program: it must be trusted.

    resize: 'clean' resizes pictures by Pillow's bicubic filter, as clean-fid and T2IBenchmark do; 'network' leaves that to the network,
    which does it as the first implementation in TensorFlow. Raises ModelUnavailable.
    """
    place = choose_device(device)
    if not path.is_file():
        raise ModelUnavailable(f'there is no file {path}: --inception takes {FILE}, see docs/score-images.md', 'incomplete')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DeprecationWarning)  # of TorchScript: the weights are published in no newer form
            script = torch.jit.load(str(path), map_location=place).eval()
    except DAMAGE as error:
        raise ModelUnavailable(f'{path} is no TorchScript file, or a damaged one: --inception takes {FILE}, not weights alone') from error
    return Inception(lambda batch: script(batch, return_features=True), path.name, file_hash(path), resize, place)


@torch.no_grad()
def inception_features(model: Inception, pictures: Sequence[Image]) -> Tensor:
    """Features of pictures (H, W, 3) uint8: (N, D) on the CPU, in the precision of the network."""
    prepared = [resized(picture) if model.resize == 'clean' else picture for picture in pictures]
    parts = []
    for _, same in itertools.groupby(prepared, np.shape):
        for batch in batches(list(same)):
            values = torch.from_numpy(np.stack(batch)).to(model.device, torch.float32)  # (N, H, W, 3)
            parts.append(checked(features_of(model, values.permute(0, 3, 1, 2).contiguous()), len(batch), model))
    return torch.cat(parts) if parts else torch.zeros(0, 0)


def features_of(model: Inception, batch: Tensor) -> Any:
    try:
        return model.network(batch)
    except DAMAGE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:300]
        raise ModelUnavailable(f'{model.name} does not take pictures as {FILE} does: {reason}') from error


def checked(features: Any, count: int, model: Inception) -> Tensor:
    if not isinstance(features, Tensor) or features.shape[:1] != (count,) or not features.isfinite().all():
        raise ModelUnavailable(f'{model.name} gives no finite features ({count}, D) for {count} pictures')
    return features.reshape(count, -1).cpu()


def resized(picture: Image) -> Array:
    """A picture (H, W, 3) of Inception's size, by Pillow's bicubic filter in floating point: (299, 299, 3) float32 in 0..255."""
    channels = [PIL.Image.fromarray(channel).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC) for channel in planes(picture)]
    return np.stack([np.asarray(channel) for channel in channels], axis=2).clip(0, 255)


def planes(picture: Image) -> list[Array]:
    return [np.ascontiguousarray(picture[..., number], np.float32) for number in range(3)]


def fid(ours: Tensor, theirs: Tensor) -> float:
    """FID of two sets of features (N, D) and (M, D); at least two pictures each.

    PadsegError if torchmetrics is not installed, NotFinite if numbers overflow.
    """
    require_library()
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(ours), len(theirs)) < FEWEST or ours.shape[1] != theirs.shape[1]:
        raise ValueError(f'features (N, D) of two pictures or more are expected; got {tuple(ours.shape)} and {tuple(theirs.shape)}')
    distance = FrechetInceptionDistance(feature=Given(ours.shape[1]))
    distance.update(theirs.double(), real=True)
    distance.update(ours.double(), real=False)
    found = float(distance.compute())
    if not math.isfinite(found):
        raise NotFinite('FID is not finite: the features are too large')
    return found


def require_library() -> None:
    """Raise PadsegError if torchmetrics is not installed. Does not import it."""
    if importlib.util.find_spec('torchmetrics') is None:
        raise PadsegError("FID needs torchmetrics: pip install 'padseg[scores]', or leave fid out of --scores")


class Given(torch.nn.Module):
    """Stands for Inception where torchmetrics expects it, and passes on features that are known already."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        return features
