"""Settings of making pictures, with each model's own defaults. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from padseg.methods.options import Range, check_options, filled, model_settings, option, own, require

if TYPE_CHECKING:
    from padseg.backbones.spec import Spec

GUIDANCES = ('none', 'cfg', 'perturbed', 's-cfg', 'goca-s-cfg')
WITH_TOKENS = ('goca-s-cfg',)  # guidances that read where the words stand
PADS = ('reflect', 'symmetric')
STRENGTH = Range('a strength from 0 to below 1000', 0, 1000)
ROWS: dict[str, dict[str, Any]] = {
    'sd3': {'steps': 28, 'scale': 7.5},  # Seg4Diff's
    'flux': {'steps': 50, 'scale': 1.0},  # what the distilled model is told is apart from this
    'flux2': {'steps': 50, 'scale': 4.0},
    'unet': {'steps': 50, 'scale': 7.5},
    'pixart': {'steps': 20, 'scale': 4.5},
}


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How pictures are made. Settings left open take the model's own value, see `resolve`.

    Raises UsageError for a value outside its range; the message gives the range.
    """

    guidance: str = option('cfg', 'what steers the pictures to their prompts', choices=GUIDANCES)
    scale: float | None = own(
        'strength w of classifier-free guidance', range=STRENGTH, default="the model's own; none with perturbed, which then stands alone"
    )
    perturb_layer: tuple[str, ...] = own('with perturbed: blocks that are blurred, by number from 0 or by name', default='the expert block')
    perturb_scale: float = option(1.0, 'with perturbed: strength s', range=STRENGTH)
    perturb_size: int = option(5, 'with perturbed: taps of the blur, an odd number', range=Range('an odd number of taps in 1..77', 1, 78))
    perturb_sigma: float = option(9.0, 'with perturbed: standard deviation of the blur, in tokens', range=Range('above 0', 1e-6, 1e9))
    perturb_pad: str = option('reflect', 'with perturbed: what is beyond the first and the last token', choices=PADS)
    perturb_renorm: bool = option(False, "with perturbed: keep the share of attention that text has; the paper's blur changes it")
    steps: int = own('steps of denoising', range=Range('a number of steps in 1..1000', 1, 1001))
    size: int = own('side of the square picture in pixels', range=Range('a number of pixels in 8..65536', 8, 65537))
    encoders: str = own('text encoders to use: CLIP-L, CLIP-G, T5, Qwen3', choices=('l', 'g', 'l+g', 't5', 'l+g+t5', 'clip', 'qwen3'))

    def __post_init__(self) -> None:
        check_options(self)
        require(self.perturb_size % 2 == 1, f'perturb_size is an odd number of taps; got {self.perturb_size}')

    def resolve(self, spec: Spec) -> SamplingSettings:
        """Fill in everything left open for a model."""
        row = {'size': spec.side, 'encoders': spec.encoders, 'perturb_layer': (str(spec.layer),), **ROWS[spec.family]}
        values = model_settings(SamplingSettings, 'generate', spec, row)
        if self.guidance in ('none', 'perturbed'):
            values['scale'] = 0.0
        return filled(self, values)
