"""Text of others on terminals and in tables: it stays on its line, and does nothing."""

from __future__ import annotations

import ast
import csv
import io
import json
import logging
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies
from support.runs import HAND_MADE, put_run

from padseg.commands import main
from padseg.system.streams import Messages
from padseg.system.text import csv_cell, printable, say, warn

ROOT = Path(__file__).parents[2]
HOSTILE = 'a\x1b]0;OWNED\x07\x1b[2J\n0 failed\u202e\u2028\x85.png'
SHOWN = r'a\x1b]0;OWNED\x07\x1b[2J\n0 failed\u202e\u2028\x85.png'


@pytest.mark.parametrize(
    ('text', 'shown'),
    [
        ('plain é 日本 😀.png', 'plain é 日本 😀.png'),
        ('', ''),
        (r'back\slash', r'back\slash'),
        (HOSTILE, SHOWN),
        ('tab\tand\rreturn', r'tab\tand\rreturn'),
        ('\udcff.png', r'\udcff.png'),
        ('\0\x7f\x9b', r'\x00\x7f\x9b'),
        ('\ufeff\u200b\u2066', r'\ufeff\u200b\u2066'),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


@given(strategies.text(strategies.characters(exclude_categories=())))
def test_what_is_printable_is_one_line_that_can_be_written(text):
    shown = printable(text)
    assert shown.isprintable() and len(shown.splitlines()) <= 1
    assert printable(shown) == shown and shown.encode().decode() == shown


@pytest.mark.parametrize('text', ['=1+1', '+1', '-1', '@SUM(A1)', ' =1+1', '\t=1', '\r\n=1', '＝1', '=HYPERLINK("http:||evil","x").png'])
def test_a_formula_is_text_in_a_table(text):
    table = io.StringIO()
    csv.writer(table).writerow([csv_cell(text), csv_cell('cat')])
    (cell, other), *more = csv.reader(io.StringIO(table.getvalue()))
    assert cell[0] not in '=+-@＝\t\r' and cell.strip()[0] not in '=+-@＝' and other == 'cat' and not more


@pytest.mark.parametrize('text', ['', ' ', 'cat', 'a=b', '1-2', "it's"])
def test_other_cells_are_as_they_are(text):
    assert csv_cell(text) == text


def test_what_a_stream_cannot_write_is_shown_as_python_does():
    stream = io.TextIOWrapper(io.BytesIO(), encoding='ascii', write_through=True)
    say('é \udcff', 'b\nc', to=stream)
    assert stream.buffer.getvalue() == rb'\xe9 \udcff' + b'\n' + rb'b\nc' + b'\n'  # type: ignore[attr-defined]


def test_commands_print_by_these_functions_only():
    """So a new message is safe too."""
    for path in (ROOT / 'padseg/commands').glob('*.py'):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(node, ast.Call)]
        names = {call.id if isinstance(call, ast.Name) else call.attr for call in calls if isinstance(call, (ast.Name, ast.Attribute))}
        assert not names & {'print', 'echo', 'secho'}, path


@pytest.fixture
def hostile(tmp_path):
    """A picture that is none, with a name that would do something on a terminal, and one whose name is no UTF-8."""
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / HOSTILE).write_bytes(b'x')
    (tmp_path / 'in' / '\udcff.png').write_bytes(b'x')
    return tmp_path


def quiet(text: str) -> bool:
    return all(letter.isprintable() or letter == '\n' for letter in text)


def test_names_in_a_dry_run(hostile, capsys):
    arguments = ['run', '--dir', str(hostile / 'in'), '--out', str(hostile / 'out'), '--dry-run']
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [SHOWN, r'\udcff.png']
    assert main([*arguments, '--json']) == 0
    assert json.loads(capsys.readouterr().out) == {'pending': [HOSTILE, '\udcff.png']}


def test_names_in_errors_and_events(hostile, capsys):
    out, method = str(hostile / 'o\x1b[2J\n'), ('--method', 'felzenszwalb')
    run = ['run', '--dir', str(hostile / 'in'), '--out', out, *method, '--no-progress']
    assert main(run) == 3
    said = capsys.readouterr().err
    assert quiet(said) and len(said.splitlines()) == 1 and r'o\x1b[2J\n' in said
    assert main([*run, '--log-json']) == 3
    said = capsys.readouterr().err
    assert quiet(said) and said.isascii()
    events = [json.loads(text) for text in said.splitlines()]
    assert {event['input'] for event in events if event['event'] == 'picture'} == {HOSTILE, '\udcff.png'}
    for arguments, code in (
        (['run', '--dir', out + 'none', '--out', out], 5),
        (['run', out + 'none'], 5),
        (['run', '--dir', out, '--method', out], 2),
        (['doctor', '--model', out, '--out', out], 4),
    ):
        assert main(arguments) == code
        printed, said = capsys.readouterr()
        assert quiet(printed + said) and r'o\x1b[2J\n' in printed + said


def test_names_in_an_export(tmp_path, capsys):
    out = put_run(tmp_path, {HOSTILE: HAND_MADE})
    (out / f'labels/{HOSTILE}.png').unlink()
    assert main(['export', str(out), '--format', 'coco']) == 3
    said = capsys.readouterr().err
    assert quiet(said) and said.splitlines()[0] == f'padseg: {SHOWN}: {out}/labels/{SHOWN}.png: missing'


def test_log_records_that_nothing_handles_are_printed_as_one_line(capsys, monkeypatch):
    assert main(['--version']) == 0  # any command makes it so
    capsys.readouterr()
    assert logging.lastResort is not None
    record = logging.LogRecord('padseg', logging.WARNING, '', 1, '%s: first of 2', (HOSTILE,), None)
    logging.lastResort.emit(record)
    assert capsys.readouterr().err == f'{SHOWN}: first of 2\n'


def test_a_message_is_written_at_once(tmp_path, monkeypatch):
    with (tmp_path / 'messages').open('wb') as file:
        monkeypatch.setattr(sys, 'stderr', Messages(file, encoding='utf-8'))
        warn('one')
        assert (tmp_path / 'messages').read_text() == 'one\n'
