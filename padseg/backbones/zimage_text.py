"""Text encoding for Z-Image: tokens of Qwen3's chat template and of the text in it; the transformer fills them up by itself."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from padseg.backbones.null_prompt import cached_embedding
from padseg.backbones.qwen_text import THINKING, qwen_tokens
from padseg.backbones.source import Source, text_files
from padseg.backbones.zimage import encode_text, filled_up, text_encoder, text_shapes, tokenizers
from padseg.errors import UsageError
from padseg.types import Tokens


@dataclasses.dataclass
class ZImageTexts:
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
        return {'qwen3': qwen_tokens(self.qwen_tokenizer, text, self.source.spec.sequence, THINKING)}

    def mask(self, text: str) -> Tensor:
        """1 for the tokens of the template and the text, 0 where learned tokens fill up, which are attended to all the same: (1, L)."""
        count = self.count(text)
        return (torch.arange(filled_up(count))[None] < count).to(self.transformer.device, self.transformer.dtype)

    def count(self, text: str) -> int:
        """The number of tokens, those of the template included, without what is cut off."""
        return min(len(self.tokens(text, 'qwen3')['qwen3'].spans), self.source.spec.sequence)

    def identity(self, encoders: str) -> str:
        return self.encoders_identity

    def encode(self, text: str, encoders: str, unused: str) -> tuple[Tensor, Tensor]:
        """Encode with Qwen3, or read the cache; the empty text is the null prompt."""
        shapes = text_shapes(self.count(text), self.transformer.config)
        slots = self.source.spec.sequence
        tensors = cached_embedding(self.source, text, shapes, lambda: encode_text(*self.encoder, slots, text), self.keep)
        place, kind = self.transformer.device, self.transformer.dtype
        return tensors['embeds'].to(place, kind), tensors['pooled'].to(place, kind)
