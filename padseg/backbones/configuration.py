"""Read the JSON files of a model strictly, since strangers may have written them, and check them against the weights."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from padseg.errors import ModelUnavailable

MOST_BYTES = 1 << 26  # of a JSON file; the weight index of a large model has a few hundred kilobytes
MOST_BLOCKS = 128  # allowed even if the weights have fewer; Flux.1 has 57, and its files may lack those that are not needed
MOST_THETA = 1 << 32  # of a base of angles, a million for Qwen3
MOST_PLACES = 1 << 16  # allowed for any number, even if no dimension of the weights is as large; SD3 has 36,864 positions
SCHEDULE = 'scheduler_config.json'
TEXTS, WEIGHTS = ('.json', '.txt', '.jinja', '.model'), ('.safetensors', '.bin')  # suffixes of what libraries open by themselves
POINTER = b'version https://git-lfs'

Shape = tuple[int, ...]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read the JSON object in a file of a model's part. Raises ModelUnavailable if there is none."""
    try:
        if not path.is_file():  # reading anything but a file could block
            raise ModelUnavailable(
                f'{path.parent.parent} is not a model in diffusers layout: {path.parent.name}/{path.name} is missing', 'incomplete'
            )
        if path.stat().st_size > MOST_BYTES:
            raise ModelUnavailable(f'{path} is too large to be the JSON of a model')
        refuse_pointer(path)
        constant = no_limit if path.name == SCHEDULE else refuse_constant
        value = json.loads(path.read_text(encoding='utf-8-sig'), parse_constant=constant, parse_float=finite_float)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnavailable(f'{path} is not valid JSON: {error}') from error
    if not isinstance(value, dict):
        raise ModelUnavailable(f'{path} must hold a JSON object')
    return value


def refuse_specials(folder: pathlib.Path) -> None:
    """Raise ModelUnavailable for what a library that reads a folder would wait for or fail at: a pipe or the like, a folder under the name
    of a file, or a text that is too large."""
    try:
        for path in sorted(folder.iterdir()):
            if not path.is_file() and (not path.is_dir() or path.suffix in (*TEXTS, *WEIGHTS)):
                raise ModelUnavailable(f'{path} is not a regular file')
            if path.suffix in TEXTS and path.stat().st_size > MOST_BYTES:
                raise ModelUnavailable(f'{path} is too large: at most {MOST_BYTES >> 20} MiB are read')
    except OSError as error:
        raise ModelUnavailable(f'{folder} cannot be read: {error.strerror}') from error


def refuse_pointer(path: pathlib.Path) -> None:
    """Raise ModelUnavailable if the file is a pointer that git-lfs left in place of the real file."""
    with path.open('rb') as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise ModelUnavailable(f'{path} is a pointer of git-lfs, not the file: run `git lfs pull` in the clone', 'incomplete')


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is not a JSON number')


def no_limit(name: str) -> None:
    """-Infinity, which diffusers writes into a schedule that has no limit. Where else it stands, the noise levels show it."""
    if name != '-Infinity':
        refuse_constant(name)


def finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text} is too large')
    return value


def check_network(config: Mapping[str, Any], path: pathlib.Path, shapes: Mapping[str, Shape]) -> None:
    """Raise ModelUnavailable for a configuration with more or larger blocks than weights of these shapes can have.

    path: the configuration's file, for the message.
    """
    if 'quantization_config' in config:
        raise ModelUnavailable(f'{path} describes quantised weights, which padseg does not read')
    blocks = 1 + max((int(part) for name in shapes for part in name.split('.') if part.isdecimal() and len(part) < 9), default=0)
    largest = max((length for shape in shapes.values() for length in shape), default=0)
    for name, value in numbers_in(config):
        counts = name.endswith('(length)') or 'layers' in name or 'blocks' in name
        most = max(blocks, MOST_BLOCKS) if counts else max(4 * largest, MOST_PLACES)
        if name.endswith('rope_theta'):
            most = MOST_THETA
        if abs(value) > most:
            held = f'blocks up to number {blocks - 1}' if counts else f'no dimension above {largest}'
            raise ModelUnavailable(f'{path}: {name} is {some_digits(value)}, but the weights beside it have {held}')


def numbers_in(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Yield all numbers in a configuration, with dotted names, and the lengths of its lists."""
    open_values: list[tuple[str, Any]] = list(config.items())
    while open_values:
        name, value = open_values.pop()
        if isinstance(value, Mapping):
            open_values += [(f'{name}.{key}', inner) for key, inner in value.items()]
        elif isinstance(value, list):
            yield f'{name} (length)', len(value)
            open_values += [(name, inner) for inner in value]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def some_digits(value: float) -> str:
    text = str(value)
    return text if len(text) <= 20 else f'a number of {len(text)} digits'
