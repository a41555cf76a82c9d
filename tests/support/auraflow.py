"""AuraFlow in small, with the real classes, written to disk by diffusers' own pipeline in the hub's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.crossing import WORDS, random_vae

SLOTS = 24
AURAFLOW: dict[str, Any] = {
    'sample_size': 16,
    'num_mmdit_layers': 2,
    'num_single_dit_layers': 2,
    'attention_head_dim': 16,
    'num_attention_heads': 2,
    'joint_attention_dim': 24,
    'caption_projection_dim': 32,
    'pos_embed_max_size': 24 * 24,
}


def random_auraflow(folder: Path, padding: str = 'right', **transformer: object) -> Path:
    """Two joint blocks and two single ones. padding: the side on which the tokenizer pads."""
    import torch
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    denoiser = AuraFlowTransformer2DModel(**{**AURAFLOW, **transformer})
    for weight in denoiser.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    tokenizer = llama_tokenizer()
    sizes = {'d_model': 24, 'd_kv': 8, 'd_ff': 32, 'num_layers': 2, 'num_heads': 2}
    pipeline = AuraFlowPipeline(
        transformer=denoiser,
        vae=random_vae(0.13025),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes)),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    config = folder / 'tokenizer' / 'tokenizer_config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), 'padding_side': padding}))
    (folder / 'padseg.json').write_text(json.dumps({'layer': 2, 'side': 32, 'sequence': SLOTS}))
    return folder


def llama_tokenizer() -> Any:
    """Pile-T5's in small: bytes and letters, merged to WORDS; an end token behind the text; the start token is the pad."""
    from transformers import LlamaTokenizerFast

    pieces = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), '▁', *'abcdefghijklmnopqrstuvwxyz,']
    merges = []
    for word in WORDS:
        for end in range(1, len(word) + 1):
            merges.append(('▁' + word[: end - 1], word[end - 1]))
    pieces += [left + right for left, right in merges]
    return LlamaTokenizerFast(
        vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))},
        merges=list(dict.fromkeys(merges)),
        pad_token='<s>',
        add_bos_token=False,
        add_eos_token=True,
    )
