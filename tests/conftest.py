"""Small random models of the real classes, written to disk in the hub's layout, and pictures to run them on."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from collections.abc import Iterator

import numpy as np
import pytest

WORDS = ['a', 'cat', 'dog', 'on', 'grass']
VAE = {'block_out_channels': (8, 16), 'layers_per_block': 1, 'norm_num_groups': 4, 'latent_channels': 4}
SMALL = {'num_layers': 4, 'num_attention_heads': 2, 'attention_head_dim': 16, 'sample_size': 16, 'pos_embed_max_size': 24}
ROW = {'layer': 2, 'side': 32}


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp('cache')
        patch.setenv('PADSEG_CACHE', str(folder))
        yield folder


def random_model(folder: pathlib.Path, **transformer: object) -> pathlib.Path:
    import torch

    from padseg import tiny

    torch.manual_seed(0)
    parts = tiny.build(WORDS, {**SMALL, **transformer}, {**VAE, 'shift_factor': 0.1, 'scaling_factor': 1.5})
    for name, weight in parts.transformer.named_parameters():  # freshly built gates are zero: every path must matter
        if '.norm_' not in name:
            torch.nn.init.normal_(weight, std=0.2)
    tiny.save(parts, WORDS, folder, ROW, torch.float32)
    return folder


@pytest.fixture(scope='session')
def make_model() -> Callable[..., pathlib.Path]:
    """`random_model`, for models of other sizes."""
    return random_model


@pytest.fixture(scope='session')
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """SD3-medium in small: no normalisation of queries and keys."""
    return random_model(tmp_path_factory.mktemp('sd3') / 'model', qk_norm=None)


@pytest.fixture(scope='session')
def sd35_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """SD3.5-medium in small: dual attention in the first blocks, normalised queries and keys."""
    return random_model(tmp_path_factory.mktemp('sd35') / 'model', qk_norm='rms_norm', dual_attention_layers=(0, 1, 2))


@pytest.fixture(scope='session')
def backbone(sd3_folder: pathlib.Path):  # type: ignore[no-untyped-def]
    from padseg.backbones import load

    return load(str(sd3_folder), device='cpu', whole=True)


@pytest.fixture(scope='session')
def backbone35(sd35_folder: pathlib.Path):  # type: ignore[no-untyped-def]
    from padseg.backbones import load

    return load(str(sd35_folder), device='cpu', whole=True)


@pytest.fixture
def picture() -> np.ndarray:
    """A wide picture (48, 80, 3) of three flat areas with slight noise."""
    rng = np.random.default_rng(0)
    image = np.zeros((48, 80, 3), np.int64)
    image[:, :30] = (200, 40, 40)
    image[:20, 30:] = (40, 200, 40)
    image[20:, 30:] = (40, 40, 200)
    return (image + rng.integers(0, 20, image.shape)).astype(np.uint8)
