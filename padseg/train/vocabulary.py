"""The embedded model's byte-pair vocabulary: every word that it learns is one token."""

from __future__ import annotations

from padseg.train.scenes import CLASSES

SLOTS = 77  # tokens of a CLIP prompt
START, END = '<|startoftext|>', '<|endoftext|>'
WORDS = sorted({word for name in CLASSES for word in name.split()} | {'a', 'an', 'and', 'in', 'of', 'on', 'the', 'two', 'with'})


def vocabulary_and_merges(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Build a small CLIP byte-pair vocabulary: letters, word-final letters, and merges that make each given word one token.

    It depends on the words alone, whereas a trained vocabulary orders equally frequent pairs arbitrarily.
    """
    alphabet = [chr(code) for code in range(ord('!'), ord('~') + 1)]
    merges: list[tuple[str, str]] = []
    for word in sorted(words):
        pieces = merged([*word[:-1], word[-1] + '</w>'], merges)
        while len(pieces) > 1:  # new merges come last, so that earlier words stay whole
            merges.append((pieces[0], pieces[1]))
            pieces = merged(pieces, merges)
    pieces = alphabet + [letter + '</w>' for letter in alphabet] + [first + second for first, second in merges]
    tokens = [*dict.fromkeys(pieces), START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def merged(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Apply all merges to the pieces of a word, in the order of the list (Sennrich et al. 2016)."""
    for first, second in merges:
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == (first, second):
                joined[-1] = first + second
            else:
                joined.append(piece)
        pieces = joined
    return pieces
