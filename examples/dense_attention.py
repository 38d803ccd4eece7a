"""What the examples compare with: the same attention, spelled out in NumPy in float64.

Not an example itself. It gathers each request's pages into one matrix of keys and does what the
textbook says, one request and one head at a time.
"""

from __future__ import annotations

import numpy as np


def dense_attention(
    q: np.ndarray,
    k_cache: np.ndarray,
    block_table: np.ndarray,
    cache_seqlens: np.ndarray,
    head_dim_v: int,
    causal: bool,
) -> np.ndarray:
    """MLA decode with one KV head: float64 (batch, seq_len_q, heads_q, head_dim_v)."""
    batch, seq_len_q, heads_q, head_dim = q.shape
    out = np.zeros((batch, seq_len_q, heads_q, head_dim_v))
    for b in range(batch):
        length = int(cache_seqlens[b])
        pages = block_table[b, : -(-length // k_cache.shape[1])]
        keys = k_cache[pages, :, 0].reshape(-1, head_dim)[:length].astype(np.float64)
        for i in range(seq_len_q):
            seen = length - seq_len_q + i + 1 if causal else length
            if seen < 1:
                continue
            scores = q[b, i].astype(np.float64) @ keys[:seen].T * head_dim**-0.5  # heads, keys
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[b, i] = weights @ keys[:seen, :head_dim_v]
    return out


def relative_error(result: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what was expected."""
    difference = result.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))
