"""One decoding step on NumPy arrays, by the reference backend. The same step in each library.

    python examples/decode_numpy.py

No GPU, and nothing installed but NumPy. The reference backend computes in float32, so it serves as
a check for other implementations; it also takes float32 and float64, and any head dimensions and
page size.
"""

from __future__ import annotations

import decode_problem as problem

import flashmla_rtc


def main() -> None:
    step = problem.make()
    results = []
    plan = flashmla_rtc.get_mla_metadata(step.cache_seqlens, problem.HEADS, 1)  # once a step
    for layer in range(problem.LAYERS):
        k_cache = step.cache[:, layer]  # a strided view; nothing is copied
        out, lse = flashmla_rtc.flash_mla_with_kvcache(
            step.q[layer],
            k_cache,
            step.block_table,
            step.cache_seqlens,
            problem.HEAD_DIM_V,
            *plan,
            causal=True,
        )
        results.append((out, lse))

    for layer, (out, lse) in enumerate(results):
        error = problem.check(step, layer, out, lse)
        print(f"layer {layer}: NumPy {out.shape} on {out.device}, relative error {error:.1e}")


if __name__ == "__main__":
    main()
