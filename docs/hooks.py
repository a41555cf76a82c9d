"""What the site has besides the pages in this folder: the reference, made from the code, and files from elsewhere in the repository.

In a page, `<!-- options of seg4diff -->` becomes the table of a method's options and `<!-- public names -->` the signatures of the package.
"""

from __future__ import annotations

import inspect
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import padseg
from padseg.commands import COMMANDS, group
from padseg.commands.flags import option_flags
from padseg.methods import METHODS

ROOT = Path(__file__).parent.parent
# Files of the repository and the pages that they are on the site.
PAGES = {
    'CHANGELOG.md': 'release-notes.md',
    'CONTRIBUTING.md': 'contributing.md',
    'SECURITY.md': 'security.md',
    'padseg/models/tiny/README.md': 'model-card.md',
}
OTHERS = {name: name for name in ('notebooks/quickstart.ipynb', 'notebooks/attention.ipynb')} | {
    'LICENSE': 'LICENSE.txt',
    'data/result.jpg': 'result.jpg',
}
REFERENCE = 'reference.md'
LINK = re.compile(r'(\]\()(?!\w+:|#)([^)#\s]+)')
PLACE = re.compile(r'^<!-- (options of [\w-]+|public names) -->$', re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference and the files from outside docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding='utf-8')
        files.append(File.generated(config, page, content=relinked(without_front_matter(text), posixpath.dirname(name), page)))
    for name, target in OTHERS.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, REFERENCE, content=reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is made from the code, and lead links out of docs/ to where the site has the file."""
    source = page.file.src_uri
    if source not in {REFERENCE, *PAGES.values()}:
        markdown = relinked(markdown, posixpath.dirname(f'docs/{source}'), source)
    return PLACE.sub(lambda place: made(place[1]), markdown)


def made(what: str) -> str:
    """What the comment in a page asks for."""
    if what == 'public names':
        return public_names()
    return option_table(option_flags(METHODS[what.removeprefix('options of ')].Options))


def without_front_matter(text: str) -> str:
    return re.sub(r'\A---\n.*?\n---\n', '', text, flags=re.DOTALL)


def relinked(markdown: str, folder: str, page: str) -> str:
    """Links that are right in a folder of the repository, made right for a page of the site."""

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        on_site = {**PAGES, **OTHERS}.get(target, target.removeprefix('docs/'))
        return match[1] + posixpath.relpath(on_site, posixpath.dirname(page) or '.')

    return LINK.sub(moved, markdown)


def reference() -> str:
    """Every command with its options, as `--help` has them."""
    parts = [
        '# Reference of commands',
        paragraphs(group.help),
        'This page is made from the code: `padseg COMMAND --help` prints the same. The options of methods are on the pages of the methods:'
        ' [seg4diff](methods/seg4diff.md), [open-vocabulary](methods/open-vocabulary.md), [goca](methods/goca.md),'
        ' [diffseg](methods/diffseg.md), [diffcut](methods/diffcut.md), [classical](methods/classical.md).',
    ]
    for name, command in every_command():
        heading = '##' if ' ' not in name else '###'
        parts += [f'{heading} padseg {name}', f'```text\npadseg {name} {usage(command, name)}\n```', paragraphs(command.help)]
        own, of_methods = divided(command)
        if own:
            parts.append(option_table(own))
        if of_methods:
            parts.append(
                'And the options of the method, without `--method` these: '
                + in_code(flag for option in of_methods for flag in option.opts)
                + '.'
            )
    return '\n\n'.join(parts) + '\n'


def every_command() -> Iterator[tuple[str, click.Command]]:
    """All commands by name, sub-commands after the one that has them."""
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        yield name, command
        for below, other in (command.commands if isinstance(command, click.Group) else {}).items():
            yield f'{name} {below}', other


def usage(command: click.Command, name: str) -> str:
    return ' '.join(command.collect_usage_pieces(click.Context(command, info_name=name)))


def divided(command: click.Command) -> tuple[list[click.Option], list[click.Option]]:
    """The options of a command: its own, and those of a method, which it adds when it knows which one."""
    options = [param for param in command.get_params(click.Context(command)) if isinstance(param, click.Option) and param.name != 'help']
    own = [option for option in options if option in command.params or option.name == 'method']
    return own, [option for option in options if option not in own]


def paragraphs(help: str | None) -> str:
    """Text of `--help` as Markdown: what click leaves as it is becomes a block of code."""
    text = inspect.cleandoc(help or '')
    return '\n\n'.join(
        f'```text\n{part.removeprefix(chr(8)).strip()}\n```' if part.startswith('\b') else part for part in re.split(r'\n\s*\n', text)
    )


def option_table(options: Iterable[click.Option]) -> str:
    return table(('option', 'default', 'meaning'), map(option_row, options))


def option_row(option: click.Option) -> tuple[str, str, str]:
    """Flags, default and meaning. A default that stands in the help text is moved from there."""
    words, _, said = (option.help or '').removesuffix(')').partition(' (default: ')
    meaning = escaped(words if said else option.help or '')
    if isinstance(option.type, click.Choice):
        meaning += f': {in_code(option.type.choices)}'
    return in_code((*option.opts, *option.secondary_opts)), escaped(said) or default_of(option), meaning


def default_of(option: click.Option) -> str:
    if option.secondary_opts:
        return in_code((option.opts if option.default else option.secondary_opts)[:1])
    if option.is_flag:
        return 'off'
    return in_code([option.default]) if isinstance(option.default, str | int | float) else 'none'


def in_code(words: Iterable[object]) -> str:
    return ', '.join(f'`{word}`' for word in words)


def table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [heading, ('---',) * len(tuple(heading)), *rows]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def escaped(text: str) -> str:
    """Text for a cell of a table, in which nothing is markup."""
    return re.sub(r'([|<*\\])', r'\\\1', text)


def public_names() -> str:
    """Signature and docstring of each public name."""
    parts = []
    for name in padseg.__all__:
        value = getattr(padseg, name)
        if callable(value) and not isinstance(value, type):
            parts += [f'### `padseg.{name}`', f'```python\n{signature(name, value)}\n```', escaped(inspect.getdoc(value) or '')]
    return '\n\n'.join(parts)


def signature(name: str, function: Callable[..., Any]) -> str:
    """A parameter a line; an options object as default is written without its fields."""
    whole = inspect.signature(function)
    lines = [re.sub(r'(= [A-Z]\w+)\(.+', r'\1()', str(parameter)) for parameter in whole.parameters.values()]
    unquoted = [re.sub(r": '([^']*)'", r': \1', line) for line in lines]  # annotations are text
    return '\n'.join([f'{name}(', *(f'    {line},' for line in unquoted), f') -> {whole.return_annotation}'])
