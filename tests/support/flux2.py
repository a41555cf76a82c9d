"""FLUX.2-klein in small: real classes, random weights, the layout of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.qwen import small_qwen, small_tokenizer

SLOTS = 40  # of a text; the published models have 512
WIDTH = 16  # of the text encoder
SMALL = {
    'in_channels': 16,
    'num_layers': 2,
    'num_single_layers': 2,
    'attention_head_dim': 16,
    'num_attention_heads': 2,
    'joint_attention_dim': 3 * WIDTH,
    'timestep_guidance_channels': 32,
    'axes_dims_rope': (4, 4, 4, 4),
    'guidance_embeds': False,
}
SMALL_VAE = {
    'block_out_channels': (8, 16),
    'down_block_types': ('DownEncoderBlock2D',) * 2,
    'up_block_types': ('UpDecoderBlock2D',) * 2,
    'layers_per_block': 1,
    'norm_num_groups': 4,
    'latent_channels': 4,
    'sample_size': 32,
}


def random_flux2(folder: Path, **transformer: Any) -> Path:
    """Two double blocks and two single ones; channels of latents have means and deviations of their own."""
    import torch
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel

    torch.manual_seed(0)
    denoiser = Flux2Transformer2DModel(**{**SMALL, **transformer})
    for name, weight in denoiser.named_parameters():
        torch.nn.init.uniform_(weight, 1, 3) if '.norm_' in name else torch.nn.init.normal_(weight, std=0.2)
    vae = AutoencoderKLFlux2(**SMALL_VAE)
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 4)
    tokenizer = small_tokenizer()
    pipeline = Flux2KleinPipeline(
        transformer=denoiser,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        tokenizer=tokenizer,
        text_encoder=small_qwen(len(tokenizer), WIDTH, 28),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / 'padseg.json').write_text(json.dumps({'layer': 2, 'side': 32, 'sequence': SLOTS}))
    return folder
