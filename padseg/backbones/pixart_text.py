"""Text encoding for PixArt: T5's tokens of the text in lower case take up all columns, and pads are masked."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from padseg.backbones.null_prompt import cached_embedding
from padseg.backbones.parts import tokens_of
from padseg.backbones.pixart import encode_text, prompt_shapes, text_pipeline, tokenizers
from padseg.backbones.source import Source, text_files
from padseg.errors import UsageError
from padseg.types import Tokens


@dataclasses.dataclass
class PixArtTexts:
    """A model's tokenizer and text encoder, both loaded on first use; see `Texts`."""

    source: Source
    transformer: Any
    keep: bool  # whether embeddings are kept in padseg's cache
    encoders_identity: str = ''  # SHA-256 over the text encoders of the null prompt

    @cached_property
    def t5_tokenizer(self) -> Any:
        text_files(self.source)
        return tokenizers(self.source)['tokenizer']

    @cached_property
    def pipeline(self) -> Any:
        return text_pipeline(self.source, self.transformer)

    def tokens(self, text: str, encoders: str) -> dict[str, Tokens]:
        """T5's tokens from column 0, with their places in the text as it was given."""
        if encoders != 't5':
            raise UsageError(f'{self.source.model} reads texts with T5 alone: encoders is t5; got {encoders}')
        lowered, places = lower_case(text)
        tokens = tokens_of(self.t5_tokenizer, lowered, 0, self.source.spec.sequence)
        spans = tuple((places[start], places[end - 1] + 1) if end > start else (0, 0) for start, end in tokens.spans)
        return {'t5': tokens._replace(spans=spans)}

    def mask(self, text: str) -> Tensor:
        """1 for the slots of the text's tokens and the end, 0 for those of pads: (1, L)."""
        slots = self.source.spec.sequence
        count = len(self.tokens(text, 't5')['t5'].spans)
        return (torch.arange(slots)[None] < count).to(self.transformer.device, self.transformer.dtype)

    def identity(self, encoders: str) -> str:
        return self.encoders_identity

    def encode(self, text: str, encoders: str, unused: str) -> tuple[Tensor, Tensor]:
        """Encode with T5, or read the cache; the empty text is the null prompt."""
        slots = self.source.spec.sequence
        shapes = prompt_shapes(slots, self.transformer.config)
        tensors = cached_embedding(self.source, text, shapes, lambda: encode_text(self.pipeline, slots, text), self.keep)
        place, kind = self.transformer.device, self.transformer.dtype
        return tensors['embeds'].to(place, kind), tensors['pooled'].to(place, kind)


def lower_case(text: str) -> tuple[str, list[int]]:
    """The text as the pipeline reads it, in lower case without space around, and for each of its letters the place in the given text.

    A few letters become two in lower case.
    """
    lowered = text.lower()
    places = [place for place, letter in enumerate(text) for _ in letter.lower()]
    start, stripped = len(lowered) - len(lowered.lstrip()), lowered.strip()
    return stripped, places[start : start + len(stripped)]
