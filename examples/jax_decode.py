"""MLA decode on JAX arrays, outside `jax.jit`.

    python examples/jax_decode.py

JAX arrays reach the kernels over DLPack and come back as JAX arrays. They are immutable, so there
is no `out=`. With JAX's CPU build the reference backend does the work.
"""

from __future__ import annotations

import numpy as np
from dense_attention import dense_attention, relative_error

import flashmla_rtc


def main() -> None:
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        raise SystemExit(
            "This example needs JAX: pip install jax, or 'jax[cuda13]' for the GPU."
        ) from None

    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (4, 1, 16, 576), dtype=jnp.bfloat16)
    k_cache = jax.random.normal(keys[1], (36, 64, 1, 576), dtype=jnp.bfloat16)
    block_table = jax.random.permutation(keys[2], 36).astype(jnp.int32).reshape(4, 9)
    cache_seqlens = jnp.array([513, 64, 2, 190], dtype=jnp.int32)

    out, lse = flashmla_rtc.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, 512, None, causal=True
    )

    expected = dense_attention(
        np.asarray(q.astype(jnp.float32)),
        np.asarray(k_cache.astype(jnp.float32)),
        np.asarray(block_table),
        np.asarray(cache_seqlens),
        512,
        causal=True,
    )
    error = relative_error(np.asarray(out.astype(jnp.float32)), expected)
    print(
        f"out {out.shape} {out.dtype} on {out.device}, lse {lse.shape}, relative error {error:.1e}"
    )
    assert isinstance(out, jax.Array)
    assert error < 4e-3  # bfloat16 has 8 bits


if __name__ == "__main__":
    main()
