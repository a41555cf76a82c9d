"""Text encoding for Stable Diffusion 1 and 2 and SDXL: CLIP's tokens take up all columns, SDXL's two encoders by channels."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from torch import Tensor

from padseg.backbones.null_prompt import cached_embedding
from padseg.backbones.sd3_text import PAD, clip_tokens
from padseg.backbones.source import Source, text_files
from padseg.backbones.unet import encode_text, prompt_shapes, text_pipeline, tokenizers
from padseg.errors import UsageError
from padseg.types import Tokens


@dataclasses.dataclass
class UNetTexts:
    """A model's tokenizers and text encoders, both loaded on first use; see `Texts`."""

    source: Source
    transformer: Any
    keep: bool  # whether embeddings are kept in padseg's cache
    encoders_identity: str = ''  # SHA-256 over the text encoders of the null prompt

    @cached_property
    def clip_tokenizers(self) -> dict[str, Any]:
        text_files(self.source)
        return tokenizers(self.source)

    @cached_property
    def pipeline(self) -> Any:
        return text_pipeline(self.source, self.transformer)

    def tokens(self, text: str, encoders: str) -> dict[str, Tokens]:
        """The first tokenizer's tokens from column 0. UsageError for a text that the second one cuts otherwise."""
        known = self.source.spec.encoders
        if encoders != known:
            raise UsageError(f'{self.source.model} has one set of text encoders: encoders is {known}; got {encoders}')
        cuts = [clip_tokens(tokenizer, text, self.source.spec.sequence) for tokenizer in self.clip_tokenizers.values()]
        if cuts[0].spans != cuts[-1].spans:
            raise UsageError(f'the two CLIP tokenizers of {self.source.model} cut {text!r} differently; one of them pads with {PAD}')
        return {'clip': cuts[0]._replace(strange=tuple(map(any, zip(*(cut.strange for cut in cuts), strict=True))))}

    def mask(self, text: str) -> None:
        """Pads are attended to."""

    def identity(self, encoders: str) -> str:
        return self.encoders_identity

    def encode(self, text: str, encoders: str, unused: str) -> tuple[Tensor, Tensor]:
        """Encode with CLIP, or read the cache; the empty text is the null prompt."""
        shapes = prompt_shapes(self.source.spec.sequence, self.transformer.config)
        tensors = cached_embedding(self.source, text, shapes, lambda: encode_text(self.pipeline, text), self.keep)
        place, kind = self.transformer.device, self.transformer.dtype
        return tensors['embeds'].to(place, kind), tensors['pooled'].to(place, kind)
