"""What steers a picture to its prompt: nothing, classifier-free guidance, or blurred attention from image to text (Seg4Diff, Eq. 7)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import Tensor

from padseg.backbones import Backbone
from padseg.backbones.blur import Blur, blurred
from padseg.errors import UsageError
from padseg.generation.goca_masks import goca_s_cfg
from padseg.generation.sample import Around, Call, Guide, Predict, Texts
from padseg.generation.scfg import s_cfg
from padseg.generation.settings import SamplingSettings
from padseg.types import Prompt


def guide_of(backbone: Backbone, settings: SamplingSettings) -> Guide:
    """The guide that resolved settings ask for. UsageError for a block that the model does not have, or a family without this guidance."""
    scale = settings.scale or 0.0
    makers: dict[str, Callable[[], Guide]] = {
        'none': lambda: unguided,
        'cfg': lambda: classifier_free(scale),
        'perturbed': lambda: perturbed(backbone, blur_of(backbone, settings), settings.perturb_scale, scale),
        's-cfg': lambda: s_cfg(backbone, scale),
        'goca-s-cfg': lambda: goca_s_cfg(backbone, scale),
    }
    return makers[settings.guidance]()


def unguided(predict: Predict, call: Call, texts: Texts) -> Tensor:
    """What the model predicts for the prompt."""
    return predict([texts.text], call)[0]


def classifier_free(scale: float) -> Guide:
    """v_u + w (v_c - v_u): away from the empty prompt (Ho and Salimans, 2022). scale: w; 1 is the plain prediction."""

    def guide(predict: Predict, call: Call, texts: Texts) -> Tensor:
        empty, text = predict([texts.empty, texts.text], call)
        return empty + scale * (text - empty)

    return guide


def perturbed(backbone: Backbone, blur: Blur, strength: float, scale: float = 0.0) -> Guide:
    """v_c + s (v_c - v_p), away from the prediction v_p with blurred attention (Seg4Diff, Eq. 7), in one batch of two.

    strength: s; 0 leaves v_p out. With a scale w above 0, v_u + w (v_c - v_u) + s (v_c - v_p) in one batch of three.
    """

    def guide(predict: Predict, call: Call, texts: Texts) -> Tensor:
        count, patch = len(call.z), backbone.patch
        tokens = (call.z.shape[2] // patch) * (call.z.shape[3] // patch)
        prompts = [*([texts.empty] if scale else []), texts.text, *([texts.text] if strength else [])]
        last = slice(count * (len(prompts) - 1), None)
        with blurred(backbone, blur, texts.text, tokens, last) if strength else contextlib.nullcontext():
            found = predict(prompts, call)
        text = found[1 if scale else 0]
        guided = found[0] + scale * (text - found[0]) if scale else text
        return guided + strength * (text - found[-1]) if strength else guided

    return guide


class Blurring(NamedTuple):
    """Pictures made with blurred attention, whatever guides them. both: whether the branch of the empty prompt is blurred too."""

    blur: Blur
    both: bool = True


def with_blur(backbone: Backbone, blurring: Blurring, prompt: Prompt) -> Around:
    """The context that the model is called in to make pictures from a prompt, whose rows are the last of the call's batch."""

    def around(call: Call) -> AbstractContextManager[None]:
        tokens = (call.z.shape[2] // backbone.patch) * (call.z.shape[3] // backbone.patch)
        return blurred(backbone, blurring.blur, prompt, tokens, None if blurring.both else slice(-len(call.z), None))

    return around


def blur_of(backbone: Backbone, settings: SamplingSettings) -> Blur:
    """The blur that the settings ask for. UsageError for a block that the model does not have."""
    names = backbone.layer_names()
    strange = [name for name in settings.perturb_layer if name not in names and not (name.isdecimal() and int(name) < len(names))]
    if strange:
        known = f'it has 0..{len(names) - 1}, such as {names[-1]}'
        raise UsageError(f'{backbone.identity.model} has no block {", ".join(strange)}; {known}')
    layers = dict.fromkeys(int(name) if name.isdecimal() else names.index(name) for name in settings.perturb_layer)
    return Blur(tuple(layers), settings.perturb_size, settings.perturb_sigma, settings.perturb_pad, settings.perturb_renorm)
