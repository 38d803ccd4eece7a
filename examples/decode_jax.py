"""One decoding step on JAX arrays, outside `jax.jit`. The same step in each library.

    python examples/decode_jax.py

JAX shows its users no streams: the kernels wait on the device for arrays that JAX still computes,
and JAX waits for the results before it uses them. JAX arrays are immutable, so there is no `out=`,
and the inputs are never written. With JAX's CPU build the reference backend does the work.
"""

from __future__ import annotations

import decode_problem as problem
import numpy as np

import flashmla_rtc


def main() -> None:
    try:
        import jax.numpy as jnp
    except ImportError:
        raise SystemExit(
            "This example needs JAX: pip install jax, or 'jax[cuda13]' for the GPU."
        ) from None

    step = problem.make()
    results = []
    q = jnp.asarray(step.q)
    cache = jnp.asarray(step.cache)
    block_table = jnp.asarray(step.block_table)
    cache_seqlens = jnp.asarray(step.cache_seqlens)

    plan = flashmla_rtc.get_mla_metadata(cache_seqlens, problem.HEADS, 1)  # once a step
    for layer in range(problem.LAYERS):
        k_cache = cache[:, layer]  # JAX copies here: keep a layer's cache in an array of its own
        out, lse = flashmla_rtc.flash_mla_with_kvcache(
            q[layer],
            k_cache,
            block_table,
            cache_seqlens,
            problem.HEAD_DIM_V,
            *plan,
            causal=True,
        )
        results.append((out, lse))

    for layer, (out, lse) in enumerate(results):
        error = problem.check(step, layer, np.asarray(out), np.asarray(lse))
        print(f"layer {layer}: JAX {out.shape} on {out.device}, relative error {error:.1e}")


if __name__ == "__main__":
    main()
