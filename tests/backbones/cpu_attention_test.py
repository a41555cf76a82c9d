"""Attention by rows against torch's own, and where it takes its place."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from padseg.backbones.cpu_attention import attention_by_rows, by_rows
from padseg.methods.stages.attention import token_attention
from padseg.types import Attention


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize('rows', [1, 3, 7, 100])
def test_rows_give_what_the_whole_gives(rows):
    query, key, value = drawn(2, 3, 7, 4), drawn(2, 3, 9, 4), drawn(2, 3, 9, 5)
    expected = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(attention_by_rows(query, key, value, rows=rows), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_sixteen_bits_on_a_cpu_go_by_rows(dtype, bound):
    query, key, value = drawn(1, 2, 50, 8, dtype=dtype), drawn(1, 2, 60, 8, dtype=dtype), drawn(1, 2, 60, 8, dtype=dtype)
    with by_rows():
        found = scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
        usual = scaled_dot_product_attention(query, key, value, dropout_p=0.0, scale=8**-0.5, is_causal=False)  # as AuraFlow's
    assert found.dtype == dtype and torch.equal(found, attention_by_rows(query, key, value)) and torch.equal(found, usual)
    exact = scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert (found.float() - exact).abs().max() < bound


@pytest.mark.parametrize(
    ('dtype', 'options'),
    [
        (torch.float32, {}),
        (torch.bfloat16, {'attn_mask': torch.zeros(5, 5, dtype=torch.bfloat16)}),
        (torch.bfloat16, {'is_causal': True}),
        (torch.bfloat16, {'scale': 0.3}),
    ],
)
def test_all_else_stays_torchs(dtype, options):
    query = drawn(1, 2, 5, 8, dtype=dtype)
    with by_rows():
        found = scaled_dot_product_attention(query, query, query, **options)
    assert torch.equal(found, scaled_dot_product_attention(query, query, query, **options))


@pytest.mark.parametrize('shape', [(6, 9), (1, 9), (2, 1, 1, 9), (2, 3, 6, 9), (1, 1, 6, 9), (2, 1, 6, 9), (3, 1, 9)])
@pytest.mark.parametrize('chunk', [1, 4, 99])
def test_masks_of_every_shape(shape, chunk):
    """With a mask, the share of the picked keys is that of the explicit softmax."""
    query, key, mask = drawn(2, 3, 6, 4), drawn(2, 3, 9, 4), 3 * drawn(*shape)
    expected = ((query @ key.transpose(2, 3)) / 2 + mask).softmax(-1)[:, :, :5, [1, 8]].mean(1)
    torch.testing.assert_close(token_attention(Attention(query, key, mask=mask), 5, [1, 8], chunk), expected, atol=1e-6, rtol=0)
