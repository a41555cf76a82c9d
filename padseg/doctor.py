"""What there is to work with before a run: versions, processors, disk, memory, and whether a model can be loaded."""

from __future__ import annotations

import math
import os
import platform
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from typing import NamedTuple

import torch

from padseg.backbones import DTYPES
from padseg.backbones import family_of
from padseg.backbones.loading import check
from padseg.backbones.null_prompt import prompt_is_cached
from padseg.backbones.parts import choose_device
from padseg.backbones.parts import choose_dtype
from padseg.backbones.parts import tensors_needed
from padseg.backbones.source import MAIN
from padseg.backbones.source import MAIN_PARTS
from padseg.backbones.source import TEXT
from padseg.backbones.source import TEXT_PARTS
from padseg.backbones.source import Source
from padseg.backbones.source import hub_errors
from padseg.backbones.source import locate
from padseg.backbones.source import named
from padseg.backbones.source import no_layout
from padseg.backbones.source import refusal
from padseg.backbones.source import tensor_shapes
from padseg.backbones.source import weight_files
from padseg.errors import ModelUnavailable
from padseg.errors import UsageError
from padseg.space import free_space
from padseg.space import human
from padseg.versions import versions

MEMINFO = Path('/proc/meminfo')
CONTAINER = Path('/sys/fs/cgroup/memory.max')
SECONDS = 10  # for an answer of the hub
READY = 'ready'
DOWNLOADABLE = 'not downloaded'
ABSENT = ('offline and not cached', 'incomplete')  # what a download mends


class State(NamedTuple):
    """Whether a model can be loaded. message: one line with the remedy; folder: None unless it is here; download: bytes if known."""

    state: str
    message: str
    folder: str | None = None
    commit: str | None = None
    download: int | None = None

    @property
    def usable(self) -> bool:
        return self.state in (READY, DOWNLOADABLE)


class Memory(NamedTuple):
    """Bytes that the weights take, by reckoning from their shapes: on the device, and in the computer's memory while loading."""

    device: int
    host: int


class Report(NamedTuple):
    """Bytes for sizes; None for what cannot be known here."""

    versions: dict[str, str]
    platform: str
    cpus: int
    threads: int
    gpus: list[str]
    mps: bool
    device: str
    dtype: str | None
    device_memory: int | None  # free on the device, unless that is the CPU
    memory: int | None
    memory_free: int | None
    needed: Memory | None
    out: str
    disk_free: int
    cache: str
    cache_free: int
    offline: bool
    token: bool
    model: str
    state: State
    warnings: list[str]


def examine(model: str, revision: str | None, device: str | None, dtype: str | None, out: Path) -> Report:
    """Downloads nothing and reads no weights. Raises UsageError for a model, device or dtype that there is not."""
    from huggingface_hub import constants
    from huggingface_hub import get_token
    from huggingface_hub import is_offline_mode

    if dtype not in (None, *DTYPES):
        raise UsageError(f'dtype is one of {", ".join(DTYPES)}; got {dtype}')
    place = choose_device(device)
    state, source = model_state(model, revision)
    kind = dtype or (chosen_dtype(place, source) if source or place.type == 'cpu' else None)
    report = Report(
        versions=versions(),
        platform=platform.platform(),
        cpus=usable_cpus(),
        threads=torch.get_num_threads(),
        gpus=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        mps=torch.backends.mps.is_available(),
        device=str(place),
        dtype=kind,
        device_memory=torch.cuda.mem_get_info(place)[0] if place.type == 'cuda' else None,
        memory=memory_in_all(),
        memory_free=memory_available(),
        needed=reckon(source, place, kind) if source and kind else None,
        out=str(out),
        disk_free=free_space(out),
        cache=constants.HF_HUB_CACHE,
        cache_free=free_space(Path(constants.HF_HUB_CACHE)),
        offline=is_offline_mode(),
        token=get_token() is not None,
        model=model,
        state=state,
        warnings=[],
    )
    return report._replace(warnings=shortages(report))


def model_state(model: str, revision: str | None = None) -> tuple[State, Source | None]:
    """What `load` would meet, in its words; and the model if it is here. The hub is asked only about files that are not here."""
    source = None
    try:
        source = locate(model, revision, fetch=False)
        check(family_of(source.spec), source)
    except ModelUnavailable as error:
        here = State(error.state, str(error))
        spec, wanted = named(model, revision)
        if error.state not in ABSENT or Path(spec.repo).exists() or not on_hub(spec.repo):
            return here, None
        return ask_hub(spec.repo, wanted, here), None
    return State(READY, 'all files are here; it loads without a network', str(source.folder), source.commit), source


def on_hub(repo: str) -> bool:
    """Whether this could be a repository of the hub, and the hub may be asked."""
    from huggingface_hub import is_offline_mode

    return not Path(repo).is_absolute() and not is_offline_mode()


def ask_hub(repo: str, revision: str | None, here: State) -> State:
    """Whether the files could be downloaded now, asked as a download asks; `here` if the hub does not know better."""
    from huggingface_hub import HfApi
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub import hf_hub_url
    from huggingface_hub import try_to_load_from_cache

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=SECONDS, files_metadata=True)
        wanted = {file.rfilename: file.size for file in info.siblings or () if any(fnmatch(file.rfilename, glob) for glob in MAIN + TEXT)}
        if 'transformer/config.json' not in wanted:
            other = no_layout(repo)
            return State(other.state, str(other))
        # of a gated repository the list can be read by everybody, the weights only with access
        probe = next((name for name in wanted if name.endswith('.safetensors')), 'transformer/config.json')
        get_hf_file_metadata(hf_hub_url(repo, probe, revision=info.sha), timeout=SECONDS)
    except hub_errors() as error:
        refused = refusal(repo, revision, error)
        if not isinstance(refused, ModelUnavailable):
            raise refused from error
        return here if here.state == 'incomplete' and refused.state in ABSENT else State(refused.state, str(refused))
    absent = [name for name in wanted if not isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str)]
    sizes = [wanted[name] for name in absent]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    amount = f'{len(absent)} files' if total is None else f'{len(absent)} files, {human(total)}'
    return State(DOWNLOADABLE, f'the hub grants it: the first run downloads {amount}', commit=info.sha, download=total)


def chosen_dtype(place: torch.device, source: Source | None) -> str:
    """Name of the dtype that `load` chooses."""
    paths = weight_files(source.folder, MAIN_PARTS) if source else []
    return str(choose_dtype(place, sum(path.stat().st_size for path in paths))).removeprefix('torch.')


def reckon(source: Source, place: torch.device, dtype: str) -> Memory:
    """The weights alone. On another device they pass through the computer's memory part by part; text encoders stay there."""
    family, size = family_of(source.spec), getattr(torch, dtype).itemsize
    parts = [size * sum(map(math.prod, tensors_needed(family, source, part).values())) for part in ('transformer', 'vae')]
    prompt = 0 if prompt_is_cached(source) else family.TEXT_DTYPE.itemsize * parameters(source.folder, TEXT_PARTS)
    if place.type == 'cpu':
        return Memory(sum(parts), sum(parts) + prompt)
    return Memory(sum(parts), max(*parts, prompt))


def parameters(folder: Path, parts: tuple[str, ...]) -> int:
    return sum(math.prod(shape) for path in weight_files(folder, parts) for shape in tensor_shapes(path).values())


def shortages(report: Report) -> list[str]:
    """What is there in smaller amounts than it is needed, a line each."""
    found = []
    if report.needed and report.device_memory is not None and report.device_memory < report.needed.device:
        found.append(
            f'{report.device} has {human(report.device_memory)} free, the weights alone take {human(report.needed.device)}: '
            'free it, or `--dtype float16`, or `--device cpu`'
        )
    memory = min((size for size in (report.memory, report.memory_free) if size is not None), default=None)
    if report.needed and memory is not None and memory < report.needed.host:
        found.append(
            f'{human(memory)} of memory are free, the weights alone take {human(report.needed.host)}: `--dtype bfloat16` halves them'
        )
    if report.state.download and report.cache_free < report.state.download:
        found.append(
            f'{report.cache} has {human(report.cache_free)} free, the download takes {human(report.state.download)}: '
            'set HF_HOME to another disk'
        )
    return found


def usable_cpus() -> int:
    """Those this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def memory_in_all() -> int | None:
    """Bytes of memory of the machine, or of the container that padseg runs in; None where the system does not say."""
    if 'SC_PHYS_PAGES' not in os.sysconf_names:
        return None
    machine = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    limit = CONTAINER.read_text().strip() if CONTAINER.is_file() else 'max'
    return min(machine, int(limit)) if limit.isdecimal() else machine


def memory_available() -> int | None:
    """Bytes that can be had without swapping; SC_AVPHYS_PAGES would leave out what the system only caches. None where it does not say."""
    text = MEMINFO.read_text() if MEMINFO.is_file() else ''
    found = re.search(r'^MemAvailable: +(\d+) kB$', text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def as_object(report: Report) -> dict[str, Any]:
    """The report as one JSON object."""
    values = report._asdict()
    values['state'] = report.state._asdict()
    values['needed'] = report.needed._asdict() if report.needed else None
    return values


def as_lines(report: Report) -> list[str]:
    """The report for people."""
    sizes = {
        'memory': f'{known(report.memory)} in all, {known(report.memory_free)} free',
        'weights': 'not known before the model is here'
        if report.needed is None
        else f'{human(report.needed.device)} on {report.device}, up to {human(report.needed.host)} of memory while loading'
        ' (a reckoning from their shapes; pictures come on top)',
    }
    token = 'a token' if report.token else 'no token'
    rows = {
        'versions': ', '.join(f'{name} {number}' for name, number in report.versions.items()),
        'platform': report.platform,
        'CPUs': f'{report.cpus}, {report.threads} threads',
        'GPUs': ', '.join([*report.gpus, *(['MPS'] if report.mps else [])]) or 'none that torch can use',
        'device': f'{report.device} ({report.dtype or "float16 for large models, else float32"})',
        **sizes,
        'disk': f'{human(report.disk_free)} free at {report.out}',
        'hub': f'{token}, {"offline" if report.offline else "online"}, cache {report.cache} ({human(report.cache_free)} free)',
        'model': f'{report.model}: {report.state.state}',
        '': report.state.message,
    }
    width = max(map(len, rows))
    return [f'{name:{width}}  {value}' for name, value in rows.items()] + [f'{"warning":{width}}  {line}' for line in report.warnings]


def known(size: int | None) -> str:
    return 'unknown' if size is None else human(size)
