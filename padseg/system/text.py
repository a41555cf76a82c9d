"""Text of others, such as names of files and classes, on its way to a terminal or a spreadsheet."""

from __future__ import annotations

FORMULA = tuple('=+-@\t\r\n＝＋－＠')  # what a spreadsheet takes for the start of a formula (OWASP, CSV injection)


def printable(text: str) -> str:
    """The text in one line: whatever is not shown as a letter, such as a line break or an escape sequence, as \\n or \\x1b."""
    return ''.join(letter if letter.isprintable() else letter.encode('unicode_escape').decode() for letter in text)


def csv_cell(text: str) -> str:
    """Text that a spreadsheet does not take for a formula: with an apostrophe before what would be one."""
    return f"'{text}" if text.startswith(FORMULA) else text
