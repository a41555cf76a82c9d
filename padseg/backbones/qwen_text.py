"""Qwen3 as a text encoder, of FLUX.2-klein and Z-Image: a text is one turn of a chat, with a template around it, and padded behind.

The template is that of Qwen3's tokenizers, written out here: a model's own one is a program, which padseg does not run. The tokenizer has
to cut it into the tokens that are named here, so that those of the empty prompt are known without reading it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from padseg.backbones.configuration import read_json
from padseg.backbones.layout import config_name
from padseg.backbones.parts import part_name, read_text_encoders, read_tokenizer, told_errors
from padseg.backbones.source import Source, check_files, text_files, text_parts
from padseg.errors import ModelUnavailable
from padseg.types import Tokens

KIND = 'qwen3'  # transformers' name of the architecture
BEFORE = '<|im_start|>user\n'
BEHIND = '<|im_end|>\n<|im_start|>assistant\n'
ROLES = ('<|im_start|>', 'user', '\n', '<|im_end|>', '\n', '<|im_start|>', 'assistant', '\n')


class Template(NamedTuple):
    """What is around a text. behind: after it; tokens: of the template around the empty text."""

    behind: str
    tokens: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tokens, printable."""
        return tuple(printable(token) for token in self.tokens)


THINKING = Template(BEHIND, ROLES)  # `enable_thinking=True`
NOT_THINKING = Template(f'{BEHIND}<think>\n\n</think>\n\n', (*ROLES, '<think>', '\n\n', '</think>', '\n\n'))


def printable(token: str) -> str:
    """A token on one line: a line break is \\n."""
    return repr(token)[1:-1]


def framed(text: str, template: Template) -> str:
    return f'{BEFORE}{text}{template.behind}'


def qwen_tokenizer(source: Source, part: str, template: Template) -> Any:
    """The tokenizer in a part. ModelUnavailable if it or its text encoder is not that of Qwen3, or if it cuts the template otherwise."""
    from transformers import Qwen2TokenizerFast

    encoder = part.replace('tokenizer', 'text_encoder')
    kind = read_json(source.folder / encoder / config_name(encoder)).get('model_type')
    if kind != KIND:
        raise ModelUnavailable(f'{part_name(source, encoder)} is a {str(kind)[:100]}; this family reads texts with {KIND} alone')
    check_files(source, (part,))  # transformers would create an empty vocabulary
    tokenizer = read_tokenizer(Qwen2TokenizerFast, source, part)
    with told_errors(f'the tokenizer in {source.folder / part} fails'):
        found = tuple(tokenizer.decode([number]) for number in tokenizer(framed('', template)).input_ids)
    if found != template.tokens or tokenizer.padding_side != 'right':
        pieces = ' '.join(map(printable, found))
        raise ModelUnavailable(f"{part_name(source, part)} cuts Qwen3's template into {pieces[:300]}; expected {' '.join(template.names)}")
    return tokenizer


def qwen_encoder(source: Source, dtype: torch.dtype, template: Template) -> tuple[Any, Any]:
    """The text encoder and its tokenizer. ModelUnavailable if files are missing, or as `qwen_tokenizer`."""
    text_files(source)
    check_files(source, text_parts(source))
    tokenizer = qwen_tokenizer(source, 'tokenizer', template)
    return read_text_encoders(source, dtype)['text_encoder'], tokenizer


def qwen_tokens(tokenizer: Any, text: str, slots: int, template: Template) -> Tokens:
    """Tokenize a text in its template, without truncation: tokens of the template stand for none of the text, and are special."""
    with told_errors(f'the tokenizer in {tokenizer.name_or_path} fails'):
        encoded = tokenizer(framed(text, template), return_offsets_mapping=True, verbose=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    first = len(BEFORE)
    inside = [(max(start - first, 0), min(end - first, len(text))) for start, end in encoded.offset_mapping]
    spans = tuple((start, end) if start < end else (0, 0) for start, end in inside)
    strange = tuple(start >= end or number in special for number, (start, end) in zip(encoded.input_ids, spans, strict=True))
    return Tokens(0, slots, spans, strange)


@torch.no_grad()
def qwen_states(encoder: Any, tokenizer: Any, text: str, slots: int, template: Template) -> tuple[tuple[Tensor, ...], Tensor]:
    """Hidden states of a text in its template, cut off behind `slots` tokens: (1, slots, D) each, of the embedding and then of every layer;
    and the mask that is 1 for tokens and 0 for pads, (1, slots). Pads see the text, as in the pipelines of diffusers.
    """
    with told_errors(f'the tokenizer in {tokenizer.name_or_path} fails'):
        inputs = tokenizer(framed(text, template), padding='max_length', max_length=slots, truncation=True, return_tensors='pt')
    reader = getattr(encoder, 'model', encoder)  # without the head that would predict words
    states = reader(inputs.input_ids, attention_mask=inputs.attention_mask, output_hidden_states=True, use_cache=False).hidden_states
    return states, inputs.attention_mask
