"""Z-Image in small: real classes, random weights, the layout of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.crossing import random_vae
from support.qwen import small_qwen, small_tokenizer

SLOTS = 40  # of a text; the published models have 512
WIDTH = 16  # of the text encoder
ZIMAGE: dict[str, Any] = {
    'in_channels': 4,
    'dim': 32,
    'n_layers': 3,
    'n_heads': 2,
    'n_kv_heads': 2,
    'cap_feat_dim': WIDTH,
    'axes_dims': [4, 6, 6],
    'axes_lens': [128, 48, 48],
}


def random_zimage(folder: Path, **transformer: Any) -> Path:
    """Three blocks behind two refiner blocks of the image and two of the text."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    denoiser = ZImageTransformer2DModel(**{**ZIMAGE, **transformer})
    for name, weight in denoiser.named_parameters():
        torch.nn.init.uniform_(weight, 0.5, 1.5) if 'norm' in name else torch.nn.init.normal_(weight, std=0.2)
    for pad in (denoiser.cap_pad_token, denoiser.x_pad_token):
        torch.nn.init.normal_(pad)
    vae = random_vae(0.3611)
    vae.register_to_config(shift_factor=0.1159)
    tokenizer = small_tokenizer()
    pipeline = ZImagePipeline(
        transformer=denoiser,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        tokenizer=tokenizer,
        text_encoder=small_qwen(len(tokenizer), WIDTH, 3, 'Qwen3Model'),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / 'padseg.json').write_text(json.dumps({'layer': 1, 'side': 32, 'sequence': SLOTS}))
    return folder
