"""The values passed from one stage to the next; docstrings give shapes, axis order and units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Image = NDArray[np.uint8]  # (H, W, 3) RGB, upright
Array = NDArray[Any]


class Frame(NamedTuple):
    """The part of a picture that the model sees. size: (H, W) of the picture; box: (top, left, height, width) in its pixels."""

    size: tuple[int, int]
    box: tuple[int, int, int, int]


class Latent(NamedTuple):
    """A noised latent. z: (1, C, H', W'); sigma: noise level in 0..1; frame: the part of the picture that it shows."""

    z: Tensor
    sigma: float
    timestep: float
    frame: Frame


class TextToken(NamedTuple):
    """A token of the empty prompt. kind: template, what stands before or behind any text; pad, what fills the slots that no text takes;
    register, a learned vector that stands for no text at all."""

    name: str
    kind: Literal['template', 'pad', 'register']


class Prompt(NamedTuple):
    """An encoded text. embeds: (1, L, D); pooled: (1, E), E = 0 if the model takes none; picked: the T columns to read, each in 0..L-1, or
    below 0 for registers in front of the text; names: T words; kinds: of the empty prompt's T tokens, as of `TextToken`; empty for other
    texts.

    weights: factors for summing the maps of all columns with the same name into one map; empty if each column has its own map.
    mask: (1, L), 0 for pads that the model does not attend to, or for which Z-Image puts its learned token, else 1; None if it attends to
    all as they are. outside: how many of the last tokens are no part of the text, so that they have no order: concepts.
    """

    embeds: Tensor
    pooled: Tensor
    picked: tuple[int, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    mask: Tensor | None = None
    kinds: tuple[str, ...] = ()
    outside: int = 0


class Attention(NamedTuple):
    """Inputs and output of one attention layer. query, and output before its projection: (B, heads, N, d); key, value: (B, heads, L, d).

    mask: additive, broadcast to (B, heads, N, L), or None. value and output are None unless requested.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None = None
    mask: Tensor | None = None
    output: Tensor | None = None


class TokenMaps(NamedTuple):
    """maps: (T, h, w) float32, the share of each image token's attention that goes to text token t; names: T words.

    settings: the method's settings for the model that made the maps; they fill in options left open later.
    whole: if the maps are from windows, those of the usual view of the whole picture, (T, h', w').
    """

    maps: Tensor
    names: tuple[str, ...]
    frame: Frame
    settings: Mapping[str, Any] = {}
    whole: Tensor | None = None


class Proposals(NamedTuple):
    """maps: (M, h, w) float64, the mean of each group's normalised maps; members: M groups of token numbers, which may overlap."""

    maps: Tensor
    members: tuple[tuple[int, ...], ...]
    frame: Frame


class Tokens(NamedTuple):
    """A tokenized text. first: column of the first token; slots: the tokenizer's maximum length, start and end tokens included.

    spans: (start, end) of each token in the text, (0, 0) for one that stands for none of it; strange: whether it is a special token or
    one for what the tokenizer does not know; blanks: places of those that stand for a space alone.
    """

    first: int
    slots: int
    spans: tuple[tuple[int, int], ...]
    strange: tuple[bool, ...]
    blanks: tuple[int, ...] = ()


class LabelMap(NamedTuple):
    """labels: (H, W) int32, 0 = unassigned, regions 1..K in order of first appearance; tokens: for each region, the tokens that formed it.

    names: class names, if any: label k is then the class names[k - 1], and a picture need not show all of them.
    levels: further label maps, (H, W) each, of which each divides the regions of the one before it.
    """

    labels: Array
    tokens: tuple[tuple[int, ...], ...]
    names: tuple[str, ...] = ()
    levels: tuple[Array, ...] = ()

    def masks(self) -> list[dict[str, Any]]:
        """Return the regions, or the classes shown, in the format of Segment Anything's automatic mask generator.

        Keys: segmentation (H, W) bool; area in pixels; bbox [x, y, width, height] in pixels; crop_box, the whole picture in the same form;
        predicted_iou, point_coords and stability_score, all None because only prompted masks have them. padseg adds two keys: region, the
        number in `labels`; name, the class name or None.
        """
        height, width = self.labels.shape
        return [
            {
                'segmentation': mask,
                'area': int(np.count_nonzero(mask)),
                'bbox': box_of(mask),
                'predicted_iou': None,
                'point_coords': None,
                'stability_score': None,
                'crop_box': [0, 0, width, height],
                'region': number,
                'name': self.names[number - 1] if self.names else None,
            }
            for number, mask in ((number, self.labels == number) for number in np.unique(self.labels[self.labels > 0]).tolist())
        ]


def box_of(mask: Array) -> list[int]:
    """Bounding box of a non-empty mask (H, W): [x, y, width, height] in pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
