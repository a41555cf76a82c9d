"""The legend of label maps whose values are classes: classes.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from padseg.exports.colours import voc_colours
from padseg.system.files import atomic


def write_classes(names: Sequence[str], path: Path) -> None:
    """Write the class and colour of each label value; 0 is background, or where the model did not look."""
    colours = voc_colours(len(names) + 1).tolist()
    rows = [{'id': number, 'name': name, 'color': colours[number]} for number, name in enumerate(names, start=1)]
    with atomic(path) as temporary:
        temporary.write_text('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n', encoding='ascii')
