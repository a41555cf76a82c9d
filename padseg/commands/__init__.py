"""The command line. Errors that the user can fix become one line and an exit code."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import click

from padseg.errors import PadsegError
from padseg.system import libraries
from padseg.system.text import log_printable, printable, say, warn
from padseg.system.versions import versions
from padseg.version import __version__

# Modules of padseg.commands, imported on demand.
COMMANDS = (
    *('run', 'label', 'merge', 'export', 'eval', 'compare', 'score-images', 'analyze', 'generate'),
    *('train', 'train-tiny', 'convert-lora', 'demo', 'models', 'doctor', 'show', 'labelstudio-backend'),
)
INTERRUPTED = 130


class Commands(click.Group):
    """A click group that imports its commands on demand from the modules in COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f'padseg.commands.{cmd_name.replace("-", "_")}').command
        return command


def show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        libraries = ', '.join(f'{name} {number}' for name, number in versions().items())
        say(f'padseg {__version__} ({libraries})')
        ctx.exit()


@click.group(cls=Commands, context_settings={'help_option_names': ['-h', '--help'], 'max_content_width': 120})
@click.option('--version', is_flag=True, is_eager=True, expose_value=False, callback=show_version, help='Show the versions and exit.')
def group() -> None:
    """Segment pictures with the attention of a diffusion transformer: padding tokens give masks, words give names."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    libraries.quiet()
    log_printable()
    try:
        return group.main(args=argv, prog_name='padseg', standalone_mode=False) or 0
    except click.ClickException as error:
        vars(error)['message'] = printable(error.message)
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except PadsegError as error:
        warn(*f'padseg: {error}'.split('\n') if error.several_lines else [f'padseg: {error}'])
        return error.exit_code
