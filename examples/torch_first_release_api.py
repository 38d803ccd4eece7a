"""A program written for FlashMLA's first release, with one line changed: the import.

    python examples/torch_first_release_api.py

The two-step interface: `get_mla_metadata` makes two tensors from the lengths, once a decoding
step, and every layer gets them. Runs on the GPU if there is one, else on the CPU.
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
    layers, batch, s_q, h_q, h_kv, d, dv, page = 3, 4, 2, 16, 1, 576, 512, 64
    cache_seqlens = torch.tensor([513, 64, 2, 190], dtype=torch.int32, device=device)
    max_blocks = 9
    block_table = torch.randperm(batch * max_blocks, dtype=torch.int32, device=device)
    block_table = block_table.view(batch, max_blocks)
    caches = [
        torch.randn(batch * max_blocks, page, h_kv, d, dtype=torch.bfloat16, device=device)
        for _ in range(layers)
    ]

    tile_scheduler_metadata, num_splits = flash_mla.get_mla_metadata(
        cache_seqlens, s_q * h_q // h_kv, h_kv
    )
    for i, cache in enumerate(caches):
        q = torch.randn(batch, s_q, h_q, d, dtype=torch.bfloat16, device=device)
        out, _lse = flash_mla.flash_mla_with_kvcache(
            q,
            cache,
            block_table,
            cache_seqlens,
            dv,
            tile_scheduler_metadata,
            num_splits,
            causal=True,
        )
        expected = dense_attention(
            q.double().cpu().numpy(),
            cache.double().cpu().numpy(),
            block_table.cpu().numpy(),
            cache_seqlens.cpu().numpy(),
            dv,
            causal=True,
        )
        error = relative_error(out.double().cpu().numpy(), expected)
        print(
            f"layer {i} on {device}: out {tuple(out.shape)} {out.dtype}, relative error {error:.1e}"
        )
        assert error < 4e-3  # bfloat16 has 8 bits


if __name__ == "__main__":
    main()
