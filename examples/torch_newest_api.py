"""A program written for FlashMLA's newest interface, with one line changed: the import.

    python examples/torch_newest_api.py

`get_mla_metadata()` takes no arguments and returns an empty plan, which the first layer's call
fills and the other layers use. Runs on the GPU if there is one, else on the CPU.
"""

from __future__ import annotations

try:
    import torch
except ImportError:
    raise SystemExit(
        "This example needs torch: any build that fits this machine will do."
    ) from None
from dense_attention import dense_attention, relative_error

import flashmla_rtc as flash_mla


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layers, batch, h_q, d, dv, page, max_blocks = 3, 4, 16, 576, 512, 64, 9
    cache_seqlens = torch.tensor([400, 64, 1, 190], dtype=torch.int32, device=device)
    block_table = torch.randperm(batch * max_blocks, dtype=torch.int32, device=device)
    block_table = block_table.view(batch, max_blocks)
    k_cache = torch.randn(batch * max_blocks, page, 1, d, device=device).half()

    for step in range(2):
        sched_meta, num_splits = flash_mla.get_mla_metadata()  # a new one when lengths change
        assert num_splits is None
        for _layer in range(layers):
            q = torch.randn(batch, 1, h_q, d, device=device).half()
            out, _lse = flash_mla.flash_mla_with_kvcache(
                q, k_cache, block_table, cache_seqlens, dv, sched_meta, causal=True
            )
        expected = dense_attention(
            q.double().cpu().numpy(),
            k_cache.double().cpu().numpy(),
            block_table.cpu().numpy(),
            cache_seqlens.cpu().numpy(),
            dv,
            causal=True,
        )
        error = relative_error(out.double().cpu().numpy(), expected)
        plan = tuple(sched_meta.tile_scheduler_metadata.shape)
        print(f"step {step} on {device}: plan {plan}, relative error of the last layer {error:.1e}")
        assert error < 1e-3  # float16 has 11 bits
        cache_seqlens += 1


if __name__ == "__main__":
    main()
