"""S-CFG: classifier-free guidance that changes all regions of a picture alike, by masks of the prompt's tokens at every step.

"Rethinking the Spatial Inconsistency in Classifier-Free Diffusion Guidance" (Shen et al., CVPR 2024), as released. Where guidance moves the
prediction further than in the foreground, it is weakened, and strengthened where it moves it less. The masks come from the attention of
the same step, here from S-CFG's own segmentation; goca_masks.py has GoCA's, which take its place.

Axes: B pictures, n text tokens, (h, w) cells of a latent or of masks, N = h w. A batch has the empty prompt's rows first, then the text's.

As released for Stable Diffusion 1 and 2: there the attention of the layers with a quarter and an eighth of the latent's sides is read. SDXL
has the former alone. Of PixArt and SD3, whose layers have one size, the block that names a model's best maps is read at every second token
along both sides; of SD3's joint attention, the part among image tokens as shares, and that to CLIP's tokens. SD3 predicts a velocity, whose
change by the text is that of the noise by a factor, which cancels. Flux has no empty prompt to be guided from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from padseg.backbones.recorder import Request, watch
from padseg.errors import NotFinite
from padseg.methods.options import require_family
from padseg.methods.stages.aggregation import (
    Grid,
    Heads,
    blurred,
    cross_map,
    enlarged,
    quotient,
    self_map,
    smaller_grid,
)
from padseg.methods.stages.cross_maps import thinned
from padseg.types import Attention

if TYPE_CHECKING:
    from padseg.backbones import Backbone
    from padseg.generation.sample import Call, Guide, Predict, Texts

FAMILIES = frozenset({'unet', 'pixart', 'sd3'})
LOWEST, HIGHEST = 0.8, 3.0  # of gamma
STRONGEST = 15.0  # of gamma times the scale
TAPS, SIGMA = 3, 0.5 * math.sqrt(2)  # the released kernel for sigma 0.5 has exp(-(x / 2 sigma)^2), a Gaussian of this sigma
NOTHING = 1e-8  # added to what is divided by
PARTS = (4, 8)  # of the latent's sides: grids of the layers that are read


class Masks(NamedTuple):
    """tokens: (B, n, h, w), 1 where a token's map is the highest, for all that share a pixel, else 0; foreground: (B, h, w). float32."""

    tokens: Tensor
    foreground: Tensor


# Guidance from masks


def gamma(eta: Tensor, token_masks: Tensor, foreground: Tensor, scale: float) -> Tensor:
    """What guidance is multiplied by at each cell: (B, h, w), (B, n, h', w'), (B, h', w') -> (B, h, w).

    eta: how far the text moves the prediction. It is what `regional` gives between LOWEST and HIGHEST, then at most STRONGEST / scale, then
    smoothed: for a scale above 18.75 it can be below LOWEST.
    """
    most = STRONGEST / scale if scale > 0 else math.inf
    return smoothed(regional(eta, token_masks, foreground).clamp(LOWEST, HIGHEST).clamp_max(most))


def regional(eta: Tensor, token_masks: Tensor, foreground: Tensor) -> Tensor:
    """The mean of eta over the foreground by that over the region of the cell's token: (B, h, w), (B, n, h', w'), (B, h', w') -> (B, h, w).

    Where tokens share a cell, what they contribute is added; where there is none, it is 0. Masks are enlarged by nearest neighbour.
    """
    size = tuple(eta.shape[1:])
    tokens = interpolate(token_masks, size, mode='nearest')  # (B, n, h, w)
    whole = interpolate(foreground[:, None], size, mode='nearest')  # (B, 1, h, w)
    return (tokens * (mean_in(eta, whole) / (mean_in(eta, tokens) + NOTHING))[..., None, None]).sum(1)


def mean_in(values: Tensor, masks: Tensor) -> Tensor:
    """The mean in each mask, 0 in an empty one: (B, h, w), (B, n, h, w) -> (B, n)."""
    return (masks * values[:, None]).sum((2, 3)) / (masks.sum((2, 3)) + NOTHING)


def smoothed(maps: Tensor) -> Tensor:
    """The released 3 x 3 smoothing, maps mirrored at their borders: (..., h, w) -> (..., h, w)."""
    return blurred(maps.flatten(0, -3), TAPS, SIGMA).unflatten(0, maps.shape[:-2])


def moved(empty: Tensor, text: Tensor) -> Tensor:
    """eta, the length of the change at each cell over its channels: (B, C, h, w) twice -> (B, h, w)."""
    return (text - empty).norm(dim=1)


def guided(empty: Tensor, text: Tensor, masks: Masks, scale: float) -> Tensor:
    """v_u + w gamma (v_c - v_u), from the predictions for the empty prompt and the text: (B, C, h, w) twice -> (B, C, h, w)."""
    factor = gamma(moved(empty, text), masks.tokens, masks.foreground, scale)
    return empty + scale * factor[:, None] * (text - empty)


# S-CFG's own segmentation


def walked(own: Tensor, cross: Tensor) -> Tensor:
    """(A + 3 A^2) / 4 times a cross-attention map, with A the self-attention: (B, N, N), (B, N, n) -> (B, N, n).

    The paper sums powers of A from 1 to 4; in the released code they are A and thrice its square.
    """
    once = own @ cross
    return (once + 3 * (own @ once)) / 4


def layer_scores(own: Tensor, cross: Tensor, grid: Grid, to: Grid) -> Tensor:
    """The tokens' maps of a layer before they are made comparable: (B, N, N), (B, N, n) -> (B, n, h, w) in the grid `to`."""
    return smoothed(enlarged(walked(own, cross).transpose(1, 2).unflatten(2, grid), to))


def even(scores: Tensor) -> Tensor:
    """Maps by their mean over pixels: (B, n, h, w) -> (B, n, h, w)."""
    return scores / (scores.mean((2, 3), keepdim=True) + NOTHING)


def split_ground(scores: Tensor, columns: Sequence[int]) -> Tensor:
    """Background and foreground by their means: the map of a token of each picture, and the sum of all others.

    (B, n, h, w) -> (B, 2, h, w).
    """
    alone = torch.stack([maps[column] for maps, column in zip(scores, columns, strict=True)])
    others = torch.stack([torch.cat((maps[:column], maps[column + 1 :])).sum(0) for maps, column in zip(scores, columns, strict=True)])
    pair = torch.stack((alone, others), 1)
    return quotient(pair, pair.mean((2, 3), keepdim=True))


def highest(maps: Tensor) -> Tensor:
    """1 where a map is the highest, for all that share a pixel: (B, n, h, w) -> (B, n, h, w)."""
    return (maps == maps.amax(1, keepdim=True)).to(maps.dtype)


class Ground(NamedTuple):
    """Which token stands for the background. half: 0 in the rows of the empty prompt, 1 in those of the text; columns: of each picture."""

    half: int
    columns: tuple[int, ...]


def ground_of(texts: Texts, count: int) -> Ground:
    """The first token of the empty prompt, as released.

    Not where an empty prompt tells no tokens apart. PixArt's has one that is not masked, so that all pixels attend to it alike: there it is
    the end token of the text, as in GoCA's released code for PixArt-Sigma. SDXL's is zeros: there it is the start token of the text.
    """
    if texts.text.mask is not None:
        return Ground(1, tuple(int(mask.sum()) - 1 for mask in texts.text.mask.expand(count, -1)))
    return Ground(int(not texts.empty.embeds.any()), (0,) * count)


@dataclasses.dataclass
class Segmentation:
    """S-CFG's masks from one run of the model, layer by layer. to: their grid; own: self-attention that waits for the layer's other map.

    Sums over the layers so far: tokens, of the text's rows, (B, n, h, w); pair, of what stands for background and foreground, (B, 2, h, w).
    """

    to: Grid
    ground: Ground
    own: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    tokens: Tensor | None = None
    pair: Tensor | None = None
    layers: int = 0

    def add(self, layer: int, grid: Grid, own: Tensor | None = None, cross: Tensor | None = None) -> None:
        """Take in maps of a layer, (2B, N, N) and (2B, N, n), of which the self-attention comes first."""
        if own is not None:
            self.own[layer] = own
        if cross is None:
            return
        scores = layer_scores(self.own.pop(layer), cross, grid, self.to)
        tokens, pair = even(scores.chunk(2)[1]), split_ground(scores.chunk(2)[self.ground.half], self.ground.columns)
        self.tokens = tokens if self.tokens is None else self.tokens + tokens
        self.pair = pair if self.pair is None else self.pair + pair
        self.layers += 1

    def maps(self) -> tuple[Tensor, Tensor]:
        """Means over layers: of the tokens (B, n, h, w), and of background and foreground (B, 2, h, w). NotFinite if numbers overflowed."""
        assert self.tokens is not None and self.pair is not None
        if not (self.tokens.isfinite().all() and self.pair.isfinite().all()):
            raise NotFinite('attention is not finite: try another --dtype')
        return self.tokens / self.layers, self.pair / self.layers

    def masks(self) -> Masks:
        """Foreground is where its map is above that of the background."""
        tokens, pair = self.maps()
        return Masks(highest(tokens), (pair[:, 1] > pair[:, 0]).to(pair.dtype))


def part_grid(latent_shape: Sequence[int], part: int) -> Grid:
    """A grid of a part of the latent's sides, rounded up as by halving."""
    return -(-latent_shape[-2] // part), -(-latent_shape[-1] // part)


def layers_read(backbone: Backbone, latent_shape: Sequence[int]) -> dict[int, Grid]:
    """The layers that S-CFG reads for latents of this shape, with their grids."""
    grids = {layer: backbone.grid(layer, latent_shape) for layer in range(backbone.layers)}
    wanted = [part_grid(latent_shape, part) for part in PARTS]
    found = {layer: grid for layer, grid in grids.items() if grid in wanted}
    best = min(backbone.spec.layer, backbone.layers - 1)
    return found or {best: grids[best]}


def recordings(backbone: Backbone, texts: Texts, latent_shape: Sequence[int], found: Segmentation) -> dict[tuple[int, str], Request[None]]:
    """What to record while the model runs, which adds to `found`."""
    requests: dict[tuple[int, str], Request[None]] = {}
    prompt = texts.text._replace(picked=tuple(range(min(texts.text.embeds.shape[1], backbone.spec.sequence))))
    first = backbone.first_image_token(prompt)
    for layer, grid in layers_read(backbone, latent_shape).items():
        text, image = backbone.attention_module(layer), backbone.self_attention_module(layer)
        columns = backbone.text_columns(prompt, math.prod(grid))
        kept = smaller_grid(grid, found.to)

        def read(seen: Attention, layer: int, grid: Grid, kept: Grid, columns: Sequence[int], parts: str, shares: bool) -> None:
            own = cross = None
            if 'image' in parts:
                own = self_map(seen, grid, kept, first)  # (2B, N, N)
                own = quotient(own, own.sum(2, keepdim=True)) if shares else own
            if 'text' in parts:
                small, start = (seen, first) if kept == grid else (thinned(seen, first, grid, kept), 0)
                cross = cross_map(small, columns, Heads('average'), start, math.prod(kept))  # (2B, N, n)
            found.add(layer, kept, own, cross)

        shares = text is image or kept != grid
        reads = {'image text': text} if text is image else {'image': image, 'text': text}
        for parts, module in reads.items():
            of_layer = partial(read, layer=layer, grid=grid, kept=kept, columns=columns, parts=parts, shares=shares)
            requests[layer, parts] = Request(module, of_layer)
    return requests


def s_cfg(backbone: Backbone, scale: float) -> Guide:
    """The guide of S-CFG. scale: that of classifier-free guidance. UsageError for a family that it is not defined for."""
    require_family('s-cfg', FAMILIES, backbone)

    def guide(predict: Predict, call: Call, texts: Texts) -> Tensor:
        shape = tuple(call.z.shape)
        found = Segmentation(part_grid(shape, PARTS[0]), ground_of(texts, len(call.z)))
        with torch.no_grad(), watch(recordings(backbone, texts, shape, found), stop=False):
            empty, text = predict([texts.empty, texts.text], call)
        return guided(empty, text, found.masks(), scale)

    return guide
