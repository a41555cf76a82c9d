"""Text encoding for AuraFlow: Pile-T5's tokens take up all columns behind the registers, before or behind the pads."""

from __future__ import annotations

from typing import Any

from padseg.backbones.auraflow import encode_text, prompt_shapes, text_pipeline, tokenizers
from padseg.backbones.one_encoder import Encoding
from padseg.backbones.parts import tokens_of
from padseg.types import Tokens


def tokens(tokenizer: Any, text: str, slots: int) -> Tokens:
    """Pile-T5's tokens, in the last slots if its tokenizer pads on the left."""
    found = tokens_of(tokenizer, text, 0, slots)
    return found._replace(first=max(0, slots - len(found.spans))) if tokenizer.padding_side == 'left' else found


ENCODING = Encoding('t5', 'tokenizer', tokenizers, tokens, text_pipeline, encode_text, prompt_shapes)
