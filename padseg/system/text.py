"""Make text from others, such as names of files and classes, safe for terminals and spreadsheets.

Commands print only with `say`, and log records that Python prints pass through `OneLine`. So no name can move the cursor, start a new line
or hide text.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

FORMULA = '=+-@＝＋－＠'  # a cell that begins with one of these is a formula to spreadsheets


def printable(text: str) -> str:
    """The text on one line, unprintable characters escaped as in Python: \\x1b, \\n, \\u202e, \\udcff for a byte that is not UTF-8."""
    if text.isprintable():
        return text
    return ''.join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def csv_cell(text: str) -> str:
    """The text for a cell of a table: printable, with an apostrophe before what a spreadsheet would take for a formula."""
    cell = printable(text)
    return f"'{cell}" if cell.lstrip()[:1] in FORMULA and cell.strip() else cell


def say(*lines: str, to: TextIO | None = None) -> None:
    """Print each text as one line, on stdout by default. Characters that the stream's encoding lacks are escaped."""
    stream = sys.stdout if to is None else to
    if stream is None:  # closed before Python started
        return
    encoding = getattr(stream, 'encoding', None) or 'utf-8'
    for line in map(printable, lines):
        print(line.encode(encoding, 'backslashreplace').decode(encoding), file=stream, flush=stream is sys.stderr)


def warn(*lines: str) -> None:
    """Print each text as one line on stderr."""
    say(*lines, to=sys.stderr)


class OneLine(logging.Formatter):
    """Formats each message as one printable line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(record.message)


def log_printable() -> None:
    """Make each log record that Python itself prints, since nothing else handles it, one printable line."""
    if logging.lastResort:
        logging.lastResort.setFormatter(OneLine())
