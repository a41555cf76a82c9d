"""`padseg convert-lora`: make a released checkpoint of MAGNET a LoRA that padseg and diffusers read."""

from __future__ import annotations

import json
from pathlib import Path

import click

from padseg.system.text import say

FILE = click.Path(path_type=Path)


@click.command('convert-lora')
@click.argument('released', type=FILE)
@click.argument('out', type=FILE)
@click.option('--alpha', type=float, help='alpha with which it was trained, 16 for the released ones (default: the rank)')
@click.option('--json', 'as_json', is_flag=True, help='print one JSON object')
def command(released: Path, out: Path, alpha: float | None, as_json: bool) -> int:
    """Convert a checkpoint that MAGNET's authors released to a LoRA in diffusers' layout.

    RELEASED is the .pth file, OUT the safetensors file to write, for --lora. Only the LoRA is kept; what else the checkpoint holds, such as
    the score layer, is listed. No code in the checkpoint is executed.
    """
    from padseg.backbones.lora_released import convert_lora, in_words

    made = convert_lora(released, out, alpha)
    if as_json:
        say(json.dumps({**made._asdict(), 'out': str(out)}))
        return 0
    say(f'{out}: a LoRA of rank {made.rank} and alpha {made.alpha:g} for {made.layers} layers')
    if made.left_out:
        say(f'left out: {in_words(made.left_out)}')
    return 0
