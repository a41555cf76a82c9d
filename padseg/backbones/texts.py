"""Encode any text as a prompt of a loaded model: the text reader's protocol, and each family's reader."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from padseg.backbones import Backbone, Identity, auraflow_text, flux2_text, flux_text, pixart_text, sd3_text, unet_text, zimage_text
from padseg.backbones.one_encoder import OneEncoderTexts
from padseg.backbones.source import Source
from padseg.types import Tokens


class Texts(Protocol):
    """A model's tokenizers and text encoders. The encoders are loaded for the first text that is not cached, and then kept."""

    def tokens(self, text: str, encoders: str) -> dict[str, Tokens]:
        """Tokenize a text with each tokenizer whose tokens have columns, by keys of COLUMNS. UsageError for encoders that are missing."""

    def identity(self, encoders: str) -> str:
        """SHA-256 over these text encoders and their tokenizers; that of the null prompt's encoders if there are no others."""

    def encode(self, text: str, encoders: str, unused: str) -> tuple[Tensor, Tensor]:
        """Embeddings (1, L, D) and pooled vector (1, E) of a text that fits, in the transformer's dtype and on its device."""

    def mask(self, text: str) -> Tensor | None:
        """A prompt's mask for this text, (1, L); None for models that attend to pads."""


READERS: dict[str, Callable[[Source, Any, bool, str], Texts]] = {
    'sd3': sd3_text.SD3Texts,
    'flux': partial(OneEncoderTexts, flux_text.ENCODING),
    'flux2': partial(OneEncoderTexts, flux2_text.ENCODING),
    'auraflow': partial(OneEncoderTexts, auraflow_text.ENCODING),
    'zimage': partial(OneEncoderTexts, zimage_text.ENCODING),
    'unet': unet_text.UNetTexts,
    'pixart': partial(OneEncoderTexts, pixart_text.ENCODING),
}


def texts_of(backbone: Backbone, keep: bool = True) -> Texts:
    """The text reader of a model, made once. keep: whether embeddings are kept in padseg's cache."""
    identity = backbone.identity
    source = Source(backbone.spec, identity.model, Path(identity.folder), identity.revision)
    return READERS[backbone.spec.family](source, backbone.transformer, keep, identity.text_encoders)


def with_encoders(backbone: Backbone, encoders: str) -> Backbone:
    """The model with an identity that depends on all text encoders which are used, T5 too."""
    source = Source(backbone.spec, backbone.identity.model, Path(backbone.identity.folder), backbone.identity.revision)
    return dataclasses.replace(backbone, identity=identity_with(backbone.identity, source, encoders))


def identity_with(identity: Identity, source: Source, encoders: str) -> Identity:
    """The identity of a model as its own text encoders and these make it."""
    return identity._replace(text_encoders=READERS[source.spec.family](source, None, False, identity.text_encoders).identity(encoders))


@lru_cache(maxsize=4)
def kept_texts(backbone: Backbone, keep: bool) -> Texts:
    """Return the model's text reader, created once per model so that its text encoders are loaded only once."""
    return texts_of(backbone, keep)
