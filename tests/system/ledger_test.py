"""The ledger of an output folder: what is written comes back, wherever the one that wrote it was stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel

from padseg.errors import OutputConflict, UsageError
from padseg.system.files import atomic
from padseg.system.ledger import (
    Name,
    continued,
    differences,
    flattened,
    line,
    owned,
    read_header,
    read_lines,
    refuse_other_settings,
    write_header,
    write_lines,
)

ROOT = Path(__file__).parents[2]

# A job of five items, each with a file of its own, that is killed before the n-th opening for writing, renaming or removal below OUT.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from pydantic import BaseModel
from padseg.system.files import atomic
from padseg.system.ledger import continued, line, owned, read_header, read_lines, refuse_other_settings, write_header, write_lines

class Header(BaseModel):
    status: str = 'running'
    settings: dict[str, int] = {'side': 8}

class Item(BaseModel):
    name: str
    number: int

UNTOUCHED = 40
root = Path(sys.argv[1])

def job(out):
    with owned(out, 'other.json'):
        earlier = read_header(out / 'job.json', Header, 'a job')
        if earlier:
            refuse_other_settings(out, earlier.settings, Header().settings)
        kept = {item.name: line(item) for item in read_lines(out / 'items.jsonl', Item)}
        missing = [name for name in kept if not (out / name).exists()]
        assert not missing, missing  # a line is the last thing written of an item
        write_header(Header(), out / 'job.json')
        with continued(kept.values(), out / 'items.jsonl') as add:
            for number, name in enumerate('edcba'):
                if name not in kept:
                    with atomic(out / name) as temporary:
                        temporary.write_text(name)
                    kept[name] = line(Item(name=name, number=number))
                    add(kept[name])
        write_lines((kept[name] for name in sorted(kept)), out / 'items.jsonl')
        write_header(Header(status='finished'), out / 'job.json')

def child(out, n):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event not in ('open', 'os.rename', 'os.remove') or not str(arguments[0]).startswith(str(out)):
            return
        if event == 'open' and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)
    if n:
        sys.addaudithook(hook)
    try:
        job(out)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0 if count >= n else UNTOUCHED)

def forked(out, n=0):
    pid = os.fork()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else child(out, n)

def tree(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != '.lock'}

assert forked(root / 'whole') == 0
kills = 0
while (code := forked(root / f'{kills}', kills + 1)) != UNTOUCHED:
    assert code == -signal.SIGKILL, (kills, code)
    assert forked(root / f'{kills}') == 0, kills
    assert tree(root / f'{kills}') == tree(root / 'whole'), (kills, tree(root / f'{kills}'))
    kills += 1
print(kills)
"""


class Item(BaseModel):
    name: Name
    number: int = 0
    inside: dict[str, float | None] = {}


names = st.one_of(st.text(max_size=8), st.binary(max_size=6).map(os.fsdecode))  # as Python gives names that are no UTF-8
items = st.builds(
    Item, name=names, number=st.integers(), inside=st.dictionaries(st.text(max_size=3), st.none() | st.floats(0, 1), max_size=2)
)


@given(st.lists(items, max_size=4), st.booleans(), st.data())
def test_a_file_torn_at_any_byte_gives_its_whole_records_and_is_continued(records, short, data):
    lines = [line(record, exclude_defaults=short) for record in records]
    written = ''.join(lines).encode('ascii')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'items.jsonl')
        cut = data.draw(st.integers(0, len(written)))
        path.write_bytes(written[:cut])
        ends = [len(''.join(lines[: number + 1])) - 1 for number in range(len(lines))]  # of JSON, without the line break
        whole = sum(end <= cut for end in ends)
        back = list(read_lines(path, Item))
        assert back == records[:whole]
        with continued((line(record, exclude_defaults=short) for record in back), path) as add:
            for text in lines[whole:]:
                add(text)
                assert path.read_bytes().endswith(text.encode('ascii'))  # nothing waits in memory
        assert path.read_bytes() == written
        assert os.listdir(folder) == ['items.jsonl']


damage = st.one_of(
    st.binary(max_size=12).map(lambda text: text.replace(b'\n', b'')),
    st.sampled_from([b'null', b'[]', b'{}', b'{"name": "a", "number": "many"}', b'[' * 100_000, b'1' * 5000, b'\xff\xfe']),
)


@given(damage)
def test_a_line_that_is_no_record_is_named_unless_it_is_the_last(text):
    good = line(Item(name='a')).encode('ascii')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'items.jsonl')
        path.write_bytes(good + text + b'\n' + good)
        with pytest.raises(OutputConflict, match='items.jsonl, line 2 is not a record of a picture: choose another --out, or --overwrite'):
            list(read_lines(path, Item))
        path.write_bytes(good + text)
        assert list(read_lines(path, Item)) == [Item(name='a')]


def test_no_file_of_lines_holds_no_records(tmp_path):
    assert list(read_lines(tmp_path / 'none.jsonl', Item)) == []


@given(items)
def test_a_header_comes_back(record):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'job.json')
        assert read_header(path, Item, 'a job') is None
        write_header(record, path)
        assert read_header(path, Item, 'a job') == record
        assert json.loads(path.read_text('ascii')) == record.model_dump()


@given(damage)
def test_a_header_that_is_no_record_is_named(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'job.json')
        path.write_bytes(text)
        with pytest.raises(OutputConflict, match=re.escape(f'{path} is not a record of a job: choose another --out, or --overwrite')):
            read_header(path, Item, 'a job')


def test_a_header_and_lines_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'items.jsonl'
    write_lines([line(Item(name='a'))], path)

    def failing():
        yield line(Item(name='b'))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_lines(failing(), path)
    assert list(read_lines(path, Item)) == [Item(name='a')] and os.listdir(tmp_path) == ['items.jsonl']


def test_settings_that_differ_are_said():
    before = {'side': 8, 'rules': {'void': 'ignored', 'sum': {'of': 1}}, 'thresholds': [1, 2], 'gone': 'x'}
    now = {'side': 8.0, 'rules': {'void': 'class', 'sum': {'of': 1}}, 'thresholds': (1, 3), 'new': None}
    assert flattened(before) == {'side': 8, 'rules.void': 'ignored', 'rules.sum.of': 1, 'thresholds': [1, 2], 'gone': 'x'}
    assert differences(before, now) == [
        'gone x there, None now',
        'rules.void ignored there, class now',
        'thresholds [1, 2] there, (1, 3) now',
    ]
    words = 'OUT holds results made with other settings (side 8 there, 9 now): choose another --out, or --overwrite'
    with pytest.raises(OutputConflict, match=re.escape(words)):
        refuse_other_settings(Path('OUT'), {'side': 8}, {'side': 9})
    refuse_other_settings(Path('OUT'), {'thresholds': [1, 2]}, {'thresholds': (1, 2)})  # JSON knows no tuples


def test_a_folder_is_one_jobs_at_a_time_and_one_commands(tmp_path):
    out = tmp_path / 'new' / 'out'
    with owned(out, 'other.json'):
        with pytest.raises(OutputConflict, match='another run is writing to'), owned(out):
            pass
    with owned(out):  # which the first has left
        pass
    (out / 'other.json').write_text('{}')
    with (
        pytest.raises(OutputConflict, match='holds other.json, results of another command: choose another --out'),
        owned(out, 'other.json'),
    ):
        pass
    (tmp_path / 'file').write_text('')
    with pytest.raises(UsageError, match='cannot create the output folder'), owned(tmp_path / 'file' / 'out'):
        pass


def test_what_a_killed_job_left_half_written_is_removed(tmp_path):
    with atomic(tmp_path / 'items.jsonl') as temporary:
        temporary.write_text('half')
        left = temporary.with_name(f'{temporary.name}-kept')
        left.write_text('half')
    assert left.exists()
    with owned(tmp_path):
        assert not left.exists() and (tmp_path / 'items.jsonl').exists()


def test_a_job_killed_at_any_change_of_its_folder_is_finished_by_the_next(tmp_path):
    ran = subprocess.run([sys.executable, '-c', PROGRAM, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 25  # the lock, two headers, two files of lines and five items take two changes or more
