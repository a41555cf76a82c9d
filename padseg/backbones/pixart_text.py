"""Text encoding for PixArt: T5's tokens of the text in lower case take up all columns, and pads are masked."""

from __future__ import annotations

from typing import Any

from padseg.backbones.one_encoder import Encoding
from padseg.backbones.parts import tokens_of
from padseg.backbones.pixart import encode_text, prompt_shapes, text_pipeline, tokenizers
from padseg.types import Tokens


def tokens(tokenizer: Any, text: str, slots: int) -> Tokens:
    """T5's tokens from column 0, with their places in the text as it was given."""
    lowered, places = lower_case(text)
    found = tokens_of(tokenizer, lowered, 0, slots)
    spans = tuple((places[start], places[end - 1] + 1) if end > start else (0, 0) for start, end in found.spans)
    return found._replace(spans=spans)


def lower_case(text: str) -> tuple[str, list[int]]:
    """The text as the pipeline reads it, in lower case without space around, and for each of its letters the place in the given text.

    A few letters become two in lower case.
    """
    lowered = text.lower()
    places = [place for place, letter in enumerate(text) for _ in letter.lower()]
    start, stripped = len(lowered) - len(lowered.lstrip()), lowered.strip()
    return stripped, places[start : start + len(stripped)]


def masked(count: int, slots: int) -> int:
    """Pads are masked in all slots."""
    return slots


ENCODING = Encoding('t5', 'tokenizer', tokenizers, tokens, text_pipeline, encode_text, prompt_shapes, masked=masked)
