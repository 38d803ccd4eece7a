"""MLA decode on CuPy arrays, without torch.

    python examples/cupy_decode.py

Queries and cache are strided views: a projection's output that carries more columns than
attention needs, and one layer of a cache that keeps all layers side by side. Nothing is copied.
The call runs on CuPy's current stream.
"""

from __future__ import annotations

from dense_attention import dense_attention, relative_error

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

    cupy.random.seed(0)
    batch, heads, layers, layer, pages = 4, 16, 2, 1, 36
    # A stream of one's own sees what was made on it; what other streams make needs an event.
    with cupy.cuda.Stream(non_blocking=True) as stream:
        projection = cupy.random.randn(batch, 1, heads, 640).astype(cupy.float16)
        q = projection[..., :576]
        all_layers = cupy.random.randn(pages, layers, 64, 1, 576).astype(cupy.float16)
        k_cache = all_layers[:, layer]
        block_table = cupy.random.permutation(pages).astype(cupy.int32).reshape(batch, 9)
        cache_seqlens = cupy.asarray([513, 64, 2, 190], dtype=cupy.int32)

        metadata, num_splits = flashmla_rtc.get_mla_metadata(cache_seqlens, heads, 1)
        out, lse = flashmla_rtc.flash_mla_with_kvcache(
            q, k_cache, block_table, cache_seqlens, 512, metadata, num_splits
        )
    stream.synchronize()

    expected = dense_attention(
        q.get(), k_cache.get(), block_table.get(), cache_seqlens.get(), 512, causal=False
    )
    error = relative_error(out.get(), expected)
    print(f"out {type(out).__module__} {out.shape} {out.dtype}, lse {lse.shape}, {error=:.1e}")
    assert error < 1e-3  # float16 has 11 bits


if __name__ == "__main__":
    main()
