"""What the decode_*.py examples share: one decoding step in NumPy arrays, and its answer.

Not an example itself. The step has DeepSeek-V3's widths, on a GPU of a tensor-parallel group of
eight: 16 of 128 query heads, keys of 512 latent and 64 rotary columns, pages of 64 keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from dense_attention import dense_attention, relative_error

LAYERS, HEADS, HEAD_DIM, HEAD_DIM_V, PAGE = 3, 16, 576, 512, 64
LENGTHS = [513, 64, 0, 190]  # the third request has no key yet
MAX_BLOCKS = 9


@dataclass(frozen=True)
class Step:
    """The arrays of one decoding step, float16 and int32.

    The cache keeps the layers of a page side by side, so one layer of it is a strided view.
    """

    q: np.ndarray  # (layers, batch, 1, heads, 576)
    cache: np.ndarray  # (pages, layers, 64, 1, 576)
    block_table: np.ndarray  # (batch, max_blocks)
    cache_seqlens: np.ndarray  # (batch,)


def make() -> Step:
    """A step of normal random numbers, on shuffled pages."""
    rng = np.random.default_rng(0)
    batch = len(LENGTHS)
    pages = batch * MAX_BLOCKS
    q = rng.standard_normal((LAYERS, batch, 1, HEADS, HEAD_DIM), dtype=np.float32)
    cache = rng.standard_normal((pages, LAYERS, PAGE, 1, HEAD_DIM), dtype=np.float32)
    return Step(
        q=q.astype(np.float16),
        cache=cache.astype(np.float16),
        block_table=rng.permutation(pages).astype(np.int32).reshape(batch, MAX_BLOCKS),
        cache_seqlens=np.array(LENGTHS, dtype=np.int32),
    )


def check(step: Step, layer: int, out: np.ndarray, lse: np.ndarray) -> float:
    """Hold a layer's results, brought to NumPy, to float64; the relative error of ``out``."""
    expected = dense_attention(
        step.q[layer],
        step.cache[:, layer],
        step.block_table,
        step.cache_seqlens,
        HEAD_DIM_V,
        causal=True,
    )
    error = relative_error(out, expected)
    empty = step.cache_seqlens == 0
    assert error < 1e-3, f"relative error {error}"  # float16 has 11 bits
    assert not out[empty].any()  # no key: out is 0 ...
    assert np.isposinf(lse[empty]).all()  # ... and lse +inf
    return error
