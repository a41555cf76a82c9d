"""Any text as a prompt of a loaded model: what a reader of texts offers, and which one each family has."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from padseg.backbones import Backbone, flux_text, sd3_text
from padseg.backbones.source import Source
from padseg.types import Tokens


class Texts(Protocol):
    """The tokenizers of a model, and its text encoders, which are read when the first text comes that is not cached, and then stay."""

    def tokens(self, text: str, encoders: str) -> dict[str, Tokens]:
        """The text as the tokenizers cut it whose tokens have columns, as keys of COLUMNS. UsageError for encoders that are not there."""

    def encode(self, text: str, encoders: str, unused: str) -> tuple[Tensor, Tensor]:
        """Embeddings (1, L, D) and pooled (1, E) of a text that fits, in the transformer's type and place."""


@lru_cache(maxsize=4)
def texts_of(backbone: Backbone, keep: bool = True) -> Texts:
    """What reads texts for a model, made once. keep: whether embeddings are kept in padseg's cache."""
    readers: dict[str, Callable[[Source, Any, bool], Texts]] = {'sd3': sd3_text.SD3Texts, 'flux': flux_text.FluxTexts}
    identity = backbone.identity
    source = Source(backbone.spec, identity.model, Path(identity.folder), identity.revision)
    return readers[backbone.spec.family](source, backbone.transformer, keep)
