"""An uploaded file and a forward pass: everything about a picture that its regions are made from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from padseg.demo.settings import Settings
from padseg.errors import PadsegError, UsageError
from padseg.images import ImageError, decode_apart
from padseg.methods import METHODS, kept_method, method_named, open_backbone, seg4diff
from padseg.types import Array, Image, LabelMap, Proposals
from padseg.version import __version__

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.methods.stages.labels import JoinOrder

MODELS_HELD = 2
WORDS, LETTERS = 20, 40  # of a list of class names, and of a name


class TooLong(PadsegError):
    """A forward pass that took longer than allowed."""


class Picture(NamedTuple):
    """A decoded upload. image: (H, W, 3); size: (H, W) in the file; notes: what was converted, in words."""

    name: str
    sha256: str
    image: Image
    size: tuple[int, int]
    notes: tuple[str, ...]


class Joining(NamedTuple):
    """What Seg4Diff's regions are cut from where superpixels are joined, which is the same at every distance."""

    proposals: Proposals
    superpixels: Array
    order: JoinOrder


class Held(NamedTuple):
    """A picture after its forward pass. method: a key of METHODS; options: resolved; maps: the method's, None if it needs no model.

    made_by: what the regions are from, for records; seconds: of the forward pass; joining: None unless superpixels are joined.
    """

    picture: Picture
    method: str
    model: str
    options: Any
    maps: Any
    made_by: dict[str, str | None]
    seconds: float
    joining: Joining | None = None


def read_picture(path: str | None, settings: Settings) -> Picture:
    """Read an upload with padseg's own reader, in a process of its own. Raises ImageError with the reason."""
    if path is None:
        raise ImageError('choose a picture first')
    known: list[str] = []
    try:
        image, _, size, notes = decode_apart(Path(path), settings.reading, known=lambda _, digest: known.append(digest))
    except OSError as error:
        raise ImageError(f'the picture is no longer here ({error.strerror}): choose it again') from error
    return Picture(Path(path).name, known[0], image, size, notes)


def hold(picture: Picture, method: str, model: str, settings: Settings) -> Held:
    """Run a method's forward pass. Raises PadsegError for a model or a method that cannot be used."""
    chosen = method_named(method, 'regions')
    backbone = backbone_of(method, model, settings.device, settings.dtype)
    prepared = chosen.prepare(backbone, chosen.Options())
    began = time.monotonic()
    with time_limit(backbone, settings.max_seconds):
        (maps,) = chosen.maps([picture.image], prepared)
    seconds = time.monotonic() - began
    held = Held(picture, method, model, prepared.options, maps, made_by(backbone, method), seconds)
    return held._replace(joining=joining_of(held))


def joining_of(held: Held) -> Joining | None:
    """Superpixels and the order in which they join, which take longer than all that follows."""
    from padseg.methods import stages

    options = held.options
    if held.method != 'seg4diff' or not (options.superpixels and options.join):
        return None
    proposals = seg4diff.proposals(held.maps, options)
    superpixels = stages.superpixels_of(held.picture.image, options.superpixels)
    return Joining(proposals, superpixels, stages.join_order(proposals, superpixels, held.picture.image, options.refine))


def named(picture: Picture, method: str, model: str, words: str, settings: Settings) -> LabelMap:
    """Classes from names, separated by commas. Raises UsageError for too many or too long names."""
    chosen = method_named(method, 'classes')
    backbone = backbone_of(method, model, settings.device, settings.dtype)
    prepared = chosen.prepare(backbone, chosen.Options(), class_names(words), keep=False)
    with time_limit(backbone, settings.max_seconds):
        (maps,) = chosen.maps([picture.image], prepared, [picture.name])
    return chosen.labels(picture.image, maps, prepared)


def class_names(words: str) -> Sequence[str]:
    names = [' '.join(name.split()) for name in words.split(',') if name.strip()]
    if not 1 <= len(names) <= WORDS or max(map(len, names)) > LETTERS:
        raise UsageError(f'write 1 to {WORDS} names of at most {LETTERS} letters, separated by commas')
    return names


def made_by(backbone: Backbone | None, method: str) -> dict[str, str | None]:
    """What made a label map, as in the files of `padseg export`."""
    if backbone is None:
        return {'version': __version__, 'method': method}
    model = backbone.identity
    return {'version': __version__, 'model': model.model, 'revision': model.revision, 'weights': model.weights}


@lru_cache(maxsize=MODELS_HELD)
def backbone_of(method: str, model: str, device: str | None, dtype: str | None) -> Backbone | None:
    """A model as far as a method needs it with its own settings; the last few stay loaded."""
    chosen = METHODS[method]
    return open_backbone(chosen, chosen.Options(), model, device=device, dtype=dtype)


@contextlib.contextmanager
def time_limit(backbone: Backbone | None, seconds: float) -> Iterator[None]:
    """Inside the block, raise TooLong from the next layer of the model once so many seconds have passed."""
    end = time.monotonic() + seconds

    def check(module: Any, inputs: Any) -> None:
        if time.monotonic() > end:
            raise TooLong(f'the model took more than {seconds:g} s, which is the limit of this demo')

    networks = [backbone.transformer, backbone.vae] if backbone else []
    hooks = [module.register_forward_pre_hook(check) for network in networks for module in network.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def without_model(held: Held, options: Any) -> Any:
    """The method, ready to make label maps of maps that are held."""
    kept = kept_method(held.method)
    return kept.without_model(options) if kept else METHODS[held.method].prepare(None, options)
