"""Text encoding for Stable Diffusion 3: CLIP-L and CLIP-G share the first columns, split by channel; T5 has its own columns."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from padseg.backbones.configuration import read_json
from padseg.backbones.null_prompt import encoders_key, path_of, read_cache, refuse_not_finite, shapes_of, write_cache
from padseg.backbones.parts import SMALL, read_model, read_tokenizer, tokens_of
from padseg.backbones.sd3 import encode_text, prompt_shapes, text_pipeline, tokenizers
from padseg.backbones.source import Source, check_files, content_hash, part_files, snapshot, text_files, weight_files
from padseg.errors import ModelUnavailable, UsageError
from padseg.types import Tokens

CLIPS = {'l': ('tokenizer',), 'g': ('tokenizer_2',), 'l+g': ('tokenizer', 'tokenizer_2'), 't5': (), 'l+g+t5': ('tokenizer', 'tokenizer_2')}
PAD = '!'  # the second CLIP tokenizer's pad token
T5_PARTS = ('text_encoder_3', 'tokenizer_3')  # loaded only if T5 encodes the class names
# explicit patterns, because the repository also holds half-precision weights
T5_FILES = ('text_encoder_3/config.json', 'text_encoder_3/model.safetensors*', 'text_encoder_3/model-*.safetensors', 'tokenizer_3/*')


@dataclasses.dataclass
class SD3Texts:
    """A model's tokenizers and text encoders, both loaded on first use; see `Texts`."""

    source: Source
    transformer: Any
    keep: bool  # whether embeddings are kept in padseg's cache
    encoders_identity: str = ''  # SHA-256 over the text encoders of the null prompt

    @cached_property
    def clip_tokenizers(self) -> dict[str, Any]:
        text_files(self.source)
        return tokenizers(self.source)

    @cached_property
    def pipeline(self) -> Any:
        return text_pipeline(self.source, self.transformer)

    @cached_property
    def t5_tokenizer(self) -> Any:
        from transformers import T5TokenizerFast

        listed = read_json(self.source.folder / 'model_index.json').get('text_encoder_3')
        if not isinstance(listed, list) or listed[:1] in ([], [None]):
            raise UsageError(f'{self.source.model} has no T5: encoders is one of l, g, l+g')
        t5_files(self.source)
        check_files(self.source, T5_PARTS)
        return read_tokenizer(T5TokenizerFast, self.source, 'tokenizer_3')

    @cached_property
    def t5_encoder(self) -> Any:
        """Load T5 on the CPU, like the other encoders; a large one in bfloat16, because float32 would take 19 GB."""
        from transformers import T5EncoderModel

        size = sum(path.stat().st_size for path in weight_files(self.source.folder, ('text_encoder_3',)))
        return read_model(T5EncoderModel, self.source, 'text_encoder_3', dtype=torch.float32 if size < SMALL else torch.bfloat16)

    @cached_property
    def clip_key(self) -> str:
        """Identify the CLIP encoders. For a local folder this hashes their files, which takes about a second per gigabyte."""
        return encoders_key(self.source)

    @cached_property
    def t5_key(self) -> str:
        return self.source.commit or content_hash(self.source.folder, t5_files(self.source))

    def tokens(self, text: str, encoders: str) -> dict[str, Tokens]:
        """CLIP's tokens from column 0, and T5's after CLIP's slots.

        UsageError for encoders of other families. If the two CLIP tokenizers split a text differently, raises UsageError when `!` is the
        cause, else ModelUnavailable.
        """
        slots = self.source.spec.sequence
        tokens = {}
        cuts = [clip_tokens(self.clip_tokenizers[part], text, slots) for part in self.clips(encoders)]
        if cuts:
            if cuts[0].spans != cuts[-1].spans:
                if PAD in text:
                    raise UsageError(
                        f'the two CLIP tokenizers cut {text!r} differently, as one pads with {PAD}: use encoders l or g, or no {PAD}'
                    )
                raise ModelUnavailable(f'the two CLIP tokenizers of {self.source.model} cut {text!r} differently: use encoders l or g')
            tokens['clip'] = cuts[0]._replace(strange=tuple(map(any, zip(cuts[0].strange, cuts[-1].strange, strict=True))))
        if 't5' in encoders:
            tokens['t5'] = tokens_of(self.t5_tokenizer, text, slots, slots)
        return tokens

    def clips(self, encoders: str) -> tuple[str, ...]:
        """Folders of the CLIP tokenizers that are used. UsageError for encoders that no model of this family has."""
        if encoders not in CLIPS:
            raise UsageError(f'{self.source.model} has other text encoders: encoders is one of {", ".join(CLIPS)}; got {encoders}')
        return CLIPS[encoders]

    def mask(self, text: str) -> None:
        """Pads are attended to."""

    def identity(self, encoders: str) -> str:
        """The null prompt comes from CLIP's encoders alone."""
        if 't5' not in encoders:
            return self.encoders_identity
        t5 = content_hash(self.source.folder, t5_files(self.source))
        return hashlib.sha256(f'{self.encoders_identity} {t5}'.encode()).hexdigest()

    def encode(self, text: str, encoders: str, unused: str) -> tuple[Tensor, Tensor]:
        """Encode a text for any arm of Yamaguchi and Yanai's comparison: channels of an unused CLIP encoder are zero, also in the pooled
        vector.
        """
        shapes = prompt_shapes(self.source.spec.sequence, self.transformer.config)
        embeds, pooled = (torch.zeros(shape) for shape in shapes.values())
        clip, t5 = embeds.chunk(2, 1)  # (1, slots, D) each
        if self.clips(encoders):
            tensors = self.clip(text, shapes)
            clip, pooled = tensors['embeds'].chunk(2, 1)[0].clone(), tensors['pooled'].clone()
            for part, used in (('text_encoder', 'l' in encoders.split('+')), ('text_encoder_2', 'g' in encoders.split('+'))):
                if not used:
                    for tensor, (start, stop) in zip((clip, pooled), self.channels(part), strict=True):
                        tensor[..., start:stop] = 0
        if 't5' in encoders:
            t5 = self.t5(text)
        embeds = clip if unused == 'dropped' and 't5' not in encoders else torch.cat((clip, t5), 1)
        place, kind = self.transformer.device, self.transformer.dtype
        return embeds.to(place, kind), pooled.to(place, kind)

    def channels(self, part: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Channel range (start, stop) of a CLIP encoder in a token embedding and in the pooled vector."""
        bounds = []
        for name in ('hidden_size', 'projection_dim'):
            first, size = (channel_count(self.source.folder / encoder / 'config.json', name) for encoder in ('text_encoder', part))
            bounds.append((0, first) if part == 'text_encoder' else (first, first + size))
        return bounds[0], bounds[1]

    def clip(self, text: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Encode with both CLIP encoders, or read the cache; the empty text is the null prompt."""
        path = path_of(self.source, self.clip_key, text)
        tensors, _ = read_cache(path)
        if shapes_of(tensors) != shapes:
            tensors = encode_text(self.pipeline, self.source.spec.sequence, text)
            refuse_not_finite(self.source, tensors)
            self.store(tensors, path)
        return tensors

    def t5(self, text: str) -> Tensor:
        """Encode with T5, padded without a mask as in diffusers' pipeline: (1, slots, D)."""
        source, slots = self.source, self.source.spec.sequence
        tokenizer = self.t5_tokenizer
        path = path_of(source, self.t5_key, f't5 {text}')
        tensors, _ = read_cache(path)
        if shapes_of(tensors) != {'embeds': (1, slots, self.transformer.config.joint_attention_dim)}:
            numbers = tokenizer(text, padding='max_length', max_length=slots, truncation=True, return_tensors='pt').input_ids
            with torch.no_grad():
                tensors = {'embeds': self.t5_encoder(numbers)[0].float().contiguous()}
            refuse_not_finite(source, tensors)
            self.store(tensors, path)
        return tensors['embeds']

    def store(self, tensors: dict[str, Tensor], path: Any) -> None:
        if self.keep:
            write_cache(tensors, path, 'a prompt')


def channel_count(config: pathlib.Path, name: str) -> int:
    count = read_json(config).get(name)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ModelUnavailable(f'{config} must say {name}, a number >= 1; got {repr(count)[:100]}')
    return count


def t5_files(source: Source) -> list[pathlib.Path]:
    """Return the files of T5 and its tokenizer, downloading them from the hub if needed."""
    if source.commit:
        snapshot(source.spec.repo, source.commit, T5_FILES)
    return part_files(source.folder, T5_PARTS)


def clip_tokens(tokenizer: Any, text: str, slots: int) -> Tokens:
    """Tokenize a text with a CLIP tokenizer. The second one treats every `!` as padding; here a `!` in the text counts as a word."""
    tokens = tokens_of(tokenizer, text, 0, slots)
    if tokenizer.pad_token != PAD:
        return tokens
    strange = (odd and text[start:end] != PAD for odd, (start, end) in zip(tokens.strange, tokens.spans, strict=True))
    return tokens._replace(strange=tuple(strange))
