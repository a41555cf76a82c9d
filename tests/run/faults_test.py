"""Real processes that are killed, or find the disk full, at every single change they make to the output folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

ROOT = Path(__file__).parents[2]

# A fault is put before the n-th opening for writing, renaming, removal or making of a folder below OUT, by Python's audit events. A full
# disk stays full.
PROGRAM = """
import errno, json, os, shutil, signal, sys, traceback
from pathlib import Path
import torch
from padseg.run import engine
from padseg.methods.stages import saved_maps
from padseg.backbones import load
from padseg.run.collect import collect
from padseg.run.convert import convert
from padseg.errors import ResourceExhausted
from padseg.run.job import Job
from padseg.run.selection import Selection

source, root, model, action, fault, every = sys.argv[1:]
torch.set_num_threads(1)
load(model)  # what it imports, the children need not import again
UNTOUCHED = 40
out, whole, start = Path(root, 'out'), Path(root, 'whole'), Path(root, 'start')
job = Job(Path(source), out, model=model, device='cpu', overlay=True, save_maps=True, coco=action == 'run')
parts = [job._replace(selection=Selection(shard=(i, 2)), coco=False) for i in (1, 2)]

def act():
    if action == 'run':
        engine.run(job)
    elif action == 'shards':
        for part in parts:
            engine.run(part)
    elif action == 'collect':
        collect([out], out, coco=True)
    else:
        convert(out, action)

def tree(folder):
    files = {str(path.relative_to(folder)): path for path in folder.rglob('*') if path.is_file() and path.name != '.lock'}
    found = {name: path.read_bytes() for name, path in files.items() if path.suffix not in ('.json', '.jsonl') or 'coco' in name}
    for name, path in files.items():
        if path.name == 'manifest.jsonl':
            found[name] = [{**json.loads(line), 'seconds': 0, 'stages': 0} for line in path.read_text().splitlines()]
        else:
            found.setdefault(name, None)
    return found

def child(n):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event not in ('open', 'os.rename', 'os.mkdir', 'os.remove') or not str(arguments[0]).startswith(str(out)):
            return
        if event == 'open' and not arguments[2] & (os.O_WRONLY | os.O_RDWR) or event == 'os.remove' and fault == 'full':
            return
        seen += 1
        if seen == n and fault == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if seen >= n:
            raise OSError(errno.ENOSPC, 'No space left on device')
    if n:
        sys.addaudithook(hook)
    try:
        act()
    except ResourceExhausted:
        os._exit(7)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0 if seen >= n else UNTOUCHED)

def forked(n=0):
    pid = os.fork()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else child(n)

def restart():
    shutil.rmtree(out, ignore_errors=True)
    if start.is_dir():
        shutil.copytree(start, out)

if action not in ('run', 'shards'):
    for each in parts if action == 'collect' else [job]:
        engine.run(each)
    out.rename(start)
    restart()
assert forked() == 0
out.rename(whole)
expected, faults, n = tree(whole), 0, 0
while True:
    n += int(every)
    restart()
    code = forked(n)
    if code == UNTOUCHED:
        break
    assert code == (-9 if fault == 'kill' else 7), (n, code)
    faults += 1
    if fault == 'full':
        assert not list(out.rglob('.padseg-*')), (n, list(out.rglob('.padseg-*')))
    assert forked() == 0, n
    found = tree(out)
    assert found == expected, (n, sorted(found.keys() ^ expected.keys()), [name for name in found if found[name] != expected.get(name)])
print(faults)
"""


@pytest.fixture
def pictures(tmp_path):
    for name, size in (('a.png', (40, 56)), ('sub/b.png', (48, 40))):
        rng = np.random.default_rng(len(name))
        path = tmp_path / 'in' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 200, (2, 2, 3)).repeat(-(-size[0] // 2), 0).repeat(-(-size[1] // 2), 1)[: size[0], : size[1]]
        PIL.Image.fromarray((coarse + rng.integers(0, 30, coarse.shape)).astype(np.uint8)).save(path)
    return tmp_path / 'in'


@pytest.mark.parametrize('fault', ['kill', 'full'])
@pytest.mark.parametrize(('action', 'fewest'), [('run', 25), ('shards', 25), ('collect', 8), ('coco-panoptic', 3)])
def test_at_every_write_nothing_is_lost_or_left(pictures, sd3_folder, tmp_path, fault, action, fewest):
    every = os.environ.get('PADSEG_TEST_EVERY', '7' if action in ('run', 'shards') else '2')
    command = [sys.executable, '-c', PROGRAM, pictures, tmp_path / 'made', sd3_folder, action, fault, every]
    (tmp_path / 'made').mkdir()
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    print(f'{action}: {ran.stdout.strip()} times {fault}')
    assert int(ran.stdout) >= fewest // int(every)
