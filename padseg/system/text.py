"""Text that others wrote, such as names of files and classes, on its way to a terminal or a spreadsheet.

Commands print by `say` only, and log records that Python prints pass through `OneLine`: what a name holds cannot move the cursor, begin
a line, or hide.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

FORMULA = '=+-@＝＋－＠'  # what spreadsheets take a cell for a formula by


def printable(text: str) -> str:
    """The text on one line, with what is not shown as itself as Python writes it: \\x1b, \\n, \\u202e, \\udcff for a byte of no UTF-8."""
    if text.isprintable():
        return text
    return ''.join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def csv_cell(text: str) -> str:
    """The text as the cell of a table: printable, and behind an apostrophe where a spreadsheet would take it for a formula."""
    cell = printable(text)
    return f"'{cell}" if cell.lstrip()[:1] in FORMULA and cell.strip() else cell


def say(*lines: str, to: TextIO | None = None) -> None:
    """Print each text as one line, on stdout unless said otherwise, in whatever letters the stream has."""
    stream = sys.stdout if to is None else to
    if stream is None:  # closed before Python began
        return
    encoding = getattr(stream, 'encoding', None) or 'utf-8'
    for line in map(printable, lines):
        print(line.encode(encoding, 'backslashreplace').decode(encoding), file=stream)


def warn(*lines: str) -> None:
    """Print each text as one line on stderr."""
    say(*lines, to=sys.stderr)


class OneLine(logging.Formatter):
    """Each message as one line of what can be printed."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(record.message)


def log_printable() -> None:
    """Let log records that nothing else handles, which Python prints on stderr, be lines of what can be printed."""
    if logging.lastResort:
        logging.lastResort.setFormatter(OneLine())
