"""The pictures of a folder with what they were made for: prompt, seed and categories, read from files that others may have written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

from pydantic import BaseModel, Field

from padseg.errors import NoImages, PadsegError, UsageError
from padseg.images import SUFFIXES, ImageError, Reading, contents, find
from padseg.system.files import inside
from padseg.system.ledger import UNREADABLE, Name, read_lines, without_repetition

MANIFEST = 'manifest.jsonl'
SHARDS = 'shards'
NAMES = ('file', 'file_name', 'filename', 'image', 'name', 'image_id')  # heads of the column of pictures, the first there is
TEXTS = ('prompt', 'caption', 'text')
SEED, CATEGORY = 'seed', 'category'
LARGEST = 1 << 26  # bytes of a file of texts
LONGEST = 10_000  # letters of a text; CLIP reads the first hundreds at most
DELIMITERS = {'.tsv': '\t'}
REMEDY = 'make the pictures again, or name their texts with --captions'
# What T2I-CompBench++ measures its categories by. Only CLIPScore needs no model that answers questions or detects objects.
BENCHMARK = {
    'color': 'BLIP-VQA',
    'shape': 'BLIP-VQA',
    'texture': 'BLIP-VQA',
    'spatial': 'UniDet',
    '3d_spatial': 'UniDet with depth',
    'numeracy': 'UniDet',
    'non_spatial': 'CLIPScore',
    'complex': '3-in-1 of BLIP-VQA, UniDet and CLIPScore',
}
PARTS = ('_val', '_train', '_val_seen', '_val_unseen')  # of names of the benchmark's files; `_val` is what it reports


class Shown(NamedTuple):
    """A picture's file. name: pairs it with that of another folder; seed: that it was made from."""

    name: str
    path: Path
    prompt: str | None = None
    seed: int | None = None


class Folder(NamedTuple):
    """The pictures of a folder, sorted by name. failed: those that were not made; unused: captions without a picture."""

    root: Path
    pictures: list[Shown]
    failed: int = 0
    unused: int = 0


class MadeLine(BaseModel):
    """What is read of a line of the manifest that `padseg generate` writes."""

    name: Name
    status: str
    prompt: Name | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] | None = None
    file: Name | None = None


def folder_of(root: Path, captions: Path | None = None) -> Folder:
    """The pictures of a folder that `padseg generate` made, or of any other, with the texts of a table if there is one.

    Raises NoImages, UsageError, OutputConflict for a record that leads out of the folder.
    """
    if captions is not None:
        return captioned(root, captions)
    if (root / MANIFEST).is_file():
        return generated(root)
    if (root / SHARDS).is_dir() and (root / 'run.json').is_file():
        raise NoImages(f'{root} has only records of shards: join them first, by the command that made them without --shard')
    pictures = [Shown(found.name, found.path) for found in find(root)]
    if not pictures:
        raise NoImages(f'there are no pictures in {root}')
    return Folder(root, pictures)


def generated(root: Path) -> Folder:
    """The pictures in the manifest of `padseg generate`; a later line of the same picture counts."""
    records = {record.name: record for record in read_lines(root / MANIFEST, MadeLine, remedy=REMEDY)}
    pictures = []
    for name, record in sorted(records.items()):
        if record.status == 'done':
            if record.file is None or record.prompt is None:
                raise UsageError(f'{root / MANIFEST} tells no prompt or no file of {name}: {REMEDY}')
            prompt = checked(record.prompt, f'{root / MANIFEST}, {name}') if record.prompt else None
            pictures.append(Shown(name, inside(root, record.file), prompt, record.seed))
    if not pictures:
        raise NoImages(f'there are no pictures in {root}')
    return Folder(root, pictures, failed=len(records) - len(pictures))


def captioned(root: Path, captions: Path) -> Folder:
    """The pictures of a folder with the texts of a table, which has a line for each; those without one keep none.

    A picture is named by its path in the folder, by its file's name, or by that without the suffix, if only one picture has it.
    """
    source = root / 'images' if (root / MANIFEST).is_file() and (root / 'images').is_dir() else root
    files = {found.name: found.path for found in find(source)}
    short = shortened_names(files)
    known: dict[str, tuple[str, int | None]] = {}
    unused = 0
    for place, row in rows_of(captions):
        given = value_of(row, NAMES, place)
        name = given if given in files else short.get(given)
        if name is None:
            unused += 1
        elif name in known:
            raise UsageError(f'{place}: a second text for {name}')
        else:
            known[name] = checked(value_of(row, TEXTS, place), place), seed_of(row, place)
    if not known:
        raise NoImages(f'no picture in {root} is named in {captions}')
    pictures = [Shown(name, path, *known.get(name, (None, None))) for name, path in sorted(files.items())]
    return Folder(root, pictures, unused=unused)


def shortened_names(names: Iterable[str]) -> dict[str, str]:
    """Pictures by their file's name, and by that without its suffix, where only one picture has it."""
    short: dict[str, str | None] = {}
    for name in names:
        last = name.rpartition('/')[2]
        for form in {last, last.rpartition('.')[0]}:
            short[form] = name if form not in short else None
    return {form: name for form, name in short.items() if name is not None and form}


def categories_of(path: Path) -> dict[str, tuple[str, ...]]:
    """The categories of prompts, by the prompt as `plain` leaves it: from a JSON or CSV file, or a folder with a text file for each.

    JSON: an object of lists of prompts by category, or a list of objects with `prompt` and `category`; CSV: columns of these names; or a
    folder such as T2I-CompBench's `examples/dataset`, of which only the `_val` files are read if it has any. Raises UsageError.
    """
    pairs = list(folder_pairs(path) if path.is_dir() else json_pairs(path) if path.suffix.lower() == '.json' else table_pairs(path))
    known: dict[str, dict[str, None]] = {}
    for prompt, category in pairs:
        known.setdefault(plain(checked(prompt, str(path))), {})[checked(category, str(path))] = None
    if not known:
        raise UsageError(f'{path} has no prompts')
    return {prompt: tuple(names) for prompt, names in known.items()}


def folder_pairs(folder: Path) -> Iterator[tuple[str, str]]:
    files = sorted(folder.glob('*.txt'))
    for path in [file for file in files if file.stem.endswith(PARTS[0])] or files:
        category = next((path.stem.removesuffix(part) for part in PARTS if path.stem.endswith(part)), path.stem)
        yield from ((line.strip(), category) for line in text_of(path).splitlines() if line.strip())


def json_pairs(path: Path) -> Iterator[tuple[str, str]]:
    try:
        stated = json.loads(text_of(path), object_pairs_hook=without_repetition)
    except UNREADABLE as error:
        raise UsageError(f'{path} is not JSON that can be read') from error
    if isinstance(stated, dict) and all(isinstance(prompts, list) for prompts in stated.values()):
        yield from ((prompt, category) for category, prompts in stated.items() for prompt in prompts)
    elif isinstance(stated, list) and all(isinstance(row, dict) for row in stated):
        yield from ((row.get(TEXTS[0]), row.get(CATEGORY)) for row in stated)
    else:
        raise UsageError(f'{path} must be an object with a list of prompts for each category, or a list of objects with prompt, category')


def table_pairs(path: Path) -> Iterator[tuple[str, str]]:
    return ((value_of(row, TEXTS, place), value_of(row, (CATEGORY,), place)) for place, row in rows_of(path))


def plain(prompt: str) -> str:
    """A prompt as it is compared with those of a list: in lower case, without the full stop, with single spaces."""
    return ' '.join(prompt.lower().split()).removesuffix('.').rstrip()


def rows_of(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The rows of a CSV file (TSV by its suffix) by the heads of their columns in lower case, each with its place in words."""
    reader = csv.reader(io.StringIO(text_of(path), newline=''), delimiter=DELIMITERS.get(path.suffix.lower(), ','), strict=True)
    heads: Sequence[str] = ()
    try:
        for row in reader:
            place = f'{path}, line {reader.line_num}'
            if not heads:
                heads = [head.strip().lower() for head in row]
            elif row:
                if len(row) != len(heads):
                    raise UsageError(f'{place}: {len(row)} columns, where the first line names {len(heads)}')
                yield place, dict(zip(heads, row, strict=True))
    except csv.Error as error:
        raise UsageError(f'{path}, line {reader.line_num}: {error}') from error


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, perhaps after a byte order mark. Raises UsageError."""
    try:
        return contents(path, Reading(max_bytes=LARGEST)).decode('utf-8-sig')
    except OSError as error:
        refuse(path, error.strerror or str(error), error)
    except ImageError as error:
        refuse(path, str(error), error)
    except UnicodeDecodeError as error:
        refuse(path, 'not text in UTF-8', error)


def refuse(path: Path, reason: str, error: Exception) -> NoReturn:
    raise UsageError(f'{path}: {reason}') from error


def value_of(row: Mapping[str, str], heads: Sequence[str], place: str) -> str:
    """The value in the first column of these names. Raises UsageError if there is no such column."""
    for head in heads:
        if head in row:
            return row[head]
    raise UsageError(f'{place}: the first line must name a column {" or ".join(heads)}')


def seed_of(row: Mapping[str, str], place: str) -> int | None:
    text = row.get(SEED, '').strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise UsageError(f'{place}: a seed is a whole number; got {text[:100]}')
    return int(text)


def checked(text: Any, place: str) -> str:
    """A text that is one, and not endless. Raises UsageError."""
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f'{place}: a text is expected; got {str(text)[:100]!r}')
    if len(text) > LONGEST:
        raise UsageError(f'{place}: a text of {len(text)} letters; at most {LONGEST} are read')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f'{place}: not text in UTF-8') from error
    return text


def paired(ours: Folder, theirs: Folder) -> list[tuple[Shown, Shown]]:
    """The pictures of two folders with the same names; their suffixes do not matter, unless only these tell pictures of a folder apart.

    Raises NoImages if there are none, PadsegError if a pair has two prompts or seeds.
    """
    cut = all(len({without_suffix(picture.name) for picture in folder.pictures}) == len(folder.pictures) for folder in (ours, theirs))
    key = without_suffix if cut else str
    others = {key(picture.name): picture for picture in theirs.pictures}
    pairs = [(picture, others[key(picture.name)]) for picture in ours.pictures if key(picture.name) in others]
    if not pairs:
        raise NoImages(f'no picture in {theirs.root} has the name of one in {ours.root}')
    for one, other in pairs:
        for what in ('prompt', 'seed'):
            values = getattr(one, what), getattr(other, what)
            if None not in values and values[0] != values[1]:
                raise PadsegError(f'{one.name} has another {what} in {ours.root} than in {theirs.root}: these are no pairs')
    return pairs


def without_suffix(name: str) -> str:
    start, dot, suffix = name.rpartition('.')
    return start if start and f'{dot}{suffix}'.lower() in SUFFIXES else name
