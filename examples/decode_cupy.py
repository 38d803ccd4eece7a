"""One decoding step on CuPy arrays, on a stream of one's own. The same step in each library.

    python examples/decode_cupy.py

Work goes to CuPy's current stream of the arrays' device, and the call waits for nothing. torch is
not needed. bfloat16 works alike, with the dtype `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

import decode_problem as problem

import flashmla_rtc


def main() -> None:
    try:
        import cupy
    except ImportError:
        raise SystemExit(
            "This example needs CuPy: pip install 'flashmla_rtc[cu13]' (or [cu12] for CUDA 12)."
        ) from None
    if not cupy.is_available():
        raise SystemExit("This example needs an NVIDIA GPU, as CuPy arrays live on one.")
    stream = cupy.cuda.Stream(non_blocking=True)

    step = problem.make()
    results = []
    with stream:
        q = cupy.asarray(step.q)
        cache = cupy.asarray(step.cache)
        block_table = cupy.asarray(step.block_table)
        cache_seqlens = cupy.asarray(step.cache_seqlens)

        plan = flashmla_rtc.get_mla_metadata(cache_seqlens, problem.HEADS, 1)  # once a step
        for layer in range(problem.LAYERS):
            k_cache = cache[:, layer]  # a strided view; nothing is copied
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
    stream.synchronize()  # another would wait by other.wait_event(stream.record())

    for layer, (out, lse) in enumerate(results):
        error = problem.check(step, layer, out.get(), lse.get())
        print(f"layer {layer}: CuPy {out.shape} on {out.device}, relative error {error:.1e}")


if __name__ == "__main__":
    main()
