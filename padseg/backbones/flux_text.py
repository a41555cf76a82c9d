"""Text encoding for Flux.1: T5's tokens take up all columns; CLIP only adds a pooled summary of the text."""

from __future__ import annotations

from typing import Any

from padseg.backbones.flux import encode_text, prompt_shapes, text_pipeline, tokenizers
from padseg.backbones.one_encoder import Encoding
from padseg.backbones.parts import tokens_of
from padseg.types import Tokens


def tokens(tokenizer: Any, text: str, slots: int) -> Tokens:
    """T5's tokens from column 0."""
    return tokens_of(tokenizer, text, 0, slots)


ENCODING = Encoding('t5', 'tokenizer_2', tokenizers, tokens, text_pipeline, encode_text, prompt_shapes)
