"""Texts of a model in which the tokens of one text encoder take up all columns: how its family reads them, and the reader itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from padseg.backbones.null_prompt import cached_embedding
from padseg.backbones.source import Source, text_files
from padseg.errors import UsageError
from padseg.types import Tokens


class Encoding(NamedTuple):
    """How a family reads texts; its file backbones/<family>_text.py has one.

    encoder: a key of COLUMNS; tokenizers: load them, keyed by folder, of which `part` is read; tokens: of a text, from tokenizer and slots;
    load: what `encode` needs, from source and transformer; encode: the tensors of a text, from that and the number of slots; shapes: of
    these tensors, from the length of the embeddings and the transformer's configuration; length: of the embeddings, from the number of
    tokens, or None for all slots; masked: the length of a prompt's mask, from the numbers of tokens and of slots, or None for no masks.
    """

    encoder: str
    part: str
    tokenizers: Callable[[Source], dict[str, Any]]
    tokens: Callable[[Any, str, int], Tokens]
    load: Callable[[Source, Any], Any]
    encode: Callable[[Any, int, str], dict[str, Tensor]]
    shapes: Callable[[int, Any], Mapping[str, tuple[int, ...]]]
    length: Callable[[int], int] | None = None
    masked: Callable[[int, int], int] | None = None


@dataclasses.dataclass
class OneEncoderTexts:
    """A model's tokenizer and text encoder, both loaded on first use; see `Texts`."""

    encoding: Encoding
    source: Source
    transformer: Any
    keep: bool  # whether embeddings are kept in padseg's cache
    encoders_identity: str = ''  # SHA-256 over the text encoders of the null prompt

    @cached_property
    def tokenizer(self) -> Any:
        text_files(self.source)
        return self.encoding.tokenizers(self.source)[self.encoding.part]

    @cached_property
    def loaded(self) -> Any:
        return self.encoding.load(self.source, self.transformer)

    def tokens(self, text: str, encoders: str) -> dict[str, Tokens]:
        name = self.encoding.encoder
        if encoders != name:
            raise UsageError(f'of the text encoders of {self.source.model}, only {name} has columns: encoders is {name}; got {encoders}')
        return {name: self.encoding.tokens(self.tokenizer, text, self.source.spec.sequence)}

    def count(self, text: str) -> int:
        """The number of tokens, without what is cut off."""
        name = self.encoding.encoder
        return min(len(self.tokens(text, name)[name].spans), self.source.spec.sequence)

    def mask(self, text: str) -> Tensor | None:
        """1 for the slots of tokens, 0 for the others, (1, L); None if pads are attended to."""
        if self.encoding.masked is None:
            return None
        count = self.count(text)
        length = self.encoding.masked(count, self.source.spec.sequence)
        return (torch.arange(length)[None] < count).to(self.transformer.device, self.transformer.dtype)

    def identity(self, encoders: str) -> str:
        return self.encoders_identity

    def encode(self, text: str, encoders: str, unused: str) -> tuple[Tensor, Tensor]:
        """Encode, or read the cache; the empty text is the null prompt."""
        slots = self.source.spec.sequence
        length = self.encoding.length(self.count(text)) if self.encoding.length else slots
        shapes = self.encoding.shapes(length, self.transformer.config)
        tensors = cached_embedding(self.source, text, shapes, lambda: self.encoding.encode(self.loaded, slots, text), self.keep)
        place, kind = self.transformer.device, self.transformer.dtype
        return tensors['embeds'].to(place, kind), tensors['pooled'].to(place, kind)
