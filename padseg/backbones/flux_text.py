"""Text encoding for Flux.1: T5's tokens take up all columns; CLIP only adds a pooled summary of the text."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from torch import Tensor

from padseg.backbones.flux import encode_text, prompt_shapes, text_pipeline, tokenizers
from padseg.backbones.null_prompt import cached_embedding
from padseg.backbones.parts import tokens_of
from padseg.backbones.source import Source, text_files
from padseg.errors import UsageError
from padseg.types import Tokens


@dataclasses.dataclass
class FluxTexts:
    """A model's tokenizers and text encoders, both loaded on first use; see `Texts`."""

    source: Source
    transformer: Any
    keep: bool  # whether embeddings are kept in padseg's cache
    encoders_identity: str = ''  # SHA-256 over the text encoders of the null prompt

    @cached_property
    def t5_tokenizer(self) -> Any:
        text_files(self.source)
        return tokenizers(self.source)['tokenizer_2']

    @cached_property
    def pipeline(self) -> Any:
        return text_pipeline(self.source, self.transformer)

    def tokens(self, text: str, encoders: str) -> dict[str, Tokens]:
        """T5's tokens from column 0."""
        if encoders != 't5':
            raise UsageError(f'only T5 has columns in {self.source.model}: encoders is t5; got {encoders}')
        return {'t5': tokens_of(self.t5_tokenizer, text, 0, self.source.spec.sequence)}

    def mask(self, text: str) -> None:
        """Pads are attended to."""

    def identity(self, encoders: str) -> str:
        return self.encoders_identity

    def encode(self, text: str, encoders: str, unused: str) -> tuple[Tensor, Tensor]:
        """Encode with T5 and CLIP, or read the cache; the empty text is the null prompt."""
        slots = self.source.spec.sequence
        shapes = prompt_shapes(slots, self.transformer.config)
        tensors = cached_embedding(self.source, text, shapes, lambda: encode_text(self.pipeline, slots, text), self.keep)
        place, kind = self.transformer.device, self.transformer.dtype
        return tensors['embeds'].to(place, kind), tensors['pooled'].to(place, kind)
