"""What the options of all methods share: fields with help and range, checks based on these, and formatting. Imports no torch.

Each method's options are one frozen dataclass in its file. A field without its own default (`own`) takes the model's value, filled in by
`filled`. Flags, option tables and records are all generated from these fields.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from padseg.backbones.spec import Spec
from padseg.errors import ModelUnavailable, UsageError

if TYPE_CHECKING:
    from padseg.backbones import Backbone

Setting = str | int | float | bool | None  # as stored in a record

RANGE_ADDED = 1e-6  # by Seg4Diff's released code, to the range of values that it divides by
NORMALISATIONS = ('released', 'minmax-softmax', 'sum', 'share')
GEOMETRIES = ('whole', 'stretch', 'diffseg', 'diffcut', 'seg4diff-paper', 'seg4diff-release', 'seg4diff-ovss')
REFINEMENTS = ('none', 'guided')
TOKENS = {'all': None, 'pads': 'pad', 'template': 'template', 'registers': 'register'}  # which of the empty prompt's are read, by kind


class Range(NamedTuple):
    """Numbers from `low` up to but excluding `below` (None: no bound, so infinity is allowed), and a description of them."""

    words: str
    low: float
    below: float | None = None

    def holds(self, value: float) -> bool:
        return self.low <= value and (self.below is None or value < self.below)


PIXELS = Range('a number of pixels in 1..65536', 1, 65537)
SCALE = Range('a scale from 0 to below 1e9', 0, 1e9)  # half of which has to be a number of pixels
MOST_LEVELS = 64  # nested label maps of a picture
SHARE = Range('a share of the picture in 0..1', 0, 1)


def option(value: Any, help: str, **metadata: Any) -> Any:
    """An option's field. help: text for `--help`; choices: the allowed words; range: the allowed numbers (of each element in a tuple).

    default: text shown as the default, if that is neither the value nor the model's own.
    """
    return dataclasses.field(default=value, metadata={'help': help, **metadata})


def own(help: str, **metadata: Any) -> Any:
    """A field whose default is the model's own value; it is None until `filled`."""
    return option(None, help, **metadata)


def geometry_option() -> Any:
    return option('whole', "what the model sees: the whole picture, or a paper's preset", choices=GEOMETRIES)


def side_option() -> Any:
    return own("side in pixels of the model's view (whole: of the square with the same area)", range=PIXELS)


def seed_option() -> Any:
    return option(0, 'seed of the noise, together with the content of each picture')


def order_option() -> Any:
    return option(
        0,
        'how often maps are refined by the self-attention of --refine-layers; 0 = off',
        range=Range('a number of times in 0..100', 0, 101),
    )


def refine_layers_option() -> Any:
    return own('blocks whose mean self-attention refines the maps, counted from 0', range=Range('distinct numbers >= 0', 0))


class ViewOptions(Protocol):
    """Options that decide what the model sees of a picture."""

    @property
    def geometry(self) -> str: ...
    @property
    def side(self) -> int: ...
    @property
    def seed(self) -> int: ...


class ForwardOptions(ViewOptions, Protocol):
    """Options that decide what the model sees and which maps are read."""

    @property
    def layer(self) -> int: ...
    @property
    def step(self) -> int: ...


class MapOptions(ForwardOptions, Protocol):
    """Options that decide token maps of the empty prompt. tokens: a key of TOKENS."""

    @property
    def tokens(self) -> str: ...


class TiledOptions(MapOptions, Protocol):
    """Options of a method that can look at a picture through windows, and of its label maps."""

    @property
    def tiles(self) -> int: ...
    @property
    def overlap(self) -> int: ...
    @property
    def refine(self) -> str: ...
    @property
    def superpixels(self) -> float: ...
    @property
    def join(self) -> float: ...
    @property
    def components(self) -> bool: ...
    @property
    def min_area(self) -> float: ...
    @property
    def regroup(self) -> float: ...


class MethodOptions(Protocol):
    """A method's options: a frozen dataclass that calls `check_options` on creation."""

    __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar('T', bound=MethodOptions)


def check_options(options: MethodOptions) -> None:
    """Raise UsageError, listing the allowed values, for a value that its field does not allow. None is allowed where it is the default."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is not None or field.default is not None:
            check_value(type(options), field, value)


def check_value(options: type[MethodOptions], field: dataclasses.Field[Any], value: Any) -> None:
    kind, several = kind_of(options, field.name)
    require(not several or isinstance(value, (tuple, list)), f'{field.name} is a list or a tuple; got {value!r}')
    values = tuple(value) if several else (value,)
    choices, range_ = field.metadata.get('choices'), field.metadata.get('range')
    if choices:
        require(value in choices, f'{field.name} is one of {", ".join(choices)}; got {value}')
    elif range_:
        verb = 'are' if several else 'is'
        good = all(of_kind(element, kind) and range_.holds(element) for element in values) and len(set(values)) == len(values) > 0
        require(good, f'{field.name} {verb} {range_.words}; got {in_list(values)}')
    else:
        require(all(of_kind(element, kind) for element in values), f'{field.name} is {KINDS[kind]}; got {value!r}')


KINDS = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text'}


def of_kind(value: object, kind: type) -> bool:
    """Return whether a value has a field's type. Booleans are not numbers; every number except NaN is a float."""
    if kind is float:
        return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and not math.isnan(value))
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


@cache
def kind_of(options: type[MethodOptions], name: str) -> tuple[type, bool]:
    """Return the type of a field's value, and whether the field holds several values."""
    hint = typing.get_type_hints(options)[name]
    kinds = (hint, *typing.get_args(hint))
    several = next((kind for kind in kinds if typing.get_origin(kind) is tuple), None)
    return (typing.get_args(several)[0], True) if several else (next(kind for kind in KINDS if kind in kinds), False)


def filled(options: T, values: Mapping[str, Any]) -> T:
    """Fill in the options left open with these values."""
    open_fields = [field.name for field in dataclasses.fields(options) if getattr(options, field.name) is None and field.name in values]
    return dataclasses.replace(options, **{name: values[name] for name in open_fields})


def model_settings(options: type[MethodOptions], method: str, spec: Spec, row: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings for a model: those in `row`, overridden by the section with the method's name in the model's `padseg.json`.

    Raises ModelUnavailable, naming the setting, for one that is unknown or not allowed.
    """
    stated = {name: in_kind(options, name, value) for name, value in spec.own.get(method, {}).items()}
    try:
        options(**stated)
    except TypeError as error:
        names = ', '.join(sorted(stated.keys() - options.__dataclass_fields__.keys()))
        raise ModelUnavailable(f'padseg.json of {spec.repo}: {method} has no settings {names}') from error
    except UsageError as error:
        raise ModelUnavailable(f'padseg.json of {spec.repo}: {method}: {error}') from error
    return {**row, **stated}


def in_kind(options: type[MethodOptions], name: str, value: Any) -> Any:
    """Convert a JSON value for a field: a list to a tuple, a whole number to a float if the field holds floats."""
    if isinstance(value, list):
        return tuple(value)
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53  # others stay as they are, to be refused
    return float(value) if whole and name in options.__dataclass_fields__ and kind_of(options, name) == (float, False) else value


def plain_settings(options: MethodOptions) -> dict[str, Setting]:
    """Return the options as JSON values: inf as a word, several values as one text."""
    return {field.name: plain_value(getattr(options, field.name)) for field in dataclasses.fields(options)}


def plain_value(value: Any) -> Setting:
    if isinstance(value, tuple):
        return in_list(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def in_list(values: Iterable[object]) -> str:
    return ', '.join(map(str, values))


def require_family(method: str, families: Collection[str], backbone: Backbone) -> None:
    """Raise UsageError if a method does not support a model's family."""
    refuse_family(method, families, backbone.identity.model, backbone.spec.family)


def refuse_family(method: str, families: Collection[str], model: str, family: str, published: str | None = None) -> None:
    """As `require_family`, for a model that is not loaded. published: name of the model of the method's paper, to propose it."""
    known = ', '.join(sorted(families)) + (f', such as --model {published}, as in its paper' if published else '')
    require(family in families, f'{method} does not support {model} of the family {family}; supported: {known}')


def check_levels(levels: tuple[float, ...] | None, words: str) -> None:
    """Raise UsageError unless thresholds of nested label maps are distinct numbers, and not too many. words: what they are."""
    values = levels or ()
    good = all(0 <= value < 1e9 for value in values) and len(set(values)) == len(values)
    require(good, f'levels are distinct {words} >= 0; got {in_list(values)}')
    require(len(values) <= MOST_LEVELS, f'at most {MOST_LEVELS} levels are made; got {len(values)}')


def require(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)
