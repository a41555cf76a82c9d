"""Captions -> prompts with roles: which words of a caption stand for a class, which for other things, and which tokens these words have.

GoCA's App. E and the released captions. Unlike the released code, words are aligned by the tokenizer's offsets, not by searching for them
(where 'car' lies in 'carpet'), stop words are whole words, not pieces of words, and a group in parentheses closes whatever it holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from padseg.types import Tokens

STOP_WORDS = frozenset({'a', 'an', 'the', 'and'})
WORD = re.compile(r'[^\s,.-]+')
BETWEEN = ', '
BACKGROUND = 'background'
SYNONYMS = ('none', 'voc', 'context', 'coco', 'ade', 'cityscapes')  # tables of synonyms.json, by data set
FOLDER = Path(__file__).parent.parent


class Entity(NamedTuple):
    """Words of a prompt that belong together. number: of the class that they stand for; None for something else, which is background."""

    text: str
    number: int | None


class Scene(NamedTuple):
    """A prompt and what its words stand for. spans: (start, end) of each entity in the text."""

    text: str
    entities: tuple[Entity, ...]
    spans: tuple[tuple[int, int], ...]


class Roles(NamedTuple):
    """Columns of the text by what they stand for. content: of all classes and objects; classes: by their number; objects: of background."""

    content: tuple[int, ...]
    classes: Mapping[int, tuple[int, ...]]
    objects: tuple[tuple[int, ...], ...]


def scene_of(entities: Sequence[Entity]) -> Scene:
    """The prompt that lists entities, in lower case."""
    text, spans = '', []
    for entity in entities:
        text += BETWEEN if text else ''
        spans.append((len(text), len(text) + len(entity.text.lower())))
        text += entity.text.lower()
    return Scene(text, tuple(entities), tuple(spans))


def named_entities(names: Sequence[str], numbers: Sequence[int], background: Sequence[str] = ()) -> list[Entity]:
    """An entity for each class name, then for each word of background."""
    return [*map(Entity, names, numbers), *(Entity(word, None) for word in background)]


def caption_entities(caption: str, classes: Mapping[int, Sequence[str]], background: bool = False, complete: bool = False) -> list[Entity]:
    """The entities of a caption, its classes known by their names. classes: names of those that may be in the picture, by number.

    Words in parentheses are parts of one thing: an entity together if they name one class or none; if they name several, only these are
    left. background: add the word; complete: add the first name of each class that the caption does not name. Repeated entities count once.
    """
    known = names_known(classes)
    entities: list[Entity] = []
    for words in parsed(caption.strip().removesuffix('.') + (BETWEEN + BACKGROUND if background else '')):
        numbers = [known.get(word) for word in words]
        named = {number for number in numbers if number is not None}
        if len(named) > 1:
            entities += [Entity(word, number) for word, number in zip(words, numbers, strict=True) if number is not None]
        else:
            entities.append(Entity(BETWEEN.join(words), named.pop() if named else None))
    if complete:
        shown = {entity.number for entity in entities}
        entities += [Entity(names[0].lower(), number) for number, names in sorted(classes.items()) if number not in shown]
    return list({entity.text: entity for entity in entities}.values())


def names_known(classes: Mapping[int, Sequence[str]]) -> dict[str, int]:
    """The class of each word for one: a class is known by its own name first; of shared words the first class has them."""
    ordered = sorted(classes.items(), reverse=True)
    words = {form: number for number, names in ordered for name in names for form in forms(name)}
    return words | {names[0].lower(): number for number, names in ordered}


def parsed(caption: str) -> list[list[str]]:
    """The entities of a caption in lower case, as lists of their words: of one, or of those inside parentheses.

    A group ends at its parenthesis or with the caption.
    """
    found = []
    for group, alone in re.findall(r'\(([^()]*)\)?|([^,()]+)', caption.lower()):
        words = [' '.join(word.split()) for word in (group.split(',') if group else [alone])]
        found.append([word for word in words if word])
    return [words for words in found if words]


def forms(name: str) -> set[str]:
    """A name in lower case, and its plurals."""
    word = ' '.join(name.lower().split())
    return {word, f'{word}s', f'{word}es', *([f'{word[:-1]}ies'] if word.endswith('y') else [])}


@cache
def synonym_tables() -> dict[str, dict[str, list[str]]]:
    """Other words for the classes of data sets, by data set and class name."""
    tables: dict[str, dict[str, list[str]]] = json.loads((FOLDER / 'synonyms.json').read_text(encoding='ascii'))
    return tables


def with_synonyms(name: str, table: str) -> tuple[str, ...]:
    """A class name, and the other words for it in one of SYNONYMS."""
    return (name, *synonym_tables().get(table, {}).get(name.lower(), ()))


def roles_of(scene: Scene, tokens: Tokens, slots: int | None = None) -> Roles:
    """The columns of the words of each entity: of all tokens that stand for a part of a word which is no stop word.

    Special tokens, and those for what the tokenizer does not know, stand for nothing; nor do those beyond `slots`, where a prompt is cut.
    Entities without tokens are left out.
    """
    room = len(tokens.spans) if slots is None or len(tokens.spans) <= slots else slots - 1  # the last one is for the end token
    classes: dict[int, tuple[int, ...]] = {}
    objects = []
    content: list[int] = []
    for entity, (start, end) in zip(scene.entities, scene.spans, strict=True):
        words = [match.span() for match in WORD.finditer(scene.text, start, end) if match[0] not in STOP_WORDS]
        columns = tuple(
            tokens.first + place for place, span in enumerate(tokens.spans[:room]) if not tokens.strange[place] and overlaps(span, words)
        )
        content += columns
        if entity.number is not None and columns:
            classes[entity.number] = classes.get(entity.number, ()) + columns
        elif columns:
            objects.append(columns)
    return Roles(tuple(content), classes, tuple(objects))


def overlaps(span: tuple[int, int], words: Collection[tuple[int, int]]) -> bool:
    return any(max(span[0], start) < min(span[1], end) for start, end in words)
