"""Where a model's files are: the package, a folder, or the hub's cache; and what identifies their content."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import pydantic

from padseg.backbones.spec import BACKBONES
from padseg.backbones.spec import Spec
from padseg.errors import ModelUnavailable
from padseg.errors import UsageError
from padseg.options import Options

MAIN = ('model_index.json', 'padseg.json', 'transformer/*', 'vae/*', 'scheduler/*')
TEXT = ('text_encoder/*', 'text_encoder_2/*', 'tokenizer/*', 'tokenizer_2/*')
HUB_ID = re.compile(r'[\w.-]+/[\w.-]+')
BLOCK = 1 << 24


class Source(NamedTuple):
    """A located model. commit: of a hub snapshot, None for a folder."""

    spec: Spec
    model: str
    folder: pathlib.Path
    commit: str | None


def locate(model: str, revision: str | None = None) -> Source:
    """The files of a model and its row; `padseg.json` in the folder overrides the row. Nothing but small files is read yet."""
    name, _, tagged = model.partition('@')
    if model in BACKBONES:
        spec = BACKBONES[model]
    elif model and pathlib.Path(model).is_dir():
        spec = Spec(repo=model)
    elif HUB_ID.fullmatch(name):
        spec, revision = Spec(repo=name), revision or tagged or None
    else:
        raise unknown(model)
    folder = pathlib.Path(spec.repo)
    commit = None
    if not folder.is_dir():
        if not HUB_ID.fullmatch(spec.repo):
            raise ModelUnavailable(f'the files of {model} should be in {folder}, which does not exist')
        folder = snapshot(spec.repo, revision, MAIN)
        commit = folder.name
    elif revision:
        raise UsageError(f'{model} is a folder, which has no revisions; got revision {revision}')
    return Source(read_row(spec, folder), model, folder, commit)


def unknown(model: str) -> UsageError:
    return UsageError(f'unknown model {model}: use {", ".join(BACKBONES)}, a hub id such as org/name, or a folder in diffusers layout')


def snapshot(repo: str, revision: str | None, patterns: Sequence[str]) -> pathlib.Path:
    """The hub's files that match, downloaded unless cached. The text encoder T5 is never among them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub import errors

    try:
        return pathlib.Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except errors.HFValidationError as error:
        raise unknown(repo) from error
    except errors.GatedRepoError as error:
        raise ModelUnavailable(f'{repo} is gated: accept its licence on https://huggingface.co/{repo}, then `hf auth login`') from error
    except errors.RevisionNotFoundError as error:
        raise ModelUnavailable(f'{repo} has no revision {revision}') from error
    except errors.RepositoryNotFoundError as error:
        raise ModelUnavailable(f'{repo} is not on the hub, or is private: check the name, or `hf auth login`') from error
    except (OSError, errors.EntryNotFoundError, errors.HTTPError) as error:
        first = str(error).partition('\n')[0]
        raise ModelUnavailable(
            f'{repo} is not in the cache and the hub cannot be reached ({first}); `--model tiny` needs no download'
        ) from error


def read_row(spec: Spec, folder: pathlib.Path) -> Spec:
    """The row with the number of blocks that the folder's transformer has, and whatever its `padseg.json` says."""
    config = folder / 'transformer' / 'config.json'
    layers = read_json(config).get('num_layers')
    if not isinstance(layers, int) or layers < 1:
        raise ModelUnavailable(f'{config} must say num_layers, a number >= 1; got {layers}')
    spec = spec._replace(layers=layers, layer=min(spec.layer, layers - 1))
    own = folder / 'padseg.json'
    return own_row(spec, own) if own.exists() else spec


def own_row(spec: Spec, path: pathlib.Path) -> Spec:
    """The row with the settings of a `padseg.json`. Raises ModelUnavailable, naming the key, for one that is not known or not allowed."""
    settings = read_json(path)
    strange = sorted(set(settings) - set(Spec._fields) | set(settings) & {'repo', 'family'})
    if strange:
        raise ModelUnavailable(f'{path} has keys that are not settings of a model: {", ".join(strange)}')
    try:
        row = pydantic.TypeAdapter(Spec).validate_python({**spec._asdict(), **settings}, strict=True)
        Options().resolve(row)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ModelUnavailable(f'{path}: {first["loc"][0]}: {first["msg"]}; got {first["input"]!r}') from error
    except UsageError as error:
        raise ModelUnavailable(f'{path}: {error}') from error
    if row.layers != spec.layers:
        raise ModelUnavailable(f'{path}: layers is {row.layers}, but the transformer has {spec.layers}')
    return row


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file of a model's part. Raises ModelUnavailable if there is none."""
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelUnavailable(
            f'{path.parent.parent} is no model in diffusers layout: {path.parent.name}/{path.name} is missing'
        ) from error
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f'{path} is not valid JSON: {error}') from error
    if not isinstance(value, dict):
        raise ModelUnavailable(f'{path} must hold a JSON object')
    return value


def text_files(source: Source) -> list[pathlib.Path]:
    """The text encoders' and tokenizers' files, from the hub if they are not there yet."""
    if source.commit:
        snapshot(source.spec.repo, source.commit, TEXT)
    return files(source.folder, ('text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2'))


def files(folder: pathlib.Path, parts: Sequence[str]) -> list[pathlib.Path]:
    return [path for part in parts for path in sorted((folder / part).glob('*')) if path.is_file()]


def content_hash(folder: pathlib.Path, paths: Sequence[pathlib.Path]) -> str:
    """SHA-256 over names and contents; a large file of the hub's cache is named after its SHA-256 and not read again."""
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
