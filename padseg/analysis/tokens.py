"""The maps of all text tokens of one block: where each of CLIP's 77 slots, or of T5's, takes the image's attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from padseg.analysis.recording import Sight, Source, Text
from padseg.methods.stages.attention import token_attention
from padseg.types import Array, Attention, Image

LIKE = 0.98  # correlation above which two maps are alike


class TokenSheet(NamedTuple):
    """Maps of a picture's text tokens in one block, averaged over heads: (T, h, w), shares of each image token's attention.

    columns: of the tokens among the text slots; names: what each stands for; image: the picture, None if it is being made.
    """

    picture: str
    step: int
    layer: int
    columns: list[int]
    names: list[str]
    maps: Array
    image: Image | None


def slot_names(text: Text) -> dict[int, str]:
    """Name of every text slot that a tokenizer fills: the piece of the text that the token stands for, or start, end, template, pad."""
    names: dict[int, str] = {}
    for tokens in text.tokens.values():
        chat = sum(begin == end for begin, end in tokens.spans) - len(tokens.blanks) > 2  # more than a start and an end
        for place in range(tokens.slots):
            begin, end = tokens.spans[place] if place < len(tokens.spans) else (0, 0)
            special = 'pad' if place >= len(tokens.spans) else 'start' if place == 0 and len(tokens.spans) > 1 else 'end'
            special = 'template' if chat and special != 'pad' else special
            blank = 'blank' if place in tokens.blanks else special
            names[tokens.first + place] = text.text[begin:end] if begin < end else f'({blank})'
    return names


def image_to_text(seen: Attention, sight: Sight) -> Tensor:
    """Maps of all slots that a text encoder fills, averaged over heads: (T, h, w) float32."""
    filled = sorted({*sight.sets['text']} - {*sight.sets['empty']})
    image = sight.sets['image']
    return token_attention(seen, len(image), filled, first=image[0])[0].T.unflatten(1, sight.grid)


def measure(source: Source, layer: int) -> list[TokenSheet]:
    """The maps of one block for every picture and step."""
    sheets = []
    for sight, blocks in source(image_to_text):
        first_text = min(sight.sets['text'])
        names = slot_names(sight.text)
        columns = [token - first_text for token in sorted({*sight.sets['text']} - {*sight.sets['empty']})]
        maps = blocks[layer].cpu().numpy()
        sheets.append(TokenSheet(sight.name, sight.step, layer, columns, [names[column] for column in columns], maps, sight.image))
    return sheets


def alike(maps: Array) -> Array:
    """For each map (T, h, w), with how many maps it is alike, itself included: (T,). Flat maps are alike to one another."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    flat = flat - flat.mean(1, keepdims=True)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    unit = np.divide(flat, lengths, out=np.zeros_like(flat), where=lengths > 0)
    same = unit @ unit.T > LIKE
    level = lengths[:, 0] == 0
    return (same | np.outer(level, level)).sum(1)


def rows(sheets: Sequence[TokenSheet]) -> list[dict[str, Any]]:
    """A row for every picture, step and token: its mean and largest share, where this is (row and column from 0), how many are alike."""
    made = []
    for sheet in sheets:
        for column, name, values, like in zip(sheet.columns, sheet.names, sheet.maps, alike(sheet.maps), strict=True):
            row, place = divmod(int(values.argmax()), values.shape[1])
            made.append(
                {
                    'picture': sheet.picture,
                    'step': sheet.step,
                    'layer': sheet.layer,
                    'token': column,
                    'name': name,
                    'mean': float(values.mean()),
                    'largest': float(values.max()),
                    'row': row,
                    'column': place,
                    'alike': int(like),
                }
            )
    return made
