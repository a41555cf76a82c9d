"""Classical segmenters that need no model, as baselines.

Felzenszwalb and Huttenlocher, Efficient Graph-Based Image Segmentation, 2004; SLIC superpixels (Achanta et al., 2012) merged by mean
colour; k-means on colour and position; a grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from padseg.methods import stages
from padseg.methods.options import SCALE, MethodOptions, Range, check_options, option, plain_settings
from padseg.types import LabelMap

if TYPE_CHECKING:
    from padseg.backbones.spec import Spec
    from padseg.methods.options import Setting
    from padseg.types import Array, Image

SIDE = 120  # pixels; k-means clusters a reduced copy, and its labels are enlarged
CLOSENESS = 0.5  # weight of one pixel's distance on that copy, in 8-bit Lab units
ATTEMPTS = 2
SUPERPIXELS = 300
COMPACTNESS = 10


@dataclasses.dataclass(frozen=True)
class FelzenszwalbOptions:
    """Options of graph-based segmentation."""

    scale: float = option(600.0, 'regions are larger for a larger scale', range=SCALE)

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class SlicOptions:
    """Options of superpixel merging."""

    distance: float = option(
        30.0, 'merge neighbours whose mean Lab colours are closer than this', range=Range('a number >= 0', 0, float('inf'))
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class KMeansOptions:
    """Options of k-means."""

    clusters: int = option(4, 'clusters of colour and place', range=Range('a whole number in 1..14400', 1, SIDE**2 + 1))

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class GridOptions:
    """Options of the grid."""

    cells: int = option(
        4, 'rectangles down, and as many across; 1 is the whole picture', range=Range('a whole number in 1..10000', 1, 10_001)
    )

    def __post_init__(self) -> None:
        check_options(self)


def graph_based(image: Image, options: FelzenszwalbOptions) -> Array:
    from skimage.segmentation import felzenszwalb

    return felzenszwalb(image, scale=options.scale, sigma=0.8, min_size=int(options.scale) // 2)


def merged_superpixels(image: Image, options: SlicOptions) -> Array:
    """Merge SLIC superpixels, always the two neighbours closest in mean Lab colour, until all are at least `distance` apart."""
    from skimage import graph
    from skimage.color import rgb2lab
    from skimage.segmentation import slic

    pieces = slic(image, n_segments=SUPERPIXELS, compactness=COMPACTNESS, start_label=0)
    if pieces.max() == 0:
        return pieces  # the graph would be empty, without even this one region
    neighbours = graph.rag_mean_color(rgb2lab(image), pieces)
    return graph.merge_hierarchical(
        pieces,
        neighbours,
        thresh=options.distance,
        rag_copy=False,
        in_place_merge=True,
        merge_func=join_colours,
        weight_func=colour_difference,
    )


def join_colours(regions: Any, gone: int, kept: int) -> None:
    first, second = regions.nodes[gone], regions.nodes[kept]
    for quantity in ('pixel count', 'total color'):
        second[quantity] = first[quantity] + second[quantity]
    second['mean color'] = second['total color'] / second['pixel count']


def colour_difference(regions: Any, _: int, kept: int, neighbour: int) -> dict[str, float]:
    return {'weight': float(np.linalg.norm(regions.nodes[kept]['mean color'] - regions.nodes[neighbour]['mean color']))}


def k_means(image: Image, options: KMeansOptions) -> Array:
    """Cluster colour and position. Deterministic for a picture, because the generator is reseeded."""
    import cv2

    small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    places = np.moveaxis(np.indices((SIDE, SIDE)), 0, -1)[..., ::-1] * CLOSENESS
    features = np.dstack([cv2.cvtColor(small, cv2.COLOR_RGB2LAB), places]).reshape(SIDE**2, -1).astype(np.float32)  # (SIDE², 5)
    stop = (cv2.TERM_CRITERIA_MAX_ITER + cv2.TERM_CRITERIA_EPS, 20, 1.0)
    cv2.setRNGSeed(0)
    _, clusters, _ = cv2.kmeans(features, options.clusters, np.zeros((SIDE**2, 1), np.int32), stop, ATTEMPTS, cv2.KMEANS_PP_CENTERS)
    return cv2.resize(clusters.reshape(SIDE, SIDE), image.shape[1::-1], interpolation=cv2.INTER_NEAREST)


def grid(image: Image, options: GridOptions) -> Array:
    """Equal rectangles."""
    down, across = (np.arange(side) * options.cells // side for side in image.shape[:2])
    return down[:, None] * options.cells + across


class Prepared(NamedTuple):
    """The options, since nothing else is needed; backbone: always None."""

    options: Any
    backbone: None = None


class Classical(NamedTuple):
    """A method consisting of one function. regions: (H, W, 3) uint8 and its options -> (H, W), any integers."""

    Options: type[MethodOptions]
    regions: Callable[[Image, Any], Array]
    TASK: str = 'regions'
    FAMILIES: frozenset[str] = frozenset()
    BACKGROUND_BY_RULE: bool = False

    def deepest(self, options: MethodOptions, spec: Spec) -> int | None:
        return 0

    def prepare(self, backbone: Any, options: MethodOptions, classes: Sequence[str] = (), keep: bool = True) -> Prepared:
        return Prepared(options)

    def maps(self, images: Sequence[Image], prepared: Prepared, names: Sequence[str] = ()) -> list[None]:
        return [None] * len(images)

    def labels(self, image: Image, maps: None, prepared: Prepared) -> LabelMap:
        return stages.as_regions(self.regions(image, prepared.options))

    def recorded(self, options: MethodOptions, spec: Spec | None) -> dict[str, Setting]:
        return plain_settings(options)


FELZENSZWALB = Classical(FelzenszwalbOptions, graph_based)
SLIC_RAG = Classical(SlicOptions, merged_superpixels)
KMEANS = Classical(KMeansOptions, k_means)
GRID = Classical(GridOptions, grid)
