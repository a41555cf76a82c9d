"""Cases of DiffSeg, maps of four grids and their merging, and of DiffCut, tokens of the encoder's last self-attention; in 64 bits."""

from __future__ import annotations

import numpy as np
import torch

from padseg.methods.stages import aggregation, anchor_merging, normalised_cut, pamr

SIDES = (64, 32, 16, 8)
LARGE = (512, 512)


def diffseg(case, arrays):
    hyper, grid = case['hyper'], (SIDES[0],) * 2
    features = {(side, side): arrays[f'in.f{side}'] for side in SIDES}
    maps = {side: attention_mean(own, own) for side, own in features.items()}
    points = anchor_merging.anchors(grid, hyper['num_points'])
    weights = anchor_merging.grid_weights(maps)
    every = anchor_merging.aggregated_maps(maps, grid)
    yield 'out.grid', torch.stack((points // grid[1], points % grid[1]), 1).int()
    yield 'out.ratio', torch.tensor(list(weights.values()))
    yield 'out.aggregated_rows', every[arrays['in.queries'].long()].unflatten(1, grid)
    yield 'out.anchor_kl', anchor_merging.symmetric_kl(every[points].double())
    first, *thresholds = hyper['thresholds']
    proposals, members = anchor_merging.first_pass(every, points, first)
    yield 'out.pass1_members', members.float()
    if 'in.anchor_subset' in arrays:
        yield 'out.pass1_rows', proposals[arrays['in.anchor_subset'].long()].unflatten(1, grid)
    for number, threshold in enumerate(thresholds, start=2):
        proposals = anchor_merging.later_pass(proposals, threshold)
        yield f'out.pass{number}', proposals.unflatten(1, grid)
    yield 'out.labels', strongest(proposals, grid)
    if 'out.labels_kmeans' in arrays:
        yield 'out.labels_kmeans', strongest(anchor_merging.clustered(every, proposals), grid)
    if 'out.labels_fp16' in arrays:
        proposals, members = anchor_merging.first_pass(every, points, first, half=True)
        yield 'out.pass1_members_fp16', members.float()
        for threshold in thresholds:
            proposals = anchor_merging.later_pass(proposals, threshold)
        yield 'out.labels_fp16', strongest(proposals, grid)
    if 'in.k_text' in arrays:
        words = anchor_merging.word_maps({side: attention_mean(own, arrays['in.k_text']) for side, own in features.items()}, LARGE)
        yield 'out.x_rows', words.flatten(1)[:, SIDES[0] * arrays['in.queries'].long()].T
        nouns = hyper['nouns (word index, word); token = index + 1']
        named = anchor_merging.words_of_regions(arrays['out.labels'].long(), words[[index + 1 for index, _ in nouns]])
        assert {nouns[word][1]: [region] for region, word in enumerate(named)} == hyper['semantics_mean']


def attention_mean(queries, keys):
    """The mean over heads of the attention: (H, N, d), (H, n, d) -> (N, n)."""
    return sum((q @ k.T / q.shape[1] ** 0.5).softmax(1) for q, k in zip(queries, keys, strict=True)) / len(queries)


def strongest(proposals, grid):
    return aggregation.enlarged(proposals.float().unflatten(1, grid), LARGE).argmax(0).byte()


# DiffCut: tokens of the encoder's last self-attention, in 64 bits


def diffcut(case, arrays):
    hyper = case['hyper']
    grid, size = (hyper['side'],) * 2, tuple(hyper['mask_size'])
    features = normalised_cut.unit(arrays['in.features'][0].numpy())
    weights = normalised_cut.affinity(features, hyper['alpha'])
    tree = normalised_cut.cut_tree(weights, hyper['tau'], released=True)
    yield 'out.zero_affinity_tokens', torch.from_numpy(np.flatnonzero((weights == 0).any(1))).int()
    yield 'out.node_level', torch.tensor([node.level for node in tree]).int()
    yield 'out.node_size', torch.tensor([len(node.graph) for node in tree]).int()
    yield 'out.node_ncut', torch.tensor([node.value if len(node.graph) > 1 else float('nan') for node in tree])
    yield 'out.root_vector', torch.from_numpy(normalised_cut.second_vector(weights))
    root = np.sqrt(weights.sum(1))
    yield 'out.root_eigenvalues', torch.from_numpy(np.linalg.eigvalsh(np.eye(len(root)) - weights / np.outer(root, root))[:4])
    sides = torch.zeros(len(normalised_cut.accepted(tree, hyper['tau'])), len(features), dtype=torch.uint8)
    for number, cut in enumerate(normalised_cut.accepted(tree, hyper['tau'])):
        sides[number, cut.graph[cut.side]] = 1
    yield 'out.bipartitions', sides.unflatten(1, grid)
    labels = normalised_cut.token_labels(tree, hyper['tau'])
    yield 'out.low_labels', torch.from_numpy(labels).byte().view(grid)
    means = normalised_cut.prototypes(features, labels)
    yield 'out.cluster_means', torch.from_numpy(means)
    scores = aggregation.enlarged(torch.from_numpy(means @ features.T).unflatten(1, grid), size)
    yield 'out.scores', scores[:, ::8, ::8].permute(1, 2, 0)
    yield 'out.labels', scores.argmax(0).byte()
    if 'out.tau0_labels' in arrays:
        yield 'out.tau0_labels', torch.from_numpy(normalised_cut.token_labels(tree, 0)).byte().max().expand(size)
    if 'in.image' in arrays:
        masks = np.stack([arrays['out.labels'] == number for number in range(len(means))])
        refined = pamr.refined_masks(masks, arrays['in.image'][0].permute(1, 2, 0).numpy(), hyper['pamr']['num_iter'])
        assert tuple(hyper['pamr']['dilations']) == pamr.DILATIONS
        yield 'out.pamr_masks', torch.from_numpy(refined)
        names = refined.argmax(0).astype(np.uint8)
        yield 'out.pamr_labels', torch.from_numpy(names)
        yield 'out.pamr_median', torch.from_numpy(pamr.smoothed_labels(names))
    if 'out.autosc_labels' in arrays:
        found = normalised_cut.automatic_clusters(features, released=True)
        yield 'out.autosc_labels', renumbered(torch.from_numpy(found).view(grid), arrays['out.autosc_labels'].long())


def renumbered(labels, like):
    """The same regions with the numbers of those that they overlap most, as the order of clusters means nothing."""
    numbers = [int(like[labels == number].bincount().argmax()) for number in range(int(labels.max()) + 1)]
    assert len(set(numbers)) == len(numbers)
    return torch.tensor(numbers)[labels].byte()


CASES = {
    'diffseg_m8': diffseg,
    'diffseg_m16': diffseg,
    'diffcut_16': diffcut,
    'diffcut_32': diffcut,
    'diffcut_tau03': diffcut,
}
