"""A program on torch tensors that type checkers accept, and that runs: see tests/test_types.py."""

from __future__ import annotations

import torch
from typing_extensions import assert_type

import flashmla_rtc

q = torch.randn(2, 1, 4, 40)
k_cache = torch.nn.Parameter(torch.randn(4, 16, 1, 40), requires_grad=False)
block_table = torch.arange(4, dtype=torch.int32).view(2, 2)
cache_seqlens = torch.tensor([20, 3], dtype=torch.int32)

plan, num_splits = flashmla_rtc.get_mla_metadata(cache_seqlens, 4, 1)
assert_type(plan, torch.Tensor)
out, lse = flashmla_rtc.flash_mla_with_kvcache(
    q, k_cache, block_table, cache_seqlens, 32, plan, num_splits
)
assert_type(out, torch.Tensor)
assert_type(lse, torch.Tensor)
flashmla_rtc.prepare(torch.device("cpu"))
print(out.shape, lse.shape)
