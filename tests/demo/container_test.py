"""The Dockerfile and the Space: what they say fits the checkout, and their steps run, as far as that goes without a daemon."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import yaml

from padseg.commands import group
from padseg.version import __version__

ROOT = Path(__file__).parents[2]
TESTERS = ('hypothesis', 'playwright', 'pytest', 'pytest-timeout')


def steps() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile with their arguments."""
    text = '\n'.join(line for line in (ROOT / 'Dockerfile').read_text().splitlines() if not line.startswith('#')).replace('\\\n', ' ')
    return [(word, rest) for word, rest in (line.split(' ', 1) for line in text.splitlines())]


def pinned(name: str) -> str:
    return re.search(rf'^{name}==(\S+)$', (ROOT / 'constraints.txt').read_text(), re.MULTILINE)[1]


def test_container_is_small_locked_and_not_root():
    instructions = steps()
    words = [word for word, _ in instructions]
    assert instructions[0][1].endswith('-slim')
    assert dict(instructions)['USER'] == 'padseg' and words.index('USER') < words.index('ENTRYPOINT') and words.count('USER') == 1
    assert ('VOLUME', '/data') in instructions
    for word, rest in instructions:
        if word == 'COPY':
            assert all((ROOT / name).exists() for name in shlex.split(rest)[:-1])
    installs = [line for word, rest in instructions if word == 'RUN' for line in rest.split('&&') if 'pip install' in line]
    assert len(installs) == 3 and all('-c constraints.txt' in line for line in installs)


def test_container_starts_a_command_that_parses():
    said = dict(steps())
    assert json.loads(said['ENTRYPOINT']) == ['padseg']
    name, *words = json.loads(said['CMD'])
    context = group.get_command(click.Context(group), name).make_context(name, words)
    assert context.params['host'] == '0.0.0.0' and context.params['public'] and str(context.params['port']) == said['EXPOSE']


def test_space():
    _, front, _ = (ROOT / 'spaces/README.md').read_text().split('---\n', 2)
    matter = yaml.safe_load(front)
    assert matter['sdk'] == 'gradio' and matter['sdk_version'] == pinned('gradio') and (ROOT / 'spaces' / matter['app_file']).exists()
    program = (ROOT / 'spaces/app.py').read_text()
    compile(program, 'app.py', 'exec')
    assert len(program.splitlines()) <= 10
    wanted = (ROOT / 'spaces/requirements.txt').read_text()
    assert f'padseg-{__version__}-' in wanted
    for name in ('torch', 'opencv-python-headless'):
        assert f'{name}=={pinned(name)}\n' in wanted


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_steps_of_the_container_and_the_demo_in_a_browser(tmp_path):
    """Run the container's steps in a new environment, in a folder that has only what the container has, then browser_test.py in it,
    which starts the demo that was installed."""
    began = time.monotonic()
    subprocess.run([sys.executable, '-m', 'venv', tmp_path / 'venv'], check=True)
    source = tmp_path / 'src'
    source.mkdir()
    for word, rest in steps():
        if word == 'COPY':
            for name in shlex.split(rest)[:-1]:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, source / name)
    places = os.pathsep.join([str(tmp_path / 'venv/bin'), os.environ['PATH']])
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'} | {'PATH': places}
    (install,) = (rest for word, rest in steps() if word == 'RUN' and 'pip install' in rest)
    own_index = re.sub(r'--index-url \S+', '', install)  # the usual index of this machine
    ran = subprocess.run(['bash', '-ec', own_index], cwd=source, env=environment, capture_output=True, text=True)
    if ran.returncode and re.search('No matching distribution|ConnectionError|ProxyError', ran.stderr):
        pytest.skip(f'no package index with what the demo needs: {ran.stderr.splitlines()[-1]}')
    assert ran.returncode == 0, ran.stderr[-3000:]
    print(f'installed after {time.monotonic() - began:.0f} s')
    extra = ['pip', 'install', '-q', '-c', 'constraints.txt', *TESTERS]
    subprocess.run(extra, cwd=source, env=environment, check=True)
    tests = ['python', '-m', 'pytest', '-m', 'slow', '-rs', '-q', '-p', 'no:cacheprovider', 'tests/demo/browser_test.py']
    ran = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(ran.stdout[-3000:], ran.stderr[-1000:])
    assert ran.returncode == 0 and ' passed' in ran.stdout
