"""The calling convention of `transformers.pipeline('mask-generation')`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from padseg.backbones import opened
from padseg.methods import DEFAULTS, method_named, options_of, usual_model

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.types import LabelMap


def pipeline(
    model: Backbone | str | None = None, method: str = DEFAULTS['regions'], options: Any = None
) -> Callable[..., dict[str, Any] | list[dict[str, Any]]]:
    """A function of a picture, or of a list, that gives what `transformers.pipeline('mask-generation')` gives.

    That is {'masks': K arrays (H, W) bool, 'scores': tensor (K,)} for each picture. The masks do not overlap. The scores are NaN, because
    regions have no predicted IoU. model, method and options are those of `padseg.segment`; the model is loaded now.
    """
    from padseg.methods.seg4diff import segment

    chosen = method_named(method, 'regions')
    options = options_of(chosen, method, options)
    backbone = opened(model or usual_model(chosen), partial(chosen.deepest, options)) if chosen.FAMILIES else None

    def generate(images: Any) -> dict[str, Any] | list[dict[str, Any]]:
        found = segment(images, backbone, options, method=method)
        return [as_output(each) for each in found] if isinstance(found, list) else as_output(found)

    return generate


def as_output(labels: LabelMap) -> dict[str, Any]:
    import torch

    masks = [mask['segmentation'] for mask in labels.masks()]
    return {'masks': masks, 'scores': torch.full((len(masks),), float('nan'))}
