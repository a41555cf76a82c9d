"""Mask proposals from the pad-token attention of diffusion transformers: the public names, each loaded on first use."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from padseg.backbones import load as load
    from padseg.evaluate import evaluate as evaluate
    from padseg.exports import export as export
    from padseg.label import label as label
    from padseg.labels import label_map as label_map
    from padseg.maps import token_maps as token_maps
    from padseg.options import LabelOptions as LabelOptions
    from padseg.options import Options as Options
    from padseg.proposals import merge as merge
    from padseg.segment import segment as segment

__version__ = '0.1.0'

HOMES = {
    'load': 'padseg.backbones',
    'Options': 'padseg.options',
    'LabelOptions': 'padseg.options',
    'segment': 'padseg.segment',
    'token_maps': 'padseg.maps',
    'merge': 'padseg.proposals',
    'label': 'padseg.label',
    'label_map': 'padseg.labels',
    'export': 'padseg.exports',
    'evaluate': 'padseg.evaluate',
}
__all__ = ['LabelOptions', 'Options', 'evaluate', 'export', 'label', 'label_map', 'load', 'merge', 'segment', 'token_maps']


def __getattr__(name: str) -> Any:
    """The public name, imported now: none of them is needed for `padseg --help`, and torch takes seconds."""
    if name not in HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class Package(ModuleType):
    """This package as a module on which a public name always means the function.

    Importing the submodule `padseg.segment` would set the attribute `segment` to the module; that is left out here.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = Package
