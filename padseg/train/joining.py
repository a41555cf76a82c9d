"""Learn what counts when superpixels are joined and regions grouped, from pictures with ground truth: bin/fit-joining."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from padseg.datasets import VOID
from padseg.datasets.dataset import Dataset
from padseg.methods import seg4diff, stages
from padseg.methods.stages.join import Graph, Join, Weights, joins, owners
from padseg.methods.stages.labels import superpixel_graph
from padseg.methods.stages.regroup import ApartWeights, features_apart, of_regions
from padseg.methods.stages.runs import painted
from padseg.types import Array

PENALTY = 1e-3  # on the squares of weights of features with deviation 1
UNKNOWN = 0.5  # what is said of a region whose truth is void
START = Weights(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, area=0.1, bias=0.0)  # by what pairs are first met: proposals, and small regions sooner
Kind = TypeVar('Kind', Weights, ApartWeights)


class Pairs(NamedTuple):
    """Regions that were compared. features: (N, F); apart: (N,), the share of annotators who have them in different regions."""

    features: Array
    apart: Array


class Example(NamedTuple):
    """A picture's superpixels. confusions: one per annotator, (K, R), pixels of each superpixel in each region or class of the truth."""

    graph: Graph
    confusions: tuple[Array, ...]


def examples(data: Dataset, prepared: seg4diff.Prepared, part: int, parts: int) -> Iterator[Example]:
    """Every `parts`-th picture of a split, from the one numbered `part`."""
    for sample in data.samples[part::parts]:
        picture = data.picture(sample)
        (maps,) = seg4diff.maps([picture], prepared)
        options = prepared.options
        superpixels = stages.superpixels_of(picture, options.superpixels)
        runs, _, graph = superpixel_graph(seg4diff.proposals(maps, options), superpixels, picture, options.refine)
        index = painted(runs, np.arange(len(runs.names)))
        yield Example(graph, tuple(confusion(index, data.to_classes(raw), len(graph.areas)) for raw in data.read(sample)))


def confusion(index: Array, truth: Array, count: int) -> Array:
    """Pixels of each superpixel in each region of the truth, without void: (H, W), (H, W) -> (count, R)."""
    known = truth.ravel() != VOID
    names, places = np.unique(truth.ravel()[known], return_inverse=True)
    pairs = index.ravel()[known].astype(np.int64) * len(names) + places
    return np.bincount(pairs, minlength=count * len(names)).reshape(count, len(names))


def compared(example: Example, weights: Weights) -> Pairs:
    """All pairs that are compared while a picture's superpixels are joined to a single region."""
    confusions = [each.copy() for each in example.confusions]
    found: list[Pairs] = []
    done = 0

    def seen(ones: Array, others: Array, features: Array, steps: Sequence[Join]) -> None:
        nonlocal done
        for step in steps[done:]:
            for each in confusions:
                each[step.kept] += each[step.gone]
        done = len(steps)
        found.append(Pairs(features, np.mean([apart(each[ones], each[others]) for each in confusions], 0)))

    joins(example.graph, np.inf, seen, weights)
    return stacked(found)


def compared_apart(example: Example, threshold: float, weights: Weights) -> Pairs:
    """All pairs of regions that do not touch, once a picture's superpixels are joined up to a threshold."""
    owner = owners(joins(example.graph, threshold, weights=weights), len(example.graph.areas), threshold)
    kept, regions = np.unique(owner, return_inverse=True)
    graph = of_regions(example.graph, regions, len(kept))
    confusions = [np.array([each[regions == region].sum(0) for region in range(len(kept))]) for each in example.confusions]
    pairs = [(one, other) for one in range(len(kept)) for other in range(one + 1, len(kept)) if other not in graph.borders[one]]
    ones, others = np.array(pairs, int).reshape(-1, 2).T
    features = features_apart(graph, np.arange(len(kept)))[ones, others]
    return Pairs(features, np.mean([apart(each[ones], each[others]) for each in confusions], 0))


def apart(ones: Array, others: Array) -> Array:
    """1 where most of one region lies in another region of the truth than most of the other, else 0: (N, R), (N, R) -> (N,)."""
    known = (ones.sum(1) > 0) & (others.sum(1) > 0)
    return np.where(known, others.argmax(1) != ones.argmax(1), UNKNOWN)


def stacked(pairs: Sequence[Pairs]) -> Pairs:
    return Pairs(np.concatenate([each.features for each in pairs]), np.concatenate([each.apart for each in pairs]))


def fit(sets: Sequence[Pairs], kind: type[Kind], counting: Sequence[float] | None = None) -> Kind:
    """Logistic regression of the weights of a kind.

    Every set counts by its number in `counting`, or the same, and in it a pair by the harmonic sum of its areas.
    """
    pairs = stacked(sets)
    counts = [np.exp(each.features[:, kind._fields.index('area')]) for each in sets]
    each_set = np.array(counting or [1.0] * len(sets))
    importance = np.concatenate([count / pair.sum() * pair for count, pair in zip(each_set / each_set.sum(), counts, strict=True)])
    centre, scale = pairs.features.mean(0), pairs.features.std(0)
    inputs = np.column_stack([(pairs.features - centre) / scale, np.ones(len(pairs.features))])

    def loss(weights: Array) -> tuple[float, Array]:
        odds = inputs @ weights
        penalised = np.append(weights[:-1], 0)
        value = importance @ (np.logaddexp(0, odds) - pairs.apart * odds) + PENALTY * (penalised @ penalised)
        return value, inputs.T @ (importance * (expit(odds) - pairs.apart)) + 2 * PENALTY * penalised

    found = minimize(loss, np.zeros(inputs.shape[1]), jac=True, method='L-BFGS-B').x
    slopes: Array = found[:-1] / scale
    return kind._make([*slopes.tolist(), float(found[-1] - slopes @ centre)])


def fitted(
    sets: Sequence[Sequence[Example]], rounds: int, weights: Weights = START, counting: Sequence[float] | None = None
) -> Iterator[Weights]:
    """The weights after each round, whose pairs are those met while joining by the weights of the round before. counting: as of `fit`."""
    for _ in range(rounds):
        weights = fit([stacked([compared(example, weights) for example in each]) for each in sets], Weights, counting)
        yield weights
