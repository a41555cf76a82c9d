"""Encode any text as a prompt of a loaded model: the text reader's protocol, and each family's reader."""

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
    """A model's tokenizers and text encoders. The encoders are loaded for the first text that is not cached, and then kept."""

    def tokens(self, text: str, encoders: str) -> dict[str, Tokens]:
        """Tokenize a text with each tokenizer whose tokens have columns, by keys of COLUMNS. UsageError for encoders that are missing."""

    def encode(self, text: str, encoders: str, unused: str) -> tuple[Tensor, Tensor]:
        """Embeddings (1, L, D) and pooled vector (1, E) of a text that fits, in the transformer's dtype and on its device."""


def texts_of(backbone: Backbone, keep: bool = True) -> Texts:
    """Create a text reader for a model. keep: whether to cache embeddings on disk."""
    readers: dict[str, Callable[[Source, Any, bool], Texts]] = {'sd3': sd3_text.SD3Texts, 'flux': flux_text.FluxTexts}
    identity = backbone.identity
    source = Source(backbone.spec, identity.model, Path(identity.folder), identity.revision)
    return readers[backbone.spec.family](source, backbone.transformer, keep)


@lru_cache(maxsize=4)
def kept_texts(backbone: Backbone, keep: bool) -> Texts:
    """Return the model's text reader, created once per model so that its text encoders are loaded only once."""
    return texts_of(backbone, keep)
