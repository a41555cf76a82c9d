"""The texts that pictures are made from, and the names of the pictures."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from padseg.errors import UsageError
from padseg.images import ImageError, Reading
from padseg.images.files import contents
from padseg.system.ledger import without_repetition

COLUMNS = ('prompt', 'text', 'caption')  # of a table, the first of these that it has
KINDS = ('.txt', '.csv', '.tsv', '.json', '.jsonl')
MOST_BYTES = 2**26  # of a file of prompts
LONGEST = 10_000  # characters of a prompt
MOST = 10_000_000  # pictures
SLUG, MARK = 40, 12  # characters of a name that come from the words, and of the hash
HIGHEST = 2**63  # a seed is below


class Item(NamedTuple):
    """A picture to be made. name: of its file, without suffix; it depends on prompt and seed alone."""

    name: str
    prompt: str
    seed: int


def items(prompts: Sequence[str], seeds: Sequence[int]) -> list[Item]:
    """Every prompt with every seed, prompt by prompt. A prompt that comes again is left out. UsageError if they are too many."""
    texts = list(dict.fromkeys(prompts))
    if len(texts) * len(seeds) > MOST:
        raise UsageError(f'{len(texts)} prompts with {len(seeds)} seeds are more than {MOST} pictures')
    stems = [stem(text) for text in texts]
    return [Item(f'{name}-{seed}', text, seed) for name, text in zip(stems, texts, strict=True) for seed in seeds]


def stem(prompt: str) -> str:
    """The words of a prompt as far as file names go, and the start of its SHA-256: a-red-square-1f3a9c2b04d7."""
    plain = unicodedata.normalize('NFKD', prompt).encode('ascii', 'ignore').decode().lower()
    words = re.sub('[^a-z0-9]+', '-', plain)[:SLUG].strip('-')
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:MARK]
    return f'{words}-{digest}' if words else digest


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file, in order; see `in_text` for its forms. UsageError, naming the place, for one that cannot be used."""
    if path.suffix.lower() not in KINDS:
        raise UsageError(f'{path} must be one of {", ".join(KINDS)}')
    try:
        text = contents(path, Reading(max_bytes=MOST_BYTES)).decode('utf-8-sig')
    except OSError as error:
        raise UsageError(f'{path} cannot be read: {error.strerror}') from error
    except ImageError as error:
        raise UsageError(f'{path} cannot be read: {error}') from error
    except UnicodeDecodeError as error:
        raise UsageError(f'{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}') from error
    prompts = [checked(prompt, f'{path}, {place}') for place, prompt in in_text(text, path)]
    if not prompts:
        raise UsageError(f'{path} has no prompts')
    return prompts


def in_text(text: str, path: Path) -> list[tuple[str, str]]:
    """The prompts in a text with their places, by the file's kind. UsageError for what is not of it.

    .txt: one a line, blank lines are skipped; .csv, .tsv: a table whose heading names a column of COLUMNS, quoted line breaks included;
    .json: a list or an object of texts; .jsonl: a text a line. In place of a text, an object with a key of COLUMNS.
    """
    kind = path.suffix.lower()
    numbered = enumerate(re.split('\r\n|\r|\n', text), 1)  # no other character, such as U+2028, ends a line
    if kind == '.txt':
        return [(f'line {number}', line) for number, line in numbered if line.strip()]
    try:
        if kind in ('.csv', '.tsv'):
            return in_table(text, path)
        if kind == '.jsonl':
            lines = [
                (f'line {number}', json.loads(line, object_pairs_hook=without_repetition)) for number, line in numbered if line.strip()
            ]
            return [(place, of_object(value, f'{path}, {place}')) for place, value in lines]
        values = json.loads(text, object_pairs_hook=without_repetition)
    except (ValueError, RecursionError, csv.Error) as error:
        raise UsageError(f'{path} cannot be read as {kind[1:].upper()}: {error}') from error
    named = values.items() if isinstance(values, dict) else enumerate(values, 1) if isinstance(values, list) else None
    if named is None:
        raise UsageError(f'{path} must hold a list of prompts, or an object of them')
    return [(f'entry {name}', of_object(value, f'{path}, entry {name}')) for name, value in named]


def in_table(text: str, path: Path) -> list[tuple[str, str]]:
    table = csv.DictReader(io.StringIO(text, newline=''), delimiter='\t' if path.suffix.lower() == '.tsv' else ',', strict=True)
    column = next((name for name in COLUMNS if name in (table.fieldnames or ())), None)
    if column is None:
        raise UsageError(f'{path} has no column {" or ".join(COLUMNS)}; its first line is {", ".join(table.fieldnames or ())[:100]!r}')
    rows = [(f'line {table.line_num}', row[column]) for row in table]
    lacking = next((place for place, value in rows if value is None), None)
    if lacking:
        raise UsageError(f'{path}, {lacking} has no {column}')
    return [(place, value) for place, value in rows if value.strip()]


def of_object(value: object, place: str) -> str:
    if isinstance(value, dict):
        value = next((value[name] for name in COLUMNS if name in value), None)
    if not isinstance(value, str):
        raise UsageError(f'{place} is not a prompt: a text, or an object with {" or ".join(COLUMNS)}')
    return value


def checked(prompt: str, place: str = 'the prompt') -> str:
    """The prompt without blanks at its ends. UsageError for one that is too long or holds characters that no text has."""
    prompt = prompt.strip()
    if len(prompt) > LONGEST:
        raise UsageError(f'{place} has {len(prompt)} characters; at most {LONGEST} are read')
    strange = next((letter for letter in prompt if unicodedata.category(letter) in ('Cc', 'Cs') and letter not in '\t\n\r'), None)
    if strange:
        raise UsageError(f'{place} holds the character {ascii(strange)}, which is not text')
    return prompt


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse seeds: `7`, `0..4` (which is 0, 1, 2, 3, 4) and lists of these, `0..2,10`. UsageError for anything else, or a seed twice."""
    seeds: list[int] = []
    for part in text.split(','):
        match = re.fullmatch(r'\s*(\d{1,19})(?:\.\.(\d{1,19}))?\s*', part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < HIGHEST:
            raise UsageError(f'seeds are numbers and ranges such as 0..4 or 0,2,10..12; got {text!r}')
        if last - first >= MOST:
            raise UsageError(f'seeds are at most {MOST}; got {text!r}')
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f'a seed is given twice: {text!r}')
    return tuple(seeds)
