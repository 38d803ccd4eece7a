"""The reference backend on NumPy arrays: no GPU, nothing installed but NumPy.

    python examples/numpy_reference.py

It computes in float32 whatever the input, so it serves as a check for other implementations; and
it takes geometries that the kernels do not, here that of a small model for tests.
"""

from __future__ import annotations

import numpy as np
from dense_attention import dense_attention, relative_error

import flashmla_rtc


def main() -> None:
    rng = np.random.default_rng(0)
    head_dim, head_dim_v, page = 40, 32, 16  # a toy model's: any sizes do here
    q = rng.standard_normal((3, 1, 4, head_dim), dtype=np.float32)
    k_cache = rng.standard_normal((24, page, 1, head_dim), dtype=np.float32)
    block_table = rng.permutation(24).astype(np.int32).reshape(3, 8)
    cache_seqlens = np.array([100, 1, 0], dtype=np.int32)  # the last request has no key

    # None in place of the metadata: plan for this call alone.
    out, lse = flashmla_rtc.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, head_dim_v, None
    )

    expected = dense_attention(q, k_cache, block_table, cache_seqlens, head_dim_v, causal=False)
    error = relative_error(out, expected)
    print(f"out {out.shape} {out.dtype}, lse {lse.shape} {lse.dtype}, relative error {error:.1e}")
    assert error < 1e-5
    assert not out[2].any()  # no key: out is 0 ...
    assert np.isposinf(lse[2]).all()  # ... and lse +inf


if __name__ == "__main__":
    main()
