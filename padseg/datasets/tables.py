"""Map the numbers in label files to classes: names and tables, stored as JSON next to this module, and look-up."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from padseg.datasets.base import VOID, DatasetRow

if TYPE_CHECKING:
    from padseg.types import Array

FOLDER = Path(__file__).parent
UNDECLARED = -2  # a number that never occurs in a data set's files
BYTE = 256
DENSE = 65536  # values below this (16 bits, the most in a PNG) are counted with a table
LISTED = 20  # values shown in a message's histogram

Table = tuple[int, ...]  # class of each raw value from 0 on, VOID or UNDECLARED


@functools.cache
def facts(name: str) -> Any:
    """Load one of this package's JSON files."""
    return json.loads((FOLDER / f'{name}.json').read_text(encoding='ascii'))


def row_class_names(row: DatasetRow) -> tuple[str, ...]:
    """Names of the classes that a row scores, in order; empty for regions without classes."""
    names = tuple(facts(row.facts)['names']) if row.facts else ()
    return {None: names, 'first': ('background', *names), 'last': (*names, 'background')}[row.background]


def background_class(row: DatasetRow) -> int | None:
    """Number of the background class, or None."""
    return {None: None, 'first': 0, 'last': len(row_class_names(row)) - 1}[row.background]


def value_table(row: DatasetRow, values: str) -> Table | None:
    """Table for one way of encoding a row's classes; None for regions without classes."""
    if not row.facts:
        return None
    return expanded(facts(row.facts)['values'][values], int(row.background == 'first'), background_class(row))


def expanded(ranges: Mapping[str, str], first: int, background: int | None) -> Table:
    """Expand ranges {values: classes} to a table; both are 'n' or inclusive 'low-high', and later ranges override earlier ones.

    A single class applies to all its values; 'void' means no class, 'background' means `background`, or void if that is None. first: number
    of class 0.
    """
    words = {'void': VOID, 'background': VOID if background is None else background}
    table = [UNDECLARED] * (1 + max(span(values)[-1] for values in ranges))
    for values, classes in ranges.items():
        targets = [words[classes]] if classes in words else [first + number for number in span(classes)]
        places = span(values)
        for place, target in zip(places, targets if len(targets) > 1 else targets * len(places), strict=True):
            table[place] = target
    return tuple(table)


def span(text: str) -> range:
    """'3-5' is 3, 4, 5; '3' is 3."""
    low, _, high = text.partition('-')
    return range(int(low), int(high or low) + 1)


@functools.lru_cache(maxsize=8)
def lookup(table: Table) -> Array:
    """Extend the table to an int32 array that any byte can index."""
    return np.array(table + (UNDECLARED,) * (BYTE - len(table)), np.int32)


def look_up(raw: Array, table: Table) -> Array | None:
    """Map raw values to classes: (H, W) -> (H, W) int32; None if a value is undeclared."""
    numbers = lookup(table)
    if raw.dtype != np.uint8 and (raw.min() < 0 or raw.max() >= len(numbers)):
        return None
    classes = np.take(numbers, raw)
    return None if classes.min() == UNDECLARED else classes


def declared(table: Table) -> str:
    """Format the values that a table declares as ranges: '0..20, 255'."""
    values = [value for value, number in enumerate(table) if number != UNDECLARED]
    starts = [value for value in values if value - 1 not in values]
    ends = [value for value in values if value + 1 not in values]
    return ', '.join(f'{low}..{high}' if high > low else str(low) for low, high in zip(starts, ends, strict=True))


def histogram(raw: Array) -> dict[int, int]:
    """Count the pixels with each value, in ascending order of values."""
    if raw.min() < 0 or raw.max() >= DENSE:
        values, pixels = np.unique(raw, return_counts=True)
        return dict(zip(values.tolist(), pixels.tolist(), strict=True))
    counts = np.bincount(raw.ravel())
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def histogram_text(counts: Mapping[int, int]) -> str:
    """Format a histogram as one line: '0: 12, 3: 4'."""
    shown = ', '.join(f'{value}: {pixels}' for value, pixels in list(counts.items())[:LISTED])
    return shown + (f' and {len(counts) - LISTED} more values' if len(counts) > LISTED else '')


def listed_names(ids: str) -> tuple[str, ...]:
    """Read the names in one of this package's lists: COCO's have twelve digits, VOC's a year and six digits."""
    numbers = facts(ids)
    if isinstance(numbers, list):
        return tuple(f'{number:012}' for number in numbers)
    return tuple(f'{year}_{number:06}' for year, listed in numbers.items() for number in listed)
