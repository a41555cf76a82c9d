"""Check whether a model can be loaded, from local files or the hub, and how much memory it takes."""

from __future__ import annotations

import math
from collections.abc import Collection
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from padseg.backbones import family_of
from padseg.backbones.fits import Need, needs
from padseg.backbones.layout import LAYOUTS, all_main, all_text, denoisers, weights_name
from padseg.backbones.loading import check_loadable
from padseg.backbones.null_prompt import prompt_is_cached
from padseg.backbones.parts import choose_dtype, outlined, tensors_needed, vae_dtype
from padseg.backbones.source import (
    Source,
    globs_of,
    hub_errors,
    locate,
    main_files,
    named_row,
    no_layout,
    refusal,
    tensor_shapes,
    text_parts,
    weight_files,
    with_advice,
)
from padseg.backbones.spec import Spec
from padseg.errors import ModelUnavailable
from padseg.system.disk import human

HUB_SECONDS = 10  # timeout for the hub's answer
READY = 'ready'
DOWNLOADABLE = 'not downloaded'
ABSENT = ('offline and not cached', 'incomplete')  # states that a download fixes


class State(NamedTuple):
    """Whether a model can be loaded. message: one line with the remedy; folder: None unless it is local; download: bytes if known."""

    state: str
    message: str
    folder: str | None = None
    commit: str | None = None
    download: int | None = None

    @property
    def usable(self) -> bool:
        return self.state in (READY, DOWNLOADABLE)


class Memory(NamedTuple):
    """Bytes that the weights take, computed from their shapes: on the device, and in host memory while loading."""

    device: int
    host: int


def model_state(model: str, revision: str | None = None, whole: bool = False) -> tuple[State, Source | None]:
    """Predict what `load` would report, and return the model if it is local. The hub is asked only about missing files.

    whole: as in `load(whole=True)`.
    """
    source = None
    try:
        source = locate(model, revision, fetch=False)
        check_loadable(family_of(source.spec), source, whole)
    except ModelUnavailable as error:
        here = State(error.state, str(error))
        spec, wanted = named_row(model, revision)
        if error.state not in ABSENT or Path(spec.repo).exists() or not on_hub(spec.repo):
            return here, None
        return ask_hub(spec, wanted, here), None
    return State(READY, 'all files are present; the model loads without a network', str(source.folder), source.commit), source


def on_hub(repo: str) -> bool:
    """Return whether this could be a repository on the hub that may be contacted now."""
    from huggingface_hub import is_offline_mode

    return not Path(repo).is_absolute() and not is_offline_mode()


def ask_hub(spec: Spec, revision: str | None, here: State) -> State:
    """Check whether the files could be downloaded now, by the same requests as a download; return `here` if the hub adds nothing."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    repo = spec.repo
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=HUB_SECONDS, files_metadata=True)
        listed = {file.rfilename: file.size for file in info.siblings or ()}
        wanted = {name: listed[name] for name in files_to_fetch(listed)}
        config = next((f'{part}/config.json' for part in denoisers() if f'{part}/config.json' in wanted), None)
        if config is None:
            other = no_layout(repo)
            return State(other.state, str(other))
        # anybody can list a gated repository's files, but only users with access can read its weights
        probe = next((name for name in wanted if name.endswith('.safetensors')), config)
        get_hf_file_metadata(hf_hub_url(repo, probe, revision=info.sha), timeout=HUB_SECONDS)
    except hub_errors() as error:
        refused = with_advice(refusal(repo, revision, error), spec)
        if not isinstance(refused, ModelUnavailable):
            raise refused from error
        return here if here.state == 'incomplete' and refused.state in ABSENT else State(refused.state, str(refused))
    absent = [name for name in wanted if not isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str)]
    sizes = [wanted[name] for name in absent]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    amount = f'{len(absent)} files' if total is None else f'{len(absent)} files, {human(total)}'
    return State(DOWNLOADABLE, f'access granted: the first run downloads {amount}', commit=info.sha, download=total)


def files_to_fetch(names: Collection[str]) -> list[str]:
    """Those of a repository's files that a download takes."""
    globs = [*main_files(), *globs_of(all_text())]
    for part in (*all_main(), *all_text()):
        weights = [name for name in names if any(fnmatch(name, glob) for glob in globs_of([part])) and name.endswith('.safetensors')]
        if weights_name(part) and not weights:
            globs.append(f'{part}/*')  # as `fetch_other_forms`
    return [name for name in names if any(fnmatch(name, glob) for glob in globs)]


def chosen_dtype(place: torch.device, source: Source | None) -> str:
    """Name of the dtype that `load` would choose."""
    paths = weight_files(source.folder, LAYOUTS[source.spec.family].networks) if source else []
    return str(choose_dtype(place, sum(path.stat().st_size for path in paths))).removeprefix('torch.')


def reckon_memory(source: Source, place: torch.device, dtype: str, whole: bool = False) -> Memory:
    """Estimate the memory for the weights alone, either those that `load` reads by default or all of them.

    For a device other than the CPU, weights pass through host memory one part at a time; text encoders stay there.
    """
    family, size, layer = family_of(source.spec), getattr(torch, dtype).itemsize, None if whole else source.spec.layer
    vae = vae_dtype(family, source, source, 'vae', getattr(torch, dtype)).itemsize
    parts = [
        (vae if part == 'vae' else size) * sum(map(math.prod, tensors_needed(family, source, part, layer).values()))
        for part in family.LAYOUT.networks
    ]
    prompt = 0 if prompt_is_cached(source) else family.TEXT_DTYPE.itemsize * parameters(source.folder, text_parts(source))
    if place.type == 'cpu':
        return Memory(sum(parts), sum(parts) + prompt)
    return Memory(sum(parts), max(*parts, prompt))


def reckon_cards(source: Source) -> dict[str, Need]:
    """What maps up to the expert block need for one picture of the model's own size on a graphics card, by form of the weights."""
    family, spec = family_of(source.spec), source.spec
    transformer, vae = (outlined(family, source, part, spec.layer) for part in family.LAYOUT.networks)
    return needs(family, transformer, vae, spec.side, spec.sequence, partial(vae_dtype, family, source, source, 'vae'))


def parameters(folder: Path, parts: tuple[str, ...]) -> int:
    return sum(math.prod(shape) for path in weight_files(folder, parts) for shape in tensor_shapes(path).values())
