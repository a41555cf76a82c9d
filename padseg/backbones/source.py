"""Locate a model's files, in the package, a folder or the hub's cache, and identify their content."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pydantic

from padseg.backbones.layout import LAYOUTS, all_main, config_name, denoiser_in, denoisers, weights_name
from padseg.backbones.spec import BACKBONES, DEPTHS, FAMILIES, Spec
from padseg.errors import ModelUnavailable, PadsegError, UsageError

SMALL_VAE = 'tiny'  # stands for the family's small VAE on the hub
# settings of Seg4Diff that version 0.1 kept at the top level of `padseg.json`
BESIDE_FACTS = ('step', 'normalisation', 'threshold', 'refine', 'superpixels', 'join', 'components', 'min_area')
HUB_ID = re.compile(r'[\w.-]+/[\w.-]+')
BLOCK = 1 << 24


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
        folder = snapshot(spec.repo, commit_or_branch, main_files(), fetch=fetch)
        commit = folder.name
        if (folder / 'model_index.json').exists():
            refuse_missing(model, folder, commit, (denoiser_in(folder), 'vae', 'scheduler'))
        elif not (folder / denoiser_in(folder) / 'config.json').exists():
            raise no_layout(spec.repo)
    elif commit_or_branch:
        raise UsageError(f'{model} is a folder, which has no revisions; got revision {commit_or_branch}')
    source = Source(read_row(spec, folder), model, folder, commit)
    check_files(source, LAYOUTS[source.spec.family].main)
    return source


def locate_vae(name: str, family: str) -> Source:
    """Locate the files of a standalone small VAE: `tiny`, a hub id or a folder. Raises UsageError, ModelUnavailable."""
    repo = LAYOUTS[family].small_vae if name == SMALL_VAE else name
    folder, commit = pathlib.Path(repo), None
    if not folder.is_dir():
        if not HUB_ID.fullmatch(repo):
            raise UsageError(f'unknown VAE {name}: use {SMALL_VAE}, a hub id such as org/name, or a folder with an AutoencoderTiny')
        folder = snapshot(repo, None, (config_name('.'), f'{weights_name(".")}*.safetensors*'))
        commit = folder.name
    source = Source(Spec(repo=repo), name, folder, commit)
    check_files(source, ('.',))
    return source


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
    return ('model_index.json', 'padseg.json', *(f'{part}/*' for part in all_main()))


def text_parts(source: Source) -> tuple[str, ...]:
    """Folders of the text encoders and tokenizers."""
    return LAYOUTS[source.spec.family].text


def snapshot(repo: str, revision: str | None, patterns: Sequence[str], *, fetch: bool = True) -> pathlib.Path:
    """Return the folder of a hub snapshot, downloading matching files unless cached. It may lack some; for SD3, T5 is never in it."""
    from huggingface_hub import errors, snapshot_download

    try:
        return pathlib.Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), local_files_only=not fetch))
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
            'unset it for the first run; `--model tiny` needs no download',
            'offline and not cached',
        )
    return ModelUnavailable(
        f'{repo} is not in the cache and the hub cannot be reached ({first}); `--model tiny` needs no download', 'offline and not cached'
    )


def check_files(source: Source, parts: Sequence[str]) -> None:
    """Raise ModelUnavailable if a file of these parts is missing, a configuration is not JSON, or weights do not match their header."""
    from safetensors import SafetensorError

    refuse_missing(source.model, source.folder, source.commit, parts)
    for part in parts:
        read_json(source.folder / part / config_name(part))
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
        raise ModelUnavailable(f'{model} is incomplete: no file named {", ".join(missing)} of {folder}; {remedy}', 'incomplete')


def needed(folder: pathlib.Path, part: str) -> list[str]:
    """Names of the files that a part is loaded from, whether or not they exist."""
    weights = [path.name for path in weight_files(folder, (part,))]
    vocabulary: list[str] = []
    if part.startswith('tokenizer') and not (folder / part / 'tokenizer.json').is_file():
        split = ['vocab.json', 'merges.txt']
        vocabulary = split if any((folder / part / name).is_file() for name in split) else ['tokenizer.json']
    return [config_name(part), *weights, *vocabulary]


def weight_files(folder: pathlib.Path, parts: Sequence[str]) -> list[pathlib.Path]:
    """Paths of the parts' safetensors files: one per part, or the shards that its index lists; they need not exist."""
    paths = []
    for part in parts:
        if name := weights_name(part):
            whole = folder / part / f'{name}.safetensors'
            index = whole.with_name(f'{whole.name}.index.json')
            sharded = not whole.is_file() and index.is_file()
            paths += [folder / part / name for name in shards(index)] if sharded else [whole]
    return paths


def shards(index: pathlib.Path) -> list[str]:
    names = read_json(index).get('weight_map')
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelUnavailable(f'{index} must contain weight_map, the file of each tensor')
    return sorted(set(names.values()))


def tensor_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Read the shape of each tensor from a safetensors file's header. Raises OSError or SafetensorError if the file is damaged."""
    from safetensors import safe_open

    with safe_open(path, 'np') as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def read_row(spec: Spec, folder: pathlib.Path) -> Spec:
    """Complete a model's facts with the family and block count of the transformer in the folder, then with its `padseg.json`."""
    config = folder / denoiser_in(folder) / 'config.json'
    values = read_json(config)
    kind = str(values.get('_class_name', 'SD3Transformer2DModel'))
    if kind not in FAMILIES:
        raise ModelUnavailable(f'{config} describes a {kind}; known: {", ".join(FAMILIES)}')
    if FAMILIES[kind] != spec.family:
        spec = BACKBONES[FAMILIES[kind]]._replace(repo=spec.repo)
    layers = sum(block_count(values, name, config) for name in DEPTHS[spec.family])
    spec = spec._replace(layers=layers, layer=min(spec.layer, layers - 1))
    own = folder / 'padseg.json'
    return own_row(spec, own) if own.exists() else spec


def block_count(values: dict[str, Any], name: str, config: pathlib.Path) -> int:
    count = values.get(name)
    if not isinstance(count, int) or count < 1:
        raise ModelUnavailable(f'{config} must say {name}, a number >= 1; got {count}')
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
        row = pydantic.TypeAdapter(Spec).validate_python({**spec._asdict(), **facts, 'own': own}, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ModelUnavailable(f'{path}: {first["loc"][0]}: {first["msg"]}; got {first["input"]!r}') from error
    if row.layers != spec.layers:
        raise ModelUnavailable(f'{path}: layers is {row.layers}, but the transformer has {spec.layers}')
    for name, low, high in (('layer', 0, row.layers - 1), ('steps', 1, None), ('side', 1, None), ('sequence', 1, None)):
        value = getattr(row, name)
        if value < low or (high is not None and value > high):
            raise ModelUnavailable(
                f'{path}: {name} is {f"one of {low}..{high}" if high is not None else f"a number >= {low}"}; got {value}'
            )
    return row


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read the JSON object in a file of a model's part. Raises ModelUnavailable if there is none."""
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelUnavailable(
            f'{path.parent.parent} is not a model in diffusers layout: {path.parent.name}/{path.name} is missing', 'incomplete'
        ) from error
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f'{path} is not valid JSON: {error}') from error
    if not isinstance(value, dict):
        raise ModelUnavailable(f'{path} must hold a JSON object')
    return value


def text_files(source: Source) -> list[pathlib.Path]:
    """Return the files of the text encoders and tokenizers, downloading them from the hub if needed."""
    if source.commit:
        snapshot(source.spec.repo, source.commit, [f'{part}/*' for part in text_parts(source)])
    return part_files(source.folder, text_parts(source))


def cache_home() -> pathlib.Path:
    """padseg's cache folder: $PADSEG_CACHE, or a folder in the user's cache."""
    home = os.environ.get('PADSEG_CACHE') or os.path.join(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'padseg')
    return pathlib.Path(home).expanduser()


def part_files(folder: pathlib.Path, parts: Sequence[str]) -> list[pathlib.Path]:
    return [path for part in parts for path in sorted((folder / part).glob('*')) if path.is_file()]


def content_hash(folder: pathlib.Path, paths: Sequence[pathlib.Path]) -> str:
    """SHA-256 over names and contents. Large files in the hub's cache are named by their SHA-256 and not read again."""
    digest = hashlib.sha256()
    for path in paths:
        blob = path.resolve().name
        whole = blob if path.is_symlink() and re.fullmatch('[0-9a-f]{64}', blob) else file_hash(path)
        digest.update(f'{path.relative_to(folder).as_posix()} {whole}\n'.encode())
    return digest.hexdigest()


def file_hash(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
