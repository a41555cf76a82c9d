"""The values that flow from one stage to the next; docstrings give shapes, axis order and units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Image = NDArray[np.uint8]  # (H, W, 3) RGB, upright
Array = NDArray[Any]


class Frame(NamedTuple):
    """Where the model looks: box (top, left, height, width) in pixels of a picture of size (H, W)."""

    size: tuple[int, int]
    box: tuple[int, int, int, int]


class Latent(NamedTuple):
    """A noised picture. z: (1, C, H', W'); sigma: noise level in 0..1; frame: the part of the picture it shows."""

    z: Tensor
    sigma: float
    timestep: float
    frame: Frame


class Prompt(NamedTuple):
    """Text as the transformer takes it. embeds: (1, L, D); pooled: (1, E); picked: the T columns read, in 0..L-1; names: T words.

    weights: with which the maps of the columns of one name are added up to the map of that name; none where columns stand alone.
    """

    embeds: Tensor
    pooled: Tensor
    picked: tuple[int, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...] = ()


class Attention(NamedTuple):
    """What one attention layer computed. query, and output before its projection: (B, heads, N, d); key, value: (B, heads, L, d);
    mask: additive, broadcast to (B, heads, N, L), or None. Value and output are None where they were not asked for.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None = None
    mask: Tensor | None = None
    output: Tensor | None = None


class TokenMaps(NamedTuple):
    """maps: (T, h, w) float32, the share of an image token's attention that goes to text token t; names: T words.

    settings: those that the method has for the model that made the maps, for options that are left open later.
    """

    maps: Tensor
    names: tuple[str, ...]
    frame: Frame
    settings: Mapping[str, Any] = {}


class Proposals(NamedTuple):
    """maps: (M, h, w) float64, the mean of a group's normalised maps; members: M groups of token numbers, which may overlap."""

    maps: Tensor
    members: tuple[tuple[int, ...], ...]
    frame: Frame


class Tokens(NamedTuple):
    """A text as one tokenizer cuts it. first: column of its first token; slots: how many there are room for, start and end included.

    spans: (start, end) of each token in the text, (0, 0) for one that stands for none of it; strange: whether it is a special token or
    one for what the tokenizer does not know; blanks: places of those that stand for a space alone.
    """

    first: int
    slots: int
    spans: tuple[tuple[int, int], ...]
    strange: tuple[bool, ...]
    blanks: tuple[int, ...] = ()


class LabelMap(NamedTuple):
    """labels: (H, W) int32, 0 = unassigned, regions 1..K in order of first appearance; tokens: for each region the tokens that made it.

    names: of classes; where there are any, label k is the class names[k - 1], of which a picture may show a few only.
    """

    labels: Array
    tokens: tuple[tuple[int, ...], ...]
    names: tuple[str, ...] = ()

    def masks(self) -> list[dict[str, Any]]:
        """The regions, or the classes that are shown, as Segment Anything's automatic mask generator gives masks.

        Keys: segmentation (H, W) bool; area in pixels; bbox [x, y, width, height] in pixels; crop_box, the whole picture in the same
        form; predicted_iou, point_coords and stability_score are None, as only a prompted mask has them. And two of our own: region,
        its number in `labels`; name, of its class, or None.
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
    """The bounding box of a mask (H, W) that is not empty: [x, y, width, height] in pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
