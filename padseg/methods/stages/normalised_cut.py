"""DiffCut's recursive normalised cut of tokens into regions, on plain arrays.

Axes: N tokens of C channels, n of them in a graph. Everything is float64. A tree of cuts holds for all thresholds below the one that it was
grown with, and its regions at a higher threshold divide those at a lower one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh, eigh_tridiagonal, qr, svd

from padseg.types import Array

CANDIDATES, SHRUNK = 100, 0.99  # thresholds of a cut, and the share of the vector's range that they span
ALIKE = 1e-10  # cosines of the same vector differ by rounding alone, which must not be stretched to 0..1
DENSE = 64  # tokens up to which all eigenvectors are computed, as quickly
EXACT = 1e-9  # what an eigenvector by Lanczos' method is off by, times the gap of eigenvalues, which are in -1..1
MOST_STEPS, CHECKED = 256, 6  # of Lanczos' method, and after how many it is looked whether they are enough
EQUAL = 1e-9  # numbers that differ by less are ties
EXPONENTS = (1, 5, 10, 15)  # that AutoSC tries
ADDED_TO_MEAN = 1e-6  # by AutoSC's released code


class Cut(NamedTuple):
    """A visited node of the tree. tokens: (n,) all that it holds; level: 0 for the root; graph: (m,) those in its graph.

    value: of its best cut, inf if there is none; side: (m,) bool, the first side, empty if there is none; children: numbers of the nodes
    made by it, where the first holds the first side and the second all others; both -1 if it was not cut.
    """

    tokens: Array
    level: int
    graph: Array
    value: float
    side: Array
    children: tuple[int, int] = (-1, -1)


Tree = list[Cut]  # in the order of visits: a node, its first side, its second


def unit(features: Array) -> Array:
    """Features of length 1: (N, C) -> (N, C)."""
    features = np.asarray(features, np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(np.finfo(np.float64).tiny)


def affinity(features: Array, alpha: float = 10) -> Array:
    """Cosines scaled from 0 to 1 over all pairs, to the power of alpha: (N, C) of length 1 -> (N, N). All 1 if all features are alike."""
    cosines = features @ features.T
    low, high = cosines.min(), cosines.max()
    if high - low < ALIKE:
        return np.ones_like(cosines)
    cosines -= low
    cosines /= high - low
    return np.power(cosines, alpha, out=cosines)


def second_vector(weights: Array) -> Array:
    """The second eigenvector of a graph's normalised Laplacian, times D^-1/2: (n, n) -> (n,), n > 1. Its largest entry is positive.

    Of several such vectors it is the one nearest to a fixed vector, so that the same graph always gives the same.
    """
    root = np.sqrt(weights.sum(1).clip(np.finfo(np.float64).tiny))
    first = root / np.linalg.norm(root)  # the eigenvector of 0
    scaled = weights / root[:, None]
    scaled /= root
    vector = (top_vector(scaled, first) if len(root) > DENSE else None) if len(root) > 2 else None
    if vector is None:
        values, vectors = eigh(scaled - 2 * np.outer(first, first))  # which takes the first from 1 to -1, below all others
        among = vectors[:, values > values[-1] - EQUAL]
        vector = among @ (among.T @ fixed_vector(len(root)))
    vector = vector / root
    largest = np.abs(vector)
    return vector * np.sign(vector[np.argmax(largest > largest.max() * (1 - EQUAL))])


def top_vector(scaled: Array, first: Array) -> Array | None:
    """The eigenvector of the largest eigenvalue of a symmetric matrix (n, n) but for the known first one, or None if that takes too long.

    By Lanczos' method, in a fraction of the time of a full decomposition. It starts at the fixed vector and never leaves the space that
    this one spans, so that of several such vectors it finds the nearest, which ARPACK, that goes on with others, would not.
    """
    basis = np.empty((MOST_STEPS + 1, len(first)))
    basis[0] = first
    diagonal, beside = np.empty(MOST_STEPS), np.empty(MOST_STEPS)
    rest = fixed_vector(len(first))
    for step in range(MOST_STEPS):
        known = basis[: step + 1]
        for _ in range(2):  # once leaves rounding that grows
            rest = rest - (known @ rest) @ known
        length = np.linalg.norm(rest)
        if step:
            beside[step - 1] = length
            if length < EXACT or step % CHECKED == 0:
                place = (step - 1, step - 1)
                shares = eigh_tridiagonal(diagonal[:step], beside[: step - 1], select='i', select_range=place)[1][:, 0]
                if length * abs(shares[-1]) < EXACT:
                    return np.asarray(shares @ basis[1 : step + 1])
        basis[step + 1] = rest / length
        rest = scaled @ basis[step + 1]
        diagonal[step] = rest @ basis[step + 1]
    return None


def fixed_vector(length: int) -> Array:
    """Numbers in -0.5..0.5 without any pattern, always the same: (length,)."""
    return np.random.PCG64(0).random_raw(length) / 2.0**64 - 0.5


def best_cut(weights: Array) -> tuple[float, Array]:
    """The least of the normalised cuts of a graph at 100 thresholds of its second vector: its value, and the first side, (n,) bool.

    Ncut = cut / vol of one side + cut / vol of the other, which is below 2.
    """
    vector = second_vector(weights)
    sides = vector[:, None] > np.linspace(SHRUNK * vector.min(), SHRUNK * vector.max(), CANDIDATES)  # (n, 100)
    inside = sides.astype(np.float64)
    degrees = weights.sum(1)
    volume, total = degrees @ inside, degrees.sum()
    crossing = volume - np.einsum('nk,nk->k', inside, weights @ inside)
    values = crossing / volume + crossing / (total - volume)
    best = int(np.argmax(values <= np.nanmin(values) + EQUAL))
    return float(values[best]), sides[:, best]


def cut_tree(weights: Array, tau: float, released: bool = False) -> Tree:
    """Cut all tokens in two, and the sides again, wherever the value is below tau: (N, N) -> the tree.

    released: below the root, leave tokens out of the graph that have an affinity of 0 to any other; they go to the second side.
    """
    whole = ~(weights == 0).any(1)  # the tokens that stay in graphs
    tree: Tree = []
    waiting = [(np.arange(len(weights)), 0, -1, 0)]  # tokens, level, number of the parent, and which child
    while waiting:
        tokens, level, parent, child = waiting.pop()
        graph = tokens[whole[tokens]] if released and level else tokens
        value, side = best_cut(weights[np.ix_(graph, graph)]) if len(graph) > 1 else (np.inf, np.zeros(len(graph), bool))
        if parent >= 0:
            pair = tree[parent].children
            tree[parent] = tree[parent]._replace(children=(len(tree), pair[1]) if child == 0 else (pair[0], len(tree)))
        tree.append(Cut(tokens, level, graph, value, side))
        if value < tau:
            first = graph[side]
            waiting += [
                (np.setdiff1d(tokens, first, assume_unique=True), level + 1, len(tree) - 1, 1),
                (first, level + 1, len(tree) - 1, 0),
            ]
    return tree


def accepted(tree: Tree, tau: float) -> list[Cut]:
    """The cuts with a value below tau, whose parents were cut too, in the order of visits."""
    cuts, waiting = [], [0]
    while waiting:
        node = tree[waiting.pop()]
        if node.value < tau:
            cuts.append(node)
            waiting += reversed(node.children)
    return cuts


def token_labels(tree: Tree, tau: float) -> Array:
    """The region of each token, (N,), as the released code numbers them: 0, then each first side in the order of cuts.

    tau: at most the one that the tree was grown with.
    """
    labels = np.zeros(len(tree[0].tokens), int)
    for number, cut in enumerate(accepted(tree, tau), start=1):
        labels[cut.graph[cut.side]] = number
    return labels


def prototypes(features: Array, labels: Array) -> Array:
    """The mean feature of each region: (N, C) of length 1, (N,) -> (K, C), which are shorter than 1."""
    sums = np.zeros((labels.max() + 1, features.shape[1]))
    np.add.at(sums, labels, features)
    return sums / np.bincount(labels)[:, None]


def automatic_clusters(features: Array, released: bool = False) -> Array:
    """AutoSC: spectral clustering whose exponent and number of clusters have the largest relative gap of eigenvalues: (N, C) -> (N,).

    released: take the vectors of the last exponent in place of the best one's, as the released code does.
    """
    found = []
    for alpha in EXPONENTS:
        weights = affinity(features, alpha)
        root = np.sqrt(weights.sum(1))
        values, vectors = eigh(np.eye(len(root)) - weights / root[:, None] / root)
        gaps = relative_gaps(values)
        found.append((gaps.max(), int(gaps.argmax()), vectors))
    _, count, vectors = max(found, key=lambda one: one[0])
    return pivoted_clusters((found[-1][2] if released else vectors)[:, :count])


def relative_gaps(values: Array) -> Array:
    """By how much each value exceeds the mean of those up to it, relative to that: (n,) ascending -> (n,)."""
    means = np.cumsum(values) / np.arange(1, len(values) + 1)
    return (values - means) / (means + ADDED_TO_MEAN)


def pivoted_clusters(vectors: Array) -> Array:
    """Clusters of the rows of orthogonal vectors by QR with column pivoting (Damle, Minden and Ying, 2019): (N, k) -> (N,)."""
    count = vectors.shape[1]
    pivots = qr(vectors.T, mode='r', pivoting=True)[1][:count]
    left, _, right = svd(vectors[pivots].T)
    return np.abs(vectors @ (left @ right)).argmax(1)
