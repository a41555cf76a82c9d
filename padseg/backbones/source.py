"""Where a model's files are: the package, a folder, or the hub's cache; and what identifies their content."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from padseg.backbones.spec import BACKBONES
from padseg.backbones.spec import Spec
from padseg.errors import ModelUnavailable
from padseg.errors import UsageError

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
    elif pathlib.Path(model).is_dir():
        spec = Spec(repo=model)
    elif HUB_ID.fullmatch(name):
        spec, revision = Spec(repo=name), revision or tagged or None
    else:
        raise UsageError(f'unknown model {model}: use {", ".join(BACKBONES)}, a hub id such as org/name, or a folder in diffusers layout')
    folder = pathlib.Path(spec.repo)
    commit = None
    if not folder.is_dir():
        if not HUB_ID.fullmatch(spec.repo):
            raise ModelUnavailable(f'the files of {model} should be in {folder}, which does not exist')
        folder = snapshot(spec.repo, revision, MAIN)
        commit = folder.name
    return Source(read_row(spec, folder), model, folder, commit)


def snapshot(repo: str, revision: str | None, patterns: Sequence[str]) -> pathlib.Path:
    """The hub's files that match, downloaded unless cached. The text encoder T5 is never among them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub import errors

    try:
        return pathlib.Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        raise ModelUnavailable(f'{repo} is gated: accept its licence on https://huggingface.co/{repo}, then `hf auth login`') from error
    except errors.RevisionNotFoundError as error:
        raise ModelUnavailable(f'{repo} has no revision {revision}') from error
    except errors.RepositoryNotFoundError as error:
        raise ModelUnavailable(f'{repo} is not on the hub, or is private: check the name, or `hf auth login`') from error
    except (OSError, errors.EntryNotFoundError) as error:
        first = str(error).splitlines()[0]
        raise ModelUnavailable(
            f'{repo} is not in the cache and the hub cannot be reached ({first}); `--model tiny` needs no download'
        ) from error


def read_row(spec: Spec, folder: pathlib.Path) -> Spec:
    """The row with the number of blocks that the folder's transformer has, and whatever its `padseg.json` says."""
    config = read_json(folder / 'transformer' / 'config.json')
    layers = int(config['num_layers'])
    spec = spec._replace(layers=layers, layer=min(spec.layer, layers - 1))
    own = folder / 'padseg.json'
    row = read_json(own) if own.exists() else {}
    unknown = sorted(set(row) - set(Spec._fields) | set(row) & {'repo', 'family'})
    if unknown:
        raise ModelUnavailable(f'{own} has keys that are not settings of a model: {", ".join(unknown)}')
    return spec._replace(**row)


def read_json(path: pathlib.Path) -> dict[str, object]:
    try:
        return dict(json.loads(path.read_text(encoding='utf-8')))
    except FileNotFoundError as error:
        raise ModelUnavailable(
            f'{path.parent.parent} is no model in diffusers layout: {path.parent.name}/{path.name} is missing'
        ) from error
    except ValueError as error:
        raise ModelUnavailable(f'{path} is not valid JSON: {error}') from error


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
