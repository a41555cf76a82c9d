"""Qwen3 and its tokenizer in small: real classes, random weights, a vocabulary of letters, some words and the template's tokens."""

from __future__ import annotations

from typing import Any

WORDS = ('Ġcat', 'Ġdog', 'Ġgrass', 'cat', 'user', 'assistant', 'ĊĊ')  # earlier ones are made of letters first
MARKS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
# what Qwen3's own template makes of one message of a user
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def small_tokenizer() -> Any:
    """Every text can be spelled; WORDS are one token each."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast

    pieces, merges = sorted(ByteLevel.alphabet()), []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                merges.append((word[: end - 1], word[end - 1]))
                pieces.append(word[:end])
    vocabulary = {piece: number for number, piece in enumerate((*pieces, *MARKS))}
    tokenizer = Qwen2TokenizerFast(vocab=vocabulary, merges=merges, extra_special_tokens=list(MARKS[1:]), model_max_length=4096)
    tokenizer.add_tokens([AddedToken(mark, special=False) for mark in ('<think>', '</think>')])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def small_qwen(tokens: int, width: int, layers: int, kind: str = 'Qwen3ForCausalLM') -> Any:
    """As deep as is asked for: two heads of 8 channels that share keys and values. kind: the class, as the model's index names it."""
    import torch
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        rope_parameters={'rope_type': 'default', 'rope_theta': 1_000_000.0},
    )
    model = getattr(transformers, kind)(config)
    for name, weight in model.named_parameters():
        torch.nn.init.uniform_(weight, 0.5, 1.5) if 'norm' in name else torch.nn.init.normal_(weight, std=0.2)
    return model
