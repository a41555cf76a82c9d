"""Floating-point operations of the method, computed from shapes: two per multiply-add of a matrix product or convolution."""

from __future__ import annotations

from typing import Any

FREQUENCIES = 256  # of the timestep embedding


def linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def convolution(places: int, inputs: int, outputs: int, kernel: int = 3) -> int:
    return 2 * places * inputs * outputs * kernel**2


def transformer(config: Any, image: int, text: int) -> int:
    """A full forward pass of SD3: embeddings, all blocks and the output projection. image, text: numbers of tokens."""
    width = width_of(config)
    output = linear(1, width, 2 * width) + linear(image, width, config.patch_size**2 * config.out_channels)
    return embeddings(config, image, text) + config.num_layers * block(width, image, text) - unused(width, text) + output


def proposals(config: Any, image: int, text: int, layer: int) -> int:
    """A forward pass up to the token maps of one block: the blocks before it, then its image queries, keys and attention scores."""
    width = width_of(config)
    modulation = linear(1, width, 4 * width)  # shift and scale of both streams
    scores = 2 * image * (image + text) * width
    expert = modulation + linear(2 * image + text, width, width) + scores
    return embeddings(config, image, text) + layer * block(width, image, text) + expert


def width_of(config: Any) -> int:
    return config.num_attention_heads * config.attention_head_dim


def embeddings(config: Any, image: int, text: int) -> int:
    """The embeddings of patches, text, timestep and pooled text."""
    width = width_of(config)
    conditions = linear(1, FREQUENCIES, width) + linear(1, config.pooled_projection_dim, width) + 2 * linear(1, width, width)
    patches = linear(image, config.patch_size**2 * config.in_channels, width)
    return patches + linear(text, config.joint_attention_dim, width) + conditions


def block(width: int, image: int, text: int) -> int:
    """A joint block: modulation, projections to queries, keys, values and output, attention, and an MLP of four times the width."""
    both = image + text
    attention = 2 * (2 * both * both * width)
    return linear(1, width, 12 * width) + linear(both, width, 4 * width) + attention + 2 * linear(both, width, 4 * width)


def unused(width: int, text: int) -> int:
    """The parts that the last block lacks: the output projection and MLP of the text, and the modulation of that MLP."""
    return linear(1, width, 4 * width) + linear(text, width, width) + 2 * linear(text, width, 4 * width)


def encoder(config: Any, height: int, width: int) -> int:
    """The encoder of AutoencoderKL: levels of residual blocks with downsampling after all but the last, and attention in the middle."""
    places, channels = height * width, config.block_out_channels[0]
    total = convolution(places, config.in_channels, channels)
    for level, wider in enumerate(config.block_out_channels):
        for _ in range(config.layers_per_block):
            total += residual(places, channels, wider)
            channels = wider
        if level < len(config.block_out_channels) - 1:
            places //= 4
            total += convolution(places, channels, channels)
    attention = 4 * linear(places, channels, channels) + 2 * (2 * places * places * channels)
    return total + 2 * residual(places, channels, channels) + attention + convolution(places, channels, 2 * config.latent_channels)


def residual(places: int, inputs: int, outputs: int) -> int:
    shortcut = convolution(places, inputs, outputs, 1) if inputs != outputs else 0
    return convolution(places, inputs, outputs) + convolution(places, outputs, outputs) + shortcut


def tiny_encoder(config: Any, height: int, width: int) -> int:
    """The encoder of AutoencoderTiny: each level has one convolution, strided after the first level, and blocks of three."""
    places, total = height * width, 0
    for level, (channels, blocks) in enumerate(zip(config.encoder_block_out_channels, config.num_encoder_blocks, strict=True)):
        places //= 4 if level else 1
        total += convolution(places, channels if level else config.in_channels, channels) + 3 * blocks * convolution(
            places, channels, channels
        )
    return total + convolution(places, config.encoder_block_out_channels[-1], config.latent_channels)
