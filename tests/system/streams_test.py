"""Standard streams that are closed or full, of a real process: exit codes, and files that stay what they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# what a command may do: open a file, and write to both streams
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from padseg.system.streams import close_stdout, open_streams
from padseg.errors import PadsegError

def main():
    with open(sys.argv[2], 'w') as file:
        print('message', file=sys.stderr, flush=True)
        print('data' * int(sys.argv[3]))
        file.write('kept')
        assert min(file.fileno(), 3) == 3
    print('another', file=sys.stderr)
    return 0

open_streams()
try:
    code = close_stdout(main())
except PadsegError as error:
    print(error, file=sys.stderr)
    code = error.exit_code
raise SystemExit(code)
"""


@pytest.mark.parametrize('size', [1, 100_000])
@pytest.mark.parametrize(
    ('streams', 'code', 'out', 'err'),
    [
        ('', 0, 'data', ['message', 'another']),
        ('2>&-', 0, 'data', []),
        ('2>/dev/full', 0, 'data', []),
        ('>&-', 0, '', ['message', 'another']),
        ('<&- >&- 2>&-', 0, '', []),
        ('>/dev/full', 7, '', None),
        ('>/dev/full 2>/dev/full', 7, '', []),
        ('| true', 141, '', None),
    ],
)
def test_streams(tmp_path, size, streams, code, out, err):
    if 'full' in streams and not Path('/dev/full').exists():
        pytest.skip('this system has no full device')
    arguments = [sys.executable, '-c', PROGRAM, str(ROOT), str(tmp_path / 'file'), str(size)]
    if streams == '| true':
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.close()  # which nobody will read
        stdout, stderr, returncode = '', process.stderr.read(), process.wait()
        process.stderr.close()
        if size > 1:
            assert returncode == 1 and 'BrokenPipeError' in stderr  # in the midst of a command, where click sees to it
            return
    else:
        ran = subprocess.run(['sh', '-c', f'"$@" {streams}', 'sh', *arguments], capture_output=True, text=True)
        stdout, stderr, returncode = ran.stdout, ran.stderr, ran.returncode
    assert (returncode, stdout.strip()) == (code, out * size), stderr
    if err is not None:
        assert stderr.split() == err
    elif code == 7:
        assert 'cannot write to stdout: No space left on device' in stderr
    if size == 1 or code == 0:
        assert (tmp_path / 'file').read_text() == 'kept'
