"""Class names -> prompts: how names are worded, which tokens belong to each name, and how names are split over prompts."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from padseg.backbones.texts import Texts
from padseg.errors import UsageError
from padseg.types import Prompt, Tokens

TEMPLATE = 'a photo of a '
JOINTS = {'joined': ('', ' '), 'template': (TEMPLATE, ', '), 'per-class': (TEMPLATE, ', ')}  # text before the names, and between them


class PromptOptions(Protocol):
    """prompt: a key of JOINTS; encoders: that read it; unused: what stands in the places of others; columns: whose are read; blanks:
    whether those of spaces alone count."""

    @property
    def prompt(self) -> str: ...
    @property
    def encoders(self) -> str: ...
    @property
    def unused(self) -> str: ...
    @property
    def columns(self) -> str: ...
    @property
    def blanks(self) -> bool: ...


class Wording(NamedTuple):
    """A text that contains names. spans: (start, end) of each name."""

    text: str
    names: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names with single spaces. UsageError if there are none, or one that is no text, empty or there twice; and for what has no order, or
    is a text itself, whose letters would be taken for names."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        kind = type(names).__name__ if not isinstance(names, (list, tuple)) else f'{names!r:.100}'
        raise UsageError(f'classes must be a list of names in order, such as ["cat", "grass"]; got {kind}')
    tidy = tuple(' '.join(name.split()) for name in names)
    if not tidy:
        raise UsageError('there are no class names: give at least one')
    if '' in tidy:
        raise UsageError(f'the name of class {tidy.index("") + 1} of {len(tidy)} is empty')
    seen: dict[str, str] = {}
    for name in tidy:
        same = unicodedata.normalize('NFC', name).casefold()
        if same in seen:
            raise UsageError(f'two classes have the same name: {seen[same]} and {name}')
        seen[same] = name
    return tidy


def worded(names: Sequence[str], mode: str) -> Wording:
    """Word the names as one text in one of the modes of PROMPTS."""
    text, between = JOINTS[mode]
    spans = []
    for number, name in enumerate(names):
        text += between if number else ''
        spans.append((len(text), len(text) + len(name)))
        text += name
    return Wording(text, tuple(names), tuple(spans))


def prompts_of(names: Sequence[str], texts: Texts, options: PromptOptions) -> list[Prompt]:
    """Return the fewest prompts that hold all names in order, with the columns of every name.

    Raises UsageError for a name that fits into no prompt or has no tokens.
    """
    return [prompt_of(wording, texts, options) for wording in split(checked_names(names), texts, options)]


def split(names: Sequence[str], texts: Texts, options: PromptOptions) -> list[Wording]:
    """Fill each prompt with names in order while they fit; with `per-class`, one name per prompt."""
    wordings: list[Wording] = []
    for name in names:
        alone = worded([name], options.prompt)
        length, room = max((len(tokens.spans), tokens.slots) for tokens in texts.tokens(alone.text, options.encoders).values())
        if not fits_prompt(alone, texts, options):
            raise UsageError(f'the name {name!r} is too long: its prompt takes {length} tokens, start and end included, of {room}')
        longer = worded([*wordings[-1].names, name], options.prompt) if wordings and options.prompt != 'per-class' else None
        if longer and fits_prompt(longer, texts, options):
            wordings[-1] = longer
        else:
            wordings.append(alone)
    return wordings


def fits_prompt(wording: Wording, texts: Texts, options: PromptOptions) -> bool:
    """Return whether every tokenizer has room for the whole text; names in a truncated part would have no maps."""
    return all(len(tokens.spans) <= tokens.slots for tokens in texts.tokens(wording.text, options.encoders).values())


def prompt_of(wording: Wording, texts: Texts, options: PromptOptions) -> Prompt:
    """Encode a wording, with the columns of its names picked name by name.

    A name's map is the mean over its tokens; if CLIP's and T5's columns are both read, it is the mean of both.
    """
    found = texts.tokens(wording.text, options.encoders)
    read = [tokens for kind, tokens in found.items() if options.columns in (kind, 'both')]
    picked: list[int] = []
    names: list[str] = []
    weights: list[float] = []
    for name, span in zip(wording.names, wording.spans, strict=True):
        for tokens in read:
            columns = columns_of(name, span, tokens, options.blanks)
            picked += columns
            names += [name] * len(columns)
            weights += [1 / (len(columns) * len(read))] * len(columns)
    embeds, pooled = texts.encode(wording.text, options.encoders, options.unused)
    return Prompt(embeds, pooled, tuple(picked), tuple(names), tuple(weights), texts.mask(wording.text))


def columns_of(name: str, span: tuple[int, int], tokens: Tokens, blanks: bool = False) -> list[int]:
    """The columns of the tokens that stand for a part of the span, and with `blanks` of those for a space alone before one of them.

    UsageError if there are none, or one of them is a special token.
    """
    own = [place for place, (start, end) in enumerate(tokens.spans) if max(start, span[0]) < min(end, span[1])]
    if not own or any(tokens.strange[place] for place in own):
        raise UsageError(f'the tokenizer has no tokens for the name {name!r}')
    if blanks:
        own = sorted({*own, *(place for place in tokens.blanks if place + 1 in own)})
    return [tokens.first + place for place in own]
