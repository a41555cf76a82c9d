"""A naive implementation of the method for bin/bench sd3: the whole pipeline per picture, the full attention matrix, plain loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from padseg.methods.seg4diff import Options
from padseg.methods.stages.latents import content_noise
from padseg.types import Array, Image

STEPS = 28  # of the noise schedule
SLOTS = 77  # CLIP tokens, and as many zeros in place of T5

TimedStage = Callable[[str], AbstractContextManager[None]]


class NaiveResult(NamedTuple):
    """Result for one picture. maps: (T, h, w) float32; groups: members of each proposal; labels: (H, W), strongest proposal, from 0."""

    maps: Tensor
    groups: tuple[tuple[int, ...], ...]
    labels: Array


class WholeAttention:
    """Joint attention that forms the full matrix of all heads. It keeps the image-to-text part of the last call: (heads, h w, 77)."""

    def __init__(self) -> None:
        self.seen = torch.empty(0)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        image = hidden_states.shape[1]
        query = torch.cat([attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states)], 1)
        key = torch.cat([attn.to_k(hidden_states), attn.add_k_proj(encoder_hidden_states)], 1)
        value = torch.cat([attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states)], 1)
        query, key, value = (
            projected.unflatten(2, (attn.heads, -1)).transpose(1, 2) for projected in (query, key, value)
        )  # (1, heads, L, d)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        shares = scores.softmax(-1)  # (1, heads, L, L)
        self.seen = shares[0, :, :image, image : image + SLOTS]
        joined = (shares @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](joined[:, :image]), attn.to_add_out(joined[:, image:])


def read_whole(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Load a diffusers model with all its weights, without allocating any twice."""
    with torch.device('meta'):
        model = kind.from_config(kind.load_config(folder))
    weights = {name: weight.to(device, dtype) for path in sorted(folder.glob('*.safetensors')) for name, weight in tensors(path)}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and copies of a file's tensors. Only one is mapped at a time, because mapped pages count as memory of the process."""
    with safe_open(path, 'pt') as file:
        names = list(file.keys())
    for name in names:
        with safe_open(path, 'pt') as file:
            yield name, file.get_tensor(name).clone()


def load_models(folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Load the whole transformer and VAE."""
    kinds = (('transformer', SD3Transformer2DModel), ('vae', AutoencoderKL))
    return {name: read_whole(kind, folder / name, device, dtype) for name, kind in kinds}


def load_pipeline(folder: Path, device: torch.device, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Load the whole pipeline except T5."""
    parts: dict[str, Any] = {**load_models(folder, device, dtype), 'text_encoder_3': None, 'tokenizer_3': None}
    for number in ('', '_2'):
        encoder = CLIPTextModelWithProjection.from_pretrained(folder / f'text_encoder{number}', dtype=dtype)
        parts[f'text_encoder{number}'] = encoder.to(device).eval()
        parts[f'tokenizer{number}'] = CLIPTokenizer.from_pretrained(folder / f'tokenizer{number}')
    return StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / 'scheduler'), **parts)


@torch.no_grad()
def segment_naively(image: Image, pipeline: StableDiffusion3Pipeline, options: Options, stage: TimedStage) -> NaiveResult:
    """Segment an image (H, W, 3) whose size the model takes without resizing."""
    transformer, vae = pipeline.transformer, pipeline.vae
    with stage('text'):
        embeds, _, pooled, _ = pipeline.encode_prompt(
            '', '', '', device=transformer.device, do_classifier_free_guidance=False, max_sequence_length=SLOTS
        )
    with stage('vae'):
        pixels = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[None].to(transformer.device, vae.dtype)
        clean = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    with stage('transformer'):
        attention = WholeAttention()
        transformer.transformer_blocks[options.layer].attn.processor = attention
        pipeline.scheduler.set_timesteps(STEPS)
        sigma, timestep = pipeline.scheduler.sigmas[-1 - options.step].item(), pipeline.scheduler.timesteps[-options.step]
        noised = (1 - sigma) * clean + sigma * content_noise(image, options.seed, clean.shape).to(clean)
        transformer(
            hidden_states=noised,
            encoder_hidden_states=embeds.to(transformer.dtype),
            pooled_projections=pooled.to(transformer.dtype),
            timestep=timestep.expand(1).to(transformer.device),
        )
        h, w = (length // transformer.config.patch_size for length in clean.shape[2:])
        maps = attention.seen.float().mean(0).T.unflatten(1, (h, w))  # (77, h, w)
    with stage('merge'):
        merged, groups = merge_by_loop(maps, options.threshold)
    with stage('labels'):
        enlarged = nn.functional.interpolate(merged[None], image.shape[:2], mode='bilinear')[0]  # (M, H, W)
        labels = enlarged.argmax(0).cpu().numpy()
    return NaiveResult(maps, groups, labels)


def merge_by_loop(maps: Tensor, threshold: float) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """Compare each map that has no group yet with all others, and return the merged maps (M, h, w) and the members of each."""
    flat = maps.double().flatten(1)
    low, high = flat.amin(0, keepdim=True), flat.amax(0, keepdim=True)  # of each pixel, over the tokens
    rows = ((flat - low) / (high - low + 1e-6)).softmax(1)
    taken = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    merged, groups = [], []
    for anchor in range(len(rows)):
        if not taken[anchor].item():
            quotient = rows[anchor].log() - rows.log()  # (T, h w)
            distance = ((rows[anchor] * quotient).sum(1) - (rows * quotient).sum(1)) / 2
            near = distance < threshold
            near[anchor] = True
            taken |= near
            merged.append(rows[near].mean(0))
            groups.append(tuple(near.nonzero()[:, 0].tolist()))
    return torch.stack(merged).unflatten(1, maps.shape[1:]), tuple(groups)
