"""Small random models of the real classes, written to disk in the hub's layout, and pictures to run them on."""

from __future__ import annotations

import gc
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import filelock
import hypothesis
import numpy as np
import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')  # sums of another number of threads are rounded otherwise
os.environ.setdefault('MKL_DISABLE_FAST_MM', '1')  # its lists of buffers may be in disorder after a fork, and then it searches them forever
os.environ.setdefault('TORCHINDUCTOR_COMPILE_THREADS', '1')  # or what compiles would start processes that import torch
hypothesis.settings.register_profile('padseg', deadline=None)  # how long an example takes is the machine's business
hypothesis.settings.load_profile('padseg')

ROOT = pathlib.Path(__file__).parents[1]
WORDS = ['a', 'cat', 'dog', 'on', 'grass']
VAE = {'block_out_channels': (8, 16), 'layers_per_block': 1, 'norm_num_groups': 4, 'latent_channels': 4}
SMALL = {'num_layers': 4, 'num_attention_heads': 2, 'attention_head_dim': 16, 'sample_size': 16, 'pos_embed_max_size': 24}
SMALL_FLUX = {
    'num_layers': 2,
    'num_single_layers': 2,
    'num_attention_heads': 2,
    'attention_head_dim': 16,
    'in_channels': 16,
    'joint_attention_dim': 24,
    'pooled_projection_dim': 20,
    'axes_dims_rope': (4, 6, 6),
    'guidance_embeds': True,
}
ROW = {'layer': 2, 'side': 32}
SD35 = {'qk_norm': 'rms_norm', 'dual_attention_layers': (0, 1, 2)}

# The files that take longest, which start first, so that no worker is left alone with one at the end.
LONGEST = (
    *(
        'run/cluster_test',
        'train/lora_test',
        'train/tiny_test',
        'run/faults_test',
        'backbones/compiled_test',
        'bench/bench_test',
        'commands/doctor_test',
    ),
    *('evaluation/faults_test', 'backbones/unet_test', 'run/engine_test', 'notebook_test', 'main_job_test', 'backbones/loading_test'),
    *('evaluation/engine_test', 'backbones/strangers_test', 'docs_test', 'train/tiny_model_test'),
)


def pytest_sessionstart() -> None:
    gc.disable()  # garbage is looked for from the first test on, and not among what importing the tests has made


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    from support import forks

    forks.use(getattr(config, 'workerinput', {}).get('forks'))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist where the fork server is."""
    from support import forks

    node.workerinput['forks'] = forks.serve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {ROOT / 'tests' / f'{name}.py': number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """After --cov: the share of each package's statements that ran in the tests' own processes; what runs in others is not seen."""
    if not config.pluginmanager.hasplugin('_cov') or not os.path.exists('.coverage'):
        return
    import coverage

    measured = coverage.Coverage()
    measured.load()
    terminalreporter.section('statements run in these processes')
    files = measured.get_data().measured_files()
    packages = sorted({pathlib.Path(file).relative_to(ROOT / 'padseg').parts[0].removesuffix('.py') for file in files})
    for package in packages:
        share = measured.report(include=[f'{ROOT}/padseg/{package}/*', f'{ROOT}/padseg/{package}.py'], file=io.StringIO())
        terminalreporter.write_line(f'{package:12} {share:4.0f} %')
    terminalreporter.write_line(f'{"all":12} {measured.report(file=io.StringIO()):4.0f} %')


@pytest.fixture
def keep_only_needed():  # type: ignore[no-untyped-def]
    """Takes the tensors whose names match a part's pattern out of its weights and returns the names of those that are left."""
    from safetensors.torch import load_file, save_file

    def keep(folder: pathlib.Path, unneeded: dict[str, str]) -> set[str]:
        names: set[str] = set()
        for part, pattern in unneeded.items():
            path = folder / part / 'diffusion_pytorch_model.safetensors'
            tensors = load_file(path)
            kept = {name: tensor for name, tensor in tensors.items() if not re.match(pattern, name)}
            assert len(kept) < len(tensors)
            save_file(kept, path, {'format': 'pt'})
            names |= kept.keys()
        return names

    return keep


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp('cache')
        patch.setenv('PADSEG_CACHE', str(folder))
        yield folder


@pytest.fixture(scope='session')
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pathlib.Path]:
    """Make a folder that no test changes: once for all workers. Its function gets the folder first, then what else is given."""
    place = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        place = place.parent

    def make(name: str, function: Callable[..., pathlib.Path], *arguments: object, **options: object) -> pathlib.Path:
        folder, unfinished = place / 'made' / name / 'model', place / 'made' / name / 'unfinished'
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name('lock')):
            if not folder.is_dir():
                function(unfinished, *arguments, **options)
                unfinished.rename(folder)
        return folder

    return make


def random_model(folder: pathlib.Path, **transformer: object) -> pathlib.Path:
    import torch

    from padseg.train import tiny_model as tiny

    torch.manual_seed(0)
    parts = tiny.build_tiny(WORDS, {**SMALL, **transformer}, {**VAE, 'shift_factor': 0.1, 'scaling_factor': 1.5})
    for name, weight in parts.transformer.named_parameters():  # freshly built gates are zero: every path must matter
        if '.norm_' not in name:
            torch.nn.init.normal_(weight, std=0.2)
    tiny.save_tiny(parts, WORDS, folder, ROW, torch.float32)
    return folder


def random_flux(folder: pathlib.Path, **transformer: object) -> pathlib.Path:
    """Flux.1 in small, two double blocks and two single ones, with tokenizers of the real classes that know WORDS whole."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

    from padseg.train import tiny_model as tiny

    torch.manual_seed(0)
    denoiser = FluxTransformer2DModel(**{**SMALL_FLUX, **transformer})
    for name, weight in denoiser.named_parameters():
        torch.nn.init.uniform_(weight, 1, 3) if '.norm_' in name else torch.nn.init.normal_(weight, std=0.2)
    clip, t5 = tiny.make_tokenizers(WORDS)[0], t5_vocabulary(WORDS)
    text = {
        'vocab_size': len(clip),
        'bos_token_id': clip.bos_token_id,
        'eos_token_id': clip.eos_token_id,
        'pad_token_id': clip.pad_token_id,
    }
    pipeline = FluxPipeline(
        transformer=denoiser,
        vae=tiny.build_tiny(WORDS, SMALL, {**VAE, 'shift_factor': 0.1, 'scaling_factor': 1.5}).vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        tokenizer=clip,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(hidden_size=20, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, **text)
        ),
        tokenizer_2=T5TokenizerFast(vocab=t5, extra_ids=0, model_max_length=512),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(t5), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / 'padseg.json').write_text(json.dumps(ROW))
    return folder


def t5_vocabulary(words: list[str]) -> list[tuple[str, float]]:
    """T5's in small: pieces with their log probabilities; letters make what is no word of these."""
    letters = [(chr(code), -9.0) for code in range(ord('a'), ord('z') + 1)]
    return [('<pad>', 0.0), ('</s>', 0.0), ('<unk>', 0.0), ('▁', -4.0), *letters, *(('▁' + word, -5.0) for word in words)]


@pytest.fixture(scope='session')
def make_flux() -> Callable[..., pathlib.Path]:
    """`random_flux`, for models of other sizes."""
    return random_flux


@pytest.fixture(scope='session')
def make_model() -> Callable[..., pathlib.Path]:
    """`random_model`, for models of other sizes."""
    return random_model


@pytest.fixture(scope='session')
def sd3_folder(made_once: Callable[..., pathlib.Path]) -> pathlib.Path:
    """SD3-medium in small: no normalisation of queries and keys."""
    return made_once('sd3', random_model, qk_norm=None)


@pytest.fixture(scope='session')
def sd35_folder(made_once: Callable[..., pathlib.Path]) -> pathlib.Path:
    """SD3.5-medium in small: dual attention in the first blocks, normalised queries and keys."""
    return made_once('sd35', random_model, **SD35)


@pytest.fixture(scope='session')
def flux_folder(made_once: Callable[..., pathlib.Path]) -> pathlib.Path:
    return made_once('flux', random_flux)


@pytest.fixture(scope='session')
def unet_folders(made_once: Callable[..., pathlib.Path]) -> dict[str, pathlib.Path]:
    """Stable Diffusion 1.5, 2.1, SDXL and SSD-1B in small."""
    from support.crossing import UNETS, random_unet

    return {kind: made_once(kind, random_unet, kind) for kind in UNETS}


@pytest.fixture(scope='session')
def pixart_folders(made_once: Callable[..., pathlib.Path]) -> dict[str, pathlib.Path]:
    """PixArt-Sigma and PixArt-alpha in small."""
    from support.crossing import random_pixart

    return {kind: made_once(kind, random_pixart, kind == 'alpha') for kind in ('sigma', 'alpha')}


@pytest.fixture(scope='session')
def unets(unet_folders: dict[str, pathlib.Path]):  # type: ignore[no-untyped-def]
    from padseg.backbones import load

    return {kind: load(str(folder), device='cpu', whole=True) for kind, folder in unet_folders.items()}


@pytest.fixture(scope='session')
def pixarts(pixart_folders: dict[str, pathlib.Path]):  # type: ignore[no-untyped-def]
    from padseg.backbones import load

    return {kind: load(str(folder), device='cpu', whole=True) for kind, folder in pixart_folders.items()}


@pytest.fixture(scope='session')
def flux(flux_folder: pathlib.Path):  # type: ignore[no-untyped-def]
    from padseg.backbones import load

    return load(str(flux_folder), device='cpu', whole=True)


@pytest.fixture(scope='session')
def flux2_folder(made_once: Callable[..., pathlib.Path]) -> pathlib.Path:
    """FLUX.2-klein in small."""
    from support.flux2 import random_flux2

    return made_once('flux2', random_flux2)


@pytest.fixture(scope='session')
def flux2(flux2_folder: pathlib.Path):  # type: ignore[no-untyped-def]
    from padseg.backbones import load

    return load(str(flux2_folder), device='cpu', whole=True)


@pytest.fixture(scope='session')
def auraflow_folder(made_once: Callable[..., pathlib.Path]) -> pathlib.Path:
    """AuraFlow in small."""
    from support.auraflow import random_auraflow

    return made_once('auraflow-right', random_auraflow, padding='right')


@pytest.fixture(scope='session')
def auraflow(auraflow_folder: pathlib.Path):  # type: ignore[no-untyped-def]
    from padseg.backbones import load

    return load(str(auraflow_folder), device='cpu', whole=True)


@pytest.fixture(scope='session')
def backbone(sd3_folder: pathlib.Path):  # type: ignore[no-untyped-def]
    from padseg.backbones import load

    return load(str(sd3_folder), device='cpu', whole=True)


@pytest.fixture(scope='session')
def backbone35(sd35_folder: pathlib.Path):  # type: ignore[no-untyped-def]
    from padseg.backbones import load

    return load(str(sd35_folder), device='cpu', whole=True)


def with_texts(folder: pathlib.Path) -> pathlib.Path:
    """Give a model tokenizers that can spell everything, with text encoders for them, and T5."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    from padseg.train import tiny_model as tiny
    from padseg.train.vocabulary import END, SLOTS, START

    torch.manual_seed(1)
    letters = sorted(ByteLevel.alphabet())
    merges = [('c', 'a'), ('ca', 't</w>'), ('c', 'a</w>'), ('l', 'i'), ('g', 'h'), ('gh', 't</w>'), ('f', 'f'), ('t', 'r'), ('tr', 'a')]
    pieces = [*letters, *(letter + '</w>' for letter in letters), *(one + two for one, two in merges), START, END]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    width = sum(tiny.TEXT['hidden_size'])
    for number, pad in enumerate((END, '!')):
        end = f'_{number + 1}' if number else ''
        tiny.make_text_encoder(len(vocabulary), tiny.TEXT['hidden_size'][number], tiny.TEXT['heads'][number]).save_pretrained(
            folder / f'text_encoder{end}'
        )
        CLIPTokenizer(
            vocab=vocabulary,
            merges=merges,
            pad_token=pad,
            unk_token=END,
            bos_token=START,
            eos_token=END,
            model_max_length=SLOTS,
        ).save_pretrained(folder / f'tokenizer{end}')
    words = ['▁' + word for word in ('', 'cat', 'tra', 'li', 'a', 'photo', 'of')]
    unigrams = [('<pad>', 0.0), ('</s>', 0.0), ('<unk>', -20.0), *((word, -2.0) for word in (*words, 'ffic', 'ght'))]
    unigrams += [(chr(code), -5.0) for code in range(ord('!'), ord('~') + 1)] + [(letter, -6.0) for letter in 'éèûß日本']
    T5TokenizerFast(vocab=unigrams, extra_ids=0, model_max_length=SLOTS).save_pretrained(folder / 'tokenizer_3')
    config = T5Config(vocab_size=len(unigrams), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    encoder = T5EncoderModel(config)
    torch.nn.init.normal_(encoder.shared.weight)
    encoder.save_pretrained(folder / 'text_encoder_3')
    index = json.loads((folder / 'model_index.json').read_text())
    index |= {'text_encoder_3': ['transformers', 'T5EncoderModel'], 'tokenizer_3': ['transformers', 'T5TokenizerFast']}
    (folder / 'model_index.json').write_text(json.dumps(index))
    return folder


def random_speller(folder: pathlib.Path, **transformer: object) -> pathlib.Path:
    return with_texts(random_model(folder, **transformer))


@pytest.fixture(scope='session')
def texts_folder(made_once: Callable[..., pathlib.Path]) -> pathlib.Path:
    """SD3-medium in small with all three text encoders."""
    return made_once('texts', random_speller, qk_norm=None)


@pytest.fixture(scope='session')
def texts35_folder(made_once: Callable[..., pathlib.Path]) -> pathlib.Path:
    """SD3.5-medium in small with all three text encoders."""
    return made_once('texts35', random_speller, **SD35)


@pytest.fixture(scope='session')
def speller(texts_folder: pathlib.Path):  # type: ignore[no-untyped-def]
    from padseg.backbones import load

    return load(str(texts_folder), device='cpu', whole=True)


@pytest.fixture(scope='session')
def speller35(texts35_folder: pathlib.Path):  # type: ignore[no-untyped-def]
    from padseg.backbones import load

    return load(str(texts35_folder), device='cpu', whole=True)


@pytest.fixture
def picture() -> np.ndarray:
    """A wide picture (48, 80, 3) of three flat areas with slight noise."""
    rng = np.random.default_rng(0)
    image = np.zeros((48, 80, 3), np.int64)
    image[:, :30] = (200, 40, 40)
    image[:20, 30:] = (40, 200, 40)
    image[20:, 30:] = (40, 40, 200)
    return (image + rng.integers(0, 20, image.shape)).astype(np.uint8)


@pytest.fixture(scope='session')
def clip_folder(made_once: Callable[..., pathlib.Path]) -> pathlib.Path:
    """CLIP in small, which knows WORDS whole, and reads 8 tokens."""
    from support.scoring import random_clip

    return made_once('clip', random_clip, WORDS)


@pytest.fixture(scope='session')
def dino_folder(made_once: Callable[..., pathlib.Path]) -> pathlib.Path:
    """DINO in small."""
    from support.scoring import random_dino

    return made_once('dino', random_dino)


@pytest.fixture(scope='session')
def inception_file(made_once: Callable[..., pathlib.Path]) -> pathlib.Path:
    """Inception's interface in small."""
    from support.scoring import random_inception

    return made_once('inception', random_inception) / 'inception.pt'
