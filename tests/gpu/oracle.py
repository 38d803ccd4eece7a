"""Attention by its formula, in float64, with torch on whatever device the arguments are.

Independent of ``flashmla_rtc.reference``: all requests of a chunk are computed at once, padded to
the longest, and what a query may not see is masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEAD_DIM_V = 512
CHUNK_BYTES = 1 << 30  # of gathered float64 keys, and of scores


def attention(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` in float64: (batch, seq_len_q, heads_q, 512) and (batch, heads_q, seq_len_q).

    Lengths are clamped to the table; keys of used pages outside the cache do not exist. A row
    without keys gives out 0 and lse +inf.
    """
    batch, seq_len_q, heads_q, head_dim = q.shape
    num_blocks, page, heads_k, _ = k_cache.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    lengths = cache_seqlens.long().clamp(0, block_table.shape[1] * page)
    out = torch.zeros(batch, seq_len_q, heads_q, HEAD_DIM_V, dtype=torch.float64, device=q.device)
    lse = torch.full((batch, heads_q, seq_len_q), torch.inf, dtype=torch.float64, device=q.device)
    host_lengths = lengths.tolist()
    by_length = sorted(range(batch), key=host_lengths.__getitem__)
    while by_length:
        pages = -(-host_lengths[by_length[-1]] // page)
        if pages == 0:
            break
        widest = max(heads_k * head_dim, seq_len_q * heads_q)
        count = max(1, CHUNK_BYTES // (pages * page * widest * 8))
        chunk = torch.tensor(by_length[-count:], device=q.device)
        del by_length[-count:]
        table = block_table[chunk, :pages].long()
        present = (table >= 0) & (table < num_blocks)
        keys = k_cache[torch.where(present, table, 0)].double()
        keys = keys.flatten(1, 2).transpose(1, 2)  # (chunk, heads_k, positions, head_dim)
        position = torch.arange(pages * page, device=q.device)
        exists = present.repeat_interleave(page, 1) & (position < lengths[chunk, None])
        queries = q[chunk].double().unflatten(2, (heads_k, -1))  # (chunk, seq, heads_k, group, dim)
        for first, last in [(i, i + 1) for i in range(seq_len_q)] if causal else [(0, seq_len_q)]:
            limit = lengths[chunk] - seq_len_q + last if causal else lengths[chunk]
            seen = exists & (position < limit[:, None])
            rows = queries[:, first:last].transpose(1, 2).flatten(2, 3)
            some_out, some_lse = _rows(rows, keys, seen, scale)
            some_out = some_out.unflatten(2, (last - first, -1)).transpose(1, 2).flatten(2, 3)
            some_lse = some_lse.unflatten(2, (last - first, -1)).transpose(2, 3).flatten(1, 2)
            out[chunk, first:last] = some_out
            lse[chunk, :, first:last] = some_lse
    return out, lse


def _rows(rows: Tensor, keys: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Rows (chunk, heads_k, n, head_dim) attend to the keys that ``seen`` (chunk, keys) marks."""
    visible = keys.masked_fill(~seen[:, None, :, None], 0.0)  # so that no 0 * NaN arises
    scores = (rows @ visible.transpose(2, 3) * scale).masked_fill(~seen[:, None, None], -torch.inf)
    some = seen.any(1)[:, None, None]
    lse = scores.logsumexp(-1).masked_fill(~some, torch.inf)
    out = (scores - lse[..., None]).exp() @ visible[..., :HEAD_DIM_V]
    return out, lse
