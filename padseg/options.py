"""The only home of the options of the method; importing it costs nothing (no torch)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from padseg.backbones.spec import Spec
from padseg.errors import UsageError

NORMALISATIONS = ('minmax-softmax', 'sum', 'share')
GEOMETRIES = ('whole', 'stretch', 'diffseg', 'diffcut', 'seg4diff-paper', 'seg4diff-release')
REFINEMENTS = ('none', 'guided')
LATER = ('normalisation', 'threshold', 'refine', 'superpixels', 'components', 'min_area')  # options that come after the token maps
UNREFINED = {'refine': 'none', 'superpixels': 0.0, 'components': False, 'min_area': 0.0}  # the papers end with the argmax


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of Options with the text that `--help` shows."""
    return dataclasses.field(default=default, metadata={'help': help, **metadata})


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
    components: bool
    min_area: float
    seed: int


def require(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)
