"""x"""
from torch import Tensor
def flow_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Flow-matching loss (Lipman et al. 2023) of each picture, (B, C, h, w) each -> (B,)."""
    return (velocity.float() - (noise - clean)).square().flatten(1).mean(1)
