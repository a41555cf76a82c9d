"""--config: a file of settings in the form of a model's `padseg.json`, which take the place of flags that are not given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from padseg.backbones.configuration import read_json
from padseg.backbones.spec import Spec
from padseg.errors import ModelUnavailable, UsageError
from padseg.methods import ELSEWHERE, METHODS
from padseg.methods.options import MethodOptions, in_kind

METHOD = 'padseg.method'  # key of the method's name in a context's meta
OPTIONS_TOO = ('layer', 'side', 'encoders')  # facts of a model that are options of methods by the same names


def use_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Let the settings of a file be the defaults of the command's flags. Raises UsageError for what no flag would accept."""
    if path is not None and not ctx.resilient_parsing:
        ctx.default_map = settings_in(path, ctx.meta[METHOD])


config_flag = click.option(
    '--config',
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=use_config,
    help="settings in the form of a model's padseg.json, such as those of `padseg analyze expert`; flags override them",
)


def settings_in(path: Path, method: str) -> dict[str, Any]:
    """A method's settings in a file, by the names of its options. Raises UsageError, naming the file, for whatever is wrong with any."""
    stated = stated_in(path)
    sections = {name: value for name, value in stated.items() if isinstance(value, dict)}
    facts = {name: value for name, value in stated.items() if name not in sections}
    refuse_strange(path, sections, facts)
    for name, values in sections.items():
        if name in METHODS:
            checked(path, name, values)
    fields = METHODS[method].Options.__dataclass_fields__
    own = {name: value for name, value in facts.items() if name in fields}
    return checked(path, method, {**own, **sections.get(method, {})})


def stated_in(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f'--config: there is no file {path}')
    try:
        return read_json(path)
    except ModelUnavailable as error:
        raise UsageError(f'--config: {error}') from error


def refuse_strange(path: Path, sections: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raise UsageError for sections of no method, and for facts that are no options."""
    unknown = sorted(sections.keys() - METHODS.keys() - ELSEWHERE)
    if unknown:
        raise UsageError(f'--config: {path} has settings of unknown methods: {", ".join(unknown)}')
    others = sorted(facts.keys() - set(OPTIONS_TOO))
    fixed = [name for name in others if name in Spec._fields]
    if fixed:
        raise UsageError(f"--config: {path}: {', '.join(fixed)} can be set only in padseg.json in the model's folder")
    if others:
        raise UsageError(f'--config: {path} has keys that are not settings: {", ".join(others)}')


def checked(path: Path, method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a method as its options hold them. UsageError, as for flags, for those that they do not allow."""
    kind: type[MethodOptions] = METHODS[method].Options
    names = {field.name for field in dataclasses.fields(kind)}
    strange = sorted(values.keys() - names)
    if strange:
        raise UsageError(f'--config: {path}: {method} has no settings {", ".join(strange)}')
    converted = {name: in_kind(kind, name, value) for name, value in values.items()}
    try:
        kind(**converted)
    except UsageError as error:
        raise UsageError(f'--config: {path}: {error}') from error
    return converted
