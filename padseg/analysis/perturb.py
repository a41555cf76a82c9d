"""What a block's attention from image to text is for: pictures made with it blurred along the text, compared with plain ones.

Seg4Diff, Sec. 3: the same noise and prompt, one block blurred at a time, at every step of denoising.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from padseg.backbones.blur import Blur, blurred
from padseg.evaluation.similarity import PictureModel, clip_image_features, clip_text_features, cosines, dino_features, scores_of
from padseg.generation.guidance import guide_of
from padseg.generation.prompts import Item
from padseg.generation.sample import Call, Sampler, encode, sample
from padseg.generation.settings import SamplingSettings
from padseg.system.progress import Progress
from padseg.types import Array, Image, Prompt

SHOWN = 4  # prompts whose pictures are drawn
MEASURES = ('clip_i', 'dino', 'clip_t')


class Perturbed(NamedTuple):
    """Pictures with single blocks blurred. layers: the blocks; scores: (items, layers, MEASURES); plain_scores: CLIP-T of plain ones,
    (items,).

    clip_i, dino: cosine with the plain picture of the same noise, 1 for the same picture; clip_t: CLIPScore with the prompt, up to 100.
    shown: of the first items, the plain picture and that of each layer.
    """

    items: Sequence[Item]
    layers: list[int]
    scores: Array
    plain_scores: Array
    shown: list[list[Image]]

    @property
    def plain(self) -> float:
        """Mean CLIP-T of the plain pictures."""
        return float(self.plain_scores.mean())

    def over(self, measure: str) -> tuple[Array, Array]:
        """Mean and standard deviation of a measure over items: (layers,) each."""
        values = self.scores[:, :, MEASURES.index(measure)]
        return values.mean(0), values.std(0)


def pictures_by_layer(
    sampler: Sampler, item: Item, settings: SamplingSettings, layers: Sequence[int], blur: Blur, both: bool = True
) -> Iterator[Image]:
    """Make the plain picture of a prompt and seed, then one for each layer with that layer blurred: (size, size, 3) each.

    settings: resolved; blur: how, whatever its own layers are; both: whether the branch of the empty prompt is blurred too.
    """
    guide = guide_of(sampler.backbone, settings)
    prompt = encode(sampler, [item.prompt], settings, with_tokens=False).text
    for layers_blurred in ((), *((layer,) for layer in layers)):
        around = partial(blurred_call, sampler, blur._replace(layers=layers_blurred), prompt, both)
        yield sample(sampler, [item.prompt], [item.seed], settings, guide, around, with_tokens=False)[0]


def blurred_call(sampler: Sampler, blur: Blur, prompt: Prompt, both: bool, call: Call) -> AbstractContextManager[None]:
    """The context in which the model is called for one picture. The last row of the batch is that of the prompt."""
    patch = sampler.backbone.patch
    tokens = (call.z.shape[2] // patch) * (call.z.shape[3] // patch)
    rows = None if both else slice(-1, None)
    return blurred(sampler.backbone, blur, prompt, tokens, rows) if blur.layers else nullcontext()


def compared(pictures: Sequence[Image], prompt: str, clip: PictureModel, dino: PictureModel) -> tuple[Array, float]:
    """MEASURES of all pictures but the first, (N - 1, 3), against the first, the plain one; and CLIP-T of that one."""
    features, others = clip_image_features(clip, pictures), dino_features(dino, pictures)
    texts = clip_text_features(clip, [prompt]).expand(len(pictures), -1)
    to_text = scores_of(features, texts)
    alike = [cosines(part[1:], part[:1].expand(len(part) - 1, -1)) for part in (features, others)]
    return np.stack([*alike, to_text[1:]], axis=1).astype(float), float(to_text[0])


def measure(
    sampler: Sampler,
    items: Sequence[Item],
    settings: SamplingSettings,
    layers: Sequence[int],
    blur: Blur,
    both: bool,
    clip: PictureModel,
    dino: PictureModel,
    progress: Progress,
) -> Perturbed:
    """Make and compare the pictures of all items, each with every layer blurred in turn; progress counts items."""
    scores: list[Array] = []
    plain: list[float] = []
    shown: list[list[Image]] = []
    progress.start(len(items))
    for item in items:
        pictures = list(pictures_by_layer(sampler, item, settings, layers, blur, both))
        by_layer, own = compared(pictures, item.prompt, clip, dino)
        scores.append(by_layer)
        plain.append(own)
        if len(shown) < SHOWN:
            shown.append(pictures)
        progress.step()
    progress.close()
    return Perturbed(items, list(layers), np.stack(scores), np.array(plain), shown)


def rows(perturbed: Perturbed) -> list[dict[str, Any]]:
    """A row for every picture; layer None is the plain one."""
    made: list[dict[str, Any]] = []
    for item, scores, plain in zip(perturbed.items, perturbed.scores, perturbed.plain_scores, strict=True):
        own = {'prompt': item.prompt, 'seed': item.seed}
        made.append({**own, 'layer': None, 'clip_i': 1.0, 'dino': 1.0, 'clip_t': float(plain)})
        for layer, values in zip(perturbed.layers, scores, strict=True):
            made.append({**own, 'layer': layer, **{name: float(value) for name, value in zip(MEASURES, values, strict=True)}})
    return made


def summary(perturbed: Perturbed) -> list[dict[str, Any]]:
    """A row for every layer: means over prompts and seeds; layer None is that of the plain pictures."""
    means = {name: perturbed.over(name)[0] for name in MEASURES}
    plain = {'layer': None, 'clip_i': 1.0, 'dino': 1.0, 'clip_t': perturbed.plain}
    return [plain, *({'layer': layer, **{name: float(means[name][n]) for name in MEASURES}} for n, layer in enumerate(perturbed.layers))]
