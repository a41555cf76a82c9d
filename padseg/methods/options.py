"""The only home of the options of the method; importing it costs nothing (no torch)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from padseg.backbones.spec import Spec
from padseg.errors import UsageError

NORMALISATIONS = ('minmax-softmax', 'sum', 'share')
GEOMETRIES = ('whole', 'stretch', 'diffseg', 'diffcut', 'seg4diff-paper', 'seg4diff-release', 'seg4diff-ovss')
REFINEMENTS = ('none', 'guided')
LATER = ('normalisation', 'threshold', 'refine', 'superpixels', 'join', 'components', 'min_area')  # options that come after the token maps
PROMPTS = ('joined', 'template', 'per-class')
ENCODERS = ('l', 'g', 'l+g', 't5', 'l+g+t5')
COLUMNS = ('clip', 't5', 'both')
UNUSED = ('zeros', 'dropped')
SCORES = ('raw', 'minmax', 'minmax-token', 'share')
NAMED = ('words', 'proposals')
UNREFINED = {'refine': 'none', 'superpixels': 0.0, 'join': 0.0, 'components': False, 'min_area': 0.0}  # the papers end with the argmax


def option(value: Any, help: str, **metadata: Any) -> Any:
    """A field with the text that `--help` shows. default: what stands there for it, where that is not the value or the model's own."""
    return dataclasses.field(default=value, metadata={'help': help, **metadata})


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the method. None takes the value that the backbone's row names; `resolve` fills it in.

    Raises UsageError for a value outside its range, with the range in the message.
    """

    layer: int | None = option(None, 'expert block whose attention is read, counted from 0')
    step: int | None = option(None, 'noise level: the n-th step from the end of the schedule, from 1')
    normalisation: str | None = option(None, 'how token maps are normalised before merging', choices=NORMALISATIONS)
    threshold: float | None = option(None, 'merge maps whose symmetric KL divergence / 2 is below this; 0 merges none, inf all')
    geometry: str = option('whole', "what the model sees: the whole picture, or a paper's preset", choices=GEOMETRIES)
    side: int | None = option(None, "side in pixels of the model's view (whole: of the square with the same area)")
    refine: str | None = option(
        None, 'how maps are enlarged: bilinear, or guided by the edges of the picture (guided filter)', choices=REFINEMENTS
    )
    superpixels: float | None = option(None, 'average maps inside Felzenszwalb superpixels of this scale before the argmax; 0 = off')
    join: float | None = option(
        None, 'join neighbouring superpixels whose proposals, colours and border differ by less than this, instead of the argmax; 0 = off'
    )
    components: bool | None = option(None, 'split regions into connected components')
    min_area: float | None = option(None, 'regions below this share of the picture go to the neighbour with the longest common border')
    seed: int = option(0, 'seed of the noise, together with the content of each picture')

    def __post_init__(self) -> None:
        require(self.layer is None or self.layer >= 0, f'layer is counted from 0; got {self.layer}')
        require(self.step is None or self.step >= 1, f'step is counted from the end of the schedule, from 1; got {self.step}')
        require(
            self.normalisation in (None, *NORMALISATIONS),
            f'normalisation is one of {", ".join(NORMALISATIONS)}; got {self.normalisation}',
        )
        require(self.threshold is None or self.threshold >= 0, f'threshold is a number >= 0 or inf; got {self.threshold}')
        require(self.geometry in GEOMETRIES, f'geometry is one of {", ".join(GEOMETRIES)}; got {self.geometry}')
        require(self.side is None or self.side >= 1, f'side is a number of pixels >= 1; got {self.side}')
        require(self.refine in (None, *REFINEMENTS), f'refine is one of {", ".join(REFINEMENTS)}; got {self.refine}')
        require(
            self.superpixels is None or (self.superpixels >= 0 and math.isfinite(self.superpixels)),
            f'superpixels is a finite scale >= 0; got {self.superpixels}',
        )
        require(self.join is None or (self.join >= 0 and math.isfinite(self.join)), f'join is a finite distance >= 0; got {self.join}')
        require(self.min_area is None or 0 <= self.min_area < 1, f'min_area is a share of the picture in 0..1; got {self.min_area}')

    def resolve(self, spec: Spec) -> Resolved:
        """These options on a backbone: every None replaced by the value in its row, and all checked against its size.

        A paper's preset has no refinements but those that are asked for.
        """
        row = {**spec._asdict(), **(UNREFINED if self.geometry != 'whole' else {})}
        given = dataclasses.asdict(self)
        filled = Options(**{name: row[name] if value is None else value for name, value in given.items()})
        resolved = Resolved(**dataclasses.asdict(filled))
        require(resolved.layer < spec.layers, f'layer is one of 0..{spec.layers - 1} for {spec.repo}; got {resolved.layer}')
        require(resolved.step <= spec.steps, f'step is one of 1..{spec.steps} for {spec.repo}; got {resolved.step}')
        return resolved


@dataclasses.dataclass(frozen=True)
class Resolved:
    """Options with nothing left to a default: what really ran, as run.json records it."""

    layer: int
    step: int
    normalisation: str
    threshold: float
    geometry: str
    side: int
    refine: str
    superpixels: float
    join: float
    components: bool
    min_area: float
    seed: int


@dataclasses.dataclass(frozen=True)
class LabelOptions:
    """Options of names for masks. None takes the value that the backbone's row names, or what the text says; `resolve` fills it in.

    Raises UsageError for a value outside its range, with the range in the message.
    """

    layers: tuple[int, ...] | None = option(
        None, 'blocks whose maps are averaged, from one forward, counted from 0', default="the model's own"
    )
    steps: tuple[int, ...] | None = option(None, 'noise levels whose maps are averaged, a forward each', default="the model's own")
    head: int | None = option(None, 'one attention head, counted from 0', default='the mean of all')
    prompt: str = option(
        'joined', 'how names become a prompt: joined by spaces, "a photo of a …, …", or one prompt a class', choices=PROMPTS
    )
    encoders: str | None = option(None, 'text encoders that are used: CLIP-L, CLIP-G, T5', choices=ENCODERS, default="the model's own")
    unused: str = option('zeros', "what stands in T5's places where T5 is not used", choices=UNUSED)
    columns: str | None = option(None, "whose tokens' attention is read", choices=COLUMNS, default="the encoders' own")
    softmax: bool = option(True, 'read shares of the attention, not the scores before the softmax')
    scores: str | None = option(
        None,
        'scores of classes as they are, from 0 to 1 over the picture (by class or by token), or as shares over classes',
        choices=SCORES,
        default='raw; minmax with per-class',
    )
    background_words: tuple[str, ...] = option((), 'further names: what scores highest for one of them is background', default='none')
    background_below: float | None = option(None, 'pixels whose best score is below this are background', default='none')
    on: str = option(
        'words', 'what is named: every pixel by its words, or the proposals of `padseg run` by the mean score inside', choices=NAMED
    )
    geometry: str = option('whole', "what the model sees: the whole picture, or a paper's preset", choices=GEOMETRIES)
    side: int | None = option(None, "side in pixels of the model's view (whole: of the square with the same area)")
    refine: str | None = option(None, 'how maps are enlarged, as for `padseg run`', choices=REFINEMENTS)
    superpixels: float | None = option(None, 'superpixels inside which maps are averaged, as for `padseg run`')
    min_area: float | None = option(None, 'parts below this share of the picture go to the neighbour with the longest common border')
    seed: int = option(0, 'seed of the noise, together with the content of each picture')

    def __post_init__(self) -> None:
        same = {name: getattr(self, name) for name in ('geometry', 'side', 'refine', 'superpixels', 'min_area', 'seed')}
        Options(**same)  # checks what is the same there
        numbers = {'layers': (self.layers, 0), 'steps': (self.steps, 1)}
        for name, (values, first) in numbers.items():
            require(
                values is None or (len(set(values)) == len(values) > 0 and min(values) >= first),
                f'{name} are different numbers from {first} on; got {in_list(values)}',
            )
        require(self.head is None or self.head >= 0, f'head is counted from 0; got {self.head}')
        choices = {'prompt': PROMPTS, 'encoders': ENCODERS, 'unused': UNUSED, 'columns': COLUMNS, 'scores': SCORES, 'on': NAMED}
        for name, allowed in choices.items():
            value, default = getattr(self, name), getattr(type(self), name)
            require(value in allowed or value is default is None, f'{name} is one of {", ".join(allowed)}; got {value}')
        below = self.background_below
        require(below is None or math.isfinite(below), f'background_below is a finite number; got {below}')
        require(self.softmax or self.scores != 'share', 'scores before the softmax have no shares: softmax with share')

    @property
    def layer(self) -> int | None:
        """The deepest of the layers, as `load` wants it."""
        return max(self.layers) if self.layers else None

    def resolve(self, spec: Spec) -> ResolvedLabels:
        """These options on a backbone: every None replaced by what it stands for, and all checked against the backbone's size."""
        row = {**spec._asdict(), **(UNREFINED if self.geometry != 'whole' else {})}
        encoders = self.encoders or spec.encoders
        require(encoders in ENCODERS, f'encoders is one of {", ".join(ENCODERS)}; got {encoders}')
        used = {'l': 'clip', 'g': 'clip', 'l+g': 'clip', 't5': 't5', 'l+g+t5': 'both'}[encoders]
        own = {
            'layers': (spec.layer,),
            'steps': (spec.step,),
            'encoders': encoders,
            'columns': used,
            'scores': 'minmax' if self.prompt == 'per-class' else 'raw',
            **{name: row[name] for name in ('side', 'refine', 'superpixels', 'min_area')},
        }
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        filled = {name: own[name] if value is None and name in own else value for name, value in given.items()}
        resolved = ResolvedLabels(**filled, proposals=self.of_proposals().resolve(spec) if self.on == 'proposals' else None)
        require(max(resolved.layers) < spec.layers, f'layers are of 0..{spec.layers - 1} for {spec.repo}; got {in_list(resolved.layers)}')
        require(max(resolved.steps) <= spec.steps, f'steps are of 1..{spec.steps} for {spec.repo}; got {in_list(resolved.steps)}')
        require(used in ('both', resolved.columns), f'columns of {resolved.columns} need its encoder; encoders are {encoders}')
        require(
            not (encoders in ('t5', 'l+g+t5') and self.unused == 'dropped'),
            f'T5 is dropped only where it is not used; encoders are {encoders}',
        )
        return resolved

    def of_proposals(self) -> Options:
        """What `padseg run` would do with the same picture."""
        return Options(
            geometry=self.geometry, side=self.side, refine=self.refine, superpixels=self.superpixels, min_area=self.min_area, seed=self.seed
        )


@dataclasses.dataclass(frozen=True)
class ResolvedLabels:
    """LabelOptions with nothing left to a default. proposals: how those are found that are named, None where words name pixels."""

    layers: tuple[int, ...]
    steps: tuple[int, ...]
    head: int | None
    prompt: str
    encoders: str
    unused: str
    columns: str
    softmax: bool
    scores: str
    background_words: tuple[str, ...]
    background_below: float | None
    on: str
    geometry: str
    side: int
    refine: str
    superpixels: float
    min_area: float
    seed: int
    proposals: Resolved | None


def in_list(values: Iterable[object] | None) -> str:
    return ', '.join(map(str, values or ()))


def require(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)
