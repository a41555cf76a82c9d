"""Tokens behind the prompt that read the picture and that nothing else reads: ConceptAttention's third stream, in an unmodified model.

They are appended to the prompt's embeddings, so that the text's weights process them. One boolean mask keeps image and prompt from them:

    queries of image and prompt: all keys but those of concepts;   queries of concepts: keys of image and concepts, not of the prompt.

It is never stored: attention runs once for the rows of image and prompt, as without concepts, and once for the rows of concepts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.types import Prompt

SEES = ('both', 'image', 'concepts', 'itself')  # what concepts attend to; itself: each only to its own token


class Places(NamedTuple):
    """Where tokens stand among the queries and keys of joint attention: image, prompt and concepts are all of the `total` ones.

    Registers, which come before the text in some models, count as the prompt's.
    """

    image: slice
    prompt: slice
    concepts: slice
    total: int

    @property
    def others(self) -> list[slice]:
        """Image and prompt, in order."""
        return sorted((self.image, self.prompt), key=lambda place: place.start)


def with_concepts(prompt: Prompt, embeds: Tensor) -> Prompt:
    """A prompt followed by concepts, (1, C, D)."""
    return prompt._replace(embeds=torch.cat((prompt.embeds, embeds.to(prompt.embeds)), 1), outside=embeds.shape[1])


def places_of(backbone: Backbone, together: Prompt, image_tokens: int) -> Places:
    """Places for a prompt with concepts."""
    length, concepts = together.embeds.shape[1], together.outside
    first = backbone.first_image_token(together)
    columns = backbone.text_columns(together._replace(picked=tuple(range(length))), image_tokens)
    prompt, own = columns[: length - concepts], columns[length - concepts :]
    start = image_tokens if first == 0 else 0  # of what is no image
    total = max(first + image_tokens, own[-1] + 1)
    return Places(slice(first, first + image_tokens), slice(start, prompt[-1] + 1), slice(own[0], own[-1] + 1), total)


def picked(tensor: Tensor, places: Sequence[slice]) -> Tensor:
    """Tokens at these places, one after another; without a copy where they are neighbours: (B, H, L, d) -> (B, H, n, d)."""
    first, *rest = places
    if all(one.stop == other.start for one, other in zip(places, rest, strict=False)):
        return tensor[:, :, first.start : places[-1].stop]
    return torch.cat([tensor[:, :, place] for place in places], 2)


class _Apart(TorchFunctionMode):
    """Computes joint attention of `total` tokens with the mask above; other attention, such as of the image alone, as it is."""

    def __init__(self, places: Places, sees: str) -> None:
        super().__init__()
        self.places = places
        self.sees = sees

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and length_of(*args, **kwargs) == self.places.total:
            return self.apart(*args, **kwargs)
        return func(*args, **kwargs)

    def apart(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return attention_apart(query, key, value, self.places, self.sees)


def length_of(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return key.shape[2]


def attention_apart(query: Tensor, key: Tensor, value: Tensor, places: Places, sees: str = 'both') -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v under the mask above: (B, heads, L, d) each -> (B, heads, L, d). sees: one of SEES."""
    attend = nn.functional.scaled_dot_product_attention
    own = places.concepts
    output = torch.empty_like(query)
    rest = attend(picked(query, places.others), picked(key, places.others), picked(value, places.others))
    for place, rows in zip(places.others, rest.split([place.stop - place.start for place in places.others], 2), strict=True):
        output[:, :, place] = rows
    if sees == 'itself':
        output[:, :, own] = value[:, :, own]
        return output
    seen = {'both': sorted((places.image, own), key=lambda place: place.start), 'image': [places.image], 'concepts': [own]}[sees]
    output[:, :, own] = attend(query[:, :, own], picked(key, seen), picked(value, seen))
    return output


@contextmanager
def third_stream(backbone: Backbone, places: Places, sees: str = 'both', pooled: Tensor | None = None) -> Iterator[None]:
    """Context in which the tokens at `places.concepts` are a stream of their own.

    It goes around the context of `watch`, which then sees all tokens. pooled: (1, E), the pooled vector that scales and shifts concepts,
    by default the prompt's, as of all text tokens.
    """
    with ExitStack() as stack:
        if pooled is not None:
            stack.enter_context(modulated_apart(backbone.transformer, backbone.family.blocks(backbone.transformer), places, pooled))
        stack.enter_context(_Apart(places, sees))
        yield


@contextmanager
def modulated_apart(transformer: Any, blocks: Sequence[Any], places: Places, pooled: Tensor) -> Iterator[None]:
    """Context in which scales, shifts and gates of concepts follow from another pooled vector than those of the prompt.

    A block has one gate for all its text tokens, so what it makes of concepts is computed once more with their own ones. This holds for
    blocks of two streams, where the text has weights of its own; those of one stream go on with the prompt's vector.
    """
    start = places.concepts.start - places.prompt.start  # among the text tokens
    rows = slice(start, start + places.concepts.stop - places.concepts.start)
    time: list[Tensor] = []

    def keep_time(module: nn.Module, args: tuple[Any, ...], _: Tensor) -> None:
        time[:] = [module.forward(*args[:-1], pooled.to(args[-1]).expand_as(args[-1]))]

    handles = [transformer.time_text_embed.register_forward_hook(keep_time)]
    for block in blocks:
        if hasattr(block, 'norm1_context'):
            handles += own_modulation(block, rows, time)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def own_modulation(block: Any, rows: slice, time: list[Tensor]) -> list[Any]:
    """Hooks of one block. time: the embedding of time and pooled vector that its concepts, at `rows` of the text, are to have."""
    kept: dict[str, Any] = {}

    def normalise(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tokens = args[0][:, rows]
        if not isinstance(output, tuple):  # of the last block, whose text goes nowhere
            return replaced(output, rows, module.forward(tokens, time[0]))
        normal, *gates = module.forward(tokens, emb=time[0])
        kept.update(tokens=tokens, gates=gates)
        return (replaced(output[0], rows, normal), *output[1:])

    def project(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        kept['attended'] = output[:, rows]

    def finish(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor | None, Tensor]) -> Any:
        text, image = output
        if text is None:
            return output
        gate, shift, scale, last_gate = (part[:, None] for part in kept['gates'])
        tokens = kept['tokens'] + gate * kept['attended']
        tokens = tokens + last_gate * block.ff_context(block.norm2_context(tokens) * (1 + scale) + shift)
        return replaced(text, rows, tokens), image

    handles = [block.norm1_context.register_forward_hook(normalise), block.register_forward_hook(finish)]
    if isinstance(block.attn.to_add_out, nn.Module):
        handles.append(block.attn.to_add_out.register_forward_hook(project))
    return handles


def replaced(tensor: Tensor, rows: slice, values: Tensor) -> Tensor:
    """A copy with other rows, (B, L, C)."""
    tensor = tensor.clone()
    tensor[:, rows] = values
    return tensor
