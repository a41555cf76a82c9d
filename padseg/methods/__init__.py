"""The methods, one file per paper. Run, label, eval and merge use a method only through this protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from padseg.errors import ModelUnavailable, UsageError
from padseg.methods import classical, open_vocabulary, seg4diff

if TYPE_CHECKING:
    from padseg.backbones import Backbone, Identity
    from padseg.backbones.source import Source
    from padseg.backbones.spec import Spec
    from padseg.methods.options import MethodOptions, Setting
    from padseg.types import Image, LabelMap

DEFAULTS = {'regions': 'seg4diff', 'classes': 'open-vocabulary'}  # by task


class Method(Protocol):
    """What a method's module offers, such as methods/seg4diff.py. Importing it imports no torch, as `--help` needs its options."""

    @property
    def TASK(self) -> str:
        """'regions' (`padseg run`) or 'classes' (`padseg label`)."""

    @property
    def FAMILIES(self) -> frozenset[str]:
        """The families of models that it is defined for; none if it needs no model."""

    @property
    def Options(self) -> type[MethodOptions]:
        """A frozen dataclass, with help and range in its fields."""

    def deepest(self, options: Any, spec: Spec) -> int | None:
        """The last block of the model that is read; None for all of them."""

    def prepare(self, backbone: Any, options: Any, classes: Sequence[str] = (), keep: bool = True) -> Any:
        """All that does not depend on a picture: options resolved, prompts encoded (keep: and cached), layers checked.

        The result has `options` and `backbone`. UsageError for options or classes that the model cannot take.
        """

    def maps(self, images: Sequence[Image], prepared: Any) -> Sequence[Any]:
        """The forwards: TokenMaps of every picture, or None for a method that needs no model."""

    def labels(self, image: Image, maps: Any, prepared: Any) -> LabelMap:
        """The label map of a picture, without a forward."""

    def recorded(self, options: Any, spec: Any) -> dict[str, Setting]:
        """All options that decide the results on a model, resolved, as a record holds them."""


METHODS: dict[str, Method] = {
    'seg4diff': seg4diff,
    'open-vocabulary': open_vocabulary,
    'felzenszwalb': classical.FELZENSZWALB,
    'slic-rag': classical.SLIC_RAG,
    'kmeans': classical.KMEANS,
    'grid': classical.GRID,
}


def method_named(name: str, task: str | None = None) -> Method:
    """The method of this name. UsageError, with the known ones, if there is none, or none for the task."""
    known = [key for key, method in METHODS.items() if task in (None, method.TASK)]
    if name not in known:
        raise UsageError(f'method is one of {", ".join(known)}; got {name}')
    return METHODS[name]


def open_backbone(method: Method, options: Any, model: str, revision: str | None = None, **how: Any) -> Backbone | None:
    """The model for a method, read as far as it is needed; None for a method that needs none. how: as for `padseg.load`."""
    if not method.FAMILIES:
        return None
    from padseg.backbones import load
    from padseg.backbones.source import locate

    spec = locate(model, revision).spec
    check_settings(spec)
    layer = method.deepest(options, spec)
    backbone = load(model, revision=revision, layer=layer, whole=layer is None, **how)
    encoders = method.recorded(options, spec).get('encoders')  # of a method that encodes texts of its own
    if not encoders:
        return backbone
    from padseg.backbones.texts import with_encoders

    return with_encoders(backbone, str(encoders))


def identity_for(method: Method, options: Any, source: Source, vae: Source | None = None) -> Identity:
    """Which model `open_backbone` would load for the method, without loading it. ModelUnavailable if files of it are missing."""
    from padseg.backbones import family_of
    from padseg.backbones.loading import identify
    from padseg.backbones.texts import identity_with

    identity = identify(family_of(source.spec), source, vae)
    encoders = method.recorded(options, source.spec).get('encoders')
    return identity_with(identity, source, str(encoders)) if encoders else identity


def check_settings(spec: Spec) -> None:
    """ModelUnavailable for settings in a model's `padseg.json` that no method takes."""
    strange = sorted(spec.own.keys() - METHODS.keys())
    if strange:
        raise ModelUnavailable(f'padseg.json of {spec.repo} has settings of unknown methods: {", ".join(strange)}')
    for name, method in METHODS.items():
        if spec.family in method.FAMILIES:
            try:
                method.recorded(method.Options(), spec)
            except UsageError as error:  # a block or a noise level that the model does not have
                raise ModelUnavailable(f'padseg.json of {spec.repo}: {name}: {error}') from error
