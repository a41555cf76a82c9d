"""The methods, one file per paper. Run, label, eval and merge access a method only through this protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from padseg.errors import ModelUnavailable, UsageError
from padseg.methods import classical, concepts, diffcut, diffseg, diffseg_names, goca, open_vocabulary, seg4diff
from padseg.methods.options import refuse_family

if TYPE_CHECKING:
    from padseg.backbones import Backbone, Identity
    from padseg.backbones.source import Source
    from padseg.backbones.spec import Spec
    from padseg.methods.options import MethodOptions, Setting
    from padseg.types import Image, LabelMap

DEFAULTS = {'regions': 'seg4diff', 'classes': 'open-vocabulary'}  # keyed by task
ELSEWHERE = {'generate'}  # sections of padseg.json that are not a method's


class Method(Protocol):
    """Interface of a method's module, such as methods/seg4diff.py. Importing it must not import torch, since `--help` needs its options."""

    @property
    def TASK(self) -> str:
        """'regions' (`padseg run`) or 'classes' (`padseg label`)."""

    @property
    def FAMILIES(self) -> frozenset[str]:
        """Model families that the method supports; empty if it needs no model."""

    @property
    def BACKGROUND_BY_RULE(self) -> bool:
        """Whether background is no class to look for, but what a rule leaves, whose threshold is `tau` of the options."""

    @property
    def Options(self) -> type[MethodOptions]:
        """A frozen dataclass whose fields carry help and range."""

    def deepest(self, options: Any, spec: Spec) -> int | None:
        """The last block to read; None for all of them."""

    def prepare(self, backbone: Any, options: Any, classes: Sequence[str] = (), keep: bool = True) -> Any:
        """Do everything that does not depend on a picture: resolve options, encode prompts (keep: and cache them), check layers.

        The result has `options` and `backbone`. UsageError for options or classes that the model does not support.
        """

    def maps(self, images: Sequence[Image], prepared: Any, names: Sequence[str] = ()) -> Sequence[Any]:
        """Run the forward passes: TokenMaps of each picture, or None for a method without a model.

        names: of the pictures, for options that depend on them.
        """

    def labels(self, image: Image, maps: Any, prepared: Any) -> LabelMap:
        """Compute a picture's label map, without a forward pass."""

    def recorded(self, options: Any, spec: Any) -> dict[str, Setting]:
        """All options that affect the results on a model, resolved, for a record."""


class Kept(Method, Protocol):
    """What a method offers besides if `padseg merge` can make other label maps of what its runs kept."""

    @property
    def LATER(self) -> Sequence[str]:
        """Names of the options that come after the maps; in `Options` they are None unless they were given."""

    def without_model(self, options: Any) -> Any:
        """As `prepare`, with resolved options, for `labels` alone."""


class Swept(Method, Protocol):
    """What a method for regions offers besides if several values of one option can be tried on kept maps."""

    def swept(self, options: Any) -> str:
        """The name of that option. options: resolved."""


METHODS: dict[str, Method] = {
    'seg4diff': seg4diff,
    'open-vocabulary': open_vocabulary,
    'goca': goca,
    'diffseg': diffseg,
    'diffcut': diffcut,
    'concepts': concepts,
    'diffseg-names': diffseg_names,
    'felzenszwalb': classical.FELZENSZWALB,
    'slic-rag': classical.SLIC_RAG,
    'kmeans': classical.KMEANS,
    'grid': classical.GRID,
}


def method_named(name: str, task: str | None = None) -> Method:
    """Return the method with this name. UsageError, listing the known ones, if there is none, or none for the task."""
    known = [key for key, method in METHODS.items() if task in (None, method.TASK)]
    if name not in known:
        raise UsageError(f'method is one of {", ".join(known)}; got {name}')
    return METHODS[name]


def options_of(method: Method, name: str, options: Any = None) -> Any:
    """The options given, or the method's own as they are. UsageError for those of another method."""
    if options is None:
        return method.Options()
    if not isinstance(options, method.Options):
        raise UsageError(f'options of {name} are {method.Options.__name__}; got {type(options).__name__}')
    return options


def kept_method(name: str) -> Kept | None:
    """The method with this name, if its kept maps can be merged again."""
    method: Any = METHODS[name]
    return method if hasattr(method, 'LATER') else None


def swept_method(method: Method) -> Swept | None:
    """The method, if several values of one option can be tried on kept maps."""
    sweeping: Any = method
    return sweeping if hasattr(method, 'swept') else None


def usual_model(method: Method) -> str:
    """The model to use if none is named: `tiny`, or that of the method's paper where `tiny` is of no family that the method supports."""
    return getattr(method, 'PUBLISHED', 'tiny')


def open_backbone(method: Method, options: Any, model: str, revision: str | None = None, **how: Any) -> Backbone | None:
    """Load a method's model as far as the method needs it; None for a method without a model. how: as for `padseg.load`."""
    if not method.FAMILIES:
        if how.get('lora'):
            raise UsageError('a LoRA changes a model, and this method has none: leave out --lora')
        if how.get('quantize'):
            raise UsageError('this method has no model: leave out --quantize')
        return None
    from padseg.backbones import load, lora_named
    from padseg.backbones.source import locate
    from padseg.backbones.spec import BACKBONES

    name = next((key for key, known in METHODS.items() if known is method), 'the method')
    lora_named(how.get('lora'), how.get('lora_scale', 1.0))  # before gigabytes are downloaded for nothing
    published = getattr(method, 'PUBLISHED', None)
    if model in BACKBONES:
        refuse_family(name, method.FAMILIES, model, BACKBONES[model].family, published)
    spec = locate(model, revision).spec
    refuse_family(name, method.FAMILIES, model, spec.family, published)
    check_settings(spec)
    layer = method.deepest(options, spec)
    backbone = load(model, revision=revision, layer=layer, whole=layer is None, **how)
    encoders = method.recorded(options, spec).get('encoders')  # of a method that encodes texts of its own
    if not encoders:
        return backbone
    from padseg.backbones.texts import with_encoders

    return with_encoders(backbone, str(encoders))


def identity_for(
    method: Method, options: Any, source: Source, vae: Source | None = None, lora: str | None = None, lora_scale: float = 1.0
) -> Identity:
    """Which model `open_backbone` would load for the method, without loading it. ModelUnavailable if files of it are missing."""
    from padseg.backbones import family_of
    from padseg.backbones.loading import identify
    from padseg.backbones.texts import identity_with

    identity = identify(family_of(source.spec), source, vae, lora, lora_scale)
    encoders = method.recorded(options, source.spec).get('encoders')
    return identity_with(identity, source, str(encoders)) if encoders else identity


def check_settings(spec: Spec) -> None:
    """Raise ModelUnavailable for settings in a model's `padseg.json` that no method accepts."""
    strange = sorted(spec.own.keys() - METHODS.keys() - ELSEWHERE)
    if strange:
        raise ModelUnavailable(f'padseg.json of {spec.repo} has settings of unknown methods: {", ".join(strange)}')
    for name, method in METHODS.items():
        if spec.family in method.FAMILIES:
            try:
                method.recorded(method.Options(), spec)
            except UsageError as error:  # a block or a noise level that the model does not have
                raise ModelUnavailable(f'padseg.json of {spec.repo}: {name}: {error}') from error
