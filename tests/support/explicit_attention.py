"""Attention in the naive way, with the full matrix."""

from __future__ import annotations

import torch


class ExplicitAttention:
    """Joint attention processor that computes, stores and uses the full softmax matrix."""

    def __init__(self):
        self.probabilities = None
        self.tensors = None  # queries, keys, values, output

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def heads(x, norm):
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        query, key = heads(attn.to_q(hidden_states), attn.norm_q), heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states), None)
        if encoder_hidden_states is not None:
            query = torch.cat([query, heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], 2)
            key = torch.cat([key, heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], 2)
            value = torch.cat([value, heads(attn.add_v_proj(encoder_hidden_states), None)], 2)
        self.probabilities = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        self.tensors = (query, key, value, self.probabilities @ value)
        mixed = self.tensors[-1].transpose(1, 2).flatten(2)
        image = attn.to_out[1](attn.to_out[0](mixed[:, : hidden_states.shape[1]]))
        if encoder_hidden_states is None:
            return image
        text = mixed[:, hidden_states.shape[1] :]
        return image, text if attn.context_pre_only else attn.to_add_out(text)
