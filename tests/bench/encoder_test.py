"""The benchmark of VAE encoders, on a small one."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from padseg.bench.encoder import in_words, measure
from padseg.bench.measure import surroundings


def test_both_ways_are_timed_and_agree():
    blocks = {'down_block_types': ('DownEncoderBlock2D',) * 2, 'up_block_types': ('UpDecoderBlock2D',) * 2}
    vae = AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=4, **blocks).eval().to(memory_format=torch.channels_last)
    case = measure(vae, 64, 2, product=64)
    assert 0 < case['difference'] < 1e-5
    assert all(len(taken) == 2 and min(taken) > 0 for taken in case['seconds'].values())
    assert sum(case['profile'].values()) <= case['seconds']['modules'][0] and case['profile']['conv2d'] > 0
    words = in_words({'dtype': 'float32', 'cases': {'small 64': case}, **surroundings()})
    assert 'small 64: 0.00 TFLOP' in words and f'differ by {case["difference"]:.1e}' in words
