"""Text encoding for Z-Image: tokens of Qwen3's chat template and of the text in it; the transformer fills them up by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from padseg.backbones.one_encoder import Encoding
from padseg.backbones.qwen_text import THINKING, qwen_encoder, qwen_tokens
from padseg.backbones.source import Source
from padseg.backbones.zimage import TEXT_DTYPE, encode_text, filled_up, text_shapes, tokenizers
from padseg.types import Tokens


def tokens(tokenizer: Any, text: str, slots: int) -> Tokens:
    """Qwen's tokens from column 0, those of the template too."""
    return qwen_tokens(tokenizer, text, slots, THINKING)


def load(source: Source, transformer: Any) -> tuple[Any, Any]:
    return qwen_encoder(source, TEXT_DTYPE, THINKING)


def encode(loaded: tuple[Any, Any], slots: int, text: str) -> dict[str, Tensor]:
    return encode_text(*loaded, slots, text)


def own_length(count: int) -> int:
    """Embeddings are as long as the text."""
    return count


def masked(count: int, slots: int) -> int:
    """What the learned tokens fill up is masked, though attended to all the same."""
    return filled_up(count)


ENCODING = Encoding('qwen3', 'tokenizer', tokenizers, tokens, load, encode, text_shapes, own_length, masked)
