"""What a block's attention from image to text is for: pictures made with it blurred along the text, compared with plain ones.

Seg4Diff, Sec. 3: the same noise and prompt, one block blurred at a time, at every step of denoising.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from padseg.analysis.recording import read_picture
from padseg.backbones.blur import Blur
from padseg.errors import PadsegError
from padseg.evaluation.similarity import PictureModel, clip_image_features, clip_text_features, cosines, dino_features, scores_of
from padseg.generation.guidance import Blurring
from padseg.generation.pictures import GenerationJob, generate, plan
from padseg.generation.prompts import Item
from padseg.generation.records import read_pictures
from padseg.generation.sample import Sampler
from padseg.system.files import inside
from padseg.system.progress import Progress
from padseg.types import Array, Image

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


def arms(job: GenerationJob, layers: Sequence[int], blur: Blur, both: bool = True) -> dict[int | None, GenerationJob]:
    """The jobs that make the pictures, each in a folder of its own in the job's OUT: of plain ones, None, and with each layer blurred.

    blur: how, whatever its own layers are; both: whether the branch of the empty prompt is blurred too.
    """
    found: dict[int | None, GenerationJob] = {None: job._replace(out=job.out / 'plain')}
    for layer in layers:
        found[layer] = job._replace(out=job.out / f'block-{layer}', blurring=Blurring(blur._replace(layers=(layer,)), both))
    return found


def make(jobs: Mapping[int | None, GenerationJob], sampler: Sampler, progress: Progress) -> int | None:
    """Make the pictures that are not there yet. Returns the signal that stopped it, if one did; errors are those of `generate`."""
    progress.start(sum(len(plan(job).pending) for job in jobs.values()))
    with contextlib.closing(progress):
        for job in jobs.values():
            counts = generate(job, Within(progress), sampler)
            if counts.signal:
                return counts.signal
    return None


class Within:
    """The progress of a part of the work."""

    def __init__(self, progress: Progress) -> None:
        self.step = progress.step

    def start(self, total: int) -> None:
        pass

    def close(self) -> None:
        pass


def pictures_of(jobs: Mapping[int | None, GenerationJob]) -> Callable[[Item], list[Image]]:
    """What reads the pictures of an item, of all jobs. It raises PadsegError for one that could not be made, or cannot be read."""
    known = {job.out: read_pictures(job.out / 'manifest.jsonl') for job in jobs.values()}

    def read(item: Item) -> list[Image]:
        images = []
        for out, records in known.items():
            record = records[item.name]
            if record.file is None:
                raise PadsegError(f'{item.name} could not be made: {record.reason}; {out / "failures.jsonl"} names all')
            images.append(read_picture(inside(out, record.file)))
        return images

    return read


def compared(pictures: Sequence[Image], prompt: str, clip: PictureModel, dino: PictureModel) -> tuple[Array, float]:
    """MEASURES of all pictures but the first, (N - 1, 3), against the first, the plain one; and CLIP-T of that one."""
    features, others = clip_image_features(clip, pictures), dino_features(dino, pictures)
    texts = clip_text_features(clip, [prompt]).expand(len(pictures), -1)
    to_text = scores_of(features, texts)
    alike = [cosines(part[1:], part[:1].expand(len(part) - 1, -1)) for part in (features, others)]
    return np.stack([*alike, to_text[1:]], axis=1).astype(float), float(to_text[0])


def measure(items: Sequence[Item], jobs: Mapping[int | None, GenerationJob], clip: PictureModel, dino: PictureModel) -> Perturbed:
    """Compare the pictures of all items that `make` made. PadsegError if any of them is missing."""
    scores: list[Array] = []
    plain: list[float] = []
    shown: list[list[Image]] = []
    read = pictures_of(jobs)
    for item in items:
        pictures = read(item)
        by_layer, own = compared(pictures, item.prompt, clip, dino)
        scores.append(by_layer)
        plain.append(own)
        if len(shown) < SHOWN:
            shown.append(pictures)
    return Perturbed(items, [layer for layer in jobs if layer is not None], np.stack(scores), np.array(plain), shown)


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
