"""Score a folder of generated pictures, alone or against a second one whose pictures were made for the same prompts and seeds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import BaseModel

from padseg.errors import UsageError
from padseg.evaluation.bootstrap import Bootstrap, mean_interval
from padseg.evaluation.pictures import BENCHMARK, Folder, Shown, categories_of, folder_of, paired, plain
from padseg.images import ImageError, Reading, decode_apart
from padseg.system.progress import Progress
from padseg.system.versions import versions
from padseg.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from padseg.types import Image

SCORES = ('clip', 'fid', 'clip-i', 'dino')
RESIZES = ('clean', 'network')  # who brings pictures to Inception's size
NEEDS = {
    'clip': 'prompts: a manifest of `padseg generate`, or --captions',
    'fid': '--reference',
    'clip-i': '--against',
    'dino': '--against',
}
CONVENTION = '100 x cosine, as T2I-Metrics; neither cut at 0 nor multiplied by 2.5'
READ, MOST_BYTES = 32, 2**28  # pictures in memory at a time, and their bytes
LONGEST = 64  # times as long as wide; models enlarge the shorter side to what they see
MOST_SEEDS = 16  # for which FID is computed one by one
FEW = 2048  # pictures, Inception's features: with fewer the covariance has not its full rank
Value = TypeVar('Value')


class ScoringJob(NamedTuple):
    """What to score. against: a second folder; reference: real pictures, for FID; scores: of SCORES, by default all that have their input.

    captions, categories: files of texts, as `folder_of` and `categories_of` read them; a partner has the prompt of its pair. clip, dino:
    hub ids or folders; inception: a file.
    """

    folder: Path
    captions: Path | None = None
    against: Path | None = None
    reference: Path | None = None
    categories: Path | None = None
    scores: tuple[str, ...] = ()
    clip: str | None = None
    dino: str | None = None
    inception: Path | None = None
    resize: str = 'clean'
    device: str | None = None
    how: Bootstrap = Bootstrap()


class ImageRow(BaseModel):
    """The scores of a picture. against: CLIPScore of its partner; difference: the picture's less the partner's."""

    name: str
    prompt: str | None = None
    seed: int | None = None
    categories: tuple[str, ...] = ()
    clip: float | None = None
    against: float | None = None
    difference: float | None = None
    clip_i: float | None = None
    dino: float | None = None
    reason: str | None = None


class Mean(BaseModel):
    """A mean over pictures. intervals: where it lies if prompts, or seeds, are drawn anew; only for what has several."""

    mean: float
    pictures: int
    intervals: dict[str, tuple[float, float]] = {}


class Fid(BaseModel):
    """FID against the real pictures, of all pictures and of those of each seed."""

    all: float
    pictures: int
    by_seed: dict[int, float] = {}


class Category(BaseModel):
    """A category of prompts. measure: what T2I-CompBench++ measures it by; computed: whether that is CLIPScore."""

    clip: Mean
    against: Mean | None = None
    difference: Mean | None = None
    measure: str | None = None
    computed: bool = False


class ImageScores(BaseModel):
    """image-scores.json. models: what gave features, with SHA-256 of their files.

    difference: of the first folder less the second, over pairs. fid_difference: the mean of the differences of every seed, or that of all
    pictures if they are not of several seeds.
    """

    padseg: str = __version__
    settings: dict[str, Any]
    models: dict[str, dict[str, str | None]] = {}
    convention: str = CONVENTION
    counts: dict[str, int] = {}
    clip: Mean | None = None
    against: Mean | None = None
    difference: Mean | None = None
    clip_i: Mean | None = None
    dino: Mean | None = None
    fid: Fid | None = None
    fid_against: Fid | None = None
    fid_difference: Mean | None = None
    categories: dict[str, Category] = {}
    notes: list[str] = []
    failed: dict[str, str] = {}
    versions: dict[str, str]


class ScoringInput(NamedTuple):
    """What was found to score. others: the partner of each picture that has one, by the picture's name."""

    ours: Folder
    theirs: Folder | None
    others: Mapping[str, Shown]
    real: Folder | None
    categories: Mapping[str, tuple[str, ...]]
    scores: tuple[str, ...]


class Features(NamedTuple):
    """Unit vectors and Inception's features by picture path, and why a picture has none."""

    clip: dict[Path, Tensor]
    dino: dict[Path, Tensor]
    inception: dict[Path, Tensor]
    failed: dict[Path, str]


class Models(NamedTuple):
    clip: Any = None
    dino: Any = None
    inception: Any = None


def scored(asked: ScoringJob, given: ScoringInput, models: Models, progress: Progress) -> tuple[ImageScores, list[ImageRow]]:
    """Score pictures: the record of all scores, and a row for each picture. A picture that cannot be read fails alone."""
    features = features_of(given, models, progress)
    rows = rows_of(given, models, features)
    record = ImageScores(settings=settings(asked, given), models=identities(models), versions=versions())
    record.counts = counts(given, rows)
    record.failed = failures(given, features)
    summarise(record, rows, given, asked.how)
    if 'fid' in given.scores:
        summarise_fid(record, given, features, asked.how)
    record.notes = notes(record, given, models)
    return record, rows


def inputs(asked: ScoringJob) -> ScoringInput:
    """Read the folders and texts. Raises UsageError if a score that was asked for lacks its input."""
    ours = folder_of(asked.folder, asked.captions)
    theirs = folder_of(asked.against) if asked.against else None
    pairs = paired(ours, theirs) if theirs else []
    if not any(picture.prompt for picture in ours.pictures):
        texts = {one.name: other for one, other in pairs}
        ours = ours._replace(pictures=[with_text(picture, texts.get(picture.name)) for picture in ours.pictures])
    others = {one.name: with_text(other, one) for one, other in pairs}
    real = folder_of(asked.reference) if asked.reference else None
    present = {
        'clip': any(picture.prompt for picture in ours.pictures),
        'fid': real is not None,
        'clip-i': theirs is not None,
        'dino': theirs is not None,
    }
    scores = asked.scores or tuple(score for score in SCORES if present[score])
    for score in scores:
        if not present[score]:
            raise UsageError(f'{score} needs {NEEDS[score]}')
    if not scores:
        raise UsageError('nothing to score: ' + '; '.join(f'{score} needs {what}' for score, what in NEEDS.items()))
    if asked.categories and 'clip' not in scores:
        raise UsageError('--categories divides CLIPScores: add clip to --scores')
    given = ScoringInput(ours, theirs, others, real, categories_of(asked.categories) if asked.categories else {}, scores)
    if 'fid' in scores:
        refuse_few(given)
    return given


def refuse_few(given: ScoringInput) -> None:
    """Raise UsageError if FID cannot be computed, even if all pictures can be read."""
    from padseg.evaluation.fid import FEWEST

    assert given.real  # `inputs` has seen to it
    ours, real = len(given.others) if given.theirs else len(given.ours.pictures), len(given.real.pictures)
    if min(ours, real) < FEWEST:
        kind = 'pairs' if given.theirs else 'pictures'
        raise UsageError(f'FID needs at least {FEWEST} pictures on both sides; got {ours} {kind} and {real} real ones')


def with_text(picture: Shown, other: Shown | None) -> Shown:
    """A picture with its partner's prompt and seed where it has none."""
    if other is None:
        return picture
    seed = other.seed if picture.seed is None else picture.seed
    return picture._replace(prompt=picture.prompt or other.prompt, seed=seed)


def loaded(asked: ScoringJob, scores: Sequence[str]) -> Models:
    """Load what the scores need. Raises UsageError without Inception's file, ModelUnavailable."""
    from padseg.evaluation import fid, similarity

    inception = clip = dino = None
    if 'fid' in scores:
        if asked.inception is None:
            raise UsageError(f"FID needs Inception's weights: --inception PATH to {fid.FILE} (docs/score-images.md), or other --scores")
        fid.require_library()
        inception = fid.load_inception(asked.inception, asked.device, asked.resize)
    if 'clip' in scores or 'clip-i' in scores:
        advice = 'name a folder with --clip PATH, or leave clip and clip-i out of --scores'
        clip = similarity.load_clip(asked.clip or similarity.CLIP, asked.device, remedy=advice)
    if 'dino' in scores:
        dino = similarity.load_dino(
            asked.dino or similarity.DINO, asked.device, remedy='name a folder with --dino PATH, or leave dino out of --scores'
        )
    return Models(clip, dino, inception)


def identities(models: Models) -> dict[str, dict[str, str | None]]:
    known: dict[str, dict[str, str | None]] = {
        kind: {'name': model.name, 'commit': model.commit, 'weights': model.weights}
        for kind, model in (('clip', models.clip), ('dino', models.dino))
        if model
    }
    if models.inception:
        known['inception'] = {'name': models.inception.name, 'weights': models.inception.weights}
    return known


def features_of(given: ScoringInput, models: Models, progress: Progress) -> Features:
    """The features of all pictures that any score needs; of real pictures only Inception's. Pictures themselves are not kept."""
    features = Features({}, {}, {}, {})
    made = list(given.ours.pictures) + (given.theirs.pictures if given.theirs else [])
    real = given.real.pictures if given.real else []
    progress.start(len(made) + len(real))
    for pictures, wanted in ((made, models), (real, Models(inception=models.inception))):
        for batch in read(pictures, features.failed, progress):
            add_features(features, batch, wanted)
    progress.close()
    return features


def read(pictures: Sequence[Shown], failed: dict[Path, str], progress: Progress) -> Iterator[dict[Path, Image]]:
    """Yield the pictures in batches, those that can be read. Each is decoded in a process of its own, within limits."""
    batch: dict[Path, Image] = {}
    for picture in pictures:
        try:
            image = decode_apart(picture.path, Reading()).image
            if max(image.shape[:2]) > LONGEST * min(image.shape[:2]):
                raise ImageError(f'{image.shape[1]}x{image.shape[0]} pixels: more than {LONGEST} times as long as wide')
            batch[picture.path] = image
        except ImageError as error:
            failed[picture.path] = str(error)
        except OSError as error:
            failed[picture.path] = error.strerror or str(error)
        progress.step()
        if len(batch) == READ or sum(image.nbytes for image in batch.values()) >= MOST_BYTES:
            yield batch
            batch = {}
    if batch:
        yield batch


def add_features(features: Features, batch: Mapping[Path, Image], models: Models) -> None:
    from padseg.evaluation.fid import inception_features
    from padseg.evaluation.similarity import clip_image_features, dino_features

    images = list(batch.values())
    for kept, model, function in (
        (features.clip, models.clip, clip_image_features),
        (features.dino, models.dino, dino_features),
        (features.inception, models.inception, inception_features),
    ):
        if model:
            kept.update(zip(batch, function(model, images), strict=True))


def rows_of(given: ScoringInput, models: Models, features: Features) -> list[ImageRow]:
    """A row for each picture of the first folder, with what could be computed."""
    texts = text_features(given, models) if 'clip' in given.scores else {}
    rows = []
    for picture in given.ours.pictures:
        other = given.others.get(picture.name)
        row = ImageRow(name=picture.name, prompt=picture.prompt, seed=picture.seed, reason=features.failed.get(picture.path))
        row.categories = given.categories.get(plain(picture.prompt), ()) if picture.prompt else ()
        row.clip = clip_of(picture, texts, features)
        if other:
            row.against = clip_of(other, texts, features)
            row.difference = None if row.clip is None or row.against is None else row.clip - row.against
            row.clip_i = cosine(features.clip, picture, other) if 'clip-i' in given.scores else None
            row.dino = cosine(features.dino, picture, other)
        rows.append(row)
    return rows


def text_features(given: ScoringInput, models: Models) -> dict[str, Tensor]:
    """CLIP's unit vectors of the prompts, one by one the same."""
    from padseg.evaluation.similarity import clip_text_features

    prompts = sorted({picture.prompt for picture in (*given.ours.pictures, *given.others.values()) if picture.prompt})
    return dict(zip(prompts, clip_text_features(models.clip, prompts), strict=True))


def clip_of(picture: Shown, texts: Mapping[str, Tensor], features: Features) -> float | None:
    from padseg.evaluation.similarity import scores_of

    if picture.prompt is None or picture.prompt not in texts or picture.path not in features.clip:
        return None
    return float(scores_of(features.clip[picture.path][None], texts[picture.prompt][None])[0])


def cosine(known: Mapping[Path, Tensor], one: Shown, other: Shown) -> float | None:
    from padseg.evaluation.similarity import cosines

    if one.path not in known or other.path not in known:
        return None
    return float(cosines(known[one.path][None], known[other.path][None])[0])


def settings(asked: ScoringJob, given: ScoringInput) -> dict[str, Any]:
    """All that decides the scores, besides the models."""
    paths = {name: str(value) for name in ('folder', 'captions', 'against', 'reference', 'categories') if (value := getattr(asked, name))}
    fid = {'fid_resize': asked.resize} if 'fid' in given.scores else {}
    return {**paths, 'scores': list(given.scores), **fid, 'bootstrap': asked.how._asdict()}


def counts(given: ScoringInput, rows: Sequence[ImageRow]) -> dict[str, int]:
    """How many pictures there are, and how many lack something."""
    number = {'pictures': len(rows), 'unread': sum(row.reason is not None for row in rows), 'not made': given.ours.failed}
    if 'clip' in given.scores:
        number |= {'without a prompt': sum(row.prompt is None for row in rows), 'captions without a picture': given.ours.unused}
    if given.theirs:
        number |= {'pairs': len(given.others), 'only here': len(rows) - len(given.others)}
        number['only in --against'] = len(given.theirs.pictures) - len(given.others)
    if given.categories:
        number['without a category'] = sum(not row.categories for row in rows)
    if given.real:
        number['real pictures'] = len(given.real.pictures)
    return {name: count for name, count in number.items() if count or name in ('pictures', 'pairs')}


def failures(given: ScoringInput, features: Features) -> dict[str, str]:
    """Why pictures could not be read, by folder and name."""
    folders = [folder for folder in (given.ours, given.theirs, given.real) if folder]
    known = ((f'{folder.root}/{picture.name}', features.failed.get(picture.path)) for folder in folders for picture in folder.pictures)
    return {name: reason for name, reason in known if reason is not None}


def summarise(record: ImageScores, rows: Sequence[ImageRow], given: ScoringInput, how: Bootstrap) -> None:
    """Fill in the means over pictures, of all and by category."""
    for name in ('clip', 'against', 'difference', 'clip_i', 'dino'):
        setattr(record, name, mean_of(rows, name, how))
    by_category: dict[str, list[ImageRow]] = {}
    for row in rows:
        for category in row.categories:
            by_category.setdefault(category, []).append(row)
    for category, own in sorted(by_category.items()):
        clip = mean_of(own, 'clip', how)
        if clip:
            measure = BENCHMARK.get(category.lower().replace('-', '_').replace(' ', '_'))
            record.categories[category] = Category(
                clip=clip,
                against=mean_of(own, 'against', how),
                difference=mean_of(own, 'difference', how),
                measure=measure,
                computed=measure == 'CLIPScore',
            )


def mean_of(rows: Sequence[ImageRow], name: str, how: Bootstrap) -> Mean | None:
    """The mean of a column with its intervals, over the rows that have a value."""
    known = [(getattr(row, name), row) for row in rows if getattr(row, name) is not None]
    if not known:
        return None
    values = [value for value, _ in known]
    groups: dict[str, list[Hashable]] = {'prompts': [row.prompt or row.name for _, row in known]}
    if all(row.seed is not None for _, row in known):
        groups['seeds'] = [row.seed for _, row in known]
    return Mean(mean=statistics.fmean(values), pictures=len(values), intervals=intervals(values, groups, how))


def intervals(values: Sequence[float], groups: Mapping[str, Sequence[Hashable]], how: Bootstrap) -> dict[str, tuple[float, float]]:
    known = {kind: mean_interval(values, own, how) for kind, own in groups.items()}
    return {kind: interval for kind, interval in known.items() if interval}


def summarise_fid(record: ImageScores, given: ScoringInput, features: Features, how: Bootstrap) -> None:
    """Fill in FID of the folders, and their difference with its interval over seeds."""
    assert given.real  # `inputs` has seen to it
    real = vectors(given.real.pictures, features)
    ours, theirs = given.ours.pictures, list(given.others.values())
    record.fid = fid_of([picture for picture in ours if not theirs or picture.name in given.others], real, features)
    if theirs:
        record.fid_against = fid_of(theirs, real, features)
    if record.fid and record.fid_against:
        seeds = sorted(record.fid.by_seed.keys() & record.fid_against.by_seed.keys())
        values = [record.fid.by_seed[seed] - record.fid_against.by_seed[seed] for seed in seeds]
        own = intervals(values, {'seeds': seeds}, how) if values else {}
        whole = record.fid.all - record.fid_against.all
        record.fid_difference = Mean(mean=statistics.fmean(values) if values else whole, pictures=record.fid.pictures, intervals=own)


def fid_of(pictures: Sequence[Shown], real: Sequence[Tensor], features: Features) -> Fid | None:
    """FID of pictures, all and by seed; None if there are fewer than two on either side that could be read."""
    import torch

    from padseg.evaluation.fid import FEWEST, fid

    own = vectors(pictures, features)
    if min(len(own), len(real)) < FEWEST:
        return None
    truth = torch.stack(list(real))
    by_seed = grouped((picture.seed, features.inception[picture.path]) for picture in pictures if picture.path in features.inception)
    several = None not in by_seed and 1 < len(by_seed) <= MOST_SEEDS and min(map(len, by_seed.values())) >= FEWEST
    return Fid(
        all=fid(torch.stack(own), truth),
        pictures=len(own),
        by_seed={seed: fid(torch.stack(some), truth) for seed, some in sorted(by_seed.items()) if seed is not None} if several else {},
    )


def grouped(pairs: Iterable[tuple[int | None, Value]]) -> dict[int | None, list[Value]]:
    groups: dict[int | None, list[Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def vectors(pictures: Sequence[Shown], features: Features) -> list[Tensor]:
    return [features.inception[picture.path] for picture in pictures if picture.path in features.inception]


def notes(record: ImageScores, given: ScoringInput, models: Models) -> list[str]:
    """What a reader of the scores must know."""
    said = []
    if 'fid' in given.scores and not (record.fid and (record.fid_against or not given.theirs)):
        said.append('not computed: FID, for which too few pictures could be read')
    if record.fid and record.fid.pictures < FEW:
        said.append(
            f'FID of {record.fid.pictures} pictures is too high: compare it only with FID of as many pictures and the same real ones'
        )
    if 'clip' in given.scores:
        from padseg.evaluation.similarity import texts_cut

        prompts = sorted({picture.prompt for picture in given.ours.pictures if picture.prompt})
        cut = sum(texts_cut(models.clip, prompts))
        if cut:
            said.append(f'CLIP does not read the end of {cut} of {len(prompts)} prompts, which are too long for it')
    missing = Counter(own.measure for own in record.categories.values() if own.measure and not own.computed)
    if missing:
        said.append(f'not computed, because they need other models: {", ".join(sorted(filter(None, missing)))}')
    return said
