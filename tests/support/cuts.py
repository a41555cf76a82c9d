"""What the tests of DiffSeg run in a process of its own, whose memory is measured."""

from __future__ import annotations


def merge_a_large_picture() -> None:
    """The memory in MiB that merging takes beyond the maps of 64 x 64 pixels themselves."""
    import torch

    from padseg.bench.measure import peak
    from padseg.methods.stages import anchor_merging

    torch.set_num_threads(1)
    maps = torch.rand(4096, 4096, generator=torch.Generator().manual_seed(0))
    maps /= maps.sum(1, keepdim=True)
    before = peak()
    anchor_merging.merged(maps, anchor_merging.anchors((64, 64), 16), (0.05, 0.05, 0.05))
    print(peak() - before)
