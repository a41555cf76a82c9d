"""Text encoding for FLUX.2: tokens of Qwen3's chat template, of the text in it, and pads behind take up all columns."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from torch import Tensor

from padseg.backbones.flux2 import encode_text, prompt_shapes, text_encoder, tokenizers
from padseg.backbones.null_prompt import cached_embedding
from padseg.backbones.qwen_text import NOT_THINKING, qwen_tokens
from padseg.backbones.source import Source, text_files
from padseg.errors import UsageError
from padseg.types import Tokens


@dataclasses.dataclass
class Flux2Texts:
    """A model's tokenizer and text encoder, both loaded on first use; see `Texts`."""

    source: Source
    transformer: Any
    keep: bool  # whether embeddings are kept in padseg's cache
    encoders_identity: str = ''  # SHA-256 over the text encoders of the null prompt

    @cached_property
    def qwen_tokenizer(self) -> Any:
        text_files(self.source)
        return tokenizers(self.source)['tokenizer']

    @cached_property
    def encoder(self) -> tuple[Any, Any]:
        return text_encoder(self.source)

    def tokens(self, text: str, encoders: str) -> dict[str, Tokens]:
        """Qwen's tokens from column 0, those of the template too."""
        if encoders != 'qwen3':
            raise UsageError(f'{self.source.model} reads texts with Qwen3 alone: encoders is qwen3; got {encoders}')
        return {'qwen3': qwen_tokens(self.qwen_tokenizer, text, self.source.spec.sequence, NOT_THINKING)}

    def mask(self, text: str) -> None:
        """Pads are attended to."""

    def identity(self, encoders: str) -> str:
        return self.encoders_identity

    def encode(self, text: str, encoders: str, unused: str) -> tuple[Tensor, Tensor]:
        """Encode with Qwen3, or read the cache; the empty text is the null prompt."""
        slots = self.source.spec.sequence
        shapes = prompt_shapes(slots, self.transformer.config)
        tensors = cached_embedding(self.source, text, shapes, lambda: encode_text(*self.encoder, slots, text), self.keep)
        place, kind = self.transformer.device, self.transformer.dtype
        return tensors['embeds'].to(place, kind), tensors['pooled'].to(place, kind)
