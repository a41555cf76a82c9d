"""Small random models that compare pictures, of the real classes, in the layout of the hub."""

from __future__ import annotations

import warnings
from pathlib import Path

SIDE = 32
SLOTS = 8  # of CLIP's texts
SIZES = {'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2}


def random_clip(folder: Path, words: list[str]) -> Path:
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from padseg.train import tiny_model as tiny

    torch.manual_seed(0)
    tokens = tiny.make_tokenizers(words)[0]
    text = {**SIZES, 'vocab_size': len(tokens), 'max_position_embeddings': SLOTS}
    ends = {'bos_token_id': tokens.bos_token_id, 'eos_token_id': tokens.eos_token_id, 'pad_token_id': tokens.pad_token_id}
    config = CLIPConfig(text_config={**text, **ends}, vision_config={**SIZES, 'image_size': SIDE, 'patch_size': 8}, projection_dim=12)
    network = CLIPModel(config)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    network.save_pretrained(folder)
    tokens.save_pretrained(folder)
    CLIPImageProcessorPil(size={'shortest_edge': SIDE}, crop_size={'height': SIDE, 'width': SIDE}).save_pretrained(folder)
    return folder


def random_dino(folder: Path) -> Path:
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(1)
    network = ViTModel(ViTConfig(image_size=SIDE, patch_size=8, **SIZES), add_pooling_layer=False)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    network.save_pretrained(folder)
    ViTImageProcessorPil(size={'height': SIDE, 'width': SIDE}).save_pretrained(folder)
    return folder


def random_inception(folder: Path) -> Path:
    """A TorchScript file with the interface of the published Inception: it resizes pictures itself and gives 8 features."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 8, 16, 16)

        def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            x = torch.nn.functional.interpolate(img.to(torch.float32), (299, 299))
            x = self.layer((x - 128) / 128).relu().mean((2, 3))
            return x if return_features else x.softmax(1)

    torch.manual_seed(2)
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        torch.jit.save(torch.jit.script(Network()), str(folder / 'inception.pt'))
    return folder
