"""Times parts of padseg on this machine: bin/bench."""

from __future__ import annotations

import click

from padseg import speed
from padseg import speed_engine
from padseg import speed_merge
from padseg import speed_sd3


@click.group(commands=[speed.command, speed_engine.command, speed_merge.command, speed_sd3.command, speed_sd3.load_command])
def main() -> None:
    """Time parts of padseg."""


if __name__ == '__main__':
    main()
