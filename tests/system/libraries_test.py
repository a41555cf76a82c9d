"""Notes of libraries reach neither users of Python, at the first use of a model with an empty cache, nor users of a command."""

from __future__ import annotations

import builtins
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from padseg.system.libraries import imported

ROOT = Path(__file__).parents[2]

# Python, and then all commands that load a model, in a process where every library is imported for the first time
PROGRAM = """
import sys
import padseg
print(padseg.segment('data/images/scene-22.png').labels.shape)
from padseg.commands import main
images, labels, model, out = sys.argv[1:]
picked = ['--dir', images, '--include', 'scene-22.png', '--model', model, '--device', 'cpu', '--quiet']
codes = [
    main(['models']),
    main(['doctor', '--model', model, '--device', 'cpu']),
    main(['run', *picked, '--out', out + '/run', '--log-json']),
    main(['label', *picked, '--out', out + '/label', '--classes', 'cat, dog']),
    main(['eval', '--pred', out + '/run/labels', '--labels', labels, '--regions', '--allow-missing', '--quiet']),
    main(['analyze', '--dir', images, '--labels', labels, '--count', '1', '--model', model, '--out', out + '/analyze', '--quiet']),
]
import padseg.train.tiny
print('codes', codes)
"""


def test_no_garbage_is_collected_while_a_library_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, end in (('padseg_test_whole', ''), ('padseg_test_broken', '1 / 0')):
        (tmp_path / f'{name}.py').write_text(f'import gc\nimport builtins\nbuiltins.padseg_test_enabled = gc.isenabled()\n{end}\n')
    assert imported('padseg_test_whole').__name__ == 'padseg_test_whole'
    assert vars(builtins).pop('padseg_test_enabled') is False and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        imported('padseg_test_broken')
    assert vars(builtins).pop('padseg_test_enabled') is False and gc.isenabled()
    gc.disable()
    try:
        assert imported('padseg_test_whole') and not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.slow
def test_stderr_has_no_words_of_libraries(sd3_folder: Path, tmp_path: Path) -> None:
    """Also with a cold cache, and with whatever Python's own warnings are by default."""
    kept = {name: value for name, value in os.environ.items() if name != 'PYTHONWARNINGS' and not name.endswith('_VERBOSITY')}
    arguments = (str(ROOT / 'data/images'), str(ROOT / 'data/labels'), str(sd3_folder), str(tmp_path))
    environment = {**kept, 'PADSEG_CACHE': str(tmp_path / 'cache')}
    ran = subprocess.run((sys.executable, '-c', PROGRAM, *arguments), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [json.loads(line)['event'] for line in ran.stderr.splitlines()] == ['start', 'picture', 'end']  # of the run alone
    assert list((tmp_path / 'cache/prompts').iterdir())  # the text encoders did run
    assert ran.stdout.splitlines()[0] == '(256, 384)'
    assert ran.stdout.splitlines()[-1] == 'codes [0, 0, 0, 0, 0, 0]'
