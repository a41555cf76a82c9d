"""Evaluations that are killed, or find the disk full, at every change they make to their output folder."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from support.faults import ENDED_BY, UNTOUCHED, install_fault

from padseg.commands import main

CONFLICT = 6
NOBODY = 65534
FEWEST = 30  # writes of an evaluation of three pictures


def at_every_write(command: list[str], earlier: list[str], out: Path, fault: str, first: int, every: int) -> int:
    """Do `padseg eval` again and again over what `earlier` left, with the fault at another write each time.

    These are the first few writes, then one of so many. Whatever the fault leaves, the same command gives what it would have given,
    without --overwrite too unless it refuses, and so does the earlier one. All arguments end in --out's folder.
    """
    begun, broken = out.with_name('begun'), out.with_name('broken')
    commands = [command, [word for word in command if word != '--overwrite'], *([earlier] if earlier else [])]
    hush()
    import_for([*command[:-1], str(out.with_name('warm'))])
    if earlier:
        assert run(earlier) == 0
        out.rename(begun)
    expected = {}
    for words in commands:
        shutil.rmtree(out, ignore_errors=True)
        assert run(words) == 0
        expected[tuple(words)] = results(out)
    number = 0
    while True:
        number += 1 if number < first else every
        put(begun, out)
        code = run(command, out, fault, number)
        if code == UNTOUCHED:
            assert number > FEWEST
            return 0
        assert code == ENDED_BY[fault], (number, code)
        put(out, broken)
        for words in commands:
            put(broken, out)
            code = run(words)
            assert code in ((0, CONFLICT) if '--overwrite' not in words and earlier else (0,)), (number, words, code)
            assert code or results(out) == expected[tuple(words)], (number, words)
            assert code or not list(out.rglob('.padseg-*')), number


def put(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, target)


def run(command: list[str], out: Path | None = None, fault: str = '', number: int = 0) -> int:
    """Exit code of padseg in a child, with a fault before the so-manieth write below a folder if there is one."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        seen = install_fault(out, fault, number) if out else [0]
        os._exit(main(command) or (0 if seen[0] >= number else UNTOUCHED))
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def import_for(command: list[str]) -> None:
    """Import what padseg imports for a command, once instead of in every child; it runs in one itself, see `faults.run_in_child`."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            code = main(command)
            os.write(writer, ' '.join(name for name in sys.modules if name.startswith('padseg.')).encode())
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as names:
        for name in names.read().split():
            importlib.import_module(name)
    assert os.waitpid(child, 0)[1] == 0


def hush() -> None:
    """Whatever is printed from now on goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def results(out: Path) -> tuple[object, ...]:
    """What an evaluation says, but for the order of its lines."""
    record = json.loads((out / 'scores.json').read_text())
    return record, sorted((out / 'pictures.jsonl').read_text().splitlines()), (out / 'per_image.csv').read_bytes()


def as_nobody(folder: Path, command: list[str]) -> int:
    """padseg as a user who may read all below a folder, and write what its permissions allow; all is imported before."""
    hush()
    assert main([*command[:-1], str(folder / 'warm')]) == 0
    for path in folder, *folder.parents:
        if path.owner() == 'root' and os.getuid() == 0 and str(path).startswith(tempfile.gettempdir()):
            path.chmod(path.stat().st_mode | 0o055)
    if os.getuid() == 0:
        os.setuid(NOBODY)
    return main(command)
