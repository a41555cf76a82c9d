"""Text encoding for AuraFlow: Pile-T5's tokens take up all columns behind the registers, before or behind the pads."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from torch import Tensor

from padseg.backbones.auraflow import encode_text, prompt_shapes, text_pipeline, tokenizers
from padseg.backbones.null_prompt import cached_embedding
from padseg.backbones.parts import tokens_of
from padseg.backbones.source import Source, text_files
from padseg.errors import UsageError
from padseg.types import Tokens


@dataclasses.dataclass
class AuraFlowTexts:
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
        """Pile-T5's tokens, in the last slots if its tokenizer pads on the left."""
        if encoders != 't5':
            raise UsageError(f'{self.source.model} reads texts with T5 alone: encoders is t5; got {encoders}')
        slots = self.source.spec.sequence
        tokens = tokens_of(self.t5_tokenizer, text, 0, slots)
        behind = self.t5_tokenizer.padding_side == 'left'
        return {'t5': tokens._replace(first=max(0, slots - len(tokens.spans))) if behind else tokens}

    def mask(self, text: str) -> None:
        """Pads are attended to."""

    def identity(self, encoders: str) -> str:
        return self.encoders_identity

    def encode(self, text: str, encoders: str, unused: str) -> tuple[Tensor, Tensor]:
        """Encode with Pile-T5, or read the cache; the empty text is the null prompt."""
        slots = self.source.spec.sequence
        shapes = prompt_shapes(slots, self.transformer.config)
        tensors = cached_embedding(self.source, text, shapes, lambda: encode_text(self.pipeline, slots, text), self.keep)
        place, kind = self.transformer.device, self.transformer.dtype
        return tensors['embeds'].to(place, kind), tensors['pooled'].to(place, kind)
