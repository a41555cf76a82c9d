"""Text encoding for FLUX.2: tokens of Qwen3's chat template, of the text in it, and pads behind take up all columns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from padseg.backbones.flux2 import TEXT_DTYPE, encode_text, prompt_shapes, tokenizers
from padseg.backbones.one_encoder import Encoding
from padseg.backbones.qwen_text import NOT_THINKING, qwen_encoder, qwen_tokens
from padseg.backbones.source import Source
from padseg.types import Tokens


def tokens(tokenizer: Any, text: str, slots: int) -> Tokens:
    """Qwen's tokens from column 0, those of the template too."""
    return qwen_tokens(tokenizer, text, slots, NOT_THINKING)


def load(source: Source, transformer: Any) -> tuple[Any, Any]:
    return qwen_encoder(source, TEXT_DTYPE, NOT_THINKING)


def encode(loaded: tuple[Any, Any], slots: int, text: str) -> dict[str, Tensor]:
    return encode_text(*loaded, slots, text)


ENCODING = Encoding('qwen3', 'tokenizer', tokenizers, tokens, load, encode, prompt_shapes)
