"""Locate a model's files, in the package, a folder or the hub's cache, and identify their content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import pydantic

from padseg.backbones.configuration import MOST_BLOCKS, numbers_in, read_json, refuse_pointer, some_digits
from padseg.backbones.layout import (
    FAMILIES,
    LAYOUTS,
    all_main,
    config_name,
    denoiser_in,
    denoisers,
    network_class,
    weights_name,
)
from padseg.backbones.spec import BACKBONES, CELL, FAMILY_FACTS, UNET_INPUTS, Spec
from padseg.errors import ModelUnavailable, PadsegError, UsageError
from padseg.system.progress import bytes_bar

OFFLINE = 'offline and not cached'  # a state
SMALL_VAE = 'tiny'  # stands for the family's small VAE on the hub
# settings of Seg4Diff that version 0.1 kept at the top level of `padseg.json`
BESIDE_FACTS = ('step', 'normalisation', 'threshold', 'refine', 'superpixels', 'join', 'components', 'min_area')
HUB_ID = re.compile(r'[\w.-]+/[\w.-]+')
PLAIN_NAME = re.compile(r'[\w-][\w.-]*\.safetensors')
VARIANTS = ('', 'fp16', 'bf16')  # of weights; the first that exists is read
PICKLED = ('.bin', '.pt', '.pth', '.ckpt', '.h5', '.msgpack', '.onnx', '.gguf')  # weights that are not read
LARGE_SCALE = 0.13025  # by which SDXL's latents are scaled, and those of models that share its VAE
CROSS = '.attn2.to_q.weight'  # one in each transformer block of a UNet
LOOSE = 16  # `blocks_asked` of SDXL is 2.6 times its number of blocks
BLOCK = 1 << 24
LARGE = 1 << 26  # bytes
# limits for values in `padseg.json`
MOST_STEPS = 10_000  # of a noise schedule; all models here were trained with 1000
MOST_PIXELS = 1 << 16  # along a side
MOST_SLOTS = 1 << 13  # of a prompt


class Source(NamedTuple):
    """A located model. commit: commit of a hub snapshot, None for a folder."""

    spec: Spec
    model: str
    folder: pathlib.Path
    commit: str | None


def locate(model: str, revision: str | None = None, *, fetch: bool = True) -> Source:
    """Locate a model's files and read its facts, which `padseg.json` in the folder overrides. Of the weights, only headers are read.

    Without `fetch`, nothing is downloaded and the hub is not contacted. Raises UsageError for an unknown name, else ModelUnavailable.
    """
    spec, commit_or_branch = named_row(model, revision)
    folder = pathlib.Path(spec.repo)
    commit = None
    if not folder.is_dir():
        if not HUB_ID.fullmatch(spec.repo):
            raise ModelUnavailable(f'the files of {model} should be in {folder}, which does not exist', 'incomplete')
        try:
            folder = snapshot(spec.repo, commit_or_branch, main_files(), fetch=fetch)
        except ModelUnavailable as error:
            raise with_advice(error, spec) from error.__cause__
        commit = folder.name
        if fetch:
            fetch_other_forms(spec.repo, folder, (denoiser_in(folder), 'vae'))
        if (folder / 'model_index.json').exists():
            refuse_missing(model, folder, commit, (denoiser_in(folder), 'vae', 'scheduler'))
        elif not (folder / denoiser_in(folder) / 'config.json').exists():
            raise no_layout(spec.repo)
    elif commit_or_branch:
        raise UsageError(f'{model} is a folder, which has no revisions; got revision {commit_or_branch}')
    elif not any((folder / part).is_dir() for part in denoisers()):
        raise no_layout(model)
    source = Source(spec, model, folder, commit)
    source = source._replace(spec=read_row(source))
    check_files(source, LAYOUTS[source.spec.family].main)
    return source


def with_advice(error: PadsegError, spec: Spec) -> PadsegError:
    """An error of the hub; that the embedded model needs no download is said for models of its family, whose place it can take."""
    if isinstance(error, ModelUnavailable) and error.state == OFFLINE and spec.family == BACKBONES['tiny'].family:
        return ModelUnavailable(f'{error}; `--model tiny` needs no download', error.state)
    return error


def family_named(model: str, revision: str | None = None) -> str:
    """A model's family; for a model of `padseg models`, its files are not needed. Raises as `locate`."""
    return BACKBONES[model].family if model in BACKBONES else locate(model, revision).spec.family


def locate_vae(name: str, source: Source, *, fetch: bool = True) -> Source:
    """The files of a small VAE that comes by itself: `tiny`, a hub id or a folder. Raises UsageError, ModelUnavailable.

    source: the model whose latents it makes.
    """
    repo = small_vae(source) if name == SMALL_VAE else name
    if not repo:
        raise UsageError(f"there is no small VAE in AutoencoderTiny's layout for {source.model}: use its own")
    folder, commit = pathlib.Path(repo), None
    if not folder.is_dir():
        if not HUB_ID.fullmatch(repo):
            raise UsageError(f'unknown VAE {name}: use {SMALL_VAE}, a hub id such as org/name, or a folder with an AutoencoderTiny')
        folder = snapshot(repo, None, (config_name('.'), f'{weights_name(".")}*.safetensors*'), fetch=fetch)
        commit = folder.name
    source = Source(Spec(repo=repo), name, folder, commit)
    check_files(source, ('.',))
    return source


def small_vae(source: Source) -> str:
    """Hub id of the small VAE for a model's latents: those of families that share VAEs are told apart by their scale."""
    layout = LAYOUTS[source.spec.family]
    large = layout.large_vae and read_json(source.folder / 'vae' / config_name('vae')).get('scaling_factor') == LARGE_SCALE
    return layout.large_vae if large else layout.small_vae


def named_row(model: str, revision: str | None = None) -> tuple[Spec, str | None]:
    """Return the facts known from a model's name alone, and the revision wanted. Raises UsageError for a name that cannot be a model."""
    name, _, tagged = model.partition('@')
    if model in BACKBONES:
        return BACKBONES[model], revision
    if model and pathlib.Path(model).is_dir():
        return Spec(repo=model), revision
    if HUB_ID.fullmatch(name):
        return Spec(repo=name), revision or tagged or None
    raise unknown(model)


def unknown(model: str) -> UsageError:
    return UsageError(f'unknown model {model}: use {", ".join(BACKBONES)}, a hub id such as org/name, or a folder in diffusers layout')


def no_layout(name: str) -> ModelUnavailable:
    lacks = ' or '.join(f'{part}/config.json' for part in denoisers())
    return ModelUnavailable(f'{name} is not a model in diffusers layout: {lacks} is missing', 'incomplete')


def main_files() -> tuple[str, ...]:
    """Glob patterns of the files that a model of any family needs besides its text encoders."""
    return ('model_index.json', 'padseg.json', *globs_of(all_main()))


def globs_of(parts: Iterable[str]) -> list[str]:
    """Glob patterns of the files of these parts on the hub, of weights only those of the whole precision: many have each in five forms."""
    globs = []
    for part in parts:
        own = weights_name(part)
        weights = (f'{own}.safetensors', f'{own}-?????-of-?????.safetensors') if own else ()
        globs += [f'{part}/{name}' for name in ('*.json', '*.txt', '*.model', *weights)]
    return globs


def fetch_other_forms(repo: str, folder: pathlib.Path, parts: Iterable[str]) -> None:
    """Download all that the hub has of the parts whose weights did not come with `globs_of`, such as those of half precision only."""
    for part in parts:
        if (folder / part / config_name(part)).is_file() and not all(path.is_file() for path in weight_files(folder, (part,))):
            with contextlib.suppress(ModelUnavailable):  # who looks for the files says what is missing
                snapshot(repo, folder.name, [f'{part}/*'])


def text_encoders(source: Source) -> dict[str, str]:
    """The classes of a model's text encoders, by folder."""
    layout = LAYOUTS[source.spec.family]
    return {**layout.text_encoders, **(layout.second_encoders if has_second(source) else {})}


def text_parts(source: Source) -> tuple[str, ...]:
    """Folders of the text encoders and tokenizers."""
    layout = LAYOUTS[source.spec.family]
    return (*text_encoders(source), *layout.tokenizers, *(layout.second_tokenizers if has_second(source) else ()))


def has_second(source: Source) -> bool:
    """Whether a model has the family's second text encoder, whose pooled text its network takes."""
    layout = LAYOUTS[source.spec.family]
    config = source.folder / layout.denoiser / config_name(layout.denoiser)
    return bool(layout.second_encoders) and read_json(config).get('addition_embed_type') is not None


def snapshot(repo: str, revision: str | None, patterns: Sequence[str], *, fetch: bool = True) -> pathlib.Path:
    """Return the folder of a hub snapshot, downloading matching files unless cached. It may lack some; for SD3, T5 is never in it."""
    from huggingface_hub import errors, snapshot_download

    from padseg.backbones.download import DownloadBar

    try:
        return pathlib.Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(patterns), local_files_only=not fetch, tqdm_class=DownloadBar)
        )
    except hub_errors() as error:
        # newer clients reject a snapshot that lacks any file of the repository; padseg itself decides which files it needs
        partial = getattr(error, 'snapshot_path', None)
        if partial and isinstance(error, errors.LocalEntryNotFoundError):
            return pathlib.Path(partial)
        raise refusal(repo, revision, error) from error


def hub_errors() -> tuple[type[Exception], ...]:
    """Exceptions of the hub's client for problems with a repository, an account or the network."""
    from huggingface_hub import errors

    return (OSError, errors.HFValidationError, errors.EntryNotFoundError, errors.HTTPError)


def refusal(repo: str, revision: str | None, error: Exception) -> PadsegError:
    """Turn an error of the hub's client into one line that says what is wrong and how to fix it."""
    from huggingface_hub import errors, get_token, is_offline_mode

    page = f'https://huggingface.co/{repo}'
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    first = str(error).strip().partition('\n')[0]
    if isinstance(error, errors.HFValidationError):
        return unknown(repo)
    if isinstance(error, errors.GatedRepoError):
        if get_token() is None:
            return ModelUnavailable(f'{repo} is gated: accept its licence on {page}, then `hf auth login`', 'no token')
        return ModelUnavailable(
            f'{repo} is gated and the account of your token has no access: accept its licence on {page} with that account '
            '(`hf auth whoami` names it)',
            'licence not accepted',
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelUnavailable(f'{repo} has no revision {revision}: {page}/tree/main lists branches and tags', 'unknown revision')
    # the hub answers 401 for a missing repository if there is no token; the client handles this only for the default endpoint
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 401 and get_token() is None):
        remedy = '`hf auth login`' if get_token() is None else 'that the account of your token may read it (`hf auth whoami`)'
        return ModelUnavailable(f'{repo} is not on the hub, or is private: check the name, or {remedy}', 'unknown repository')
    if isinstance(error, errors.HfHubHTTPError) and status in (401, 403):
        reason = error.response.headers.get('X-Error-Message') or f'HTTP {status}'
        remedy = (
            '`hf auth login` again, or fix HF_TOKEN'
            if status == 401
            else 'change what it may read on https://huggingface.co/settings/tokens'
        )
        return ModelUnavailable(f'the hub refuses your token for {repo} ({reason}): {remedy}', 'token refused')
    if is_offline_mode():
        return ModelUnavailable(
            f'{repo} is not in the cache and the hub cannot be reached (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set): '
            'unset it for the first run',
            OFFLINE,
        )
    return ModelUnavailable(f'{repo} is not in the cache and the hub cannot be reached ({first})', OFFLINE)


def check_files(source: Source, parts: Sequence[str]) -> None:
    """Raise ModelUnavailable if a file of these parts is missing, a configuration is not JSON, or weights do not match their header."""
    from safetensors import SafetensorError

    refuse_missing(source.model, source.folder, source.commit, parts)
    for part in parts:
        read_json(source.folder / part / config_name(part))
        for name in needed(source.folder, part):
            refuse_pointer(source.folder / part / name)
    for path in weight_files(source.folder, parts):
        try:
            tensor_shapes(path)
        except (OSError, SafetensorError) as error:
            remedy = f'`rm {path.resolve()}` and run again with a network' if source.commit else 'copy or download it again'
            raise ModelUnavailable(f'{path} is damaged ({str(error).strip()}): {remedy}') from error


def refuse_missing(model: str, folder: pathlib.Path, commit: str | None, parts: Sequence[str]) -> None:
    """Raise ModelUnavailable if files that loading needs from these parts are missing; the message names them."""
    missing = [f'{name} in {part}' for part in parts for name in needed(folder, part) if not (folder / part / name).is_file()]
    if missing:
        remedy = 'run again with a network to fetch the rest' if commit else 'copy or download the folder again'
        without = [part for part in parts if not all(path.is_file() for path in weight_files(folder, (part,)))]
        others = sorted(path.name for part in without for path in (folder / part).glob('*') if is_other_form(path.name, part))
        if others:
            remedy = f'of weights, padseg reads safetensors of the whole precision, fp16 or bf16, not {", ".join(others[:3])}'
        raise ModelUnavailable(f'{model} is incomplete: no file named {", ".join(missing)} of {folder}; {remedy}', 'incomplete')


def needed(folder: pathlib.Path, part: str) -> list[str]:
    """Names of the files that a part is loaded from, whether or not they exist."""
    weights = [path.name for path in weight_files(folder, (part,))]
    vocabulary: list[str] = []
    if part.startswith('tokenizer'):
        forms = (['tokenizer.json'], ['vocab.json', 'merges.txt'], ['spiece.model'])
        vocabulary = next((form for form in forms if any((folder / part / name).is_file() for name in form)), forms[0])
    return [config_name(part), *weights, *vocabulary]


def is_other_form(name: str, part: str) -> bool:
    """Whether a file holds weights of a part in a form that is not read: pickled, of another framework, or of another variant."""
    own = weights_name(part)
    return own is not None and (name.endswith(PICKLED) or (name.startswith(f'{own}.') and name.endswith('.safetensors')))


def weight_files(folder: pathlib.Path, parts: Sequence[str]) -> list[pathlib.Path]:
    """The safetensors files of these parts: one for a part, or the shards that its index lists. They need not exist."""
    return [path for part in parts if weights_name(part) for path in chosen_weights(folder / part, str(weights_name(part)))[1]]


def weights_variant(folder: pathlib.Path, part: str) -> str | None:
    """'fp16' or 'bf16' for a part whose folder has only weights of that type."""
    return chosen_weights(folder / part, str(weights_name(part)))[0] or None


def chosen_weights(folder: pathlib.Path, name: str) -> tuple[str, list[pathlib.Path]]:
    """The first variant of a part's weights that exists, and its files; the usual name if there is none."""
    for variant in VARIANTS:
        own = f'.{variant}' if variant else ''
        if (folder / f'{name}{own}.safetensors').is_file():
            return variant, [folder / f'{name}{own}.safetensors']
        for index in (f'{name}.safetensors.index{own}.json', f'{name}{own}.safetensors.index.json'):
            if (folder / index).is_file():
                return variant, [folder / shard for shard in shards(folder / index)]
    return '', [folder / f'{name}.safetensors']


def shards(index: pathlib.Path) -> list[str]:
    names = read_json(index).get('weight_map')
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelUnavailable(f'{index} must contain weight_map, the file of each tensor')
    strange = [name for name in names.values() if not PLAIN_NAME.fullmatch(name)]
    if strange:
        raise ModelUnavailable(f'{index} names a file that is not a safetensors file beside it: {strange[0]!r}')
    return sorted(set(names.values()))


def tensor_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Read the shape of each tensor from a safetensors file's header. Raises OSError or SafetensorError if the file is damaged."""
    from safetensors import safe_open

    with safe_open(path, 'np') as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def read_row(source: Source) -> Spec:
    """Complete a model's facts with the family and block count of the transformer in the folder, then with its `padseg.json`."""
    spec, _, folder, _ = source
    part = denoiser_in(folder)
    config = folder / part / 'config.json'
    values = read_json(config)
    kind = network_class(values, next(layout.network for layout in LAYOUTS.values() if layout.denoiser == part))
    if kind not in FAMILIES:
        raise ModelUnavailable(f'{config} describes a {kind[:100]}; known: {", ".join(FAMILIES)}')
    if FAMILIES[kind] != spec.family:
        spec = family_row(FAMILIES[kind], folder, values)._replace(repo=spec.repo)
    if spec.family == 'unet':
        layers = cross_attentions(source, part, values)
    else:
        layers = sum(block_count(values, name, config) for name in FAMILY_FACTS[spec.family].depths)
    spec = spec._replace(layers=layers, layer=min(spec.layer, layers - 1))
    own = folder / 'padseg.json'
    return own_row(spec, own) if own.exists() else spec


def family_row(family: str, folder: pathlib.Path, values: Mapping[str, Any]) -> Spec:
    """Facts of a model that has no name here: those of a named one of its kind, with the side that its network was trained on."""
    if family not in ('unet', 'pixart'):
        return next(spec for spec in BACKBONES.values() if spec.family == family)
    spec = BACKBONES['pixart-sigma' if family == 'pixart' else 'sdxl' if values.get('addition_embed_type') else 'sd1.5']
    index = folder / 'model_index.json'
    if family == 'pixart' and index.is_file() and read_json(index).get('_class_name') == 'PixArtAlphaPipeline':
        spec = spec._replace(sequence=120)
    cells = values.get('sample_size')
    if isinstance(cells, int) and not isinstance(cells, bool) and 0 < CELL * cells <= MOST_PIXELS:
        spec = spec._replace(side=CELL * cells)
    return spec


def cross_attentions(source: Source, part: str, values: Mapping[str, Any]) -> int:
    """The number of transformer blocks in a UNet's weights. ModelUnavailable for one that takes what padseg does not give."""
    config = source.folder / part / 'config.json'
    for name, known in UNET_INPUTS.items():
        if values.get(name) not in known:
            raise ModelUnavailable(f'{config}: {name} is {str(values[name])[:100]}, an input that padseg does not give')
    check_files(source, (part,))
    count = sum(name.endswith(CROSS) for path in weight_files(source.folder, (part,)) for name in tensor_shapes(path))
    if not count:
        raise ModelUnavailable(f'{part} of {source.model} attends to no text: no tensor in {source.folder / part} is named *{CROSS}')
    if blocks_asked(values) > max(LOOSE * count, MOST_BLOCKS):
        raise ModelUnavailable(f'{config} describes more transformer blocks than the {count} that the weights beside it have')
    return count


def blocks_asked(values: Mapping[str, Any]) -> int:
    """More than the blocks of a UNet with this configuration: the most of a layer, times the most layers of a level, times levels."""
    levels = [values.get(name) for name in ('down_block_types', 'up_block_types')]
    counts = [len(names) if isinstance(names, list) else 4 for names in levels]
    layers, depth, reverse = (
        max((int(number) for _, number in numbers_in({name: values.get(name)})), default=2)
        for name in ('layers_per_block', 'transformer_layers_per_block', 'reverse_transformer_layers_per_block')
    )
    return sum(counts) * (layers + 1) * max(depth, reverse)


def block_count(values: dict[str, Any], name: str, config: pathlib.Path) -> int:
    count = values.get(name)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ModelUnavailable(f'{config} must say {name}, a number >= 1; got {str(count)[:100]}')
    return count


def own_row(spec: Spec, path: pathlib.Path) -> Spec:
    """Apply a `padseg.json` to a model's facts: facts at the top level, and settings of a method under the method's name.

    Raises ModelUnavailable, naming the key, for a key or value that is not allowed.
    """
    stated = read_json(path)
    own = {name: value for name, value in stated.items() if isinstance(value, dict)}
    beside = {name: stated[name] for name in BESIDE_FACTS if name in stated}
    facts = {name: value for name, value in stated.items() if name not in own and name not in beside}
    strange = sorted(facts.keys() - set(Spec._fields) | facts.keys() & {'repo', 'family', 'own'})
    if strange:
        raise ModelUnavailable(f'{path} has keys that are not settings of a model: {", ".join(strange)}')
    if beside:
        own = {**own, 'seg4diff': {**beside, **own.get('seg4diff', {})}}
    try:
        facts |= {name: tuple(value) for name, value in facts.items() if name == 'words' and isinstance(value, list)}
        row = pydantic.TypeAdapter(Spec).validate_python({**spec._asdict(), **facts, 'own': own}, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ModelUnavailable(f'{path}: {first["loc"][0]}: {first["msg"]}; got {repr(first["input"])[:100]}') from error
    if row.layers != spec.layers:
        raise ModelUnavailable(f'{path}: layers is {row.layers}, but the transformer has {spec.layers}')
    for name, low, high in (('layer', 0, row.layers - 1), ('steps', 1, MOST_STEPS), ('side', 1, MOST_PIXELS), ('sequence', 1, MOST_SLOTS)):
        if not low <= getattr(row, name) <= high:
            raise ModelUnavailable(f'{path}: {name} is one of {low}..{high}; got {some_digits(getattr(row, name))}')
    return row


def text_files(source: Source) -> list[pathlib.Path]:
    """Return the files of the text encoders and tokenizers, downloading them from the hub if needed."""
    if source.commit:
        snapshot(source.spec.repo, source.commit, globs_of(text_parts(source)))
        fetch_other_forms(source.spec.repo, source.folder, text_encoders(source))
    return part_files(source.folder, text_parts(source))


def cache_home() -> pathlib.Path:
    """padseg's cache folder: $PADSEG_CACHE, or a folder in the user's cache."""
    home = os.environ.get('PADSEG_CACHE') or os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'padseg')
    try:
        return pathlib.Path(home).expanduser()
    except RuntimeError:  # HOME is not set, and the system does not know the user: nothing can be kept
        return pathlib.Path(os.devnull, 'padseg')


def part_files(folder: pathlib.Path, parts: Sequence[str]) -> list[pathlib.Path]:
    return [path for part in parts for path in sorted((folder / part).glob('*')) if path.is_file()]


def content_hash(folder: pathlib.Path, paths: Sequence[pathlib.Path]) -> str:
    """SHA-256 over names and contents. Large files in the hub's cache are named by their SHA-256 and not read again."""
    digest = hashlib.sha256()
    for path in paths:
        whole = path.resolve().name if is_large_blob(path) else file_hash(path)
        digest.update(f'{path.relative_to(folder).as_posix()} {whole}\n'.encode('utf-8', 'surrogateescape'))
    return digest.hexdigest()


def is_large_blob(path: pathlib.Path) -> bool:
    """Whether this is a link in a snapshot of the hub's own cache to a blob that the hub's client named after its SHA-256.

    A link anywhere else may have any name.
    """
    from huggingface_hub import constants

    blob, cache = path.resolve(), pathlib.Path(constants.HF_HUB_CACHE).resolve()
    repo = blob.parent.parent
    return (
        path.is_symlink()
        and re.fullmatch('[0-9a-f]{64}', blob.name) is not None
        and blob.parent.name == 'blobs'
        and repo.parent == cache
        and path.parent.resolve().is_relative_to(repo / 'snapshots')
    )


def file_hash(path: pathlib.Path) -> str:
    """SHA-256 of the content. A process reads a large file once, as long as it is not written again."""
    facts = path.stat()
    if facts.st_size < LARGE:
        return read_hash(path)
    return large_hash(path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)


@lru_cache(maxsize=64)
def large_hash(path: pathlib.Path, *_: int) -> str:
    return read_hash(path)


def read_hash(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file, bytes_bar(f'checking {path.name}', path.stat().st_size) as bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
