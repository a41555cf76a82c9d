"""README: its commands and Python lines run, its tables say what the code says, and nothing that a user can meet is left out."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import cv2
import numpy as np
import pytest

import padseg
from padseg.commands import COMMANDS
from padseg.commands.flags import reading_flags, shown_default
from padseg.commands.run import SIGNALLED, SOME_FAILED
from padseg.datasets import DATASETS
from padseg.errors import PadsegError
from padseg.evaluation.protocols import PROTOCOLS
from padseg.exports import FORMATS
from padseg.exports.masks import COLUMNS
from padseg.images import DECODERS, ImageError
from padseg.methods.open_vocabulary import LabelOptions
from padseg.methods.options import GEOMETRIES, NORMALISATIONS
from padseg.methods.seg4diff import Options

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PICTURES = ('chelsea.jpg', 'more/rocket.jpg', 'scene-43.png')
# First words of lines that need a network, an index, a training, or the pictures that the tests leave out.
NOT_RUN = {'pip', 'bin/test', 'bin/train-tiny', '.venv/bin/python'}


def blocks(language: str) -> list[str]:
    every = re.findall(r'^```(\w*)\n(.*?)^```$', README, re.MULTILINE | re.DOTALL)
    return [text for name, text in every if name == language]


def shell_lines() -> list[str]:
    return [line for block in blocks('bash') for line in block.splitlines() if line and line[0] != '#']


def run_lines() -> list[str]:
    return list(dict.fromkeys(line for line in shell_lines() if line.split()[0] not in NOT_RUN))


@pytest.fixture(scope='module')
def checkout(tmp_path_factory: pytest.TempPathFactory, sd3_folder: Path) -> Path:
    """A folder with three of the pictures, in which all commands of README have run."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in PICTURES:
        (folder / 'data/images' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / 'data/images' / name, folder / 'data/images' / name)
    (folder / 'data/labels').mkdir()
    shutil.copy(ROOT / 'data/labels/scene-43.png', folder / 'data/labels')
    (folder / 'bin').mkdir()
    (folder / 'bin/padseg').write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m padseg "$@"\n')
    (folder / 'bin/padseg').chmod(0o755)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PATH': f'{folder}/bin{os.pathsep}{os.environ["PATH"]}'}
    for line in run_lines():
        # the published weights are gated: a small random model of the same classes takes their place
        line = line.replace('--model sd3', f'--model {shlex.quote(str(sd3_folder))}')
        ran = subprocess.run(['bash', '-ec', line], cwd=folder, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, f'{line}\n{ran.stdout}{ran.stderr}'
    return folder


def test_commands_run_and_write_what_readme_says(checkout):
    assert len(run_lines()) > 4
    tree = next(block for block in blocks('') if block.startswith('out/'))
    rocket = 'more/rocket.jpg'
    for path in ('run.json', 'manifest.jsonl', 'failures.jsonl', f'labels/{rocket}.png', f'masks/{rocket}/', f'overlays/{rocket}.jpg'):
        assert path.split('/')[0] in tree and path.removeprefix(path.split('/')[0]).lstrip('/') in tree
        assert (checkout / 'out' / path).exists()
    written = {path.name for path in (checkout / 'out').iterdir() if path.name[0] != '.'}
    assert written == set(re.findall(r'^.── ([\w.]+)', tree, re.MULTILINE))


def test_every_shell_line_is_known():
    assert {line.split()[0] for line in shell_lines()} <= NOT_RUN | {'bin/padseg', 'padseg', 'mkdir'}
    for program in re.findall(r'\bbin/[\w-]+', '\n'.join(shell_lines()).replace('.venv/bin/python', '')):
        assert os.access(ROOT / program, os.X_OK), program


def test_python_lines_run(checkout):
    program = '\n'.join(blocks('python'))
    assert len(blocks('python')[0].split('\n\n')[1].splitlines()) == 3
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    ran = subprocess.run([sys.executable, '-c', program], cwd=checkout, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert len(re.findall(r'^[\d.]+ \d+ regions$', ran.stdout, re.MULTILINE)) == 3
    assert (checkout / 'chelsea.png').exists()


def test_first_screen():
    screen = README[: README.index('## Install')]
    for line in ('bin/padseg run --dir data/images --out out', 'bin/test', 'backbone = padseg.load()'):
        assert line in screen.splitlines()
    assert '(data/result.jpg)' in screen


def test_options_are_those_of_the_code():
    for field in dataclasses.fields(Options):
        name = field.name.replace('_', '-')
        flags = [f'--{name}', f'--no-{name}'] if name == 'components' else [f'--{name}']
        default = "the model's own" if field.default is None else f'`{field.default}`'
        choices = ', '.join(f'`{choice}`' for choice in field.metadata.get('choices', ()))
        words = f'{field.metadata["help"]}: {choices}' if choices else field.metadata['help']
        assert f'| {", ".join(f"`{flag}`" for flag in flags)} | {default} | {words} |\n' in README
    table = README[README.index('| option | default |') :].split('\n\n')[0]
    assert len(table.splitlines()) == 2 + len(dataclasses.fields(Options))


def test_options_of_names_are_those_of_the_code():
    for field in dataclasses.fields(LabelOptions):
        name = field.name.replace('_', '-')
        flags = [f'--{name}', f'--no-{name}'] if isinstance(field.default, bool) else [f'--{name}']
        choices = ', '.join(f'`{choice}`' for choice in field.metadata.get('choices', ()))
        words = f'{field.metadata["help"]}: {choices}' if choices else field.metadata['help']
        row = next(
            row
            for row in README.splitlines()
            if row.startswith(f'| {", ".join(f"`{flag}`" for flag in flags)} |') and row.endswith(f'| {words} |')
        )
        assert row.split(' | ')[1].strip('`') == shown_default(field)
    assert len(rows('option of names')) == len(dataclasses.fields(LabelOptions))


def test_options_of_reading_are_those_of_the_code():
    table = README[README.index('How files become pictures:') :].split('\n\n')[1]
    stated = dict(re.findall(r'^\| `(--[\w-]+)` \| `?(\w+)`? \|', table, re.MULTILINE))
    command = click.command()(reading_flags(lambda **values: None))
    assert list(stated) and set(stated) == {option.opts[0] for option in command.params}
    for option in command.params:
        default = option.get_default(click.Context(command))
        known = str(default) if isinstance(default, (int, str)) and not isinstance(default, bool) else 'off'
        assert stated[option.opts[0]] == ('none' if option.nargs == 2 else known)


def rows(heading: str) -> list[str]:
    """First cells of the table with this heading."""
    table = README[README.index(f'| {heading} |') :].split('\n\n')[0]
    return [line.split(' | ')[0].removeprefix('| ') for line in table.splitlines()[2:]]


def names(heading: str) -> list[str]:
    return [name for row in rows(heading) for name in re.findall(r'`([^`]+)`', row)]


def test_geometries_and_normalisations():
    assert names('geometry') == list(GEOMETRIES)
    assert all(f'`{name}`' in README[README.index('## How it works') :] for name in NORMALISATIONS)


def test_commands():
    assert names('command') == [f'padseg {name}' for name in COMMANDS]


def test_exit_codes():
    mendable = {error.exit_code for error in (PadsegError, ImageError, *PadsegError.__subclasses__())}
    known = {0, 1, SOME_FAILED, *mendable, *(SIGNALLED + number for number in (signal.SIGINT, signal.SIGTERM))}
    assert [int(code) for row in rows('exit code') for code in row.split(',')] == sorted(known)


def test_columns_of_metadata():
    assert sorted(names('column')) == sorted(COLUMNS)


def test_formats():
    assert all(f'{name}/' in README for name in FORMATS)
    assert all(name.lower() in README.lower() for name in DECODERS)


def test_data_sets_and_protocols():
    assert names('data set') == list(DATASETS)
    assert names('protocol') == list(PROTOCOLS)


def test_public_names():
    assert [name for name in padseg.__all__ if f'padseg.{name}' not in README and f'`{name}`' not in README] == []


def test_every_module_is_in_the_file_guide():
    modules = {path.relative_to(ROOT / 'padseg').as_posix() for path in (ROOT / 'padseg').rglob('*.py')}
    assert sorted(names('module')) == sorted(modules)


def test_every_sample_picture_is_credited():
    for line in (ROOT / 'data/README.md').read_text(encoding='utf-8').splitlines():
        if found := re.match(r'\| `([\w./-]+)`', line):
            assert f'`{found[1]}`' in README
            who = re.search(r'photographer ([^|;]+?) \|', line)
            assert who is None or who[1] in ' '.join(README.split())


def test_files_that_readme_links_exist():
    for target in re.findall(r'\]\((?!https:)([^)]+)\)', README):
        assert (ROOT / target).exists(), target


def test_options_of_the_training_exist():
    text = (ROOT / 'padseg/train_tiny.py').read_text(encoding='utf-8')
    used = {word for line in shell_lines() if line.startswith('bin/train-tiny') for word in line.split() if word.startswith('--')}
    assert used and all(f"click.option('{flag}'" in text for flag in used)


def result_sheet(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / 'bin/result-sheet', *arguments], capture_output=True, text=True)


def test_result_sheet_shows_pictures_and_overlays(tmp_path):
    for path in (ROOT / 'data/images').rglob('*.*'):
        red = np.zeros_like(cv2.imread(str(path)))
        red[..., 2] = 255
        target = tmp_path / 'out/overlays' / f'{path.relative_to(ROOT / "data/images")}.jpg'
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), red)
    ran = result_sheet(tmp_path / 'out', tmp_path / 'sheet.jpg')
    assert ran.returncode == 0, ran.stderr
    sheet = cv2.imread(str(tmp_path / 'sheet.jpg')).astype(int)
    assert sheet.shape[1] == 1000
    red_share = (np.abs(sheet - (0, 0, 255)).max(2) < 30).mean()
    assert 0.45 < red_share < 0.5
    chosen = [f'scene-{number}.png' for number in (22, 38, 41)]
    ran = result_sheet(tmp_path / 'out', tmp_path / 'one.jpg', ROOT / 'data/images', *chosen)
    assert ran.returncode == 0, ran.stderr
    one = cv2.imread(str(tmp_path / 'one.jpg')).astype(int)
    assert one.shape[1] == 1000 and one.shape[0] < sheet.shape[0]
    assert 0.45 < (np.abs(one - (0, 0, 255)).max(2) < 30).mean() < 0.5


def test_result_sheet_says_what_is_missing(tmp_path):
    ran = result_sheet(tmp_path, tmp_path / 'sheet.jpg')
    assert ran.returncode == 1
    assert ran.stderr == f'there is no picture {tmp_path}/overlays/coffee.jpg.jpg\n'
    assert result_sheet().returncode == 1


def test_result_picture_is_small():
    assert (ROOT / 'data/result.jpg').stat().st_size <= 300_000
