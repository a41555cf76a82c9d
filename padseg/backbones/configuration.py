"""JSON files of a model, which strangers may have written: read strictly, and held against the weights before anything is built of them."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from padseg.errors import ModelUnavailable

MOST_BYTES = 1 << 26  # of a JSON file: the index of a large model's weights has some hundred kilobytes
MOST_BLOCKS = 128  # of a network whose weights do not hold that many: Flux.1 has 57, of which the files may lack those not needed
MOST_PLACES = 1 << 16  # of any number in a configuration whose weights have no dimension that is as large; SD3's have 36,864 places
SCHEDULE = 'scheduler_config.json'
POINTER = b'version https://git-lfs'

Shape = tuple[int, ...]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file of a model's part. Raises ModelUnavailable if there is none."""
    try:
        if not path.is_file():  # anything but a file could keep its reader waiting
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


def refuse_pointer(path: pathlib.Path) -> None:
    """ModelUnavailable for a file that git-lfs left in another's place."""
    with path.open('rb') as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        raise ModelUnavailable(f'{path} is a pointer of git-lfs, not the file: run `git lfs pull` in the clone', 'incomplete')


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is no number of JSON')


def no_limit(name: str) -> None:
    """-Infinity, which diffusers writes into a schedule that has no limit. Where else it stands, the noise levels show it."""
    if name != '-Infinity':
        refuse_constant(name)


def finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text} is too large for a number')
    return value


def check_network(config: Mapping[str, Any], path: pathlib.Path, shapes: Mapping[str, Shape]) -> None:
    """Raises ModelUnavailable for a configuration that asks for more blocks, or for larger ones, than weights of these shapes can have.

    path: where it was read, for the message.
    """
    if 'quantization_config' in config:
        raise ModelUnavailable(f'{path} describes quantised weights, which padseg does not read')
    blocks = 1 + max((int(part) for name in shapes for part in name.split('.') if part.isdecimal() and len(part) < 9), default=0)
    largest = max((length for shape in shapes.values() for length in shape), default=0)
    for name, value in numbers_in(config):
        counts = name.endswith('(length)') or 'layers' in name or 'blocks' in name
        most = max(blocks, MOST_BLOCKS) if counts else max(4 * largest, MOST_PLACES)
        if abs(value) > most:
            held = f'blocks up to number {blocks - 1}' if counts else f'no dimension above {largest}'
            raise ModelUnavailable(f'{path}: {name} is {some_digits(value)}, but the weights beside it have {held}')


def numbers_in(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """All numbers in a configuration with the names that lead to them, and the lengths of its lists."""
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
