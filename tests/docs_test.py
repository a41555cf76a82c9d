"""README and docs/: their lines run or at least parse, their tables say what the code says, nothing a user can meet is left out."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

import padseg
from padseg.backbones.spec import BACKBONES
from padseg.commands import COMMANDS, group, main
from padseg.commands.flags import option_flags
from padseg.commands.run import SIGNALLED, SOME_FAILED
from padseg.datasets import DATASETS
from padseg.errors import PadsegError
from padseg.evaluation.protocols import PROTOCOLS
from padseg.exports import CONVERTERS, FORMATS
from padseg.exports.masks import COLUMNS
from padseg.images import DECODERS, ImageError
from padseg.methods import METHODS
from padseg.methods.options import GEOMETRIES, NORMALISATIONS

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / 'docs').rglob('*.md'))
OTHERS = [ROOT / name for name in ('CHANGELOG.md', 'CONTRIBUTING.md', 'SECURITY.md', 'padseg/models/tiny/README.md')]
PAGES = [ROOT / 'README.md', *DOCS]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8') for path in (*PAGES, *OTHERS)}
README = TEXTS['README.md']
WORDS = '\n'.join(TEXTS[path.relative_to(ROOT).as_posix()] for path in PAGES)
PICTURES = ('chelsea.jpg', 'more/rocket.jpg', 'scene-43.png')
ELSEWHERE = {'--help', '--version', '--force-reinstall', '--no-deps', '--array', '--head', '--generate'}  # of click, pip, Slurm, Ray


def blocks(text: str, *languages: str) -> list[str]:
    """The blocks of code of a page, those inside lists too."""
    every = re.findall(r'^( *)```(\w*)\n(.*?)^\1```$', text, re.MULTILINE | re.DOTALL)
    return [block for _, language, block in every if language in languages]


def lines(text: str, *languages: str) -> list[str]:
    every = '\n'.join(blocks(text, *languages)).replace('\\\n', ' ')
    return [line.strip() for line in every.splitlines() if line.strip() and line.strip()[0] != '#']


def table(heading: str, text: str = WORDS) -> list[str]:
    """First cells of the table with this heading."""
    rows = text[text.index(f'| {heading} |') :].split('\n\n')[0].splitlines()[2:]
    return [row.split(' | ')[0].removeprefix('| ') for row in rows]


def names(heading: str, text: str = WORDS) -> list[str]:
    return [name for row in table(heading, text) for name in re.findall(r'`([^`]+)`', row)]


# lines that run


@pytest.fixture(scope='module')
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with three of the pictures, in which all commands of bash blocks have run."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in PICTURES:
        (folder / 'data/images' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / 'data/images' / name, folder / 'data/images' / name)
    (folder / 'data/labels').mkdir()
    shutil.copy(ROOT / 'data/labels/scene-43.png', folder / 'data/labels')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in run_lines():
            if line.startswith('padseg '):
                assert main(shlex.split(line, comments=True)[1:]) == 0, line
            else:
                subprocess.run(['bash', '-ec', line], check=True)
        yield folder


def run_lines() -> list[str]:
    """Lines of bash blocks of README and docs/; what needs a package index does not run."""
    every = [line.removeprefix('bin/') for line in lines(WORDS, 'bash')]
    assert {line.split()[0] for line in every} == {'padseg', 'mkdir', 'pip'}
    return [line for line in dict.fromkeys(every) if line.split()[0] != 'pip']


def test_commands_run_and_write_what_is_said(checkout):
    assert len(run_lines()) > 8
    tree = next(block for block in blocks(TEXTS['docs/run.md'], '') if block.startswith('out/'))
    rocket = 'more/rocket.jpg'
    for path in ('run.json', 'manifest.jsonl', 'failures.jsonl', f'labels/{rocket}.png', f'masks/{rocket}/', f'overlays/{rocket}.jpg'):
        assert path.split('/')[0] in tree and path.removeprefix(path.split('/')[0]).lstrip('/') in tree
        assert (checkout / 'out' / path).exists()
    written = {path.name for path in (checkout / 'out').iterdir() if path.name[0] != '.'}
    written |= {path.name for path in (checkout / 'out-levels').iterdir() if path.is_dir()}
    assert written == set(re.findall(r'^.── ([\w.]+)', tree, re.MULTILINE))


@pytest.mark.parametrize('page', [name for name, text in TEXTS.items() if blocks(text, 'python')])
@pytest.mark.usefixtures('checkout')
def test_python_lines_run(page, capsys):
    program = '\n'.join(blocks(TEXTS[page], 'python'))
    exec(compile(program, page, 'exec'), {})
    if page == 'docs/python.md':
        assert len(re.findall(r'^[\d.]+ \d+ regions$', capsys.readouterr().out, re.MULTILINE)) == 3


# lines that parse


def commands(line: str) -> list[list[str]]:
    """The arguments of every call of padseg in a line of a shell."""
    words = shlex.split(line.split('  ')[0], comments=True)
    words = [part for word in words for part in (word.split() if word.startswith('padseg ') else [word])]  # a command given to a program
    starts = [number for number, word in enumerate(words) if word in ('padseg', 'bin/padseg')]
    ends = [number for number, word in enumerate(words) if word in ('&', '&&', '||', '|')] + [len(words)]
    return [words[start + 1 : min(end for end in ends if end > start)] for start in starts]


CALLS = {
    ' '.join(call): call
    for text in TEXTS.values()
    for line in lines(text, 'bash', 'text', 'sh')
    for call in commands(line)
    if call and call != ['--version']
}


@pytest.mark.parametrize('call', CALLS.values(), ids=CALLS.keys())
def test_every_command_line_parses(call, monkeypatch):
    monkeypatch.chdir(ROOT)  # some paths have to exist
    command, words = group.get_command(click.Context(group), call[0]), list(call[1:])
    assert command, call
    if isinstance(command, click.Group):
        context = click.Context(command)
        command = command.get_command(context, words.pop(0) if words[0] in command.list_commands(context) else 'blocks')
    command.make_context(call[0], words)


def flags_of_commands() -> set[str]:
    context = click.Context(group)
    commands_there = [group.get_command(context, name) for name in COMMANDS]
    below = [other for command in commands_there if isinstance(command, click.Group) for other in command.commands.values()]
    every = [param for command in (*commands_there, *below) for param in command.get_params(context)]
    every += [param for method in METHODS.values() for param in option_flags(method.Options)]
    options = [param for param in every if isinstance(param, click.Option) and param.name != 'help']
    return {flag for option in options for flag in (*option.opts, *option.secondary_opts)}


def test_every_flag_in_the_text_exists():
    """Spans of code outside of blocks, in which flags of other programs stand too."""
    text = re.sub(r'^( *)```.*?^\1```$', '', WORDS, flags=re.MULTILINE | re.DOTALL)
    programs = [(ROOT / 'padseg/train/tiny.py').read_text(encoding='utf-8')]
    programs += [
        path.read_text(encoding='utf-8') for folder in ('bin', 'padseg/bench') for path in (ROOT / folder).glob('[!_]*') if path.is_file()
    ]
    used = {flag for span in re.findall(r'`([^`\n]+)`', text) for flag in re.findall(r'(?<![\w-])--[a-z][\w-]*', span)}
    known = flags_of_commands() | ELSEWHERE | {flag for program in programs for flag in re.findall(r'--[a-z][\w-]*', program)}
    assert used - known == set()


def test_programs_of_the_checkout_exist():
    for program in re.findall(r'(?<![\w/])bin/[a-z-]+', WORDS):
        assert os.access(ROOT / program, os.X_OK), program
    assert {f'bin/{path.name}' for path in (ROOT / 'bin').iterdir()} == set(names('program'))


# tables


def test_readme_is_short_and_begins_with_the_picture():
    assert len(README.splitlines()) <= 200
    assert '(data/result.jpg)' in README[: README.index('## Install')]
    assert 'bin/padseg run --dir data/images --out out --overlay' in README.splitlines()


def test_commands():
    assert names('command', README) == [f'padseg {name}' for name in COMMANDS]


def test_geometries_and_normalisations():
    assert names('geometry') == list(GEOMETRIES)
    assert all(f'`{name}`' in TEXTS['docs/methods/seg4diff.md'] for name in NORMALISATIONS)


def test_exit_codes():
    mendable = {error.exit_code for error in (PadsegError, ImageError, *PadsegError.__subclasses__())}
    known = {0, 1, SOME_FAILED, *mendable, *(SIGNALLED + number for number in (signal.SIGINT, signal.SIGTERM))}
    assert [int(code) for row in table('exit code') for code in row.split(',')] == sorted(known)


def test_columns_of_metadata():
    assert sorted(names('column')) == sorted(COLUMNS)


def test_formats():
    assert names('format') == list(CONVERTERS)
    assert all(f'{name}/' in TEXTS['docs/run.md'] for name in FORMATS)
    assert all(name.lower() in TEXTS['docs/run.md'].lower() for name in DECODERS)


def test_data_sets_and_protocols():
    assert names('data set') == list(DATASETS)
    assert names('protocol') == list(PROTOCOLS)


def test_models():
    assert names('model', TEXTS['docs/models.md']) == list(BACKBONES)


def test_methods_have_a_page():
    assert names('method') == list(METHODS)
    pages = '\n'.join(text for name, text in TEXTS.items() if name.startswith('docs/methods/'))
    assert [name for name in names('method') if not re.search(f'^##? {name}$', pages, re.MULTILINE)] == []


def test_public_names():
    assert [name for name in padseg.__all__ if f'padseg.{name}' not in WORDS and name != '__version__'] == []


def test_rooms():
    rooms = {path.name for path in (ROOT / 'padseg').iterdir() if (path / '__init__.py').exists()}
    alone = {path.stem for path in (ROOT / 'padseg').glob('*.py') if path.stem[0] != '_'}
    assert set(names('room')) - {'methods/stages'} == rooms | alone


def test_every_sample_picture_is_credited():
    licence = TEXTS['docs/licence.md']
    for line in (ROOT / 'data/README.md').read_text(encoding='utf-8').splitlines():
        if named := re.match(r'\| `([\w./-]+)`', line):
            assert f'`{named[1]}`' in licence
            who = re.search(r'photographer ([^|;]+?) \|', line)
            assert who is None or who[1] in ' '.join(licence.split())


def test_citation():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert citation['cff-version'] == '1.2.0' and citation['version'] == padseg.__version__
    for work in (citation, *citation['references']):
        assert work['title'] and work['authors'] and all({'name', 'family-names'} & author.keys() for author in work['authors'])


# links and the site


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


@pytest.mark.parametrize('page', TEXTS)
def test_links_between_files_lead_somewhere(page):
    for target, anchor in re.findall(r'\]\((?!\w+:)([^)#]*)#?([^)]*)\)', TEXTS[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r'^#+ (.+)$', path.read_text(encoding='utf-8'), re.MULTILINE)
            assert anchor in map(slug, headings), f'{target}#{anchor}'


@pytest.fixture(scope='module')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; a warning, as about a link that leads nowhere, ends the build."""
    folder = tmp_path_factory.mktemp('site')
    config = load_config(str(ROOT / 'mkdocs.yml'), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command='build', dirty=False)
    build(config)
    return folder


def test_reference_has_every_command_and_option(site):
    pages = (site / 'reference.html', *(site / 'methods').glob('*.html'))
    codes = {code for page in pages for code in re.findall('<code>(--?[a-z][^<]*)</code>', page.read_text(encoding='utf-8'))}
    assert flags_of_commands() - codes == set()
    assert re.findall('<h2 id="padseg-([^"]+)"', (site / 'reference.html').read_text(encoding='utf-8')) == list(COMMANDS)
    assert 'options of' not in ''.join(re.findall('<!--.*?-->', (site / 'methods/seg4diff.html').read_text(encoding='utf-8')))


def test_public_functions_have_their_signatures(site):
    text = (site / 'python.html').read_text(encoding='utf-8')
    functions = [name for name in padseg.__all__ if callable(getattr(padseg, name)) and not isinstance(getattr(padseg, name), type)]
    assert functions and [name for name in functions if f'id="padseg{name}"' not in text] == []


class Loaded(HTMLParser):
    """What a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kinds = ('src', 'srcset', 'poster', 'data') if tag != 'link' else ('href',)
        self.addresses += [value for name, value in attrs if name in kinds and value]


def test_pages_load_nothing_from_other_hosts(site):
    pages = list(site.rglob('*.html'))
    assert len(pages) > len(DOCS)
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding='utf-8'))
        assert loaded.addresses
        assert [address for address in loaded.addresses if re.match(r'(\w+:)?//', address)] == []
        assert 'class="mermaid"' not in page.read_text(encoding='utf-8')  # the theme would load its library from elsewhere
    for style in site.rglob('*.css'):
        assert re.findall(r'(?:url\(|@import)\s*["\']?(?:\w+:)?//[^)"\']+', style.read_text(encoding='utf-8')) == []
