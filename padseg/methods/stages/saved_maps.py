"""Store token maps on disk, so that another threshold needs no forward pass."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from padseg.backbones import Backbone
from padseg.methods.options import ForwardOptions
from padseg.system.files import atomic
from padseg.types import Frame, TokenMaps

SUFFIX = '.npz'


def forward_settings(backbone: Backbone, options: ForwardOptions) -> str:
    """Describe all settings that affect token maps."""
    return (
        f'weights {backbone.identity.weights} dtype {backbone.dtype} layer {options.layer} step {options.step} '
        f'geometry {options.geometry} side {options.side} seed {options.seed}'
    )


def write_maps(maps: TokenMaps, path: Path, made_by: str = '') -> None:
    """Write token maps (T, h, w) float32 with their tokens' words, their frame and the settings that made them."""
    with atomic(path) as temporary, temporary.open('wb') as file:
        np.savez_compressed(
            file,
            maps=maps.maps.cpu().numpy(),
            names=np.array(maps.names),
            size=np.array(maps.frame.size),
            box=np.array(maps.frame.box),
            made_by=np.array(made_by),
        )


def read_maps(path: Path, made_by: str = '') -> TokenMaps | None:
    """Read token maps from a file; None if it is missing, damaged, or made with other settings."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file['made_by']) != made_by:
                return None
            size, box = tuple(file['size'].tolist()), tuple(file['box'].tolist())
            return TokenMaps(torch.from_numpy(file['maps']), tuple(file['names'].tolist()), Frame(size, box))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
