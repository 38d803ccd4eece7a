"""Attention of many new tokens, with keys and values of every head, by torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# Queries that share a mask in memory: at 100 000 keys it takes 100 MB.
_QUERIES = 1024


def attend_expanded(module: Any, q: torch.Tensor, pages: torch.Tensor, step: Any) -> torch.Tensor:
    """Attention of q (batch, tokens, heads, qk_head_dim) over pages that hold the new tokens.

    Every query sees its request's stored tokens up to itself, or what the step's 4D mask shows.
    One request is expanded at a time where lengths differ, so padding costs nothing.

    Returns:
        (batch, tokens, heads, v_head_dim); 0 where the new token is padding.
    """
    batch, tokens, heads, _ = q.shape
    lengths = [int(past) + count for past, count in zip(step.past, step.counts, strict=True)]
    if step.mask is not None or (step.stores_all and not step.past.any()):
        keys, values = _expand(module, _gather(pages, step.block_table, lengths[0]))
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            keys,
            values,
            attn_mask=step.mask,
            is_causal=step.mask is None,
            scale=module.scaling,
        )
        return out.transpose(1, 2)

    out = q.new_zeros(batch * tokens, heads, module.v_head_dim)
    queries = q.flatten(0, 1)[step.rows].split(step.counts)
    parts = []
    for request, (some, length) in enumerate(zip(queries, lengths, strict=True)):
        if len(some) > 0:
            row = step.block_table[request : request + 1]
            keys, values = _expand(module, _gather(pages, row, length))
            parts.append(_causal(some.transpose(0, 1)[None], keys, values, module.scaling))
    if parts:
        out[step.rows] = torch.cat(parts)
    return out.view(batch, tokens, heads, -1)


def _gather(pages: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The first ``length`` slots of each row of the table: (rows, length, width)."""
    used = table[:, : -(-length // pages.shape[1])]
    return pages[used].flatten(1, 3)[:, :length]


def _expand(module: Any, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, (rows, heads, length, dim), of (rows, length, kv_lora_rank + rope)."""
    latent, k_pe = stored.split((module.kv_lora_rank, module.qk_rope_head_dim), -1)
    both = module.kv_b_proj(latent)
    both = both.unflatten(-1, (-1, module.qk_nope_head_dim + module.v_head_dim)).transpose(1, 2)
    k_nope, values = both.split((module.qk_nope_head_dim, module.v_head_dim), -1)
    k_pe = k_pe.unsqueeze(1).expand(-1, k_nope.shape[1], -1, -1)
    return torch.cat((k_nope, k_pe), -1), values


def _causal(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """The last ``queries`` of the keys attend: q (1, heads, queries, d) to (queries, heads, v)."""
    count, length = q.shape[2], keys.shape[2]
    if count == length:
        out = scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale)
        return out[0].transpose(0, 1)
    outs = []
    positions = torch.arange(length, device=q.device)
    for some, last in zip(
        q.split(_QUERIES, 2), positions[length - count :].split(_QUERIES), strict=True
    ):
        mask = positions <= last[:, None]
        outs.append(scaled_dot_product_attention(some, keys, values, mask, scale=scale))
    return torch.cat(outs, 2)[0].transpose(0, 1)
