"""One decoding step on torch tensors, on a stream of one's own. The same step in each library.

    python examples/decode_torch.py

Work goes to torch's current stream of the tensors' device, and the call waits for nothing. Runs on
the GPU if there is one, else on the CPU, which has no streams.
"""

from __future__ import annotations

import contextlib

import decode_problem as problem

import flashmla_rtc


def main() -> None:
    try:
        import torch
    except ImportError:
        raise SystemExit(
            "This example needs torch: any build that fits this machine will do."
        ) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = torch.cuda.Stream() if device == "cuda" else None

    step = problem.make()
    results = []
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        q = torch.from_numpy(step.q).to(device)
        cache = torch.from_numpy(step.cache).to(device)
        block_table = torch.from_numpy(step.block_table).to(device)
        cache_seqlens = torch.from_numpy(step.cache_seqlens).to(device)

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
    if stream:
        stream.synchronize()  # another stream would wait by other.wait_stream(stream)

    for layer, (out, lse) in enumerate(results):
        error = problem.check(step, layer, out.cpu().numpy(), lse.cpu().numpy())
        shape = tuple(out.shape)
        print(f"layer {layer}: torch {shape} on {out.device}, relative error {error:.1e}")


if __name__ == "__main__":
    main()
